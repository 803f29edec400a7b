"""What the tests of the sensitivities share: filling a table without a service, and a net with dense Hessians."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn

from search.request import SpaceRequest
from search.space import Space, build_space
from search.targets import find_target
from workers.calibration import sample_count
from workers.evaluator import Evaluator
from workers.sensitivity import FILLS, Subject, Table
from workers.tasks import Compute, Item, Result, Task


def compute_on(evaluator: Evaluator) -> Compute:
    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        return [task.run(evaluator, item) for item in items]

    return compute


def fill(metric: str, evaluator: Evaluator, space: Space, *also: str) -> Table:
    """The table of a metric; `also` are further metrics of the same search."""
    return FILLS[metric](compute_on(evaluator), subject(evaluator, space, metric, *also))


def subject(evaluator: Evaluator, space: Space, *metrics: str) -> Subject:
    sizes = tuple(map(sample_count, evaluator.batches("calibration")))
    return Subject(space, sizes, frozenset(metrics))


def space_of(evaluator: Evaluator, *schemes: str, target: str = "generic", **request: object) -> Space:
    asked = SpaceRequest.model_validate({"schemes": schemes, **request})
    return build_space(evaluator.inventory, asked, find_target(target))


class TinyNet(nn.Module):
    """A convolution, a nonlinearity and a classifier: 36 + 60 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(4, 5)
        self.config = SimpleNamespace(image_size=7, num_channels=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.gelu(self.conv(images)).mean((2, 3)))


class GroupedNet(nn.Module):
    """A convolution, a grouped and a depthwise one with batch norm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.head = nn.Linear(12, 5)
        self.config = SimpleNamespace(image_size=7, num_channels=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(images))
        x = torch.relu(self.norm(self.grouped(x)))
        return self.head(torch.nn.functional.silu(self.depthwise(x)).mean((2, 3)))
