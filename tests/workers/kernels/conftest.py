"""Kernels on a CPU."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workers.kernels.emulator.build import Emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Emulated]:
    """Compiles a program for the emulator, once."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels were NOT run")
    cache: Path = tmp_path_factory.mktemp("emulator")
    return functools.cache(lambda text: Emulated(text, cache))
