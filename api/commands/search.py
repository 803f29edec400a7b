"""`search` and `follow`: a search from the command to its frontier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from api.client import DEFAULT_URL, Client
from api.commands import request as asked
from api.commands.console import Interrupted, err, out, print_json
from api.commands.exits import ExitCode
from api.commands.options import (
    COMMON,
    Folder,
    Json,
    SearchId,
    Target,
    Url,
    complete_model,
    complete_scheme,
    examples,
    one_of,
    some_of,
)
from api.commands.progress import show, shown_on
from api.commands.report import show_frontier, write_files
from api.commands.service import free_port, interrupting_on_sigterm, log_file, running_service
from api.documents import SearchDocument
from search.metrics import METRICS
from search.request import SearchRequest

OnInterrupt = Literal["detach", "cancel"]
Wanted = Annotated[
    OnInterrupt | None,
    typer.Option(
        "--on-interrupt",
        help="What Ctrl-C does to the search: it goes on (detach), or ends (cancel). Default: detach, and cancel with "
        "--local. A second Ctrl-C leaves at once.",
        rich_help_panel=COMMON,
    ),
]

SPACE, MEASURE, OPTIMIZE = "What may be chosen", "How it is measured", "How it is searched"
DEFAULT_METRICS = ",".join(SearchRequest.model_fields["sensitivity"].default)
OBJECTIVES = ("loss", "size_mb", "avg_bits", "gbitops", "latency_ms")
METHODS = ("auto", "ilp", "refine", "evolution")

SEARCH_EXAMPLES = examples(
    (
        "the best of 4.25 bits a weight and at most 70 MB, for vLLM",
        "bitfrontier search my-model --target vllm -b avg_bits=4.25 -b 70MB",
    ),
    ("without a running service; files of the result", "bitfrontier search my-model -b 4.25bits --local -o result"),
    ("the smallest that loses no more", "bitfrontier search my-model -b loss_increase=0.01 --objective size_mb"),
    ("start it and go away", "bitfrontier search my-model -b 4.25bits --detach"),
)
FOLLOW_EXAMPLES = examples(
    ("wait for search 1, then see its frontier", "bitfrontier follow 1"),
    ("in a script: what is the best point?", "bitfrontier follow 1 --json | jq .frontier.best"),
    ("give up on it with Ctrl-C", "bitfrontier follow 1 --on-interrupt cancel"),
)


def search(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A registered model, or a Hugging Face id such as org/name.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", metavar="NAME=VALUE", help="avg_bits=4.25, or 70MB. Several hold together."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN:NAME=VALUE", help="A budget on some layers: '*.down_proj:avg_bits=6.25'."),
    ] = None,
    target: Target = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help=f"What the best has least of: {', '.join(OBJECTIVES)}. A cost needs --budget loss_increase=….",
            autocompletion=one_of(OBJECTIVES),
        ),
    ] = None,
    request: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A request as JSON, - for standard input; options have the last word."),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(help="w4a16g64,w8a16g64", autocompletion=complete_scheme, rich_help_panel=SPACE),
    ] = None,
    quantizer: Annotated[
        str | None, typer.Option(help="rtn or mse.", autocompletion=one_of(("rtn", "mse")), rich_help_panel=SPACE)
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="What takes a scheme: layer, block or channels.",
            autocompletion=one_of(("layer", "block", "channels")),
            rich_help_panel=SPACE,
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Output channels that share a scheme.", rich_help_panel=SPACE)
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers left as they are; '' for none.", rich_help_panel=SPACE),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=SCHEME", help="Layers whose scheme is settled.", rich_help_panel=SPACE),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Calibration data.", rich_help_panel=MEASURE)] = None,
    samples: Annotated[int | None, typer.Option(help="Sequences or images per split.", rich_help_panel=MEASURE)] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.", rich_help_panel=MEASURE)] = None,
    seed: Annotated[int | None, typer.Option(help="Which samples are drawn.", rich_help_panel=MEASURE)] = None,
    latency_profile: Annotated[
        str | None,
        typer.Option(help="Device whose latency counts; see 'latency list'.", rich_help_panel=MEASURE),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens (or images) of a pass whose latency counts.", rich_help_panel=MEASURE)
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help=f"Metrics of {', '.join(METRICS)}. Default: {DEFAULT_METRICS}.",
            autocompletion=some_of(lambda: METRICS),
            rich_help_panel=OPTIMIZE,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(METHODS)}.", autocompletion=one_of(METHODS), rich_help_panel=OPTIMIZE),
    ] = None,
    points: Annotated[
        int | None, typer.Option(help="Budget levels swept per metric.", rich_help_panel=OPTIMIZE)
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Most configurations to measure.", rich_help_panel=OPTIMIZE)
    ] = None,
    output: Folder = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the number of the search, and leave it.", rich_help_panel=COMMON)
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Bring a service up for this search alone.", rich_help_panel=COMMON)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the request as JSON, and send nothing.", rich_help_panel=COMMON)
    ] = False,
    on_interrupt: Wanted = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Search the bits of every layer of MODEL under a budget, and follow it to its frontier."""
    told = {
        "model": model,
        "target": target,
        "budgets": asked.budgets(budget or []) | {"limits": asked.limits(limit or [])},
        "space": {
            "schemes": asked.listed(schemes),
            "quantizer": quantizer,
            "granularity": granularity,
            "channels": channels,
            "ignore": asked.patterns(ignore),
            "pin": asked.pins(pin or []),
        },
        "calibration": {"dataset": dataset, "samples": samples, "sequence_length": sequence_length, "seed": seed},
        "latency": {"profile": latency_profile, "tokens": tokens},
        "sensitivity": asked.listed(sensitivity),
        "optimizer": {"method": method, "objective": objective, "points": points, "evaluations": evaluations},
    }
    body = asked.merged(asked.read_request(request), asked.given(told))
    if "model" not in body:
        raise typer.BadParameter("name a model, or a --request that does", param_hint="MODEL")
    if not body.get("budgets"):
        raise typer.BadParameter("name at least one budget, for example avg_bits=4.25", param_hint="--budget")
    if detach and local:
        raise typer.BadParameter("a service that is brought up for one search cannot be left", param_hint="--detach")
    if dry_run:
        print_json(body)
        return
    with ExitStack() as stack:
        pulse = _nothing
        if local:
            url, pulse = stack.enter_context(_local_service(quiet=as_json))
        client = stack.enter_context(Client(url))
        created = client.create(body)
        if detach:
            _print_created(client, created, as_json=as_json)
            return
        if not as_json:
            out.print(f"Search {created.id} of {escape(created.model)}: {client.url}{created.links['page']}")
        ending = on_interrupt or ("cancel" if local else "detach")
        page = f"{DEFAULT_URL}{created.links['page']}, while 'bitfrontier up' runs" if local else None
        _finish(client, created.id, output, page, ending=ending, pulse=pulse, as_json=as_json)


def follow(
    search_id: SearchId,
    output: Folder = None,
    on_interrupt: Wanted = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Follow a search to its frontier. The exit code says how it ended."""
    with Client(url) as client:
        client.search(search_id)
        _finish(client, search_id, output, None, ending=on_interrupt or "detach", pulse=_nothing, as_json=as_json)


def _finish(
    client: Client,
    search_id: int,
    output: Path | None,
    page: str | None,
    *,
    ending: OnInterrupt,
    pulse: Callable[[], None],
    as_json: bool,
) -> None:
    """Follow a search to its end, then print and write what it found."""
    with _interruptible(client, search_id, ending):
        show(client.events(search_id, pulse=pulse), shown_on(err, quiet=as_json))
    found = client.result(search_id)
    frontier = client.frontier(search_id)
    written = write_files(client, found, frontier.best, output) if output is not None else []
    if as_json:
        print_json({"search": found, "frontier": frontier, "files": [str(path) for path in written]})
    else:
        show_frontier(found, frontier)
        for path in written:
            out.print(f"Wrote {path}")
        out.print(f"Results page: {page or client.url + found.links['page']}")
    if frontier.best is None:
        raise typer.Exit(ExitCode.INFEASIBLE)


@contextmanager
def _interruptible(client: Client, search_id: int, ending: OnInterrupt) -> Iterator[None]:
    """Let Ctrl-C end the search, or leave it; then raise Interrupted. A second Ctrl-C ends everything at once."""
    try:
        yield
    except KeyboardInterrupt:
        if ending == "cancel":
            state = client.cancel(search_id).state
            ended = f"was {state} already" if state in ("succeeded", "failed") else "is cancelled"
            raise Interrupted(f"search {search_id} {ended}") from None
        raise Interrupted(
            f"search {search_id} goes on: 'bitfrontier follow {search_id}' shows it, "
            f"'bitfrontier cancel {search_id}' ends it"
        ) from None


@contextmanager
def _local_service(*, quiet: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """A service for one search: its address, and what is to be called now and then to look after it."""
    port = free_port()
    if not quiet:
        err.print(f"Starting Postgres, the API and a worker; they write to {log_file()}")
    with interrupting_on_sigterm(), running_service("127.0.0.1", port, log_file()) as service:
        yield f"http://127.0.0.1:{port}", service.check


def _print_created(client: Client, search: SearchDocument, *, as_json: bool) -> None:
    if as_json:
        print_json(search)
        return
    # The number alone: it is what a script goes on with.
    typer.echo(search.id)
    err.print(f"{client.url}{search.links['page']}; 'bitfrontier follow {search.id}' shows it")


def _nothing() -> None:
    """A service that others run needs no looking after."""
