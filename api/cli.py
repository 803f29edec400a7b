"""The command line: `bitfrontier`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from api.commands import apply, exporting, keys, latency, models, processes, results, search
from api.commands.exits import Commands
from api.commands.options import examples

SEARCHES, SERVICE, CATALOG = "Searches", "The service", "What a search may name"

APPLY_EXAMPLES = examples(
    ("point 5 of search 1 as a checkpoint", "bitfrontier apply 1 --point 5 --output my-model-w4"),
    ("a configuration that 'export' wrote", "bitfrontier apply --config bitfrontier.json --output my-model-w4"),
)

app = typer.Typer(
    cls=Commands,
    name="bitfrontier",
    help="How many bits should each layer get? Searches mixed-precision bit allocations under a budget.",
    epilog=examples(
        ("the whole service, its results page at http://127.0.0.1:8400", "bitfrontier up"),
        ("a model, and a search under a budget", "bitfrontier models add my-model /path/to/folder"),
        ("", "bitfrontier search my-model --target vllm --budget avg_bits=4.25"),
        ("its result, for vLLM", "bitfrontier export 1 --point 5 --format vllm"),
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bitfrontier {version('bitfrontier')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command(epilog=search.SEARCH_EXAMPLES, rich_help_panel=SEARCHES)(search.search)
app.command(epilog=search.FOLLOW_EXAMPLES, rich_help_panel=SEARCHES)(search.follow)
app.command("list", epilog=results.LIST_EXAMPLES, rich_help_panel=SEARCHES)(results.list_searches)
app.command(epilog=results.SHOW_EXAMPLES, rich_help_panel=SEARCHES)(results.show)
app.command(epilog=results.CANCEL_EXAMPLES, rich_help_panel=SEARCHES)(results.cancel)
app.command(epilog=results.SENSITIVITIES_EXAMPLES, rich_help_panel=SEARCHES)(results.sensitivities)
app.command(epilog=exporting.EXPORT_EXAMPLES, rich_help_panel=SEARCHES)(exporting.export)
app.command(epilog=APPLY_EXAMPLES, rich_help_panel=SEARCHES)(apply.apply)
app.add_typer(models.app, name="models", rich_help_panel=CATALOG)
app.add_typer(latency.app, name="latency", rich_help_panel=CATALOG)
app.command(epilog=processes.UP_EXAMPLES, rich_help_panel=SERVICE)(processes.up)
app.command(epilog=processes.API_EXAMPLES, rich_help_panel=SERVICE)(processes.api)
app.command(epilog=processes.WORKER_EXAMPLES, rich_help_panel=SERVICE)(processes.worker)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVICE)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
