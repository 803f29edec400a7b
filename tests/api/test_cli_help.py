"""Help, completion and the documentation of the command line say what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from typer.main import get_command
from typer.testing import CliRunner

from api.cli import app
from search.exports import EXPORTS
from search.metrics import METRICS
from search.targets import TARGETS
from tests.api import examples
from tests.api.terminal import run
from tests.aside import PATIENCE

DOCS = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command by its path."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = commands(command, (*path, name)) if hasattr(command, "commands") else {" ".join((*path, name)): command}
        found |= inner
    return found


COMMANDS = commands(get_command(app))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_run_and_fits_80_columns(command: str) -> None:
    shown = run(*command.split(), "--help", url="", COLUMNS="80")
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    _, _, after = shown.stdout.partition(" Examples")
    typed = [line.strip() for line in after.splitlines() if re.match(r" (\w+=\S+ )?bitfrontier ", line)]
    assert typed, "no example"
    for line in typed:
        words = re.sub(r"^\w+=\S+ ", "", line).partition("|")[0].split()[1:]
        assert any(" ".join(words).startswith(f"{one} ") or " ".join(words) == one for one in COMMANDS), line


def test_help_names_every_metric_and_target() -> None:
    shown = run("search", "--help", url="").output
    assert all(name in shown for name in (*METRICS, *TARGETS))


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"bitfrontier \d+\.\d+\.\d+\n", run("--version", url="").stdout)


def test_every_command_and_option_is_documented_and_exists() -> None:
    (table,) = re.findall(r"## Commands\n(.*?)\n## ", DOCS, re.S)
    assert set(re.findall(r"^\| `([a-z ]+)` \|", table, re.M)) == set(COMMANDS)
    options = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    long = {name for name in options if name.startswith("--")} - {"--help"}
    mentioned = set(re.findall(r"--[a-z][a-z-]+", DOCS))
    assert long - mentioned == set(), "not documented"
    assert mentioned - long - {"--help", "--version", "--install-completion", "--show-completion"} == set(), "not there"


def asked_of_bash(*words: str, url: str = "http://127.0.0.1:9") -> dict[str, str]:
    """What bash sets when the last of `words` is to be completed."""
    return {
        "_BITFRONTIER_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["bitfrontier", *words]),
        "COMP_CWORD": str(len(words)),
        "BITFRONTIER_URL": url,
    }


def completed(*words: str, **url: str) -> list[str]:
    """What bash is offered for the last of `words`."""
    done = CliRunner().invoke(app, [], env=asked_of_bash(*words, **url), prog_name="bitfrontier")
    return done.stdout.split()


def test_the_shell_asks_the_program() -> None:
    program, environment = Path(sys.executable).with_name("bitfrontier"), os.environ | asked_of_bash("sear")
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.split() == ["search"]


def test_the_shell_completes_names(served: str, engine: Engine) -> None:
    examples.finished_search(engine)
    assert completed("search", "m", "--target", "v") == ["vllm"]
    assert completed("search", "m", "--sensitivity", "kl,fi") == ["kl,fisher"]
    assert set(completed("export", "1", "--format", "")) == set(EXPORTS)
    assert completed("search", "all", url=served) == [examples.MODEL]
    assert completed("show", "", url=served) == ["1"]
    assert "w4a16g64,w8a16g64" in completed("search", "m", "--schemes", "w4a16g64,w8", url=served)
    assert completed("search", "all") == [], "and nothing where no service answers"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell: str) -> None:
    printed = CliRunner().invoke(app, [], env={"_BITFRONTIER_COMPLETE": f"source_{shell}"}, prog_name="bitfrontier")
    assert "_BITFRONTIER_COMPLETE" in printed.stdout
