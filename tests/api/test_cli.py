"""The command line against a real server; a thread does what a worker does."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from rich.console import Console
from sqlalchemy import Engine

from api.client import Client
from api.commands.report import frontier_table
from api.commands.service import free_port
from api.resources import loss_text
from db.searches import get_search
from tests.api import examples
from tests.api.terminal import a_worker, finish, run


def test_search_follows_prints_and_writes(served: str, engine: Engine, tmp_path: Path) -> None:
    examples.store_model(engine)
    arguments = ["--budget", "avg_bits=5.25", "--budget", "size_mb=40", "--target", "vllm"]
    arguments += ["--schemes", "w4a16g64,w6a16g64,w8a16g64", "--quantizer", "mse", "--samples", "8"]
    arguments += ["--method", "evolution", "--limit", "kind:linear:size_mb=40"]
    arguments += ["--limit", "*.output.dense:avg_bits=6.25"]
    arguments += ["--sequence-length", "64", "--sensitivity", "kl,hessian_trace", "--seed", "3"]
    with a_worker(engine, finish):
        result = run("search", examples.MODEL, *arguments, "--output", str(tmp_path / "out"), url=served)
    assert result.exit_code == 0, result.output
    assert f"{served}/searches/1" in result.output
    assert "★ best" in result.output
    assert "uniform" in result.output
    assert "\x1b" not in result.output, "no colours where nobody looks"
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
    with Client(served) as client:
        document = client.frontier(1)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(frontier_table(document, examples.MODEL))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    for number, remark in ((document.best, "★ best"), (document.knee, "knee"), (3, "over budget")):
        (row,) = (line for line in lines if line.split()[:1] == [str(number)])
        point = next(p for p in [*document.points, *(document.baselines or [])] if p.number == number)
        for value in (remark, f"{point.costs['avg_bits']:.2f}", loss_text(point.metrics["loss"])):
            assert value in row, "only the configuration's name is cut"


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
        assert "Open to everyone on this machine" in process.stdout.readline().decode()
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
    assert second.exit_code == 2
    assert "port" in second.output
