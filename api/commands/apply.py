"""`apply`: write the quantized checkpoint of a point."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer


def apply(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    search_id: Annotated[int | None, typer.Argument(metavar="ID", help="Number of the search.", min=1)] = None,
    point: Annotated[int | None, typer.Option(help="Number of the point.", min=0)] = None,
    config: Annotated[
        Path | None, typer.Option(help="A bitfrontier.json that 'export' wrote, in place of ID and --point.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="What --config is applied to. Left out: the model that it names.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that 'apply' wrote.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the checkpoint again, and measure its loss on the held-out data.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a point as a checkpoint in compressed-tensors' format, which vLLM and transformers load.

    Needs the database, not a running service. The folder comes to be whole, or not at all.
    """
    arguments = ["--output", str(output)]
    if config is not None:
        if search_id is not None or point is not None or check:
            raise typer.BadParameter("stands without ID, --point and --check", param_hint="--config")
        arguments += ["--config", str(config), *(["--model", model] if model else [])]
    else:
        if search_id is None or point is None:
            raise typer.BadParameter("name a point: ID and --point, or --config FILE", param_hint="ID")
        if model is not None:
            raise typer.BadParameter("only --config can be applied to another model", param_hint="--model")
        arguments += ["--search", str(search_id), "--point", str(point)]
    for option, given in (("--overwrite", overwrite), ("--check", check), ("--json", as_json)):
        arguments += [option] * given
    _become([sys.executable, "-m", "workers", "apply", *arguments])


def _become(arguments: list[str]) -> NoReturn:
    # Signals and exit codes are then the worker's own.
    os.execv(arguments[0], arguments)  # noqa: S606 - our own interpreter and module
