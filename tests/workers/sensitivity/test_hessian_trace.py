"""The Hessian trace against dense Hessians, and its predictions against measurements."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator
from workers.sensitivity.hessian_trace import PROBE


def test_hutchinsons_estimate_agrees_with_the_dense_hessian(tiny: Evaluator) -> None:
    """Averaged over probes, each layer's estimate is Tr(H_l)/n_l of the mean KL, within its standard error."""
    names = list(tiny.layers)
    batch = tiny.batches("calibration")[0]
    reference = tiny.reference("calibration", 0)
    exact = []
    for layer in tiny.layers.values():

        def loss(weight: torch.Tensor, module: nn.Module = layer.module) -> torch.Tensor:
            prefix = "conv" if isinstance(module, nn.Conv2d) else "head"
            output = torch.func.functional_call(tiny.loaded.model, {f"{prefix}.weight": weight}, batch["pixel_values"])
            return tiny.losses(batch, output, reference).mean()

        weight = layer.parameter.detach()
        hessian = torch.autograd.functional.hessian(loss, weight)
        exact.append(float(hessian.reshape(weight.numel(), -1).trace()) / weight.numel())

    item = {"batch": 0, "start": 0, "samples": 4, "layers": names, "inputs": [], "activation_bits": []}
    samples = np.array([PROBE.run(tiny, item | {"seed": seed})["weight"] for seed in range(600)])
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert (error < 0.1 * np.abs(exact)).all()
    assert (np.abs(samples.mean(axis=0) - exact) < 4 * error).all()


def test_the_prediction_is_half_the_average_trace_times_the_squared_perturbation(tiny: Evaluator) -> None:
    space = space_of(tiny, "w3a16", "w4a16")
    table = fill("hessian_trace", tiny, space)
    for row, unit in enumerate(space.units):
        for column, scheme in enumerate(space.schemes):
            trace = table.details["average_trace"][unit.name]
            expected = 0.5 * trace * tiny.rounding_error(unit.name, scheme)
            assert table.values.iloc[row, column] == pytest.approx(expected)


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
