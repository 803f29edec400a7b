"""Hutchinson's estimator for all layers at once: Tr(H_p) = E[v_pᵀ (H v)_p] for a Rademacher v over all places p.

A place is the weight of a layer, or the input of one of its uses. What is between places has mean zero, so that one
probe v gives every place's estimate, at a cost that does not depend on how many there are. H is the Hessian of the mean
loss of the samples that are probed together; how H v is taken is the metric's.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from search.inventory import by_whole, whole_and_channels
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, kept_tokens, token_dims
from workers.hooks import removing
from workers.quantizers.activation import round_activation
from workers.sensitivity.backward import micro_batches
from workers.tasks import Item, Result

Place = tuple[str, int | None]
"""A layer's weight (None), or the input of one of its uses (its number in a forward pass)."""

OnInput = Callable[[Place, Tensor], Tensor]
"""(place, input) → what the layer is given instead."""


class Piece:
    """Some samples of a batch that are probed together, and what was found of them.

    `seed` is the probe under way. `layers` are probed whole: what is found of each output channel tells of their parts.
    """

    def __init__(self, evaluator: Evaluator, item: Item, start: int, batch: Batch) -> None:
        self.evaluator = evaluator
        self.item = item
        self.batch = batch
        self.samples = sample_count(batch)
        self.seed = 0
        self.layers = list(by_whole(item["layers"]))
        self._origin = (item["batch"], start)
        self._signs: dict[tuple[int, Place], Tensor] = {}
        self._averages: dict[tuple[int, Place], Tensor] = {}
        self._by_channel: dict[tuple[int, str], Tensor] = {}
        self._rounding: dict[Place, dict[int, float]] = {}

    def weights(self) -> dict[str, Tensor]:
        """The layers' weights, by layer, as tensors apart from the model's."""
        return {name: self.evaluator.layers[name].parameter.detach() for name in self.layers}

    def signs(self, place: Place, like: Tensor) -> Tensor:
        """The probe's v of a place, shaped as `like`; kept in a byte per element."""
        key = (self.seed, place)
        if key not in self._signs:
            seed = zlib.crc32(repr((*self._origin, *key)).encode())
            generator = torch.Generator(like.device).manual_seed(seed)
            bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
            self._signs[key] = bits.mul_(2).sub_(1)
        return self._signs[key].to(like)

    def add(self, place: Place, product: Tensor) -> None:
        """Note v·(Hv)/n of a place, `product` being its part of Hv; padding, which has none, does not count in n."""
        name, use = place
        signed = self.signs(place, product).mul_(product)
        if use is None:
            by_channel = self.evaluator.layers[name].matrix(signed)
            self._by_channel[self.seed, name] = by_channel.mean(dim=1, dtype=torch.float64)
            return
        kept = kept_tokens(self.batch, product)
        count = product.numel() if kept is None else float(kept.sum()) * product.numel() / kept.numel()
        self._averages[self.seed, place] = signed.sum(dtype=torch.float64) / max(count, 1)

    def note_rounding(self, place: Place, x: Tensor) -> None:
        """Note ‖Q(x) − x‖² of an input, for every width of the item."""
        if place not in self._rounding:
            x, dims = x.detach(), token_dims(self.evaluator.layers[place[0]].module, x)
            kept = kept_tokens(self.batch, x)
            errors = {width: round_activation(x, width, dims) - x for width in self.item["activation_bits"]}
            self._rounding[place] = {
                width: float((error if kept is None else error * kept).double().square().sum())
                for width, error in errors.items()
            }

    def result(self) -> dict[str, NDArray[np.float64]]:
        """Seeds × layers: "weight", "input" and "a8", … as `probed` says. What no derivative reached is 0."""
        uses: dict[str, list[Place]] = {name: [] for name in self.item["inputs"]}
        for place in self._rounding:
            uses[place[0]].append(place)

        def average(seed: int, place: Place) -> float:
            return float(self._averages.get((seed, place), 0.0))

        def of_weight(seed: int, name: str) -> float:
            found = self._by_channel.get((seed, whole_and_channels(name)[0]))
            return 0.0 if found is None else float(found[self.evaluator.layers[name].channels].mean())

        def rounded(seed: int, name: str, width: int) -> float:
            return sum(average(seed, place) * self._rounding[place][width] / 2 for place in uses[name])

        def of_input(seed: int, name: str) -> float:
            return self.samples * sum(average(seed, place) for place in uses[name]) / max(len(uses[name]), 1)

        seeds, layers, inputs = self.item["seeds"], self.item["layers"], self.item["inputs"]
        found = {
            "weight": [[of_weight(seed, name) for name in layers] for seed in seeds],
            "input": [[of_input(seed, name) for name in inputs] for seed in seeds],
        }
        for width in self.item["activation_bits"]:
            found[f"a{width}"] = [[rounded(seed, name, width) for name in inputs] for seed in seeds]
        return {part: np.array(values, dtype=float) for part, values in found.items()}


def probed(evaluator: Evaluator, item: Item, probe: Callable[[Piece], None]) -> Result:
    """What `probe` finds of an item's samples, averaged over them; seeds × layers.

    "weight" is the average trace of the layers' weights. "input" is that of a sample's loss with respect to the inputs
    of the item's `inputs`, and "a8", … the predicted loss of rounding them: average trace and rounding error of an
    input belong to the same samples. Large models are probed one sample at a time, each with signs of its own.
    """
    evaluator.apply({})
    totals: dict[str, Any] = {}
    for batch, chosen in micro_batches(evaluator, item["batch"], item["start"], item["start"] + item["samples"]):
        piece = Piece(evaluator, item, chosen.start, batch)
        probe(piece)
        for part, values in piece.result().items():
            totals[part] = totals.get(part, 0) + values * piece.samples / item["samples"]
    evaluator.apply({})
    return {part: values.tolist() for part, values in totals.items()}


def twice_backwards(piece: Piece, loss: Callable[[Tensor], Tensor]) -> None:
    """Probe with H v = ∂(gᵀv)/∂W, the gradient g of `loss(output)` differentiated a second time.

    Its graph is built once for the samples that are probed together and kept for all their probes.
    """
    evaluator, seeds = piece.evaluator, piece.item["seeds"]
    places: dict[Place, Tensor] = {}

    def watch(place: Place, x: Tensor) -> Tensor:
        piece.note_rounding(place, x)
        places[place] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return places[place]

    with torch.enable_grad(), plain_operations(evaluator.loaded.model):
        weights = {name: weight.requires_grad_() for name, weight in piece.weights().items()}
        with entering(evaluator, piece.item["inputs"], watch):
            output = run_with(evaluator, weights, piece.batch)
        if not output.requires_grad:
            return
        places |= {(name, None): weight for name, weight in weights.items()}
        variables = list(places.values())
        gradients = torch.autograd.grad(loss(output), variables, create_graph=True, materialize_grads=True)
        # A gradient in which no variable stands has no second derivative.
        curved = {place: one for place, one in zip(places, gradients, strict=True) if one.requires_grad}
        for seed in seeds if curved else ():
            piece.seed = seed
            products = torch.autograd.grad(
                list(curved.values()),
                variables,
                [piece.signs(place, gradient) for place, gradient in curved.items()],
                retain_graph=seed != seeds[-1],
                materialize_grads=True,
            )
            for place, product in zip(places, products, strict=True):
                piece.add(place, product)


@contextmanager
def entering(evaluator: Evaluator, names: list[str], on_input: OnInput) -> Iterator[None]:
    """Within, each use of the named layers is given what `on_input` makes of its input."""
    uses: Counter[str] = Counter()

    def enter(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        place = (name, uses[name])
        uses[name] += 1
        return (on_input(place, inputs[0]), *inputs[1:])

    hooks = [
        module.register_forward_pre_hook(partial(enter, name))
        for name in names
        for module in evaluator.modules_that_round(name)
    ]
    with removing(hooks):
        yield


def run_with(evaluator: Evaluator, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """The output with other tensors in place of the named layers' weights."""
    model = _Model(evaluator)
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    by_key = {keys[id(evaluator.layers[name].parameter)]: weight for name, weight in weights.items()}
    output: Tensor = torch.func.functional_call(model, by_key, (batch,))
    return output


@contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """Within, attention and experts run as plain operations: the fused ones have neither forward nor second
    derivatives."""
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

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.model = evaluator.loaded.model
        self._loaded = evaluator.loaded

    def forward(self, batch: Batch) -> Tensor:
        return self._loaded(batch)
