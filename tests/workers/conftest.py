"""Models and an evaluator's parts that the tests of this room share; each is built once a session."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine
from torch import Tensor

from db.models import put_model
from tests import models
from tests.workers.searching import working
from workers.models import LoadedModel, load_model
from workers.worker import Worker

ModelFolder = Callable[[str], Path]
Loader = Callable[[str], LoadedModel]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another on busy cores make work this small a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The folder of a model of tests/models.py, by the name of the function that makes it. Read it only."""

    @cache
    def made(name: str) -> Path:
        make = getattr(models, name)
        return make() if name == "minilm" else make(tmp_path_factory.mktemp(name))

    return made


@pytest.fixture
def loaded(model_folder: ModelFolder) -> Loader:
    """Loads a model of tests/models.py afresh."""
    return lambda name: load_model(str(model_folder(name)), torch.device("cpu"))


@pytest.fixture
def datasets_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that requests may name data sets of, empty; what lies beside it is out of bounds."""
    monkeypatch.setenv("BITFRONTIER_DATA", str(tmp_path))
    folder = tmp_path / "datasets"
    folder.mkdir()
    return folder


@pytest.fixture
def digits(engine: Engine, model_folder: ModelFolder, datasets_folder: Path) -> Engine:
    """An engine with the digits ViT registered, and held-out digits in the data sets folder."""
    return _with_digits(engine, model_folder, datasets_folder)


@pytest.fixture(scope="module")
def lasting_digits(
    own_engine: Engine, model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """As `digits`; what was searched stays for the module's next test."""
    data = tmp_path_factory.mktemp("lasting")
    (data / "datasets").mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("BITFRONTIER_DATA", str(data))
        yield _with_digits(own_engine, model_folder, data / "datasets")


def _with_digits(engine: Engine, model_folder: ModelFolder, datasets: Path) -> Engine:
    images, labels = models.digits_arrays()
    np.savez(datasets / "digits.npz", images=images[-models.HELD_OUT :], labels=labels[-models.HELD_OUT :])
    put_model(engine, "digits-vit", str(model_folder("digits_vit")), None)
    return engine


@pytest.fixture
def changed(
    digits: Engine, model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[[Callable[[dict[str, Tensor]], None]], None]:
    """Registers the digits ViT as "changed", after a function has changed its weights in place."""

    def register(change: Callable[[dict[str, Tensor]], None]) -> None:
        shutil.copytree(model_folder("digits_vit"), tmp_path / "changed")
        weights = load_file(tmp_path / "changed" / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
        put_model(digits, "changed", str(tmp_path / "changed"), None)

    return register


@pytest.fixture
def worker(digits: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker at work in a thread."""
    monkeypatch.setenv("BITFRONTIER_POOL", "inprocess")
    worker = Worker(digits)
    with working(worker):
        yield worker
