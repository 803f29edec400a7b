"""Units are what a runtime fuses; pins and ignores are obeyed or refused with the reason."""

import numpy as np
import pytest

from search.errors import InvalidRequest, UnsupportedModel
from search.inventory import Inventory, Layer
from search.scheme import Scheme
from tests.search.spaces import decoder, space


def test_vllm_ties_attention_projections_and_the_gated_mlp() -> None:
    units = [[layer.name.split(".")[-1] for layer in unit.layers] for unit in space(decoder(blocks=1)).units]
    assert units == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_a_generic_target_ties_nothing_and_takes_embeddings() -> None:
    found = space(decoder(blocks=1), target="generic", ignore=())
    assert len(found.units) == 8
    assert found.units[0].name == "model.embed_tokens"


def test_units_are_tied_within_one_parent_only() -> None:
    units = space(decoder(blocks=3)).units
    assert all(len({layer.block for layer in unit.layers}) == 1 for unit in units)
    assert [unit.block for unit in units if "q_proj" in unit.name] == [f"model.layers.{index}" for index in range(3)]


def test_vllm_ties_all_experts_of_a_layer() -> None:
    layers = tuple(
        Layer(f"model.layers.{block}.mlp.experts.{name}", "experts", 256, 64, 0, f"model.layers.{block}")
        for block in (0, 1)
        for name in ("gate_up_proj", "down_proj")
    )
    found = space(Inventory("d", "MixtralForCausalLM", "causal-lm", 0, layers))
    assert [len(unit.layers) for unit in found.units] == [2, 2]


def test_ignoring_an_alias_ignores_the_shared_weight() -> None:
    found = space(decoder(), target="generic", ignore=("lm_head",))
    assert [layer.name for layer in found.ignored] == ["model.embed_tokens"]


def test_a_pin_leaves_its_unit_one_scheme_and_may_name_one_that_others_lack() -> None:
    found = space(decoder(), pin={"*.down_proj": "w8a16"})
    pinned = [row for row, unit in enumerate(found.units) if "down_proj" in unit.name]
    column = found.schemes.index(Scheme.parse("w8a16"))
    assert found.allowed[pinned].sum(axis=1).tolist() == [1, 1]
    assert found.allowed[:, column].sum() == 2


def test_uniform_leaves_pins_where_they_are() -> None:
    found = space(decoder(), pin={"*.down_proj": "w8a16g32"})
    choice = found.uniform(Scheme.parse("w4a16g32"))
    assert choice is not None
    schemes = {unit.name: str(found.schemes[column]) for unit, column in zip(found.units, choice, strict=True)}
    assert {text for name, text in schemes.items() if "down_proj" in name} == {"w8a16g32"}
    assert {text for name, text in schemes.items() if "down_proj" not in name} == {"w4a16g32"}


def test_a_scheme_that_only_a_pin_names_is_no_uniform_baseline() -> None:
    found = space(decoder(), pin={"*.down_proj": "w8a16"})
    assert found.uniform(Scheme.parse("w8a16")) is None


@pytest.mark.parametrize(
    ("request_", "field", "told"),
    [
        ({"pin": {"*.nothing": "w8a16g32"}}, "space.pin", "matches no searched layer"),
        ({"pin": {"lm_head": "w8a16g32"}}, "space.pin", "matches no searched layer"),
        ({"pin": {"*.q_proj": "w8a16g32", "*.k_proj": "w4a16g32"}}, "space.pin", "several schemes"),
        ({"schemes": ("w4a16g128",)}, "space.schemes", "does not divide the 64 columns of model.layers.0"),
        ({"schemes": ("w6a6",)}, "space.schemes", "refuses w6a6"),
    ],
)
def test_bad_requests_name_the_field_and_what_is_accepted(request_: dict[str, object], field: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told.replace(".", r"\.")) as refused:
        space(decoder(), **request_)
    assert refused.value.field == field
    assert refused.value.value is not None


def test_a_space_with_nothing_to_search_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no layer"):
        space(decoder(), ignore=("*",))


def test_embeddings_take_no_activation_scheme() -> None:
    with pytest.raises(InvalidRequest, match="quantizes activations"):
        space(decoder(), target="generic", ignore=(), schemes=("w8a8",))


def test_every_row_allows_something() -> None:
    found = space(decoder(), pin={"*.0.*.down_proj": "w8a16"})
    assert found.allowed.any(axis=1).all()
    assert np.array_equal(
        found.allowed.sum(axis=1) == 1, ["layers.0.mlp.down_proj" in unit.name for unit in found.units]
    )


def test_pins_that_settle_everything_leave_no_baseline() -> None:
    found = space(decoder(), schemes=("w4a16g32", "w8a16g32"), pin={"*": "w8a16g32"})
    assert found.pinned.all()
    assert [found.uniform(scheme) for scheme in found.schemes] == [None, None]


def test_one_scheme_is_not_a_pin() -> None:
    found = space(decoder(), schemes=("w4a16g32",), pin={"*.down_proj": "w8a16g32"})
    assert found.uniform(Scheme.parse("w8a16g32")) is None
    assert found.uniform(Scheme.parse("w4a16g32")) is not None


def test_part_of_what_a_runtime_merges_cannot_be_ignored() -> None:
    with pytest.raises(InvalidRequest, match="merges it") as refused:
        space(decoder(), ignore=("*.q_proj",))
    assert refused.value.field == "space.ignore"
    assert len(space(decoder(blocks=1), ignore=("*.q_proj", "*.k_proj", "*.v_proj")).units) == 3
    assert len(space(decoder(blocks=1), target="generic", ignore=("*.q_proj", "lm_head")).units) == 6


def test_a_bad_scheme_in_a_pin_is_the_pins_fault() -> None:
    with pytest.raises(InvalidRequest) as refused:
        space(decoder(), pin={"*.down_proj": "w6a6"})
    assert refused.value.field == "space.pin"
