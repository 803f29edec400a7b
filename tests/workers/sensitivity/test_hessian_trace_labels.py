"""The Hessian trace of the labelled loss against dense Hessians and finite differences."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from search.request import Calibration
from tests import models
from tests.workers.sensitivity.dense import Loss, all_signs, trace_of_weight, traces_of_inputs, twice
from tests.workers.sensitivity.support import fill, space_of, subject
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.loss import labelled_loss
from workers.models import load_model
from workers.sensitivity.hessian_trace import trace_table
from workers.sensitivity.hessian_trace_labels import PROBE, ROUNDS
from workers.sensitivity.hutchinson import Piece, plain_operations
from workers.sensitivity.rounding import ROUNDING_ERROR
from workers.tasks import Item, Result, Task


def item(layers: Sequence[str], inputs: Sequence[str] = (), **changes: object) -> Item:
    asked: Item = {"batch": 0, "start": 0, "samples": 4, "seeds": [0], "activation_bits": []}
    return asked | {"layers": list(layers), "inputs": list(inputs)} | changes


def loss_of(evaluator: Evaluator) -> Loss:
    return lambda output: labelled_loss(evaluator.loaded.task, output, evaluator.batches("calibration")[0])


@pytest.fixture(scope="module")
def llama(model_folder: Callable[[str], Path]) -> Evaluator:
    source = str(model_folder("tiny_llama"))
    return Evaluator.build(EvaluatorSpec(source, Calibration(samples=4, sequence_length=16)))


def test_hutchinsons_estimate_agrees_with_the_dense_hessian(tiny: Evaluator) -> None:
    loss, batch = loss_of(tiny), tiny.batches("calibration")[0]
    found = PROBE.run(tiny, item(tiny.layers, tiny.layers, seeds=list(range(1000))))
    exact = {
        "weight": [trace_of_weight(tiny, name, batch, loss) for name in tiny.layers],
        "input": [4 * traces_of_inputs(tiny, name, batch, loss)[0] for name in tiny.layers],
    }
    for part, expected in exact.items():
        samples = np.array(found[part])
        error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        assert (error < 0.2 * np.abs(expected).max()).all()
        assert (np.abs(samples.mean(axis=0) - expected) < 4 * error).all()


def test_over_all_rademacher_vectors_the_mean_is_the_trace_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights, and of the inputs of a layer that runs twice. Unlike the divergence's, traces may be negative."""
    evaluator = twice()
    loss, batch = loss_of(evaluator), evaluator.batches("calibration")[0]
    with monkeypatch.context() as context:
        seeds = all_signs(context, [(("body", None), 4), (("head", None), 6)])
        found = PROBE.run(evaluator, item(["body", "head"], samples=2, seeds=list(seeds)))
    exact = [trace_of_weight(evaluator, name, batch, loss) for name in ("body", "head")]
    assert np.mean(found["weight"], axis=0) == pytest.approx(exact, rel=1e-5)

    with monkeypatch.context() as context:
        seeds = all_signs(context, [(("body", 0), 4), (("body", 1), 4)])
        found = PROBE.run(evaluator, item([], ["body"], samples=2, seeds=list(seeds)))
    traces = traces_of_inputs(evaluator, "body", batch, loss)
    assert np.mean(found["input"]) == pytest.approx(2 * np.mean(traces), rel=1e-4)


def test_attention_whose_fused_kernel_has_no_second_derivative_is_differentiated_twice(llama: Evaluator) -> None:
    """v·(Hv) of a Llama is the finite difference of its gradient."""
    batch = llama.batches("calibration")[0]
    asked = item(llama.layers)
    piece = Piece(llama, asked, 0, batch)
    parameters = {name: layer.parameter for name, layer in llama.layers.items()}
    signs = {name: piece.signs((name, None), parameter) for name, parameter in parameters.items()}

    def gradient(step: float, **options: bool) -> list[Tensor]:
        leaves = {name: (p.detach() + step * signs[name]).requires_grad_() for name, p in parameters.items()}
        keys = {id(parameter): key for key, parameter in llama.loaded.model.named_parameters()}
        swapped = {keys[id(parameters[name])]: leaf for name, leaf in leaves.items()}
        output = torch.func.functional_call(
            llama.loaded.model, swapped, (), {key: batch[key] for key in ("input_ids", "attention_mask")}
        )
        loss = labelled_loss("causal-lm", output.logits, batch).mean()
        return list(torch.autograd.grad(loss, list(leaves.values()), **options))

    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        sum(g.sum() for g in gradient(0.0, create_graph=True)).backward()

    found = PROBE.run(llama, asked)["weight"][0]
    step = 1e-3
    with plain_operations(llama.loaded.model):
        ahead, behind = gradient(step), gradient(-step)
    products = [(a.double() - b.double()) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    expected = [float((v * hv).mean()) for v, hv in zip(signs.values(), products, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


def test_the_probes_of_an_item_share_one_graph_of_the_gradient(tiny: Evaluator) -> None:
    calls = 0

    def count(*_arguments: object) -> None:
        nonlocal calls
        calls += 1

    hook = tiny.loaded.model.register_forward_hook(count)
    together = PROBE.run(tiny, item(tiny.layers, tiny.layers, seeds=[0, 1, 2]))
    hook.remove()
    assert calls == 1
    for row, seed in enumerate((0, 1, 2)):
        alone = PROBE.run(tiny, item(tiny.layers, tiny.layers, seeds=[seed]))
        np.testing.assert_allclose(alone["weight"][0], together["weight"][row], rtol=1e-5)
        np.testing.assert_allclose(alone["input"][0], together["input"][row], rtol=1e-5)


def test_a_negative_trace_counts_as_its_noise_and_is_told(tiny: Evaluator) -> None:
    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        if task == ROUNDING_ERROR:
            return [task.run(tiny, one) for one in items]
        drawn = [np.array([-1.0, 3.0]) + generator.normal(0, 0.3, (len(one["seeds"]), 2)) for one in items]
        return [{"weight": values.tolist(), "input": [[]] * len(values)} for values in drawn]

    generator = np.random.default_rng(0)
    space = space_of(tiny, "w4a16")
    table = trace_table(compute, subject(tiny, space), PROBE, ROUNDS)
    assert table.details["average_trace"]["conv"] < 0
    assert table.values.loc["conv", "w4a16"] == table.stderr.loc["conv", "w4a16"] > 0
    assert any("1 of 2 layers have a negative average trace" in note for note in table.notes)


def test_a_trained_classifiers_labelled_loss_curves_about_as_its_divergence_does(
    model_folder: Callable[[str], Path],
) -> None:
    images, labels = models.digits_arrays()
    batch = {"pixel_values": torch.from_numpy(images[-32:]), "labels": torch.from_numpy(labels[-32:])}
    loaded = load_model(str(model_folder("digits_vit")), torch.device("cpu"))
    evaluator = Evaluator(loaded, Data([batch], [batch], [batch], "digits"))
    space = space_of(evaluator, "w4a16", "w4a8")
    labelled, own = (fill(name, evaluator, space) for name in ("hessian_trace_labels", "hessian_trace"))
    for scheme in ("w4a16", "w4a8"):
        assert 1 / 3 < labelled.values[scheme].sum() / own.values[scheme].sum() < 3
