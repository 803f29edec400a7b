"""`search --local` on a tiny model: no service runs before it, and none after it, however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from api.documents import FrontierDocument, SearchDocument
from tests.api.terminal import terminal
from tests.aside import PATIENCE, wait_until
from tests.models import tiny_bert

SEARCH = ("search", "tiny", "-b", "avg_bits=5.25", "--sequence-length", "16", "--points", "4", "--local")


@pytest.fixture(scope="class")
def environment(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a user with a data folder of their own, a registered model, and no database."""
    mine = {"BITFRONTIER_DATA": str(data_folder), "BITFRONTIER_DATABASE_URL": "", "BITFRONTIER_POOL": "inprocess"}
    source = tiny_bert(tmp_path_factory.mktemp("models") / "tiny")
    added = bitfrontier(mine, "models", "add", "tiny", str(source))
    assert added.returncode == 0, added.stderr
    return mine


def bitfrontier(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli", *arguments]
    everything = os.environ | environment
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)


def left_behind(environment: dict[str, str]) -> list[str]:
    """The processes that still have the data folder."""
    folder, found = environment["BITFRONTIER_DATA"], []
    for process in psutil.process_iter():
        try:
            if folder in process.environ().get("BITFRONTIER_DATA", "") or folder in " ".join(process.cmdline()):
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return found


class TestLocal:
    def test_ctrl_c_cancels_it_and_leaves_nothing_running(self, environment: dict[str, str]) -> None:
        # Enough to be long at it.
        asked = (*SEARCH, "--samples", "512", "--evaluations", "2000")
        with terminal(*asked, **environment) as opened:
            opened.wait_for("fisher")
            opened.ctrl_c()
            assert opened.leave() == 130, opened.shown
            assert "search 1 is cancelled" in " ".join(opened.shown.split())
            assert "Traceback" not in opened.shown
        wait_until(lambda: not left_behind(environment), "nothing is left")

    def test_with_json_it_prints_the_result_and_nothing_else(self, environment: dict[str, str]) -> None:
        found = bitfrontier(environment, *SEARCH, "--samples", "4", "--evaluations", "8", "--json")
        assert found.returncode == 0, found.stderr
        assert found.stderr == ""
        document = json.loads(found.stdout)
        search = SearchDocument.model_validate(document["search"])
        assert (search.id, search.state) == (2, "succeeded"), "the first one was cancelled, and is not taken up again"
        frontier = FrontierDocument.model_validate(document["frontier"])
        assert all(point.fits for point in frontier.points)
        wait_until(lambda: not left_behind(environment), "nothing is left")
