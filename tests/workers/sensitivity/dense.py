"""Dense Hessians of nets with a handful of weights, and all Rademacher vectors over them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from workers.calibration import Batch, Data
from workers.evaluator import Evaluator
from workers.models import LoadedModel
from workers.sensitivity.hutchinson import Piece, Place

Loss = Callable[[Tensor], Tensor]
"""Output → the loss of every sample."""


class Twice(nn.Module):
    """4 weights that are used twice, and 6 that are used once; `idle` runs, but nothing comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.config = SimpleNamespace(image_size=(1, 2), num_channels=1)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        self.idle(x)
        return self.head(torch.tanh(2 * self.body(torch.tanh(2 * self.body(x)))))


def evaluator_of(model: nn.Module, batch: Batch) -> Evaluator:
    loaded = LoadedModel(model.eval().requires_grad_(False), "image-classification", type(model).__name__, "digest")
    return Evaluator(loaded, Data([batch], [batch], [batch], "data"))


def twice() -> Evaluator:
    torch.manual_seed(1)
    return evaluator_of(Twice(), {"pixel_values": torch.randn(2, 1, 1, 2), "labels": torch.tensor([0, 2])})


def trace_of_weight(evaluator: Evaluator, name: str, batch: Batch, loss: Loss) -> float:
    """Tr(H)/n of the mean loss with respect to a layer's weight."""

    def of(weight: Tensor) -> Tensor:
        output = torch.func.functional_call(
            evaluator.loaded.model, {f"{name}.weight": weight}, (batch["pixel_values"],)
        )
        return loss(output).mean()

    return _average_trace(of, evaluator.layers[name].parameter.detach())


def traces_of_inputs(evaluator: Evaluator, name: str, batch: Batch, loss: Loss) -> list[float]:
    """Tr(H)/n of the mean loss with respect to the input of each use of a layer."""
    inputs: list[Tensor] = []

    def run(use: int, shift: Tensor | None) -> Tensor:
        inputs.clear()

        def enter(_module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            inputs.append(given[0])
            return (given[0] + shift,) if shift is not None and len(inputs) == use + 1 else given

        hook = evaluator.layers[name].module.register_forward_pre_hook(enter)
        output = loss(evaluator.loaded(batch)).mean()
        hook.remove()
        return output

    run(0, None)
    shapes = [x.shape for x in inputs]
    return [
        _average_trace(lambda shift, use=use: run(use, shift), torch.zeros(shape)) for use, shape in enumerate(shapes)
    ]


def all_signs(monkeypatch: pytest.MonkeyPatch, places: list[tuple[Place, int]]) -> range:
    """Seeds whose binary digits are the signs of all elements of `places` (with their sizes)."""
    offsets, total = {}, 0
    for place, size in places:
        offsets[place] = total
        total += size

    def signs(piece: Piece, place: Place, like: Tensor) -> Tensor:
        digits = [piece.seed >> (offsets[place] + index) & 1 for index in range(like.numel())]
        return (torch.tensor(digits).to(like) * 2 - 1).view_as(like)

    monkeypatch.setattr(Piece, "signs", signs)
    return range(2**total)


def _average_trace(function: Callable[[Tensor], Tensor], at: Tensor) -> float:
    hessian = torch.autograd.functional.hessian(function, at)
    return float(hessian.reshape(at.numel(), -1).trace()) / at.numel()
