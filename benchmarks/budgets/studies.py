"""The models, and three disjoint splits of their data for every seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from benchmarks.proxies.subjects import evaluator_of
from benchmarks.rivals.rivals import WIDTHS
from search.request import Calibration, SpaceRequest
from search.space import Space, build_space
from search.targets import find_target
from tests import models
from workers.evaluator import Evaluator, EvaluatorSpec

CROPS = 24


@dataclass(frozen=True)
class Study:
    """A model with the schemes of its layers, its data by seed, and how many configurations its search may measure.

    With `channels`, so many output channels of a layer are a unit; `layers` is then the study of whole layers, whose
    uniform and other tools' configurations are this one's too.
    """

    name: str
    title: str
    build: Callable[[int], Evaluator]
    schemes: tuple[str, ...]
    evaluations: int
    data: str
    ignore: tuple[str, ...] = ()
    channels: int | None = None
    layers: Study | None = None

    def space(self, evaluator: Evaluator) -> Space:
        """Every layer its own unit, or every group of channels."""
        granularity: Literal["channels", "layer"] = "channels" if self.channels else "layer"
        request = SpaceRequest(
            schemes=self.schemes, ignore=self.ignore, granularity=granularity, channels=self.channels
        )
        return build_space(evaluator.inventory, request, find_target("generic"))


def text(source: Path, samples: int, length: int, seed: int) -> Evaluator:
    """A model on the Python reference."""
    calibration = Calibration(dataset="python-docs", samples=samples, sequence_length=length, seed=seed)
    return Evaluator.build(EvaluatorSpec(str(source), calibration))


def minilm(seed: int) -> Evaluator:
    """all-MiniLM-L6-v2, a sentence encoder."""
    return text(models.minilm(), 32, 128, seed)


def smollm2(seed: int) -> Evaluator:
    """SmolLM2-135M. Raises FileNotFoundError until scripts/fetch_models.py has fetched it."""
    source = models.smollm2()
    if source is None:
        raise FileNotFoundError("SmolLM2-135M is not there; run scripts/fetch_models.py")
    return text(source, 32, 256, seed)


def efficientnet(seed: int) -> Evaluator:
    """EfficientNet-Lite0 with its ImageNet weights, on crops of three parts of two photographs."""
    model, preprocess = models.efficientnet_lite0()
    generator = np.random.default_rng(seed)
    splits = [{"pixel_values": preprocess(_crops(third, generator))} for third in range(3)]
    return evaluator_of(model, "EfficientNetLite0", splits, 8)


SMOLLM2 = Study(
    "smollm2",
    "SmolLM2-135M, 210 linear layers",
    smollm2,
    tuple(f"w{bits}a16g64" for bits in WIDTHS),
    96,
    "32 × 256 tokens of the Python reference",
    ignore=("model.embed_tokens", "lm_head"),
)

STUDIES = {
    study.name: study
    for study in (
        Study(
            "minilm",
            "MiniLM-L6, 36 linear layers",
            minilm,
            tuple(f"w{bits}a16g64" for bits in WIDTHS),
            120,
            "32 × 128 tokens of the Python reference",
            ignore=("embeddings.*",),
        ),
        Study(
            "efficientnet",
            "EfficientNet-Lite0, 50 layers",
            efficientnet,
            tuple(f"w{bits}a16" for bits in WIDTHS),
            80,
            f"{CROPS} crops of one third of two photographs",
        ),
        SMOLLM2,
        replace(
            SMOLLM2,
            name="smollm2-channels",
            title="SmolLM2-135M, 2 430 groups of 64 output channels",
            channels=64,
            evaluations=120,
            layers=SMOLLM2,
        ),
    )
}
"""By name."""


def _crops(third: int, generator: np.random.Generator) -> np.ndarray:
    """Squares of one third of the two photographs, half of them mirrored, as N × 3 × 224 × 224 in 0…1."""
    photographs = [
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images
    ]
    crops: list[Tensor] = []
    for index in range(CROPS):
        photograph = photographs[index % len(photographs)]
        width = photograph.shape[2] // 3
        part = photograph[:, :, third * width : (third + 1) * width]
        length = int(generator.integers(width * 3 // 4, width))
        top, left = (int(generator.integers(0, size - length + 1)) for size in part.shape[1:])
        crop = part[None, :, top : top + length, left : left + length]
        crop = nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if generator.random() < 0.5 else crop)
    return torch.cat(crops).numpy()
