"""The main job as its user runs it: separate processes, real Postgres, Ray, a real pretrained encoder."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compressed_tensors.quantization import QuantizationConfig
from sqlalchemy import Engine, func, select

from db.candidates import candidates
from db.models import put_model
from db.searches import create_search, get_search
from db.tables import ResultRow
from search.request import SearchRequest
from tests import models
from tests.aside import PATIENCE, wait_until

pytestmark = pytest.mark.long

BITFRONTIER = Path(sys.executable).with_name("bitfrontier")


@pytest.fixture
def environment(data_folder: Path) -> dict[str, str]:
    """Of a user with a data folder of their own and no database."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BITFRONTIER_", "RAY_"))}
    return kept | {"BITFRONTIER_DATA": str(data_folder), "NO_COLOR": "1", "COLUMNS": "160"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BITFRONTIER), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540, check=False)


def test_one_command_takes_a_real_model_to_a_measured_frontier(environment: dict[str, str], tmp_path: Path) -> None:
    added = run(environment, "models", "add", "minilm", str(models.minilm()))
    assert added.returncode == 0, added.stderr
    assert "BertModel" in added.stdout

    output = tmp_path / "output"
    options = ["--target", "vllm", "--samples", "8", "--sequence-length", "32", "--points", "5", "--evaluations", "10"]
    found = run(
        environment, "search", "minilm", "--budget", "avg_bits=5.25", *options, "--local", "--output", str(output)
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "uniform w5a16g64" in found.stdout
    assert "Traceback" not in found.stdout + found.stderr

    frontier = json.loads((output / "frontier.json").read_text())
    assert all(point["costs"]["avg_bits"] <= 5.25 for point in frontier["points"])
    assert {baseline["label"] for baseline in frontier["baselines"]} >= {"uniform w4a16g64", "uniform w8a16g64"}
    best = min(point["metrics"]["loss"] for point in frontier["points"])
    assert all(
        best <= baseline["metrics"]["loss"]
        for baseline in frontier["baselines"]
        if baseline["costs"]["avg_bits"] <= 5.25
    )
    with (output / "frontier.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) >= len(frontier["points"])
    assert "plotly" in (output / "frontier.html").read_text()
    (config,) = output.glob("*quantization_config*.json")
    quantization = QuantizationConfig.model_validate(json.loads(config.read_text()))
    assert quantization.config_groups


def test_an_infeasible_budget_is_refused_in_plain_words(environment: dict[str, str]) -> None:
    run(environment, "models", "add", "minilm", str(models.minilm()))
    refused = run(environment, "search", "minilm", "--budget", "avg_bits=3", "--local")
    told = refused.stdout + refused.stderr
    assert refused.returncode == 3
    assert "4.25" in told
    assert "avg_bits" in told
    assert "Traceback" not in told


@pytest.fixture
def start_worker(engine: Engine, postgres_url: str, tmp_path: Path) -> Iterator[object]:
    """Starts worker processes that hold a search for three seconds after their last sign of life."""
    settings = {"BITFRONTIER_DATABASE_URL": postgres_url, "BITFRONTIER_LEASE_SECONDS": "3"}
    workers = []

    def start(pool: str = "inprocess") -> subprocess.Popen[bytes]:
        environment = os.environ | settings | {"BITFRONTIER_POOL": pool, "BITFRONTIER_DATA": str(tmp_path)}
        workers.append(subprocess.Popen([sys.executable, "-m", "workers", "run"], env=environment))
        return workers[-1]

    yield start
    for worker in workers:
        worker.terminate()
        worker.wait(PATIENCE)


def test_a_worker_that_is_killed_loses_no_finished_measurement(engine: Engine, start_worker: object) -> None:
    assert callable(start_worker)
    put_model(engine, "minilm", str(models.minilm()), None)
    request = {
        "model": "minilm",
        "target": "vllm",
        "calibration": {"samples": 8, "sequence_length": 64},
        "budgets": {"avg_bits": 5.25},
        "sensitivity": ["kl"],
        "optimizer": {"points": 10, "evaluations": 30},
    }
    search, _ = create_search(engine, SearchRequest.model_validate(request))
    first = start_worker()
    wait_until(lambda: sum(candidate.loss is not None for candidate in candidates(engine, search.id)) >= 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {one.number: one.metrics["calibration_loss"] for one in candidates(engine, search.id) if one.metrics}
    assert get_search(engine, search.id).state == "running"

    start_worker()
    wait_until(lambda: get_search(engine, search.id).state == "succeeded")
    done = get_search(engine, search.id)
    assert done.attempt == 2
    assert done.summary is not None
    # What the first attempt computed is this search's own.
    assert done.summary["reused"] == 0
    with engine.connect() as connection:
        assert done.summary["computed"] == connection.scalar(select(func.count()).select_from(ResultRow))
    after = {one.number: one.metrics["calibration_loss"] for one in candidates(engine, search.id)}
    assert after.items() >= before.items()
