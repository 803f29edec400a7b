"""`latency profile`, `list`, `export`, `import`: what layers take on a device, measured there and known elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.catalog import LatencyProfileDocument
from api.client import DEFAULT_URL, Client
from api.commands.computing import compute
from api.commands.console import WrongUse, out, print_json, writing
from api.commands.database import database
from api.commands.options import Json, Url, examples
from search.errors import NotFound
from search.latency_profile import MOST_BYTES, read_profile

app = typer.Typer(no_args_is_help=True, help="Measure what layers take on a device, for budgets on latency.")

PROFILE_EXAMPLES = examples(
    ("one token, and a batch of 16", "bitfrontier latency profile my-model --tokens 1 --tokens 16"),
    ("some schemes on the second GPU", "bitfrontier latency profile my-model --schemes w4a16g64,w8a8 --device cuda:1"),
)
LIST_EXAMPLES = examples(("the devices whose latency a search may bound", "bitfrontier latency list"))
EXPORT_EXAMPLES = examples(("take it elsewhere", 'bitfrontier latency export "NVIDIA H100 80GB HBM3" h100.json'))
IMPORT_EXAMPLES = examples(("what was measured elsewhere", "bitfrontier latency import h100.json"))

Given = Annotated[Path, typer.Argument(metavar="FILE", help="A file that 'export' wrote.")]


@app.command("profile", epilog=PROFILE_EXAMPLES)
def profile(
    model: Annotated[str, typer.Argument(help="A registered model, or a Hugging Face id such as org/name.")],
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens (or images) of a forward pass; may stand several times.", min=1)
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="Separated by commas. Left out: all that kernels know.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Left out: a GPU where there is one.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is stored already, too.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what MODEL's layers take on this machine, and store it. Needs the database, not a running service."""
    arguments = [argument for count in tokens or [1] for argument in ("--tokens", str(count))]
    for option, value in (("--schemes", schemes), ("--device", device)):
        arguments += [option, value] if value is not None else []
    arguments += ["--again"] * again
    compute("latency", [*arguments, "--", model], quiet=as_json)
    if as_json:
        from db.latency import list_profiles

        with database() as engine:
            # The first is the one that was last added to.
            print_json(LatencyProfileDocument.of(list_profiles(engine)[0]))


@app.command("list", epilog=LIST_EXAMPLES)
def list_all(as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """The devices with a profile."""
    with Client(url) as client:
        profiles = client.latency_profiles()
    if as_json:
        print_json({"profiles": profiles})
        return
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
        texts = (found.device, found.key, found.driver, found.backend, found.created)
        table.add_row(*map(escape, texts), f"{found.products:,}")
    out.print(table)


@app.command("export", epilog=EXPORT_EXAMPLES)
def export(
    name: Annotated[str, typer.Argument(help="The device, or a profile's key.")],
    file: Annotated[Path, typer.Argument(help="File to write.")],
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Write the profile of a device as a file; of several, the one that was last added to."""
    with Client(url) as client:
        profiles = client.latency_profiles()
        keys = [found.key for found in profiles if name in (found.device, found.key)]
        if not keys:
            there = list(dict.fromkeys(found.device for found in profiles))
            raise NotFound(f"there is no latency profile '{name}'", field="NAME", value=name, accepted=there)
        found = client.latency_profile(keys[0])
    with writing(file, "FILE"):
        found.save(file)
    if as_json:
        print_json({"key": keys[0], "file": str(file)})
    else:
        out.print(f"Wrote {file}")


@app.command("import", epilog=IMPORT_EXAMPLES)
def import_file(file: Given, as_json: Json = False) -> None:
    """Store the profile of a device elsewhere. Needs the database, not a running service."""
    from db.latency import put_profile

    found = read_profile(_content(file))
    with database() as engine:
        stored = put_profile(engine, found)
    if as_json:
        print_json(LatencyProfileDocument.of(stored))
    else:
        out.print(f"{escape(stored.device)} ({stored.key}): {len(stored.times)} products are known")


def _content(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            # One byte too many is refused by its number, however much there is.
            return opened.read(MOST_BYTES + 1)
    except OSError as error:
        raise WrongUse(f"{file} cannot be read: {error.strerror}", field="FILE", value=str(file)) from error
