"""The command line against a real server; a thread does what a worker does."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from click.testing import Result
from rich.console import Console
from sqlalchemy import Engine
from typer.testing import CliRunner

from api.cli import app
from api.commands.client import Client
from api.commands.report import frontier_table
from api.commands.service import free_port
from api.resources import loss_text
from db.queue import claim, fail
from db.searches import get_search
from search.metrics import METRICS
from search.request import SearchRequest
from tests.api import examples


def run(*arguments: str, url: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"BITFRONTIER_URL": url, "COLUMNS": "160"})


@pytest.fixture
def worker(engine: Engine) -> Iterator[None]:
    """Finishes one search, when there is one."""

    def work() -> None:
        while not stopping.wait(0.1):
            held = claim(engine, "test-worker", examples.LEASE)
            if held:
                request = get_search(engine, held.search_id).request
                examples.report(engine, held, SearchRequest.model_validate(request))
                return

    stopping = threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    yield
    stopping.set()
    thread.join()


@pytest.mark.usefixtures("worker")
def test_search_follows_prints_and_writes(served: str, engine: Engine, tmp_path: Path) -> None:
    examples.store_model(engine)
    arguments = ["--budget", "avg_bits=5.25", "--budget", "size_mb=40", "--target", "vllm"]
    arguments += ["--schemes", "w4a16g64,w6a16g64,w8a16g64", "--quantizer", "mse", "--samples", "8"]
    arguments += ["--method", "evolution", "--limit", "kind:linear:size_mb=40"]
    arguments += ["--limit", "*.output.dense:avg_bits=6.25"]
    arguments += ["--sequence-length", "64", "--sensitivity", "kl,hessian_trace", "--seed", "3"]
    result = run("search", examples.MODEL, *arguments, "--output", str(tmp_path / "out"), url=served)
    assert result.exit_code == 0, result.output
    assert f"{served}/searches/1" in result.output
    assert "★ best" in result.output
    assert "uniform" in result.output
    bars = [line for line in result.output.splitlines() if "36/36" in line]
    assert [line.split("  ")[0].split(" ━")[0] for line in bars] == ["kl, about 41 s", "hessian_trace, about 41 s"]
    request = get_search(engine, 1).request
    assert request["calibration"] == {"dataset": None, "samples": 8, "sequence_length": 64, "seed": 3}
    assert request["sensitivity"] == ["kl", "hessian_trace"]
    assert request["optimizer"]["method"] == "evolution"
    assert request["budgets"]["limits"]["kind:linear"]["size_mb"] == 40
    assert request["budgets"]["limits"]["*.output.dense"]["avg_bits"] == 6.25
    assert request["space"]["ignore"] == ["lm_head"], "what was left out has its default"
    written = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"frontier.html", "frontier.csv", "frontier.json"} < set(written)
    config = next(path for name, path in written.items() if not name.startswith("frontier"))
    assert json.loads(config.read_text())["quant_method"] == "compressed-tensors"


def test_refusals_are_in_plain_words(served: str, engine: Engine) -> None:
    examples.store_model(engine)
    for arguments, words in (
        (("search", "nothing", "--budget", "avg_bits=5"), ("model", "nothing", examples.MODEL)),
        (("search", examples.MODEL, "--budget", "avg_bits=1"), ("budgets.avg_bits", "minimum")),
        (("search", examples.MODEL, "--budget", "bits=4"), ("budgets.bits", "avg_bits")),
        (("search", examples.MODEL, "--budget", "avg_bits=four"), ("budgets.avg_bits", "number")),
        (("search", examples.MODEL, "--limit", "nothing:avg_bits=5"), ("budgets.limits.nothing", "no searched layer")),
        (("search", examples.MODEL, "--budget", "avg_bits=5", "--objective", "size_mb"), ("loss_increase",)),
        (("search", examples.MODEL, "--budget", "avg_bits=5", "--method", "guess"), ("optimizer.method", "evolution")),
        (("show", "99"), ("no search 99",)),
        (("export", "99", "--point", "1"), ("no search 99",)),
        (("cancel", "99"), ("no search 99",)),
    ):
        result = run(*arguments, url=served)
        assert result.exit_code == 1, arguments
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)
        for word in words:
            assert word in result.output, result.output


@pytest.mark.parametrize("limit", ["avg_bits=5", "layer:avg_bits", "layer=5", ":avg_bits=5", "layer:avg_bits="])
def test_a_limit_is_a_pattern_and_a_budget(limit: str) -> None:
    result = run("search", examples.MODEL, "--limit", limit, url="")
    assert result.exit_code == 2
    assert "PATTERN:NAME=VALUE" in result.output


def test_a_search_has_a_budget() -> None:
    result = run("search", examples.MODEL, url="")
    assert result.exit_code == 2
    assert "at least one budget" in result.output


def test_the_table_fits_80_columns(served: str, engine: Engine) -> None:
    examples.finished_search(engine)
    document = Client(served).get("/v1/searches/1/frontier").json()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(frontier_table(document, examples.MODEL))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for number, remark in ((document["best"], "★ best"), (document["knee"], "knee"), (3, "over budget")):
        (row,) = (line for line in lines if line.split()[:1] == [str(number)])
        point = next(p for p in [*document["points"], *document["baselines"]] if p["number"] == number)
        for value in (remark, f"{point['costs']['avg_bits']:.2f}", loss_text(point["metrics"]["loss"])):
            assert value in row, "only the configuration's name is cut"


def test_help_names_every_metric() -> None:
    shown = run("search", "--help", url="")
    assert all(name in shown.output for name in METRICS)


def test_no_service_says_how_to_start_one() -> None:
    result = run("show", "1", url=f"http://127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "bitfrontier up" in result.output


def test_failed_search_exits_1_with_its_problem(served: str, engine: Engine) -> None:
    def work() -> None:
        while (held := claim(engine, "test-worker", examples.LEASE)) is None:
            time.sleep(0.05)
        problem = {"type": "x", "title": "Too little data", "status": 422, "detail": "3 of 64", "field": "calibration"}
        fail(engine, held, problem)

    thread = threading.Thread(target=work)
    thread.start()
    result = run("search", "org/name", "--budget", "avg_bits=5", url=served)
    thread.join()
    assert result.exit_code == 1
    assert "Too little data" in result.output
    assert "3 of 64" in result.output
    assert run("show", "1", url=served).exit_code == 1


def test_show_export_cancel_and_models(served: str, engine: Engine, tmp_path: Path) -> None:
    assert "No model is registered" in run("models", "list", url=served).output
    search_id = str(examples.finished_search(engine))
    assert "22,713,216" in run("models", "list", url=served).output
    shown = run("show", search_id, url=served)
    assert (shown.exit_code, "succeeded" in shown.output, "★" in shown.output) == (0, True, True)
    path = tmp_path / "deep" / "config.json"
    assert (
        run("export", search_id, "--point", "9", "--format", "vllm", "--output", str(path), url=served).exit_code == 0
    )
    printed = run("export", search_id, "--point", "9", "--format", "vllm", url=served).output
    assert json.loads(printed) == json.loads(path.read_text())
    assert "format" in run("export", search_id, "--point", "9", "--format", "toast", url=served).output
    queued = str(examples.queued_search(engine))
    assert "cancelled" in run("cancel", queued, url=served).output
    assert "succeeded" in run("cancel", search_id, url=served).output


@pytest.fixture
def up(postgres_url: str, engine: Engine) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    environment = os.environ | {"BITFRONTIER_DATABASE_URL": postgres_url}
    command = [sys.executable, "-m", "api.cli", "up", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # Whoever runs the tests in the background hands down an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout
        line = process.stdout.readline().decode()
        assert f"http://127.0.0.1:{port}" in line, line
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def _gone(children: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(children, timeout=25)
    return not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_up_serves_and_leaves_no_orphan(up: tuple[subprocess.Popen[bytes], str], number: int) -> None:
    process, url = up
    assert httpx.get(f"{url}/readyz").is_success
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    assert process.wait(30) == (0 if number != signal.SIGKILL else -number)
    assert _gone(children)


def test_up_starts_again_what_was_killed_and_refuses_a_taken_port(up: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = up
    for child in psutil.Process(process.pid).children():
        child.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            assert httpx.get(f"{url}/readyz").is_success
            break
        except httpx.TransportError:
            time.sleep(0.2)
    else:
        pytest.fail("the API did not come back")
    second = run("up", "--port", url.rpartition(":")[2], url=url)
    assert second.exit_code == 1
    assert "port" in second.output
