"""Commands that compute are those of the `workers` process, which is started for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import typer

from search.errors import BitfrontierError


class NotDone(BitfrontierError):
    """What was to be computed was not; the process that was to do it has said why."""

    status = 422
    type = "not-done"
    title = "It was not done"


def compute(command: str, arguments: Sequence[str], *, quiet: bool = False) -> None:
    """Run a command of `python -m workers`. What it says is shown as it comes, unless `quiet`.

    Where it does not succeed: raises NotDone with its last words if `quiet`, else leaves with its exit code.
    """
    asked = [sys.executable, "-m", "workers", command, *arguments]
    if not quiet:
        code = subprocess.run(asked, check=False).returncode
        if code:
            raise typer.Exit(code)
        return
    done = subprocess.run(asked, check=False, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"{command} ended with code {done.returncode}"]
        raise NotDone(words[-1])
