"""Units are what a runtime fuses; pins and ignores are obeyed or refused with the reason."""

import cProfile
import pstats
from collections.abc import Callable

import numpy as np
import pytest

from search.cost import cost_tables
from search.errors import InvalidRequest, UnsupportedModel
from search.inventory import Inventory, Layer
from search.limits import costs_and_bounds
from search.request import Budgets
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


class TestBlocks:
    """Granularity `block`: all searched layers of a block are one unit, which has the block's name."""

    @pytest.mark.parametrize("target", ["generic", "vllm"])
    def test_what_stands_in_no_block_is_a_unit_of_its_own(self, target: str) -> None:
        found = space(decoder(), target, granularity="block", ignore=())
        blocks = ["model.layers.0", "model.layers.1"]
        assert [unit.name for unit in found.units] == [
            *(["model.embed_tokens"] if target == "generic" else []),
            *blocks,
        ]
        assert [len(unit.layers) for unit in found.units[-2:]] == [7, 7]
        assert [unit.block for unit in found.units[-2:]] == blocks

    def test_a_block_with_one_searched_layer_keeps_its_name(self) -> None:
        found = space(decoder(blocks=1), "generic", granularity="block", ignore=("lm_head", "*attn*", "*mlp.[gu]*"))
        assert [(unit.name, len(unit.layers)) for unit in found.units] == [("model.layers.0", 1)]

    def test_layers_outside_of_blocks_are_tied_as_the_target_has_it(self) -> None:
        layers = tuple(Layer(f"model.mtp.{leaf}_proj", "linear", 64, 64) for leaf in ("q", "k", "v", "o"))
        found = space(Inventory("d", "Any", "causal-lm", 0, layers), granularity="block")
        assert [unit.name for unit in found.units] == ["model.mtp.q_proj+k_proj+v_proj", "model.mtp.o_proj"]

    def test_a_scheme_must_fit_every_layer_of_a_block(self) -> None:
        with pytest.raises(InvalidRequest, match=r"does not divide the 64 columns of model\.layers\.0\.self_attn"):
            space(decoder(), granularity="block", schemes=("w4a16g128",))

    def test_a_pin_on_one_of_its_layers_settles_the_block(self) -> None:
        found = space(decoder(), granularity="block", pin={"*.1.mlp.down_proj": "w8a16g32"})
        assert found.pinned.tolist() == [False, True]


class TestChannels:
    """Granularity `channels`: groups of output channels of each linear layer are units."""

    @pytest.mark.parametrize(("channels", "splits"), [(48, True), (10_000, False)])
    def test_layers_are_split_unless_none_has_more_channels_than_a_group(self, channels: int, splits: bool) -> None:
        assert space(decoder(), "generic", granularity="channels", channels=channels).splits_layers == splits

    @pytest.mark.parametrize("granularity", ["layer", "block"])
    def test_layers_and_blocks_are_not_split(self, granularity: str) -> None:
        found = space(decoder(), granularity=granularity)
        assert not found.splits_layers
        assert found.layer_of.tolist() == list(range(len(found.units)))

    def test_every_group_has_the_number_of_its_layer(self) -> None:
        found = space(decoder(), "generic", granularity="channels", channels=48)
        names = [layer.name for layer in space(decoder(), "generic").layers]
        assert found.layer_of.max() == len(names) - 1
        for unit, number in zip(found.units, found.layer_of, strict=True):
            assert unit.name.partition("[")[0] == names[number]

    def test_layers_are_cut_and_the_last_group_may_be_smaller(self) -> None:
        found = space(decoder(blocks=1), "generic", granularity="channels", channels=48)
        shapes = {unit.name.rpartition(".")[2]: unit.layers[0].rows for unit in found.units}
        assert shapes == {
            **{"q_proj[0:48]": 48, "q_proj[48:64]": 16, "k_proj": 32, "v_proj": 32},
            **{"o_proj[0:48]": 48, "o_proj[48:64]": 16},
            **{f"{leaf}_proj[{start}:{start + 48}]": 48 for leaf in ("gate", "up") for start in (0, 48)},
            **{f"{leaf}_proj[96:128]": 32 for leaf in ("gate", "up")},
            **{"down_proj[0:48]": 48, "down_proj[48:64]": 16},
        }
        assert all(unit.layers[0].name == unit.name and unit.block == "model.layers.0" for unit in found.units)

    def test_what_is_not_linear_stays_whole(self) -> None:
        kinds = ("linear", "conv", "embedding", "experts")
        layers = tuple(Layer(f"model.{kind}", kind, 64, 64) for kind in kinds)
        found = space(Inventory("d", "Any", "causal-lm", 0, layers), "generic", granularity="channels", channels=32)
        names = [unit.name for unit in found.units]
        assert names == ["model.linear[0:32]", "model.linear[32:64]", "model.conv", "model.embedding", "model.experts"]

    def test_costs_of_uniform_choices_are_those_of_whole_layers(self) -> None:
        model = decoder()
        whole, cut = (space(model, "generic", **asked) for asked in ({}, {"granularity": "channels", "channels": 24}))
        for column in range(3):
            for resource in ("size_bytes", "avg_bits", "bitops"):
                before, after = (
                    cost_tables(one, model)[resource].total(np.full(len(one.units), column)) for one in (whole, cut)
                )
                assert after == pytest.approx(before, rel=1e-12)

    def test_ignores_pins_and_limits_match_by_the_layers_whole_name(self) -> None:
        model = decoder()
        asked = {"granularity": "channels", "channels": 16, "ignore": ("lm_head", "*.q_proj")}
        found = space(model, "generic", pin={"*.1.mlp.down_proj": "w8a16g32"}, **asked)
        assert {layer.name.rpartition(".")[2] for layer in found.ignored} == {"embed_tokens", "q_proj"}
        assert not any("q_proj" in unit.name for unit in found.units)
        settled = [unit.name for unit, pinned in zip(found.units, found.pinned, strict=True) if pinned]
        assert settled == [f"model.layers.1.mlp.down_proj[{start}:{start + 16}]" for start in range(0, 64, 16)]
        limits = Budgets.model_validate({"avg_bits": 6, "limits": {"*.1.mlp.down_proj": {"avg_bits": 5}}})
        costs, _ = costs_and_bounds(found, model, limits)
        counted = costs["avg_bits of *.1.mlp.down_proj"].table[:, -1] > 0
        assert [unit.name for unit, count in zip(found.units, counted, strict=True) if count] == settled

    def test_a_target_that_loads_one_scheme_for_a_layer_refuses(self) -> None:
        with pytest.raises(InvalidRequest, match="target 'vllm' loads one scheme for all output channels") as refused:
            space(decoder(), "vllm", granularity="channels", channels=16)
        assert (refused.value.field, refused.value.value) == ("space.granularity", "channels")
        assert "generic" in refused.value.accepted

    def test_four_times_the_parts_take_four_times_the_steps(self) -> None:
        def cost(layers: int) -> int:
            linear = [Layer(f"model.layers.{n // 8}.{n % 8}", "linear", 4096, 4096, 4096**2) for n in range(layers)]
            model = Inventory("d", "Any", "causal-lm", layers * 4096**2, tuple(linear))
            found = space(model, "generic", granularity="channels", channels=128, pin={"*.0.*": "w8a16g32"})
            cost_tables(found, model)
            return len(found.units)

        few, many = steps(lambda: cost(40)), steps(lambda: cost(160))
        assert cost(160) == 5120
        assert many < 4.5 * few


class TestTooLarge:
    WIDE = tuple(Layer(f"model.layers.{at}.up_proj", "linear", 100_000, 64, 1, f"model.layers.{at}") for at in range(9))

    def test_a_space_of_too_many_units_is_refused_before_it_is_built(self) -> None:
        inventory = Inventory("d", "X", "causal-lm", 0, self.WIDE)

        def ask() -> None:
            with pytest.raises(InvalidRequest, match="900,000 units, and with 3 schemes 2,700,000 entries") as caught:
                space(inventory, "generic", granularity="channels", channels=1)
            refused.append(caught.value)

        refused: list[InvalidRequest] = []
        assert steps(ask) < 10_000
        assert (refused[0].field, refused[0].value) == ("space.channels", 1)
        assert "1,000,000" in refused[0].accepted

    def test_what_the_limit_admits_is_built(self) -> None:
        inventory = Inventory("d", "X", "causal-lm", 0, self.WIDE)
        assert len(space(inventory, "generic", granularity="channels", channels=100).units) == 9000

    def test_a_thousand_patterns_are_asked_of_every_layer_and_not_of_its_parts(self) -> None:
        pins = {f"model.layers.{at % 9}.{'*' * (1 + at // 9)}": "w4a16g32" for at in range(1000)}
        inventory = Inventory("d", "X", "causal-lm", 0, self.WIDE)

        def ask(pins: dict[str, str]) -> None:
            found = space(inventory, "generic", pin=pins, granularity="channels", channels=50)
            assert found.pinned.all()

        assert steps(lambda: ask(pins)) < 2 * steps(lambda: ask({"*": "w4a16g32"}))


def steps(function: Callable[[], object]) -> int:
    """How many calls it makes: the same on every machine."""
    profile = cProfile.Profile()
    profile.runcall(function)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
