"""`up`, `api`, `worker`: the processes of the service."""

from __future__ import annotations

import os
import time
from typing import Annotated, NoReturn

import typer

from api.commands.console import out, print_json
from api.commands.options import examples
from api.commands.service import (
    AUTH_VARIABLE,
    access,
    address,
    api_command,
    interrupting_on_sigterm,
    running_service,
    say_access,
    worker_command,
)
from db.logs import FORMAT_VARIABLE

CHECK_SECONDS = 0.5

UP_EXAMPLES = examples(
    ("everything in one command", "bitfrontier up"),
    ("on another port, with a database of your own", "BITFRONTIER_DATABASE_URL=… bitfrontier up --port 9000"),
)
API_EXAMPLES = examples(("for other machines, who then need keys", "bitfrontier api --host 0.0.0.0"))
WORKER_EXAMPLES = examples(("a second worker on the same database", "BITFRONTIER_DATABASE_URL=… bitfrontier worker"))

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]


def _logging_json(as_json: bool) -> bool:
    if as_json:
        os.environ[FORMAT_VARIABLE] = "json"
    return as_json


Logs = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document that says where it is, and write logs as lines of JSON.",
        callback=_logging_json,
    ),
]


def up(host: Host = "127.0.0.1", port: Port = 8400, as_json: Logs = False) -> None:
    """Run the whole service: Postgres (embedded, unless BITFRONTIER_DATABASE_URL is set), the API and a worker."""
    url = address(host, port)
    with interrupting_on_sigterm():
        try:
            with running_service(host, port) as service:
                if as_json:
                    print_json({"url": url, "access": access(host)})
                else:
                    out.print(f"Bitfrontier is at {url} (Ctrl-C stops it)")
                    say_access(host)
                while True:
                    service.check()
                    time.sleep(CHECK_SECONDS)
        except KeyboardInterrupt:
            if not as_json:
                out.print("Stopped.")


def api(host: Host = "127.0.0.1", port: Port = 8400, as_json: Logs = False) -> None:
    """Run the API and the results page.

    On another address than loopback it asks for keys; 'keys create' makes one.
    """
    if as_json:
        print_json({"url": address(host, port), "access": access(host)})
    else:
        say_access(host)
    os.environ[AUTH_VARIABLE] = access(host)
    _become(api_command(host, port))


def worker(as_json: Logs = False) -> None:
    """Run a worker: it takes searches from the queue until it is stopped."""
    if as_json:
        print_json({"pid": os.getpid()})
    _become(worker_command())


def _become(arguments: list[str]) -> NoReturn:
    os.execv(arguments[0], arguments)  # noqa: S606 - our own interpreter and module
