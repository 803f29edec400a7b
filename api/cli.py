"""The command line: `bitfrontier`."""

from __future__ import annotations

import typer

from api.commands import latency, models, processes, search

app = typer.Typer(
    name="bitfrontier",
    help="How many bits should each layer get? Searches mixed-precision bit allocations under a budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(processes.up)
app.command()(search.search)
app.command()(search.show)
app.command()(search.export)
app.command()(search.cancel)
app.add_typer(models.app, name="models")
app.add_typer(latency.app, name="latency")
app.command()(processes.worker)
app.command()(processes.api)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
