"""`keys create`, `keys list`, `keys revoke`: who may use a service that asks for keys."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from api.client import KEY_VARIABLE
from api.commands.console import out, print_json
from api.commands.database import database
from api.commands.options import Json, examples
from api.times import moment
from db.grants import MAX_OPEN, RATE_PER_MINUTE, Scope
from search.errors import NotFound

if TYPE_CHECKING:
    from db.keys import Key

app = typer.Typer(
    no_args_is_help=True, help="Make, list and revoke API keys. Needs the database, not a running service."
)

CREATE_EXAMPLES = examples(
    ("for a laptop", "bitfrontier keys create laptop"),
    ("for a dashboard, for three months", "bitfrontier keys create dashboard --scope read --expires 90d"),
)
LIST_EXAMPLES = examples(("who may use the service", "bitfrontier keys list"))
REVOKE_EXAMPLES = examples(("shut one out", "bitfrontier keys revoke laptop"))

UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
# More than is accepted, and less than what a timedelta can hold.
MOST_DIGITS = 8

Name = Annotated[str, typer.Argument(help="What the key is called in the list.")]


def _duration(text: str) -> timedelta:
    matched = re.fullmatch(rf"([0-9]{{1,{MOST_DIGITS}}})([mhdw])", text)
    if matched is None:
        raise typer.BadParameter(f"'{text}' is not a duration; accepted: a number and m, h, d or w, for example 90d")
    return int(matched[1]) * UNITS[matched[2]]


@app.command("create", epilog=CREATE_EXAMPLES)
def create(
    name: Name,
    scope: Annotated[
        Scope,
        typer.Option(help="read; write, also start and cancel searches; admin, also see those of all keys."),
    ] = "write",
    expires: Annotated[
        timedelta | None,
        typer.Option(parser=_duration, metavar="DURATION", help="For example 12h or 90d. Left out: never."),
    ] = None,
    max_open: Annotated[int, typer.Option(help="Most unfinished searches at once.", min=1)] = MAX_OPEN,
    rate: Annotated[int, typer.Option(help="Most requests a minute, of each API process.", min=1)] = RATE_PER_MINUTE,
    as_json: Json = False,
) -> None:
    """Make a key, and print it once."""
    from db.keys import create_key

    with database() as engine:
        key, token = create_key(engine, name, {scope}, expires=expires, max_open=max_open, rate_per_minute=rate)
    if as_json:
        print_json(_document(key) | {"token": token})
        return
    until = f", until {moment(key.expires_at)}" if key.expires_at else ""
    out.print(f"The key '{escape(key.name)}' ({scope}{until}). It is shown this once:")
    # As it is, whatever the width of the terminal: it is to be copied.
    typer.echo(token)
    out.print("Use it as in:")
    typer.echo(f"  {KEY_VARIABLE}={token} bitfrontier models list")


@app.command("list", epilog=LIST_EXAMPLES)
def list_all(as_json: Json = False) -> None:
    """The keys, without what opens anything."""
    from db.keys import list_keys
    from db.searches import open_by_key

    with database() as engine:
        keys, unfinished = list_keys(engine), open_by_key(engine)
    if as_json:
        print_json({"keys": [_document(key) | {"open_searches": unfinished.get(key.id, 0)} for key in keys]})
        return
    if not keys:
        out.print("There is no key. Make one with 'bitfrontier keys create NAME'.")
        return
    table = Table("name", "scopes", "created", "expires", "last used", "revoked")
    table.add_column("open searches", justify="right")
    for key in keys:
        times = (key.created_at, key.expires_at, key.last_used_at, key.revoked_at)
        searches = f"{unfinished.get(key.id, 0)} of {key.max_open}"
        ended = "dim" if _ended(key) else ""
        table.add_row(escape(key.name), ", ".join(sorted(key.scopes)), *map(moment, times), searches, style=ended)
    out.print(table)


@app.command("revoke", epilog=REVOKE_EXAMPLES)
def revoke(name: Name, as_json: Json = False) -> None:
    """Refuse a key from now on. Its searches stay."""
    from db.keys import list_keys, revoke_key

    with database() as engine:
        before = {key.name: key.revoked_at for key in list_keys(engine)}
        try:
            revoke_key(engine, name)
        except NotFound as error:
            error.accepted = [known for known, revoked_at in before.items() if revoked_at is None]
            raise
        if as_json:
            print_json(next(_document(key) for key in list_keys(engine) if key.name == name))
            return
    if before.get(name):
        out.print(f"The key '{escape(name)}' is revoked since {moment(before[name])}.")
    else:
        out.print(f"The key '{escape(name)}' is revoked; a running service refuses it within seconds.")


def _ended(key: Key) -> bool:
    return key.revoked_at is not None or (key.expires_at is not None and key.expires_at <= datetime.now(UTC))


def _document(key: Key) -> dict[str, Any]:
    """A key as JSON, without what opens anything."""
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "last_used_at", "revoked_at")}
    return {
        "name": key.name,
        "scopes": sorted(key.scopes),
        "max_open": key.max_open,
        "rate_per_minute": key.rate_per_minute,
        **{name: time.isoformat() if time else None for name, time in times.items()},
    }
