"""The application does what its description says, whatever is generated from that."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
from sqlalchemy import Engine

from api.app import create_app
from db.keys import create_key
from tests.api import examples
from tests.api.conftest import KEYS, serving

pytestmark = pytest.mark.long

SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"
CONFIG = Path(__file__).with_name("schemathesis.toml")


def test_schemathesis_finds_nothing(emptied: Engine) -> None:
    examples.finished_search(emptied)
    _, token = create_key(emptied, "schemathesis", {"admin"}, max_open=10**6, rate_per_minute=10**9)
    with serving(create_app(emptied, KEYS)) as url:
        done = subprocess.run(
            [
                SCHEMATHESIS,
                f"--config-file={CONFIG}",
                "run",
                f"{url}/openapi.json",
                "-H",
                f"Authorization: Bearer {token}",
            ],
            env=os.environ | {"PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            timeout=540,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    for phase in ("Examples", "Coverage", "Fuzzing", "Stateful"):
        assert f"✅ {phase}" in done.stdout.replace("  ", " "), done.stdout
