"""`models add`, `models list`."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.commands.client import Client
from api.commands.console import out, plain_words
from api.commands.search import DEFAULT_URL, Url

app = typer.Typer(no_args_is_help=True, help="Register models, and list those that are.")


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The name searches will use.")],
    source: Annotated[str, typer.Argument(help="A Hugging Face id, a folder or a GGUF file on this machine.")],
) -> None:
    """Load the model at SOURCE once, and register it as NAME. Needs the database, not a running service."""
    inspected = subprocess.run([sys.executable, "-m", "workers", "inspect", name, source], check=False)
    raise typer.Exit(inspected.returncode)


@app.command("list")
def list_all(url: Url = DEFAULT_URL) -> None:
    """The registered models."""
    with plain_words(url), Client(url) as client:
        models = client.get("/v1/models").json()["models"]
    if not models:
        out.print("No model is registered. Add one with 'bitfrontier models add NAME SOURCE'.")
        return
    table = Table("name", "architecture", "task", "source")
    table.add_column("parameters", justify="right")
    table.add_column("layers", justify="right")
    for model in models:
        counts = (f"{model[name]:,}" if model[name] is not None else "—" for name in ("parameters", "layers"))
        texts = (escape(model[name] or "—") for name in ("name", "architecture", "task", "source"))
        table.add_row(*texts, *counts)
    out.print(table)
