"""`export`: a point as the file of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from api.catalog import ExportDocument
from api.client import DEFAULT_URL, Client, Refused
from api.client import File as Download
from api.commands.console import out, print_json, writing
from api.commands.options import File, Json, Url, complete_format, complete_search, examples

EXPORT_EXAMPLES = examples(
    ("point 5 of search 1, for vLLM", "bitfrontier export 1 --point 5 --format vllm -o quantization_config.json"),
    ("which formats can carry that point, and how each is used", "bitfrontier export 1 --point 5 --list"),
    ("every format there is", "bitfrontier export --list"),
)


def export(
    search_id: Annotated[
        int | None,
        typer.Argument(metavar="ID", help="Number of the search.", min=1, autocompletion=complete_search),
    ] = None,
    point: Annotated[int | None, typer.Option(help="Number of the point.", show_default=False)] = None,
    format: Annotated[str, typer.Option(help="Format; see --list.", autocompletion=complete_format)] = "json",
    listing: Annotated[bool, typer.Option("--list", help="Show the formats, and write nothing.")] = False,
    output: File = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Write a point as the file another tool loads."""
    if not listing and (search_id is None or point is None):
        raise typer.BadParameter("name a search and a point, or ask for a --list", param_hint="ID and --point")
    if (search_id is None) != (point is None):
        raise typer.BadParameter("a search and a point go together", param_hint="ID and --point")
    with Client(url) as client:
        if search_id is None or point is None:
            _list_formats(client.targets().exports, as_json=as_json)
        elif listing:
            _list_for_point(client, search_id, point, as_json=as_json)
        else:
            file = client.export(search_id, point, format)
            written = _saved(file, output) if output is not None else None
            if as_json:
                about = {"search": search_id, "point": point, "format": format, "name": file.name}
                print_json(about | ({"file": written} if written else {"content": file.text}))
            elif written:
                out.print(f"Wrote {written}")
            else:
                typer.echo(file.text)


def _saved(file: Download, path: Path) -> str:
    with writing(path):
        return str(file.save(path))


def _list_formats(exports: list[ExportDocument], *, as_json: bool) -> None:
    if as_json:
        print_json({"exports": exports})
        return
    for export in exports:
        out.print(f"[bold]{escape(export.name)}[/]  {escape(export.description)}")
        out.print(f"    {escape(export.carries)}")
        out.print(f"    [dim]{escape(export.use)}[/]")


def _list_for_point(client: Client, search_id: int, point: int, *, as_json: bool) -> None:
    """Which formats can carry a point, else why not, and the command that uses each."""
    from search.exports import loaded_from

    model, rows = client.search(search_id).model, []
    source = loaded_from(next((known.source for known in client.models() if known.name == model), None))
    for export in client.targets().exports:
        command = export.use.format(file=export.filename, search=search_id, point=point, model=model, source=source)
        refused = _refusal(client, search_id, point, export.name)
        rows.append({"name": export.name, "command": command, "refused": refused})
    if as_json:
        print_json({"search": search_id, "point": point, "exports": rows})
        return
    for row in rows:
        # A command is to be copied: it is not broken, whatever the width of the terminal.
        refused = f"[dim]not: {escape(row['refused'])}[/]" if row["refused"] else escape(str(row["command"]))
        out.print(f"[bold]{escape(str(row['name']))}[/]\n    {refused}", soft_wrap=True)


def _refusal(client: Client, search_id: int, point: int, format: str) -> str | None:
    """Why a format cannot carry a point. Raises Refused where no format could be asked for."""
    try:
        client.export(search_id, point, format)
    except Refused as error:
        if not error.problem.type.endswith(":export-refused"):
            raise
        return error.problem.detail
    return None
