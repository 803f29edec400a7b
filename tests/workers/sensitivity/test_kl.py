"""Measured divergence: neither reuse of the blocks before a unit nor stacked schemes change anything."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from search.inventory import Layer
from search.scheme import Scheme
from search.space import Space, Unit
from tests.workers.sensitivity.support import compute_on, fill, space_of
from workers.evaluator import Evaluator
from workers.hooks import removing
from workers.sensitivity import variants
from workers.sensitivity.kl import DIVERGENCE, items
from workers.sensitivity.variants import Variant, Walk, _first
from workers.tasks import Result


class Stacks:
    """Stacks of up to 4 schemes, also on a processor: the sizes in which layers were run, the last one counting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[str, int] = {}
        original = Walk._losses_in_groups

        def losses(walk: Walk, asked: Sequence[Variant], size: int) -> list[Tensor]:
            self.sizes |= dict.fromkeys((name for variant in asked for name in variant.layers), size)
            return original(walk, asked, size)

        monkeypatch.setattr(Walk, "_losses_in_groups", losses)
        monkeypatch.setitem(variants.STACK, "cpu", 4)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Stacks:
    return Stacks(monkeypatch)


def mixed_space(evaluator: Evaluator) -> Space:
    """Schemes that round activations wherever they may be rounded."""
    weights_only = [name for name, layer in evaluator.layers.items() if layer.layer.kind in ("embedding", "experts")]
    return space_of(evaluator, "w2a16", "w4a8", "w8a4", ignore=(), pin=dict.fromkeys(weights_only, "w3a16"))


def assert_plain(evaluator: Evaluator, space: Space) -> None:
    """What is measured is what `Evaluator.measure` says of one unit at a scheme."""
    found: Result = {}
    for result in compute_on(evaluator)(DIVERGENCE, items(space, relative_error=0.0)):
        found |= result
    assert found.keys() == {unit.name for unit in space.units}
    for unit in space.units:
        for text, (mean, error) in found[unit.name].items():
            allocation = dict.fromkeys((layer.name for layer in unit.layers), Scheme.parse(text))
            plain = evaluator.measure(allocation, split="calibration")
            assert mean == pytest.approx(plain["loss"], rel=2e-3, abs=1e-8), (unit.name, text)
            assert error == pytest.approx(plain["loss_stderr"], rel=1e-2, abs=1e-8), (unit.name, text)
    evaluator.apply({})


def test_a_unit_is_measured_as_if_nothing_were_reused(any_evaluator: Evaluator) -> None:
    assert_plain(any_evaluator, mixed_space(any_evaluator))


def test_stacked_schemes_give_what_each_gives_alone(any_evaluator: Evaluator, stacks: Stacks) -> None:
    assert_plain(any_evaluator, mixed_space(any_evaluator))
    kinds = {any_evaluator.layers[name].layer.kind: size for name, size in stacks.sizes.items()}
    assert {size for kind, size in kinds.items() if kind in ("linear", "conv")} == {4}


def test_what_does_not_keep_samples_apart_is_measured_scheme_by_scheme(
    any_evaluator: Evaluator, stacks: Stacks
) -> None:
    """Fused experts, which take their routing along, and positions, which are looked up once for all samples."""
    space = space_of(any_evaluator, "w2a16", "w4a16", ignore=())
    assert_plain(any_evaluator, space)
    alone = {name for name, size in stacks.sizes.items() if size == 1}
    assert alone == {
        name
        for name, layer in any_evaluator.layers.items()
        if layer.layer.kind == "experts" or name.endswith(("wpe", "position_embeddings"))
    }


def test_on_a_real_encoder_reuse_and_stacks_change_nothing(minilm: Evaluator, stacks: Stacks) -> None:
    assert_plain(minilm, space_of(minilm, "w4a16g64", "w8a8", ignore=["embeddings.*", "encoder.layer.[01245].*"]))
    assert set(stacks.sizes.values()) == {4}


def test_the_weights_part_is_measured_with_activations_kept(minilm: Evaluator) -> None:
    """Though w4a16 is not in the space."""
    space = space_of(minilm, "w4a6", ignore=["embeddings.*", "encoder.layer.[1-5].*", "*.attention.*"])
    table = fill("kl", minilm, space)
    for unit in space.units:
        plain, weights = (
            minilm.measure({unit.name: scheme}, split="calibration")["loss"] for scheme in (Scheme(4, 6), Scheme(4))
        )
        assert table.values.loc[unit.name, "w4a6"] == pytest.approx(plain, rel=1e-3)
        assert table.weight.loc[unit.name, "w4a6"] == pytest.approx(min(weights, plain), rel=1e-3)
    assert (table.activation["w4a6"] > 0).any()


def test_full_precision_loses_nothing_and_is_not_measured(tiny: Evaluator) -> None:
    space = space_of(tiny, "w4a16", "w16a16")
    assert all(unit["schemes"] == ["w4a16"] for item in items(space) for unit in item["units"])
    assert (fill("kl", tiny, space).values["w16a16"] == 0).all()


def test_up_to_eight_blocks_are_stretches_of_their_own(minilm: Evaluator) -> None:
    space = space_of(minilm, "w4a16", ignore=["embeddings.*"])
    stretches = variants.stretches(space.units, [1] * len(space.units))
    assert [len({space.units[row].block for row in stretch}) for stretch in stretches] == [1] * 6


@given(blocks=st.integers(9, 100), measurements=st.integers(1, 20))
def test_stretches_cover_the_network_in_order_and_cost_about_the_same(blocks: int, measurements: int) -> None:
    layers = [Layer(f"{block}.{leaf}", "linear", 1, 1, block=str(block)) for block in range(blocks) for leaf in "ab"]
    units = [Unit(layer.name, (layer,)) for layer in layers]
    stretches = variants.stretches(units, [measurements] * len(units))
    assert [row for stretch in stretches for row in stretch] == list(range(len(units)))
    assert all(units[before[-1]].block != units[after[0]].block for before, after in pairwise(stretches))
    assert len(stretches) <= variants.STRETCHES
    costs = [sum(blocks - row // 2 for row in stretch) for stretch in stretches]
    assert max(costs) <= sum(costs) / variants.STRETCHES + 2 * blocks


@torch.no_grad()
def test_a_walk_goes_on_where_the_last_one_on_its_batch_stopped(minilm: Evaluator) -> None:
    """Another stretch of the network runs no block before it again, and finds the same input."""
    chain = minilm.chain
    assert chain is not None
    minilm.reached.clear()
    Walk(minilm, 0).move(4)
    ran: list[str | None] = []
    hooks = [
        weighted.module.register_forward_pre_hook(lambda *_, block=weighted.layer.block: ran.append(block))
        for weighted in minilm.layers.values()
        if weighted.layer.block
    ]
    walk = Walk(minilm, 0)
    with removing(hooks):
        walk.move(5)
    assert set(ran) == {chain.names[4]}
    expected = chain.output_of(4, lambda: minilm.loaded(walk.batch))
    assert torch.equal(_first(walk._before), _first(expected))
    walk.move(3)
    assert walk._block == 5, "it only moves forward"
