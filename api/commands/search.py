"""`search`, `show`, `export`, `cancel`: asking the service and reading its answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from api.commands import report
from api.commands.client import Client
from api.commands.console import err, out, plain_words
from api.commands.service import free_port, interrupting_on_sigterm, running_service
from db.engine import data_directory
from search.metrics import METRICS
from search.request import SearchRequest

DEFAULT_URL = "http://127.0.0.1:8400"
INTERRUPTED = 130
DEFAULT_METRICS = ",".join(SearchRequest.model_fields["sensitivity"].default)

Url = Annotated[str, typer.Option("--url", envvar="BITFRONTIER_URL", help="Where the service is.")]
Budget = Annotated[
    list[str] | None,
    typer.Option("--budget", "-b", help="NAME=VALUE, for example avg_bits=4.25. Several hold together."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the frontier and the configuration.")]
File = Annotated[Path | None, typer.Option("--output", "-o", help="File to write. Left out: standard output.")]
SearchId = Annotated[int, typer.Argument(metavar="ID", help="Number of the search.", min=1)]


def search(
    model: Annotated[str, typer.Argument(help="A registered model, or a Hugging Face id such as org/name.")],
    budget: Budget = None,
    target: Annotated[str | None, typer.Option(help="Runtime that will load the result, for example vllm.")] = None,
    schemes: Annotated[str | None, typer.Option(help="Schemes separated by commas: w4a16g64,w8a16g64.")] = None,
    quantizer: Annotated[str | None, typer.Option(help="rtn or mse.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration data.")] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences or images per split.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    latency_profile: Annotated[
        str | None, typer.Option(help="Device whose latency counts, of those that 'latency list' shows.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens (or images) of a pass whose latency counts.")] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(help=f"Metrics separated by commas, of {', '.join(METRICS)}. Default: {DEFAULT_METRICS}."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN:NAME=VALUE, a budget on some layers: '*.down_proj:avg_bits=6.25'."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What the best has least of: loss, or, with --budget loss_increase=…, "
            "size_mb, avg_bits, gbitops or latency_ms."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="auto, ilp, refine or evolution.")] = None,
    points: Annotated[int | None, typer.Option(help="Budget levels swept per metric.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Most configurations to measure.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Layer or glob left at full precision.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME for layers that are settled.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which samples are drawn.")] = None,
    output: Output = None,
    local: Annotated[bool, typer.Option("--local", help="Bring a service up for this search alone.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Search the bits of every layer of MODEL under a budget, and follow it to its frontier."""
    if not (budget or limit):
        raise typer.BadParameter("name at least one budget, for example avg_bits=4.25", param_hint="--budget")
    body: dict[str, Any] = {
        "model": model,
        "target": target,
        "budgets": {name: _number(value) for name, value in _pairs(budget or [], "--budget").items()}
        | {"limits": _limits(limit or [])},
        "space": {
            "schemes": _list(schemes),
            "quantizer": quantizer,
            "ignore": ignore or None,
            "pin": _pairs(pin or [], "--pin") or None,
        },
        "calibration": {"dataset": dataset, "samples": samples, "sequence_length": sequence_length, "seed": seed},
        "latency": {"profile": latency_profile, "tokens": tokens},
        "sensitivity": _list(sensitivity),
        "optimizer": {"method": method, "objective": objective, "points": points, "evaluations": evaluations},
    }
    check: Callable[[], None] | None = None
    with ExitStack() as stack:
        if local:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            stack.enter_context(plain_words(url))
            stack.enter_context(interrupting_on_sigterm())
            check = stack.enter_context(running_service("127.0.0.1", port, _log_file())).check
        stack.enter_context(plain_words(url))
        _run(stack.enter_context(Client(url)), _given(body), output, check)


def show(search_id: SearchId, url: Url = DEFAULT_URL) -> None:
    """Print a search: its state, its frontier, where its page is."""
    with plain_words(url), Client(url) as client:
        found = client.get(f"/v1/searches/{search_id}").json()
        progress = found["progress"]
        stage = f", {found['stage']} {progress['done']} of {progress['total']}" if found["state"] == "running" else ""
        out.print(f"Search {search_id} of {escape(found['model'])}: {found['state']}{stage}")
        report.show(client, found)
        out.print(f"Results page: {client.url}{found['links']['page']}")
        report.check_succeeded(client, search_id)


def export(
    search_id: SearchId,
    point: Annotated[int, typer.Option(help="Number of the point.")],
    format: Annotated[str, typer.Option(help="json, vllm, …")] = "json",
    output: File = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write a point as the file another tool loads."""
    with plain_words(url), Client(url) as client:
        text = client.get(f"/v1/searches/{search_id}/points/{point}/config", format=format).text
    if output is None:
        typer.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
        out.print(f"Wrote {output}")


def cancel(search_id: SearchId, url: Url = DEFAULT_URL) -> None:
    """Cancel a search. A finished one stays as it is."""
    with plain_words(url), Client(url) as client:
        found = client.post(f"/v1/searches/{search_id}/cancel")
    waiting = found["state"] == "running" and found["cancel_requested"]
    out.print(f"Search {search_id}: {'being cancelled' if waiting else found['state']}")


def _run(client: Client, body: dict[str, Any], output: Path | None, check: Callable[[], None] | None) -> None:
    created = client.post("/v1/searches", body)
    search_id = created["id"]
    out.print(f"Search {search_id} of {escape(created['model'])}: {client.url}{created['links']['page']}")
    try:
        report.follow(client, search_id, check or _nothing)
    except KeyboardInterrupt:
        if check is not None:
            client.post(f"/v1/searches/{search_id}/cancel")
            err.print(f"Search {search_id} was cancelled.")
        else:
            err.print(f"The search goes on. See 'bitfrontier show {search_id}' or 'bitfrontier cancel {search_id}'.")
        raise typer.Exit(INTERRUPTED) from None
    found = report.check_succeeded(client, search_id)
    report.show(client, found)
    best = client.get(f"/v1/searches/{search_id}/frontier").json()["best"]
    if output is not None:
        for path in report.write_files(client, found, best, output):
            out.print(f"Wrote {path}")
    if check is None:
        out.print(f"Results page: {client.url}{found['links']['page']}")
    else:
        out.print(f"Results page: {DEFAULT_URL}{found['links']['page']}, while 'bitfrontier up' runs")
    if best is None:
        raise typer.Exit(1)


def _log_file() -> Path:
    """Where the processes of a local search say what they do; they would garble the progress bars."""
    folder = data_directory()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "local-search.log"


def _nothing() -> None:
    """A service that others run needs no looking after."""


def _given(value: dict[str, Any]) -> dict[str, Any]:
    """`value` without what was left out, so that the service's defaults hold."""
    kept = {name: _given(item) if isinstance(item, dict) else item for name, item in value.items()}
    return {name: item for name, item in kept.items() if item not in (None, {})}


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not (name and equals and value):
            raise typer.BadParameter(f"'{name}{equals}{value}' is not NAME=VALUE", param_hint=option)
    return {name: value for name, _, value in pairs}


def _limits(texts: list[str]) -> dict[str, dict[str, float | str]]:
    limits: dict[str, dict[str, float | str]] = {}
    for text in texts:
        # A pattern may have colons of its own: kind:embedding.
        place, _, value = text.rpartition("=")
        pattern, _, name = place.rpartition(":")
        if not (pattern and name and value):
            raise typer.BadParameter(f"'{text}' is not PATTERN:NAME=VALUE", param_hint="--limit")
        limits.setdefault(pattern, {})[name] = _number(value)
    return limits


def _number(text: str) -> float | str:
    # What is not a number goes to the service as it is: its answer names the field and what is accepted.
    try:
        return float(text)
    except ValueError:
        return text


def _list(text: str | None) -> list[str] | None:
    return [item.strip() for item in text.split(",") if item.strip()] if text is not None else None
