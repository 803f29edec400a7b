"""Post-quantization integrals against closed forms, finite differences and measurements."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from search.agreement import spearman
from search.scheme import Scheme
from search.space import Space
from tests import models
from tests.workers.sensitivity.support import compute_on, fill, space_of, subject
from workers.calibration import Data, sample_count
from workers.evaluator import Evaluator
from workers.loss import divergence, gradient
from workers.models import LoadedModel
from workers.sensitivity import FILLS, backward, pqi
from workers.sensitivity.path import Path as Walked
from workers.sensitivity.pqi import OUTLIERS, PATH, RULES, gauss_legendre, gauss_radau, jackknife, midpoint
from workers.tasks import Item, Result, Task

pytestmark = pytest.mark.long

nodes = st.integers(1, 16)
polynomials = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


class TestRules:
    """What a quadrature rule on [0, 1] is exact on."""

    @given(nodes, polynomials)
    def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1(self, n: int, coefficients: list[float]) -> None:
        assert integrated(gauss_legendre, n, coefficients[: 2 * n]) == pytest.approx(
            exactly(coefficients[: 2 * n]), rel=1e-9, abs=1e-9
        )

    @given(nodes, polynomials)
    def test_gauss_radau_is_exact_up_to_degree_2n_where_nothing_starts_above_zero(
        self, n: int, coefficients: list[float]
    ) -> None:
        chosen = [0.0, *coefficients[: 2 * n]]
        assert integrated(gauss_radau, n, chosen) == pytest.approx(exactly(chosen), rel=1e-7, abs=1e-7)

    @given(nodes, st.floats(-10, 10), st.floats(-10, 10))
    def test_the_midpoint_rule_is_exact_on_straight_lines(self, n: int, start: float, slope: float) -> None:
        assert integrated(midpoint, n, [start, slope]) == pytest.approx(start + slope / 2, abs=1e-9)

    @given(st.sampled_from(sorted(RULES)), nodes)
    def test_nodes_lie_inside_and_weights_are_positive(self, rule: str, n: int) -> None:
        t, weights = RULES[rule](n)
        assert len(t) == len(weights) == n
        assert ((t > 0) & (t < 1)).all()
        assert (weights > 0).all()


def integrated(rule: Callable[[int], tuple[np.ndarray, np.ndarray]], n: int, coefficients: list[float]) -> float:
    t, weights = rule(n)
    return float(weights @ np.polynomial.polynomial.polyval(t, coefficients))


def exactly(coefficients: list[float]) -> float:
    return sum(coefficient / (power + 1) for power, coefficient in enumerate(coefficients))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9))
def test_the_jackknife_of_single_samples_is_the_squared_standard_error(values: list[float]) -> None:
    samples = np.array(values)
    assert jackknife(samples, np.ones(len(samples))) == pytest.approx(samples.var(ddof=1) / len(samples), abs=1e-12)


@pytest.mark.parametrize("task", ["embedding", "image-classification", "causal-lm"])
def test_the_gradient_of_the_divergence_is_autograds(task: str) -> None:
    torch.manual_seed(0)
    shape = (3, 5, 7) if task == "causal-lm" else (3, 7)
    output, reference = torch.randn(shape, requires_grad=True), torch.randn(shape)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]]) if task == "causal-lm" else None
    (expected,) = torch.autograd.grad(divergence(task, output, reference, mask).sum(), output)  # type: ignore[arg-type]
    found = gradient(task, output.detach(), reference, mask)  # type: ignore[arg-type]
    assert torch.allclose(found, expected, atol=1e-6)


class TwoLayers(nn.Module):
    """Linear throughout: its squared error is a polynomial of degree 4 along a path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.second(self.first(pixel_values.flatten(1)))


@pytest.fixture
def squared(monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    """A linear net whose loss is half the squared distance from its own output."""
    torch.manual_seed(0)
    loaded = LoadedModel(TwoLayers().eval().requires_grad_(False), "image-classification", "TwoLayers", "digest")
    loaded.model.config = type("Config", (), {"image_size": (2, 3), "num_channels": 1})()
    batches = [{"pixel_values": torch.randn(5, 1, 2, 3)}, {"pixel_values": torch.randn(3, 1, 2, 3)}]
    evaluator = Evaluator(loaded, Data(batches, batches, batches, "data"))
    monkeypatch.setattr(pqi, "gradient", lambda _task, output, reference, _mask: output - reference)
    evaluator.losses = lambda _batch, output, reference: (output - reference).square().sum(-1) / 2  # type: ignore[method-assign]
    return evaluator


def test_a_quadratic_loss_is_integrated_exactly_by_one_node(squared: Evaluator) -> None:
    """With only the last layer moving the loss is ½·E‖Δh‖², and the gradient along the path a straight line."""
    scheme = Scheme.parse("w2a16")
    hidden = torch.cat([squared.loaded.model.first(b["pixel_values"].flatten(1)) for b in squared.batches("held_out")])
    exact = float((hidden @ squared.rounding("second", scheme).T).square().sum(-1).mean() / 2)
    for rule in RULES:
        found = walk(squared, ["second"], "w2a16", 1, rule)
        assert shares(found).sum() == pytest.approx(exact, rel=1e-5)


def test_a_quartic_loss_is_shared_exactly_by_two_nodes(squared: Evaluator) -> None:
    """Both layers move: each one's share is the integral of a cubic, here taken by Simpson's rule in float64."""
    scheme = Scheme.parse("w2a16")
    net = squared.loaded.model
    x = torch.cat([b["pixel_values"].flatten(1) for b in squared.batches("held_out")]).double()
    w1, b1, w2 = (p.detach().double() for p in (net.first.weight, net.first.bias, net.second.weight))
    d1, d2 = (squared.rounding(name, scheme).double() for name in ("first", "second"))
    reference = (x @ w1.T + b1) @ w2.T

    def rates(t: float) -> np.ndarray:
        hidden = x @ (w1 + t * d1).T + b1
        error = hidden @ (w2 + t * d2).T - reference
        return np.array(
            [float((error * (x @ d1.T @ (w2 + t * d2).T)).sum()), float((error * (hidden @ d2.T)).sum())]
        ) / len(x)

    exact = (rates(0) + 4 * rates(0.5) + rates(1)) / 6
    found = walk(squared, ["first", "second"], "w2a16", 2)
    assert shares(found) == pytest.approx(exact, rel=1e-5)
    assert shares(found).sum() == pytest.approx(np.mean(found["losses"]), rel=1e-5)


def test_elements_are_the_gradient_times_the_change_and_the_greatest_are_outliers(squared: Evaluator) -> None:
    """For one moving layer the integral of an element is E[Δh hᵀ]ᵢⱼ·Δᵢⱼ / 2."""
    scheme = Scheme.parse("w2a16")
    change = squared.rounding("second", scheme)
    hidden = torch.cat([squared.loaded.model.first(b["pixel_values"].flatten(1)) for b in squared.batches("held_out")])
    elements = ((hidden @ change.T).T @ hidden / len(hidden) / 2) * change
    item = item_of(squared, ["second"], "w2a16", 1)
    found = PATH.run(squared, item)
    assert found["absolute_weight"][0] == pytest.approx(float(elements.abs().sum()), rel=1e-4)
    for asked, count in (({"count": 3}, 3), ({"fraction": 0.25}, 5), ({"count": 1000}, 20)):
        best = OUTLIERS.run(squared, item | asked)["second"]
        expected = elements.abs().flatten().topk(count)
        assert best["scores"] == pytest.approx(expected.values.tolist(), rel=1e-4)
        assert best["indices"] == expected.indices.tolist()


def test_at_every_node_the_shares_are_the_slope_of_the_loss_along_the_path(any_evaluator: Evaluator) -> None:
    """Of all layers, of the first and of the last, against a central difference: embeddings, tied and transposed
    weights, convolutions and experts included.

    The loss jumps where a token goes to another expert: the step is short, so that it does not go over such a place.
    """
    names, step = list(any_evaluator.layers), 0.002
    for layers in (names, names[:1], names[-1:]):
        found, expected = [], []
        for t in (0.1, 0.8):
            walked = pqi._Walk(any_evaluator, item_of(any_evaluator, layers, "w3a16", 1))
            walked._path.t, walked._width = t, 1.0
            losses = {t - step: 0.0, t + step: 0.0}
            for batch, reference in pqi._parts(any_evaluator, 0, 2):
                with walked._path.walked(walked._add_weight, walked._add_input):
                    pqi._Divergence.apply(any_evaluator.loaded(batch), reference, any_evaluator, batch).backward()
                path = Walked(any_evaluator, layers, Scheme.parse("w3a16"))
                for path.t in losses:
                    with torch.no_grad(), path.walked(lambda *_: None, lambda *_: None):
                        output = any_evaluator.loaded(batch)
                    losses[path.t] += float(any_evaluator.losses(batch, output, reference).sum())
            found.append(float(walked.sums().sum()))
            expected.append((losses[t + step] - losses[t - step]) / (2 * step))
        assert found == pytest.approx(expected, rel=0.02, abs=0.01 * max(map(abs, expected)))


def test_computing_blocks_twice_changes_nothing(any_evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is done for large models, sample by sample."""
    space = space_of(any_evaluator, "w3a16", ignore=())
    once = fill("pqi", any_evaluator, space)
    monkeypatch.setattr(backward, "LARGE", 0)
    again = fill("pqi", any_evaluator, space)
    np.testing.assert_allclose(again.values, once.values, rtol=1e-3, atol=1e-4 * np.abs(once.values.to_numpy()).max())
    for module in any_evaluator.loaded.model.modules():
        assert not {"weight", "gate_up_proj", "down_proj", "forward"} & vars(module).keys()


@pytest.mark.parametrize("scheme", ["w2a16", "w3a16", "w4a16"])
def test_shares_add_up_to_the_measured_change(scheme: str, any_evaluator: Evaluator) -> None:
    space = space_of(any_evaluator, scheme, ignore=())
    table = fill("pqi", any_evaluator, space)
    measured = any_evaluator.measure({layer.name: Scheme.parse(scheme) for layer in space.layers}, "calibration")
    any_evaluator.apply({})
    stated = table.details["completeness"][scheme]
    assert stated["measured"] == pytest.approx(measured["loss"], rel=1e-4)
    assert stated["shares"] == pytest.approx(float(table.values[scheme].sum()), rel=1e-6)
    assert abs(stated["shares"] - measured["loss"]) <= max(0.05 * measured["loss"], measured["loss_stderr"] / 3) * 1.001
    assert table.notes == ()


def test_shares_add_up_on_a_real_encoder_and_four_nodes_do(minilm: Evaluator) -> None:
    space = space_of(minilm, "w2a16g64", "w4a16g64", target="vllm")
    table = fill("pqi", minilm, space)
    for stated in table.details["completeness"].values():
        assert stated["nodes"] == 4
        assert stated["gap"] < 0.05
    stderr, values = table.stderr.to_numpy(), table.values.to_numpy()
    assert ((stderr > 0) & (stderr < np.abs(values).max())).all()
    assert set(table.details["signed"]) == set(table.details["absolute"]) == {"w2a16g64", "w4a16g64"}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_the_gap_falls_as_nodes_are_added(rule: str, tiny: Evaluator) -> None:
    layers = list(tiny.layers)
    gaps = []
    for n in (1, 2, 4, 8):
        found = walk(tiny, layers, "w2a16", n, rule)
        gaps.append(abs(shares(found).sum() / np.mean(found["losses"]) - 1))
    assert gaps[0] > gaps[2] or gaps[0] < 1e-3
    assert gaps[3] < 0.002


def test_a_path_of_one_unit_alone_adds_up_to_its_measured_divergence(any_evaluator: Evaluator) -> None:
    space = space_of(any_evaluator, "w2a16", ignore=())
    single, kl = fill("pqi_single", any_evaluator, space), fill("kl", any_evaluator, space)
    assert single.values.to_numpy() == pytest.approx(kl.values.to_numpy(), rel=0.08, abs=2e-5)
    measured = [[single.details["completeness"][u][s]["measured"] for s in kl.values] for u in kl.values.index]
    assert np.array(measured) == pytest.approx(kl.values.to_numpy(), rel=0.02, abs=1e-6)


class TestActivations:
    def test_their_share_is_apart_and_the_sum_is_near_what_is_measured(
        self, minilm: Evaluator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pqi, "PIECES", 2)
        space = space_of(minilm, "w8a4", "w8a16", ignore=["embeddings.*", "encoder.layer.[0-3].*"])
        table = fill("pqi", minilm, space)
        assert (table.activation["w8a16"] == 0).all()
        assert table.activation["w8a4"].sum() > 5 * table.weight["w8a4"].sum()
        stated = table.details["completeness"]["w8a4"]
        assert stated["gap"] < 0.35
        assert stated["gap"] < 0.05 or stated["nodes"] > 4 or table.notes
        kl = fill("kl", minilm, space)
        assert (spearman(list(table.values["w8a4"]), list(kl.values["w8a4"])) or 0) > 0.7

    def test_it_is_the_gradient_times_what_rounding_adds(self, tiny: Evaluator) -> None:
        """Of the last layer alone, at one node, written out; 4-bit inputs."""
        scheme = "w8a4"
        found = walk(tiny, ["head"], scheme, 1, "midpoint")
        head, expected, weights = tiny.layers["head"].module, 0.0, 0.0
        change = tiny.rounding("head", Scheme.parse(scheme))
        features = torch.zeros(4)
        for batch in tiny.batches("calibration"):
            seen: list[Tensor] = []
            hook = head.register_forward_pre_hook(lambda _m, inputs, seen=seen: seen.append(inputs[0]))
            reference = tiny.loaded(batch)
            hook.remove()
            x = seen[0]
            scale = x.abs().amax(-1, keepdim=True) / 7
            error = (x / scale).round() * scale - x
            point, moved = x + error / 2, head.weight + change / 2
            slope = (point @ moved.T + head.bias).softmax(-1) - reference.softmax(-1)
            features += (slope @ moved * error).sum(0) / 8
            expected += float((slope @ moved * error).sum()) / 8
            weights += float((slope.T @ point * change).sum()) / 8
        parts = [np.average(np.array(found[part])[:, 0]) for part in ("activation", "weight")]
        assert parts == pytest.approx([expected, weights], rel=1e-4)
        assert found["absolute_activation"][0] == pytest.approx(float(features.abs().sum()), rel=1e-4)


class TestSpaces:
    def test_a_unit_that_may_not_take_a_scheme_stays_where_it_is(self, minilm: Evaluator) -> None:
        """Pinned to 8 bits it moves on the 8-bit path alone, on which nothing else does."""
        pinned = "encoder.layer.5.output.dense"
        ignore = ["embeddings.*", "encoder.layer.[0-4].*"]
        space = space_of(minilm, "w3a16g64", target="vllm", ignore=ignore, pin={pinned: "w8a16g64"})
        table = fill("pqi", minilm, space)
        others = {layer.name: Scheme.parse("w3a16g64") for layer in space.layers if layer.name != pinned}
        alone = {pinned: Scheme.parse("w8a16g64")}
        stated = table.details["completeness"]
        for scheme, allocation in (("w3a16g64", others), ("w8a16g64", alone)):
            measured = minilm.measure(allocation, "calibration")["loss"]
            assert stated[scheme]["measured"] == pytest.approx(measured, rel=1e-3)
        minilm.apply({})

    def test_full_precision_costs_nothing(self, tiny: Evaluator) -> None:
        space = space_of(tiny, "w3a16", "w16a16", ignore=())
        for metric in ("pqi", "pqi_absolute", "pqi_single"):
            table = fill(metric, tiny, space)
            assert (table.values["w16a16"] == 0).all()
            assert (table.stderr["w16a16"] == 0).all()
            assert table.values["w3a16"].abs().sum() > 0

    def test_tied_layers_share_as_their_unit(self, minilm: Evaluator) -> None:
        ignore = ["embeddings.*", "encoder.layer.[0-4].*"]
        apart = fill("pqi", minilm, space_of(minilm, "w3a16", ignore=ignore))
        tied = fill("pqi", minilm, space_of(minilm, "w3a16", target="vllm", ignore=ignore))
        prefix = "encoder.layer.5.attention.self"
        parts = sum(apart.values["w3a16"][f"{prefix}.{leaf}"] for leaf in ("query", "key", "value"))
        assert tied.values["w3a16"][f"{prefix}.query+key+value"] == pytest.approx(parts, rel=1e-3)


class TestWork:
    def test_five_schemes_with_four_nodes_cost_twenty_backward_passes_and_five_forward_passes(
        self, tiny: Evaluator
    ) -> None:
        """Counted in samples; the reference, which every metric needs, is one forward pass more at most."""
        space = space_of(tiny, "w3a16", "w4a16", "w5a16", "w6a16", "w8a16")
        samples = sum(len(batch["pixel_values"]) for batch in tiny.batches("calibration"))
        seen = {True: 0, False: 0}
        hook = tiny.loaded.model.register_forward_hook(
            lambda _module, _inputs, output: seen.update(
                {output.requires_grad: seen[output.requires_grad] + len(output)}
            )
        )
        table = fill("pqi", tiny, space)
        hook.remove()
        assert {stated["nodes"] for stated in table.details["completeness"].values()} == {4}
        assert seen[True] == 20 * samples
        assert seen[False] <= 6 * samples

    def test_the_two_joint_metrics_ask_for_the_same_items(self, tiny: Evaluator) -> None:
        space = space_of(tiny, "w3a16", "w5a8", ignore=())
        assert asked_by("pqi", tiny, space) == asked_by("pqi_absolute", tiny, space)
        assert asked_by("pqi", tiny, space) != asked_by("pqi_single", tiny, space)

    def test_the_pieces_of_the_data_are_every_sample_once(self, tiny: Evaluator) -> None:
        for samples in (1, 2, 3, 7, 8, 9, 33):
            for shards in (1, 4):
                pieces = [piece for shard in pqi._shards(samples, shards) for piece in shard]
                assert [sample for start, stop in pieces for sample in range(start, stop)] == list(range(samples))
                assert len(pqi._shards(samples, shards)) == min(shards, samples)
        parts = [batch["pixel_values"] for batch, _ in pqi._parts(tiny, 1, 7)]
        everything = torch.cat([batch["pixel_values"] for batch in tiny.batches("calibration")])
        assert torch.equal(torch.cat(parts), everything[1:7])

    def test_more_nodes_are_taken_only_where_shares_do_not_add_up(
        self, tiny: Evaluator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pqi, "NODES", (1, 2, 4))
        monkeypatch.setattr(pqi._Integral, "accepted", property(lambda self: 0.01 * self.measured))
        table = fill("pqi", tiny, space_of(tiny, "w2a16", "w5a16", ignore=()))
        stated = table.details["completeness"]
        assert stated["w2a16"]["nodes"] > stated["w5a16"]["nodes"] == 1

    def test_a_gap_that_stays_is_stated(self, tiny: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pqi._Integral, "accepted", property(lambda _: 0.0))
        table = fill("pqi", tiny, space_of(tiny, "w2a16", ignore=()))
        assert table.details["completeness"]["w2a16"]["nodes"] == 16
        assert "w2a16: the units' shares add up to" in table.notes[0]


@pytest.mark.slow
def test_smollm2_takes_at_most_two_and_a_half_times_its_bytes() -> None:
    """The peak over what was used before the model was loaded, in a process that has imported everything.

    Small arrays go back to the kernel here: glibc leaves holes of a quarter of a gigabyte between them.
    """
    if models.smollm2() is None:
        pytest.skip("needs scripts/fetch_models.py")
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["shares"] == pytest.approx(found["measured"], rel=0.05)
    assert found["peak"] < 2.5 * found["model"]


_PEAK = """
import json, re, tempfile, time
from pathlib import Path

import torch

from search.request import Calibration
from tests import models
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import backward


def memory(of):
    return int(re.search(of + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def evaluator(source, **calibration):
    return Evaluator.build(EvaluatorSpec(str(source), Calibration(**calibration)))


small = evaluator(models.tiny_llama(Path(tempfile.mkdtemp())), samples=2, sequence_length=16)
large, backward.LARGE = backward.LARGE, 0
fill("pqi", small, space_of(small, "w4a16g64"))
backward.LARGE = large
before = memory("VmRSS")
smollm2 = evaluator(models.smollm2(), samples=4, sequence_length=256)
loaded = memory("VmHWM") - before
began = time.monotonic()
table = fill("pqi", smollm2, space_of(smollm2, "w4a16g64"))
model = sum(p.numel() * p.element_size() for p in smollm2.loaded.model.parameters())
print(json.dumps({
    "model": model, "peak": memory("VmHWM") - before, "peak of loading": loaded,
    "seconds": time.monotonic() - began, **table.details["completeness"]["w4a16g64"],
}))
"""


def item_of(evaluator: Evaluator, layers: list[str], scheme: str, n: int, rule: str = "gauss_legendre") -> Item:
    samples = sum(map(sample_count, evaluator.batches("calibration")))
    return {"layers": layers, "scheme": scheme, "rule": rule, "nodes": n, "samples": [[0, samples]]}


def walk(evaluator: Evaluator, layers: list[str], scheme: str, n: int, rule: str = "gauss_legendre") -> Result:
    return PATH.run(evaluator, item_of(evaluator, layers, scheme, n, rule))


def shares(found: Result) -> np.ndarray:
    """By layer, of an item with a single piece."""
    ((weight,), (activation,)) = found["weight"], found["activation"]
    return np.array(weight) + np.array(activation)


def asked_by(metric: str, evaluator: Evaluator, space: Space) -> list[tuple[str, Item]]:
    asked: list[tuple[str, Item]] = []
    compute = compute_on(evaluator)

    def noted(task: Task, items: Sequence[Item]) -> list[Result]:
        asked.extend((task.name, item) for item in items)
        return compute(task, items)

    FILLS[metric](noted, subject(evaluator, space, metric))
    return asked
