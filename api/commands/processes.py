"""`up`, `api`, `worker`: the processes of the service."""

from __future__ import annotations

import os
import time
from typing import Annotated, NoReturn

import typer

from api.commands.console import out, plain_words
from api.commands.service import address, api_command, interrupting_on_sigterm, running_service, worker_command

CHECK_SECONDS = 0.5

Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]


def up(host: Host = "127.0.0.1", port: Port = 8400) -> None:
    """Run the whole service: Postgres (embedded, unless BITFRONTIER_DATABASE_URL is set), the API and a worker."""
    url = address(host, port)
    with plain_words(url), interrupting_on_sigterm():
        try:
            with running_service(host, port) as service:
                out.print(f"Bitfrontier is at {url} (Ctrl-C stops it)")
                while True:
                    service.check()
                    time.sleep(CHECK_SECONDS)
        except KeyboardInterrupt:
            out.print("Stopped.")


def api(host: Host = "127.0.0.1", port: Port = 8400) -> None:
    """Run the API and the results page."""
    _become(api_command(host, port))


def worker() -> None:
    """Run a worker: it takes searches from the queue until it is stopped."""
    _become(worker_command())


def _become(arguments: list[str]) -> NoReturn:
    os.execv(arguments[0], arguments)  # noqa: S606 - our own interpreter and module
