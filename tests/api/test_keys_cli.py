"""Keys on the command line, and the command line with a key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta

import pytest
from click.testing import Result
from sqlalchemy import Engine
from typer.testing import CliRunner

from api.cli import app
from api.commands import console, processes
from api.commands.service import access
from db.keys import find_key, list_keys, revoke_key
from db.searches import create_search
from search.request import SearchRequest
from tests.api import examples

Run = Callable[..., Result]

TOKEN = re.compile(r"bf_[A-Za-z0-9_-]{43}")


@pytest.fixture
def run(postgres_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Run:
    # A console takes the width of the terminal that it was made in.
    monkeypatch.setattr(console.out, "width", 160)

    def run(*arguments: str, **environment: str) -> Result:
        given = {"BITFRONTIER_DATABASE_URL": postgres_url, "BITFRONTIER_KEY": ""} | environment
        return CliRunner().invoke(app, list(arguments), env=given)

    return run


def row_of(listed: Result, name: str) -> list[str]:
    (row,) = (line for line in listed.output.splitlines() if f" {name} " in line)
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_create_prints_the_token_once_and_how_to_use_it(run: Run, engine: Engine) -> None:
    made = run("keys", "create", "ci", "--scope", "read", "--expires", "90d", "--max-open", "7", "--rate", "50")
    assert made.exit_code == 0, made.output
    token, used = TOKEN.findall(made.output)
    assert used == token
    assert f"BITFRONTIER_KEY={token} bitfrontier models list" in made.output
    key = find_key(engine, token)
    assert key is not None
    assert (key.name, key.scopes, key.max_open, key.rate_per_minute) == ("ci", {"read"}, 7, 50)
    assert key.expires_at is not None
    assert key.expires_at - key.created_at == timedelta(days=90)
    assert token not in run("keys", "list").output


def test_list_shows_who_there_is(run: Run, engine: Engine) -> None:
    assert "bitfrontier keys create NAME" in run("keys", "list").output
    for name, options in (("ci", ["--max-open", "3"]), ("old", ["--scope", "admin"]), ("[red]", ["--expires", "12h"])):
        assert run("keys", "create", name, *options).exit_code == 0
    run("keys", "revoke", "old")
    key = next(key for key in list_keys(engine) if key.name == "ci")
    create_search(engine, SearchRequest.model_validate(examples.REQUEST), key=key)
    listed = run("keys", "list")
    header = [cell.strip() for cell in listed.output.splitlines()[1].strip("┃").split("┃")]
    assert header == ["name", "scopes", "created", "expires", "last used", "revoked", "open searches"]
    name, scopes, created, expires, used, revoked, searches = row_of(listed, "ci")
    assert (name, scopes, expires, used, revoked, searches) == ("ci", "write", "—", "—", "—", "1 of 3")
    assert created.endswith("UTC")
    assert row_of(listed, "old")[5].endswith("UTC")
    assert row_of(listed, "[red]")[3].endswith("UTC")


def test_revoke_says_the_same_twice(run: Run) -> None:
    run("keys", "create", "ci")
    first, second = run("keys", "revoke", "ci"), run("keys", "revoke", "ci")
    for result in (first, second):
        assert (result.exit_code, "The key 'ci' is revoked" in result.output) == (0, True)
    unknown = run("keys", "revoke", "cd")
    assert unknown.exit_code == 2
    assert "there is no key 'cd'" in unknown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ci"], ["a key 'ci' already"]),
        ([" "], ["cannot be the name"]),
        (["n" * 101], ["1 to 100 characters"]),
        (["a\nb"], ["cannot be the name"]),
        (["new", "--scope", "root"], ["'root'", "'read'", "'write'", "'admin'"]),
        (["new", "--expires", "soon"], ["'soon' is not a duration", "90d"]),
        (["new", "--expires", "-1d"], ["'-1d' is not a duration"]),
        (["new", "--expires", "0d"], ["must expire later"]),
        (["new", "--expires", "99999999w"], ["within a hundred years"]),
        (["new", "--expires", "9" * 400 + "w"], ["is not a duration"]),
        (["new", "--rate", "0"], ["--rate"]),
        (["new", "--max-open", str(2**40)], ["max_open"]),
    ],
)
def test_what_is_not_accepted_is_named(run: Run, engine: Engine, arguments: list[str], words: list[str]) -> None:
    run("keys", "create", "ci")
    refused = run("keys", "create", *arguments)
    assert refused.exit_code == 2
    assert isinstance(refused.exception, SystemExit)
    assert "Traceback" not in refused.output
    flat = " ".join(refused.output.replace("│", " ").split())
    for word in words:
        assert word in flat, refused.output
    assert len(list_keys(engine)) == 1
    assert not TOKEN.search(refused.output)


def test_client_sends_its_key_and_says_when_one_is_asked_for(run: Run, keyed_served: str, engine: Engine) -> None:
    def show(key: str) -> Result:
        return run("models", "list", BITFRONTIER_URL=keyed_served, BITFRONTIER_KEY=key)

    missing = show("")
    assert missing.exit_code == 2
    assert "this service asks for a key: set BITFRONTIER_KEY (bitfrontier keys create NAME)" in missing.output
    (token, _) = TOKEN.findall(run("keys", "create", "ci").output)
    accepted = show(f"{token}\n")
    assert (accepted.exit_code, "No model is registered" in accepted.output) == (0, True)
    revoke_key(engine, "ci")
    for wrong in ("bf_wrong", "bf_" + "x" * 43):
        refused = show(wrong)
        assert (refused.exit_code, "BITFRONTIER_KEY is not known here" in refused.output) == (2, True)
        assert wrong not in refused.output
    garbled = show("bf_\N{SNOWMAN}")
    assert (garbled.exit_code, "is not a key" in garbled.output) == (2, True)


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        ("127.0.0.1", "", "open"),
        ("localhost", "", "open"),
        ("::1", "", "open"),
        ("0.0.0.0", "", "keys"),
        ("bits.lan", "", "keys"),
        ("127.0.0.1", "keys", "keys"),
        ("0.0.0.0", "open", "open"),
    ],
)
def test_keys_are_asked_for_beyond_loopback(
    monkeypatch: pytest.MonkeyPatch, host: str, given: str, expected: str
) -> None:
    monkeypatch.setenv("BITFRONTIER_AUTH", given)
    assert access(host) == expected


def test_unknown_access_is_refused_in_plain_words(run: Run) -> None:
    refused = run("api", BITFRONTIER_AUTH="nobody")
    assert refused.exit_code == 2
    assert "BITFRONTIER_AUTH is 'nobody'; accepted: keys, open" in refused.output


@pytest.mark.parametrize(("given", "expected"), [("", "open"), ("keys", "keys")])
def test_api_is_open_on_loopback_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    # What takes the place of this process is tested where processes are; here, what it is told.
    monkeypatch.setattr(processes, "_become", lambda arguments: None)
    monkeypatch.setenv("BITFRONTIER_AUTH", given)
    printed = run("api")
    assert printed.exit_code == 0
    words = "Open to everyone on this machine: no key is asked for on loopback."
    assert (words in printed.output) == (expected == "open")
    assert os.environ["BITFRONTIER_AUTH"] == expected
