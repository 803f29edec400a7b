from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import socket, sys, threading
def refused(*_): raise AssertionError("opened a connection")
socket.socket.connect = refused
import {module}
heavy = {{"torch", "ray", "transformers", "cupy", "workers"}} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""


@pytest.mark.parametrize("module", ["api.app", "api.cli"])
def test_import_is_lean(module: str) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT.format(module=module)], check=True)
