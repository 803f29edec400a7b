"""`models add`, `models list`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from api.catalog import ModelDocument
from api.client import DEFAULT_URL, Client
from api.commands.computing import compute
from api.commands.console import out, print_json
from api.commands.database import database
from api.commands.options import Json, Url, examples

app = typer.Typer(no_args_is_help=True, help="Register models, and list those that are.")

ADD_EXAMPLES = examples(
    ("a folder in Hugging Face's format", "bitfrontier models add my-model /path/to/folder"),
    ("a GGUF file in the place of an earlier one", "bitfrontier models add my-model model.gguf --replace"),
    ("from the hub", "bitfrontier models add smollm HuggingFaceTB/SmolLM2-135M"),
)
LIST_EXAMPLES = examples(("what a search may name", "bitfrontier models list"))


@app.command("add", epilog=ADD_EXAMPLES)
def add(
    name: Annotated[str, typer.Argument(help="The name searches will use.")],
    source: Annotated[str, typer.Argument(help="A Hugging Face id, a folder or a GGUF file on this machine.")],
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of what NAME brought in before.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Load the model at SOURCE once, and register it as NAME. Needs the database, not a running service.

    What lies outside of the models roots (BITFRONTIER_MODELS) is linked or copied into the first of them.
    """
    asked = [*(["--replace"] if replace else []), "--", name, source]
    compute("inspect", asked, quiet=as_json)
    if as_json:
        from db.models import get_model

        with database() as engine:
            model = get_model(engine, name)
        assert model is not None
        print_json(ModelDocument.of(model))


@app.command("list", epilog=LIST_EXAMPLES)
def list_all(as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """The registered models."""
    with Client(url) as client:
        models = client.models()
    if as_json:
        print_json({"models": models})
        return
    if not models:
        out.print("No model is registered. Add one with 'bitfrontier models add NAME SOURCE'.")
        return
    table = Table("name", "architecture", "task", "source")
    table.add_column("parameters", justify="right")
    table.add_column("layers", justify="right")
    for model in models:
        counts = (f"{count:,}" if count is not None else "—" for count in (model.parameters, model.layers))
        texts = (escape(text or "—") for text in (model.name, model.architecture, model.task, model.source))
        table.add_row(*texts, *counts)
    out.print(table)
