"""The Hessian trace against dense Hessians, its errors and stopping rule against closed forms."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.request import Calibration
from tests.workers.sensitivity.dense import all_signs, evaluator_of, trace_of_weight, traces_of_inputs, twice
from tests.workers.sensitivity.support import TinyNet, fill, space_of, subject
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import backward
from workers.sensitivity.hessian_trace import PROBE, ROUNDS, Estimate, trace_table
from workers.sensitivity.hutchinson import Piece
from workers.sensitivity.rounding import ROUNDING_ERROR
from workers.tasks import Item, Result, Task

pytestmark = pytest.mark.long


def item(layers: Sequence[str], inputs: Sequence[str] = (), bits: Sequence[int] = (), **changes: object) -> Item:
    asked = {"batch": 0, "start": 0, "samples": 4, "seeds": [0]}
    return asked | {"layers": list(layers), "inputs": list(inputs), "activation_bits": list(bits)} | changes


def divergence_of(evaluator: Evaluator) -> Callable[[torch.Tensor], torch.Tensor]:
    reference = evaluator.reference("calibration", 0)
    return lambda output: evaluator.losses(evaluator.batches("calibration")[0], output, reference)


@pytest.mark.parametrize("large", [False, True], ids=["together", "one sample at a time"])
def test_hutchinsons_estimate_agrees_with_the_dense_hessian(
    large: bool, tiny: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged over probes, each layer's estimate is Tr(H_l)/n_l of the mean KL, within its standard error."""
    monkeypatch.setattr(backward, "LARGE", 0 if large else backward.LARGE)
    loss, batch = divergence_of(tiny), tiny.batches("calibration")[0]
    found = PROBE.run(tiny, item(tiny.layers, tiny.layers, seeds=list(range(600))))
    exact = {
        "weight": [trace_of_weight(tiny, name, batch, loss) for name in tiny.layers],
        # Of a sample's own loss: four samples share the mean.
        "input": [4 * traces_of_inputs(tiny, name, batch, loss)[0] for name in tiny.layers],
    }
    for part, expected in exact.items():
        samples = np.array(found[part])
        error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        assert (error < 0.2 * np.abs(expected)).all()
        assert (np.abs(samples.mean(axis=0) - expected) < 4 * error).all()


def test_over_all_rademacher_vectors_the_mean_is_the_trace_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = twice()
    loss, batch = divergence_of(evaluator), evaluator.batches("calibration")[0]
    seeds = all_signs(monkeypatch, [(("body", None), 4), (("head", None), 6)])
    found = PROBE.run(evaluator, item(["body", "head"], samples=2, seeds=list(seeds)))
    exact = [trace_of_weight(evaluator, name, batch, loss) for name in ("body", "head")]
    assert np.mean(found["weight"], axis=0) == pytest.approx(exact, rel=1e-5)


def test_the_inputs_of_a_layer_that_runs_twice_have_a_trace_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all Rademacher vectors, exactly: the loss of rounding both inputs is the sum of what each loses."""
    evaluator = twice()
    loss, batch = divergence_of(evaluator), evaluator.batches("calibration")[0]
    rounding: list[float] = []

    def note(_module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (x,) = inputs
        scale = x.abs().amax(-1, keepdim=True) / 7
        rounding.append(float((scale * (x / scale).round() - x).square().sum()))

    hook = evaluator.layers["body"].module.register_forward_pre_hook(note)
    evaluator.loaded(batch)
    hook.remove()

    seeds = all_signs(monkeypatch, [(("body", 0), 4), (("body", 1), 4)])
    found = PROBE.run(evaluator, item([], ["body"], [4], samples=2, seeds=list(seeds)))
    traces = traces_of_inputs(evaluator, "body", batch, loss)
    assert len(traces) == len(rounding) == 2
    assert np.mean(found["input"]) == pytest.approx(2 * np.mean(traces), rel=1e-4)
    expected = sum(trace * error / 2 for trace, error in zip(traces, rounding, strict=True))
    assert np.mean(found["a4"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["hessian_trace", "hessian_trace_labels"])
def test_a_layer_of_which_the_loss_does_not_depend_is_worth_nothing(metric: str) -> None:
    evaluator = twice()
    table = fill(metric, evaluator, space_of(evaluator, "w3a16", "w4a8"))
    assert (table.values.loc["idle"] == 0).all()
    assert (table.stderr.loc["idle"] == 0).all()
    assert (table.values.drop(index="idle") > 0).all(axis=None)


def test_all_layers_come_from_the_same_passes(tiny: Evaluator) -> None:
    calls = 0

    def count(*_arguments: object) -> None:
        nonlocal calls
        calls += 1

    hook = tiny.loaded.model.register_forward_hook(count)
    counts = []
    for layers in (["head"], ["conv", "head"]):
        calls = 0
        PROBE.run(tiny, item(layers, layers, [8], seeds=[0, 1, 2]))
        counts.append(calls)
    hook.remove()
    assert counts == [4, 4], "a forward derivative for each probe, and one graph for all of their backward passes"


def test_a_large_model_is_computed_again_block_by_block_with_the_same_result(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = llama(model_folder)
    inputs = [name for name, layer in evaluator.layers.items() if layer.layer.kind == "linear"]
    asked = item(evaluator.layers, inputs, [8], samples=1, seeds=[0, 1])
    together = PROBE.run(evaluator, asked)
    monkeypatch.setattr(backward, "LARGE", 0)
    apart = PROBE.run(evaluator, asked)
    for part, values in together.items():
        np.testing.assert_allclose(apart[part], values, rtol=1e-3, atol=1e-12)


def test_a_model_in_bfloat16_has_about_the_same_traces(model_folder: Callable[[str], Path]) -> None:
    single, half = llama(model_folder), llama(model_folder, "bfloat16")
    tables = [fill("hessian_trace", one, space_of(one, "w4a16", "w4a8", ignore=["*embed*"])) for one in (single, half)]
    for scheme in ("w4a16", "w4a8"):
        exact, found = (table.values[scheme].sum() for table in tables)
        assert found == pytest.approx(exact, rel=0.2)


def test_the_prediction_is_half_the_average_trace_times_the_squared_perturbation(tiny: Evaluator) -> None:
    space = space_of(tiny, "w3a16", "w4a16")
    table = fill("hessian_trace", tiny, space)
    for row, unit in enumerate(space.units):
        trace, error = (table.details[part][unit.name] for part in ("average_trace", "average_trace_stderr"))
        for column, scheme in enumerate(space.schemes):
            half_square = 0.5 * tiny.rounding_error(unit.name, scheme)
            assert table.values.iloc[row, column] == pytest.approx(max(trace, error) * half_square)
            assert table.stderr.iloc[row, column] == pytest.approx(error * half_square)


def test_activation_bits_are_predicted_apart_from_weight_bits(minilm: Evaluator) -> None:
    space = space_of(minilm, "w8a4", "w8a6", "w8a16", ignore=["embeddings.*"])
    table = fill("hessian_trace", minilm, space)
    a4, a6, a16 = range(3)
    assert [str(scheme) for scheme in space.schemes] == ["w8a4", "w8a6", "w8a16"]
    weight, activation = table.weight.to_numpy(), table.activation.to_numpy()
    assert (weight[:, a6] == weight[:, a16]).all()
    assert (activation[:, a16] == 0).all()
    assert (activation[:, a4] > activation[:, a6]).all()
    measured = fill("kl", minilm, space)
    assert 1 / 3 < table.values["w8a6"].sum() / measured.values["w8a6"].sum() < 3


def test_the_error_is_that_between_parts_and_what_probes_leave_of_it_that_between_probes() -> None:
    """Samples that differ (by 2 in trace) and probes that add noise (of 1): simulated, the errors are the real ones."""
    generator = np.random.default_rng(0)
    parts, probes, layers = 8, 4, 20_000
    weights = np.array([2, 2, 2, 2, 2, 2, 2, 1]) / 15
    samples = 5 + generator.normal(0, 2, (parts, 1, layers)) / np.sqrt(weights * 15)[:, None, None]
    values = samples + generator.normal(0, 1, (parts, probes, layers))
    estimate = Estimate.of(values, weights)
    assert (estimate.error**2).mean() == pytest.approx(estimate.mean.var(), rel=0.1)
    of_probes = estimate.mean - weights @ samples[:, 0]
    assert (estimate.probe_error**2).mean() == pytest.approx(of_probes.var(), rel=0.1)
    # Of a single part, nothing tells samples from probes.
    single = Estimate.of(values[:1], np.ones(1))
    np.testing.assert_allclose(single.error, values[0].std(axis=0, ddof=1) / 2)
    # An estimate below its error counts as that error.
    assert Estimate(np.array([0.5, -2.0]), np.ones(2), np.ones(2)).by_layer(["a", "b"]) == {
        "a": (1.0, 1.0),
        "b": (1.0, 1.0),
    }


@pytest.mark.parametrize(
    ("noise", "schemes", "stopped", "probes"),
    [
        (0.1, ("w3a16", "w4a16"), "relative error", 1),
        (2.0, ("w4a16",), "stable decisions", 1),
        (2.0, ("w3a16", "w4a16", "w8a16"), "most probes", 4),
    ],
)
def test_it_says_why_it_stopped(
    noise: float, schemes: tuple[str, ...], stopped: str, probes: int, tiny: Evaluator
) -> None:
    space = space_of(tiny, *schemes)
    generator = np.random.default_rng(0)

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        if task == ROUNDING_ERROR:
            return [task.run(tiny, one) for one in items]
        drawn = [np.exp(generator.normal(0, noise, (len(one["seeds"]), 2))) for one in items]
        return [{"weight": values.tolist(), "input": [[]] * len(values)} for values in drawn]

    table = trace_table(compute, subject(tiny, space), PROBE, ROUNDS)
    assert table.details["stopped"] == stopped
    assert table.details["probes_per_sample"] == probes
    assert any("stopped at the most probes" in note for note in table.notes) == (stopped == "most probes")


def llama(model_folder: Callable[[str], Path], dtype: str = "float32") -> Evaluator:
    source = str(model_folder("tiny_llama"))
    return Evaluator.build(EvaluatorSpec(source, Calibration(samples=8, sequence_length=16), dtype=dtype))


def test_padding_counts_neither_in_a_trace_nor_in_a_rounding_error(bert: Evaluator) -> None:
    """What stands at padded positions has no derivative, and rounding it costs nothing."""
    name = next(name for name, layer in bert.layers.items() if layer.layer.kind == "linear")
    tokens, mask = torch.randn(2, 5, 64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    batch = {"input_ids": mask, "attention_mask": mask}
    place = (name, 0)

    def piece(x: torch.Tensor) -> Piece:
        found = Piece(bert, item([], [name], [4], samples=2), 0, batch)
        found.note_rounding(place, x)
        found.add(place, found.signs(place, x) * mask[..., None])
        return found

    quiet, loud = (piece(tokens * torch.where(mask == 1, 1.0, factor)[..., None]).result() for factor in (0.0, 1000.0))
    assert quiet["a4"][0, 0] > 0
    assert loud["a4"] == pytest.approx(quiet["a4"])
    # v·Hv/n is 1 where Hv is v: n counts the tokens that are kept. It is given for a sample's loss, of two.
    assert quiet["input"][0, 0] == loud["input"][0, 0] == pytest.approx(2.0)


class WithoutForwardDerivative(torch.autograd.Function):
    """x³, as an operation that only goes backwards."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Cubes(TinyNet):
    def __init__(self, cube: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.cube = cube

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.cube(self.conv(images)).mean((2, 3)))


def test_an_operation_without_a_forward_derivative_changes_nothing() -> None:
    tables = []
    for cube in (lambda x: x**3, WithoutForwardDerivative.apply):
        torch.manual_seed(0)
        evaluator = evaluator_of(Cubes(cube), {"pixel_values": torch.randn(4, 1, 7, 7)})
        tables.append(fill("hessian_trace", evaluator, space_of(evaluator, "w3a16", "w4a4")))
    np.testing.assert_allclose(tables[0].values, tables[1].values, rtol=1e-3)
    np.testing.assert_allclose(tables[0].stderr, tables[1].stderr, rtol=1e-3)
