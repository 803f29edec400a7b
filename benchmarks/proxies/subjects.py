"""The four models, their data and their spaces."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

from search.request import Calibration, SpaceRequest
from search.space import Space, build_space
from search.targets import find_target
from tests import models
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel


@dataclass(frozen=True)
class Study:
    """A model with the schemes of its layers, and the sizes at which its configurations are compared.

    `bands` are mean bits of a code; empty: every configuration is measured, and the bands lie at the quantiles of their
    sizes. `data` says what it is calibrated on and measured on.
    """

    name: str
    title: str
    build: Callable[[], Evaluator]
    schemes: tuple[str, ...]
    bands: tuple[float, ...]
    data: str
    ignore: tuple[str, ...] = ()

    def space(self, evaluator: Evaluator) -> Space:
        """Every layer its own unit."""
        request = SpaceRequest(schemes=self.schemes, ignore=self.ignore)
        return build_space(evaluator.inventory, request, find_target("generic"))


def digits() -> Evaluator:
    """A convolutional net of six layers that reads 8 × 8 digits, trained here."""
    model, images, labels = _trained_digits()
    splits = [{"pixel_values": images[part], "labels": labels[part]} for part in (slice(-720, -360), slice(-360, None))]
    return evaluator_of(copy.deepcopy(model), "DigitsNet", splits, 360)


def minilm() -> Evaluator:
    """all-MiniLM-L6-v2, a sentence encoder."""
    calibration = Calibration(dataset="python-docs", samples=24, sequence_length=128)
    return Evaluator.build(EvaluatorSpec(str(models.minilm()), calibration))


def efficientnet() -> Evaluator:
    """EfficientNet-Lite0 with its ImageNet weights, on crops of two photographs: the left halves to calibrate on, the
    right halves to measure on."""
    model, preprocess = models.efficientnet_lite0()
    generator = np.random.default_rng(0)
    splits = [{"pixel_values": preprocess(_crops(side, 24, generator))} for side in ("left", "right")]
    return evaluator_of(model, "EfficientNetLite0", splits, 8)


def smollm2() -> Evaluator:
    """SmolLM2-135M. Raises FileNotFoundError until scripts/fetch_models.py has fetched it."""
    source = models.smollm2()
    if source is None:
        raise FileNotFoundError("SmolLM2-135M is not there; run scripts/fetch_models.py")
    calibration = Calibration(dataset="python-docs", samples=4, sequence_length=128)
    return Evaluator.build(EvaluatorSpec(str(source), calibration))


STUDIES = {
    study.name: study
    for study in (
        Study(
            "digits",
            "Digits CNN, 6 layers × 4 schemes",
            digits,
            ("w2a16", "w3a16", "w4a16", "w6a16"),
            (),
            "360 digits, 360 others",
        ),
        Study(
            "minilm",
            "MiniLM-L6, 36 layers × 6 schemes",
            minilm,
            tuple(f"w{bits}a16g64" for bits in (2, 3, 4, 5, 6, 8)),
            (2.5, 3.0, 4.0, 5.0),
            "24 × 128 tokens of the Python reference, as many of other pages",
            ignore=("embeddings.*",),
        ),
        Study(
            "efficientnet",
            "EfficientNet-Lite0, 50 layers × 5 schemes",
            efficientnet,
            tuple(f"w{bits}a16" for bits in (3, 4, 5, 6, 8)),
            (3.5, 4.0, 5.0, 6.0),
            "24 crops of the left halves of two photographs, 24 of the right halves",
        ),
        Study(
            "smollm2",
            "SmolLM2-135M, 210 layers × 5 schemes",
            smollm2,
            tuple(f"w{bits}a16g64" for bits in (2, 3, 4, 6, 8)),
            (2.5, 3.0, 4.0, 5.0),
            "4 × 128 tokens of the Python reference, as many of other pages",
            ignore=("model.embed_tokens", "lm_head"),
        ),
    )
}
"""By name."""


@cache
def _trained_digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The net, all images and their labels; the last 720 were not trained on."""
    found = load_digits()
    # Each person who wrote digits wrote dozens in a row.
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order, None].astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(found.target[order])
    threads = torch.get_num_threads()
    # The same sums in the same order, so that the weights are the same each time.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 16, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(24, 20, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.Linear(80, 48), nn.ReLU()),
        nn.Linear(48, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(images) - 720).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    # The size of its images, which a model of no library does not tell.
    model.config = type("Config", (), {"image_size": 8, "num_channels": 1})()
    return model.eval(), images, labels


def _crops(side: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` squares of one half of the two photographs, half of them mirrored, as N × 3 × 224 × 224 in 0…1."""
    photographs = [
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images
    ]
    crops = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        middle = photograph.shape[2] // 2
        half = photograph[:, :, :middle] if side == "left" else photograph[:, :, middle:]
        length = int(generator.integers(160, half.shape[2]))
        top, left = (int(generator.integers(0, size - length + 1)) for size in half.shape[1:])
        crop = half[None, :, top : top + length, left : left + length]
        crop = nn.functional.interpolate(crop, (224, 224), mode="bilinear", antialias=True)
        crops.append(crop.flip(3) if generator.random() < 0.5 else crop)
    return torch.cat(crops).numpy()


def evaluator_of(model: nn.Module, architecture: str, splits: list[dict[str, Tensor]], size: int) -> Evaluator:
    """An evaluator of a model from no file, with its samples in batches of `size`: those to calibrate on, to accept on
    and to report on; of two splits the second does both."""
    weights = [value for _, value in sorted(model.state_dict().items())]
    loaded = LoadedModel(
        model.eval().requires_grad_(False), "image-classification", architecture, _digest([architecture, *weights])
    )
    batches = [
        [
            {key: value[start : start + size] for key, value in split.items()}
            for start in range(0, len(split["pixel_values"]), size)
        ]
        for split in splits
    ]
    values = [value for split in splits for _, value in sorted(split.items())]
    return Evaluator(loaded, Data(batches[0], batches[1], batches[-1], _digest(values)))


def _digest(parts: Sequence[object]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.numpy().tobytes() if isinstance(part, Tensor) else str(part).encode())
    return total.hexdigest()
