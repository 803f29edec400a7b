"""`latency profile`, `list`, `export`, `import`: what layers take on a device, measured there and known elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.commands.client import Client
from api.commands.console import Refused, out, plain_words
from api.commands.search import DEFAULT_URL, Url
from db.engine import connect, migrate
from db.latency import put_profile
from search.latency_profile import MOST_BYTES, read_profile

app = typer.Typer(no_args_is_help=True, help="Measure what layers take on a device, for budgets on latency.")

Given = Annotated[Path, typer.Argument(metavar="FILE", help="A file that 'export' wrote.")]


@app.command("profile")
def profile(
    model: Annotated[str, typer.Argument(help="A registered model, or a Hugging Face id such as org/name.")],
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens (or images) of a forward pass; may stand several times.", min=1)
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="Separated by commas. Left out: all that kernels know.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Left out: a GPU where there is one.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is stored already, too.")] = False,
) -> None:
    """Measure what MODEL's layers take on this machine, and store it. Needs the database, not a running service."""
    arguments = [argument for count in tokens or [1] for argument in ("--tokens", str(count))]
    for option, value in (("--schemes", schemes), ("--device", device)):
        arguments += [option, value] if value is not None else []
    arguments += ["--again"] * again
    measured = subprocess.run([sys.executable, "-m", "workers", "latency", *arguments, "--", model], check=False)
    raise typer.Exit(measured.returncode)


@app.command("list")
def list_all(url: Url = DEFAULT_URL) -> None:
    """The devices with a profile."""
    with plain_words(url), Client(url) as client:
        profiles = client.get("/v1/latency-profiles").json()["profiles"]
    if not profiles:
        out.print("There is no latency profile. Measure one with 'bitfrontier latency profile MODEL'.")
        return
    table = Table()
    # These are to be copied, whatever the width of the terminal.
    table.add_column("device", no_wrap=True)
    table.add_column("key", no_wrap=True)
    for name in ("driver", "kernels", "measured"):
        table.add_column(name)
    table.add_column("products", justify="right")
    for found in profiles:
        texts = (escape(found[name]) for name in ("device", "key", "driver", "backend", "created"))
        table.add_row(*texts, f"{found['products']:,}")
    out.print(table)


@app.command("export")
def export(
    name: Annotated[str, typer.Argument(help="The device, or a profile's key.")],
    file: Annotated[Path, typer.Argument(help="File to write.")],
    url: Url = DEFAULT_URL,
) -> None:
    """Write the profile of a device as a file; of several, the one that was last added to."""
    with plain_words(url), Client(url) as client:
        profiles = client.get("/v1/latency-profiles").json()["profiles"]
        keys = [found["key"] for found in profiles if name in (found["device"], found["key"])]
        if not keys:
            there = list(dict.fromkeys(found["device"] for found in profiles))
            problem = {"title": "Not found", "detail": f"there is no latency profile '{name}'", "accepted": there}
            raise Refused(problem)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(client.get(f"/v1/latency-profiles/{keys[0]}").content)
    out.print(f"Wrote {file}")


@app.command("import")
def import_file(file: Given) -> None:
    """Store the profile of a device elsewhere. Needs the database, not a running service."""
    with plain_words(DEFAULT_URL):
        found = read_profile(_content(file))
        engine = connect()
        try:
            migrate(engine)
            stored = put_profile(engine, found)
        finally:
            engine.dispose()
    out.print(f"{escape(stored.device)} ({stored.key}): {len(stored.times)} products are known")


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            # One byte too many is refused by its number, however much there is.
            return opened.read(MOST_BYTES + 1)
    except OSError as error:
        detail = f"{file} cannot be read: {error.strerror}"
        raise Refused({"title": "The file cannot be read", "detail": detail}) from error
