"""Evaluators that the tests of the sensitivities share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from search.request import Calibration
from tests import models
from tests.workers.sensitivity.dense import evaluator_of
from tests.workers.sensitivity.support import GroupedNet, TinyNet
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def tiny() -> Evaluator:
    """A net small enough for dense Hessians, with labels."""
    torch.manual_seed(0)
    loaded = LoadedModel(TinyNet().eval().requires_grad_(False), "image-classification", "TinyNet", "digest")
    batches = [{"pixel_values": torch.randn(4, 1, 7, 7), "labels": torch.randint(0, 5, (4,))} for _ in range(2)]
    return Evaluator(loaded, Data(batches, batches, batches, "data"))


@pytest.fixture(autouse=True)
def _at_full_precision(request: pytest.FixtureRequest) -> None:
    """What one test applied to an evaluator that all share, the next does not find there."""
    for name in {"tiny", "minilm"} & set(request.fixturenames):
        request.getfixturevalue(name).apply({})


@pytest.fixture(scope="session")
def minilm() -> Evaluator:
    return Evaluator.build(EvaluatorSpec(str(models.minilm()), Calibration(samples=8, sequence_length=32)))


@pytest.fixture(scope="session")
def bert(model_folder: Callable[[str], Path]) -> Evaluator:
    return Evaluator.build(EvaluatorSpec(str(model_folder("tiny_bert")), Calibration(samples=4, sequence_length=16)))


@pytest.fixture(
    scope="session",
    params=["digits_vit", "digits_resnet", "tiny_llama", "tiny_gpt2", "tiny_moe", "tiny_bert"],
)
def any_evaluator(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Evaluator:
    """One of every kind of model."""
    source = str(model_folder(request.param))
    if request.param.startswith("tiny"):
        return Evaluator.build(EvaluatorSpec(source, Calibration(samples=4, sequence_length=16)))
    images, labels = models.digits_arrays()
    batch = {"pixel_values": torch.from_numpy(images[-8:]), "labels": torch.from_numpy(labels[-8:])}
    return Evaluator(load_model(source, torch.device("cpu")), Data([batch, batch], [batch], [batch], "digits"))


@pytest.fixture(scope="session")
def grouped() -> Evaluator:
    """A net with a grouped and a depthwise convolution."""
    torch.manual_seed(0)
    return evaluator_of(GroupedNet(), {"pixel_values": torch.randn(4, 1, 7, 7), "labels": torch.randint(0, 5, (4,))})
