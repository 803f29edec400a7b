"""Hessian trace (HAWQ-V2, Dong et al., 1911.03852): average trace × squared perturbation, by Hutchinson's estimator.

For layer l with n_l weights and Hessian H_l of the loss,

    ΔL_l(s) ≈ ½ · (Tr(H_l) / n_l) · ‖Q_s(W_l) − W_l‖²        Tr(H_l) = E[v_lᵀ (H v)_l],  v Rademacher

(HAWQ-V2, eq. 4, leaves out Taylor's ½). The loss is the divergence from the model's own output: its gradient is zero at
full precision, so its Hessian is exactly the Gauss-Newton matrix JᵀCJ, positive semidefinite. One probe over all layers
gives every layer's estimate: terms between layers have mean zero. Activations are treated alike, with the trace with
respect to the layer's input and the rounding error of that input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from search.inventory import Layer
from search.scheme import Scheme
from search.space import Space
from workers.evaluator import Evaluator, token_dims
from workers.loss import curvature
from workers.models import LoadedModel
from workers.quantizers.activation import round_activation
from workers.sensitivity.table import Entry, Subject, Table, metric, sum_of_layers
from workers.tasks import Compute, Item, Result, Task

PARTS = 4
"""Each calibration batch is probed in so many parts, each with its own probe: for the same work, independent probes on
few samples tell more than one probe on many."""

MAX_ROUNDS = 4
RELATIVE_ERROR = 0.2
"""Rounds stop when the mean relative standard error of the layers' traces is below this."""


@metric("hessian_trace")
def hessian_trace(compute: Compute, subject: Subject) -> Table:
    """Predicted loss increase of every unit at every allowed scheme; each round probes every calibration sample."""
    space, batch_sizes = subject.space, subject.batch_sizes
    names = [layer.name for layer in space.layers]
    rounded_inputs = [layer.name for layer in _layers_with_rounded_inputs(space)]
    widths = sorted({scheme.activation_bits for scheme in space.schemes if scheme.quantizes_activations})
    estimates: list[Result] = []
    for round_ in range(MAX_ROUNDS):
        items: list[Item] = [
            {
                "batch": batch,
                "start": start,
                "samples": -(-size // PARTS),
                "seed": round_,
                "layers": names,
                "inputs": rounded_inputs,
                "activation_bits": widths,
            }
            for batch, size in enumerate(batch_sizes)
            for start in range(0, size, -(-size // PARTS))
        ]
        estimates += compute(PROBE, items)
        relative_error = _relative_error(_samples(estimates, "weight"))
        if relative_error < RELATIVE_ERROR:
            break

    traces = dict(zip(names, _floored(_samples(estimates, "weight")), strict=True))
    inputs = {
        width: dict(zip(rounded_inputs, _floored(_samples(estimates, f"a{width}")), strict=True)) for width in widths
    }
    errors = compute(
        ROUNDING_ERROR, [{"layer": layer.name, "schemes": _weight_schemes(space)} for layer in space.layers]
    )
    rounding = dict(zip(names, errors, strict=True))

    def entry(layer: str, scheme: Scheme) -> Entry:
        weight = activation = variance = 0.0
        if scheme.quantizes_weights:
            mean, error = traces[layer]
            half_square = rounding[layer][_weight_only(scheme)] / 2
            weight, variance = mean * half_square, (error * half_square) ** 2
        if scheme.quantizes_activations:
            activation, error = inputs[scheme.activation_bits][layer]
            variance += error**2
        return Entry(weight, activation, variance)

    details = {
        "average_trace": {name: mean for name, (mean, _) in traces.items()},
        "relative_error": relative_error,
        "probes": len(estimates),
    }
    return Table.of(space, sum_of_layers(entry), details)


def _samples(estimates: list[Result], part: str) -> NDArray[np.float64]:
    """Probes × layers."""
    return np.array([estimate[part] for estimate in estimates])


def _relative_error(samples: NDArray[np.float64]) -> float:
    mean, error = _mean_and_error(samples)
    return float((error / np.maximum(np.abs(mean), 1e-300)).clip(0, 1).mean())


def _mean_and_error(samples: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def _floored(samples: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Mean and standard error per layer. The trace is positive: an estimate lost in noise counts as that noise."""
    mean, error = _mean_and_error(samples)
    return [(max(float(m), float(e)), float(e)) for m, e in zip(mean, error, strict=True)]


def _layers_with_rounded_inputs(space: Space) -> list[Layer]:
    rounds = np.array([scheme.quantizes_activations for scheme in space.schemes])
    rows = (space.allowed & rounds).any(axis=1)
    return [layer for unit, row in zip(space.units, rows, strict=True) if row for layer in unit.layers]


def _weight_only(scheme: Scheme) -> str:
    return str(Scheme(scheme.weight_bits, 16, scheme.group_size, scheme.symmetric))


def _weight_schemes(space: Space) -> list[str]:
    return sorted({_weight_only(scheme) for scheme in space.schemes if scheme.quantizes_weights})


def _rounding_error(evaluator: Evaluator, item: Item) -> Result:
    columns = evaluator.layers[item["layer"]].layer.columns
    schemes = [scheme for text in item["schemes"] if (scheme := Scheme.parse(text)).fits(columns)]
    return {str(scheme): evaluator.rounding_error(item["layer"], scheme) for scheme in schemes}


def _probe(evaluator: Evaluator, item: Item) -> Result:
    """v_lᵀ(Hv)_l / n_l of every layer, H being the Hessian of the mean loss of a few samples.

    For activations, the average trace with respect to the layer's input is multiplied by ½‖Q(X) − X‖² of the same
    samples at once: both belong to them.
    """
    evaluator.apply({})
    chosen = slice(item["start"], item["start"] + item["samples"])
    batch = {key: value[chosen] for key, value in evaluator.batches("calibration")[item["batch"]].items()}
    generator = torch.Generator(evaluator.loaded.device).manual_seed(
        (item["seed"] * 100_003 + item["batch"]) * 1_009 + item["start"]
    )
    layers = [evaluator.layers[name] for name in item["layers"]]
    modules = [evaluator.layers[name].module for name in item["inputs"]]
    with _differentiable(evaluator.loaded.model), _Inputs(modules) as inputs:
        if item["inputs"]:
            inputs.note(lambda: evaluator.loaded(batch), item["activation_bits"])
        model = _Model(evaluator.loaded)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        keys = [names[id(layer.parameter)] for layer in layers]

        def run(variables: list[Tensor]) -> Tensor:
            inputs.shifts = variables[len(keys) :]
            weights = dict(zip(keys, variables, strict=False))
            output: Tensor = torch.func.functional_call(model, weights, (batch,))
            return output

        def curved(output: Tensor, change: Tensor) -> Tensor:
            return curvature(evaluator.loaded.task, output, change, batch.get("attention_mask")) / len(output)

        variables = [*(layer.parameter.detach() for layer in layers), *inputs.zeros]
        traces = _hutchinson(run, curved, variables, generator)
    rounded = {
        f"a{width}": [t * e / 2 for t, e in zip(traces[len(keys) :], inputs.errors[width], strict=True)]
        for width in item["activation_bits"]
    }
    return {"weight": traces[: len(keys)], **rounded}


def _hutchinson(
    run: Callable[[list[Tensor]], Tensor],
    curved: Callable[[Tensor, Tensor], Tensor],
    variables: list[Tensor],
    generator: torch.Generator,
) -> list[float]:
    """v·(Hv) / n of every variable, for one Rademacher v over all of them, with H = JᵀCJ.

    J is that of `run`, C what `curved` multiplies by. Jv is taken forwards, which keeps no graph, and Jᵀ backwards:
    half the memory of differentiating twice backwards, and less work.
    """
    probe = [
        torch.randint(0, 2, variable.shape, generator=generator, device=variable.device, dtype=torch.int8)
        .to(variable)
        .mul_(2)
        .sub_(1)
        for variable in variables
    ]
    with torch.no_grad():
        output, change = torch.func.jvp(run, (variables,), (probe,))  # type: ignore[misc]
        cotangent = curved(output, change).to(output)
        del output, change
    leaves = [variable.requires_grad_() for variable in variables]
    products = torch.autograd.grad(run(leaves), leaves, grad_outputs=cotangent)
    return [float((v * hv).sum(dtype=torch.float64)) / v.numel() for v, hv in zip(probe, products, strict=True)]


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Within, attention and experts run as plain operations: the fused ones have no forward derivative."""
    fused = getattr(getattr(model, "config", None), "_experts_implementation", None)
    try:
        if fused is not None:
            model.set_experts_implementation("eager")  # type: ignore[operator]
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if fused is not None:
            model.set_experts_implementation(fused)  # type: ignore[operator]


class _Model(nn.Module):
    """A loaded model as a module, so that it can be called with other weights."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__()
        self.model = loaded.model
        self._loaded = loaded

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loaded(batch)


class _Inputs:
    """The inputs of some modules: within, each carries a shift with respect to which derivatives can be taken."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = {module: index for index, module in enumerate(modules)}
        self.shifts: list[Tensor] = []
        self.zeros: list[Tensor] = []
        self.errors: dict[int, list[float]] = {}

    def __enter__(self) -> _Inputs:
        self._hooks = [module.register_forward_pre_hook(self._shift) for module in self._modules]
        return self

    def __exit__(self, *_exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def note(self, run: Callable[[], object], widths: list[int]) -> None:
        """Fill `zeros` (shaped as the inputs) and `errors` (‖Q(X) − X‖² by width in bits) from one pass."""
        noted: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            noted[module] = inputs[0]

        hooks = [module.register_forward_pre_hook(keep) for module in self._modules]
        with torch.no_grad():
            run()
        for hook in hooks:
            hook.remove()
        self.zeros = [torch.zeros_like(noted[module]) for module in self._modules]
        self.errors = {
            width: [_rounding(noted[module], width, token_dims(module, noted[module])) for module in self._modules]
            for width in widths
        }

    def _shift(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0] + self.shifts[self._modules[module]], *inputs[1:]) if self.shifts else None


def _rounding(x: Tensor, width: int, dims: int) -> float:
    return float((round_activation(x, width, dims) - x).double().square().sum())


PROBE = Task("hessian_trace.probe", 1, _probe)
"""Item: samples of a batch, a seed, layers. Result: each layer's average trace ("weight"), and the predicted loss of
rounding its input ("a8", …)."""

ROUNDING_ERROR = Task("rounding_error", 1, _rounding_error, uses_data=False)
"""Item: a layer and weight schemes. Result: scheme → ‖Q(W) − W‖²."""
