"""Kernels on a CPU."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from workers.kernels.emulator.build import Emulated


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what was compiled is kept from run to run, in pytest's cache, under a digest of all that it was made of."""
    if not request.config.pluginmanager.has_plugin("cacheprovider"):
        return tmp_path_factory.mktemp("kernels")
    return request.config.cache.mkdir("kernels")  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def emulated(kept: Path) -> Callable[[str], Emulated]:
    """Compiles a program for the emulator, once."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels were NOT run")
    return functools.cache(lambda text: Emulated(text, kept))
