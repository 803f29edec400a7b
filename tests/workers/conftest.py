"""Models and an evaluator's parts that the tests of this room share; each is built once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import models
from workers.models import LoadedModel, load_model

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
