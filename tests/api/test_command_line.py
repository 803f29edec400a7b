"""A request as a command: what the page shows can be typed, and asks for the same."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from api.cli import app
from api.command_line import command_line, curl_line
from search.inventory import LayerKind
from search.request import SearchRequest
from search.targets import TARGETS

URL = "http://127.0.0.1:8400"

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}(/[A-Za-z0-9][A-Za-z0-9._-]{0,9})?", fullmatch=True)
# What a shell might take for something else: quotes, spaces, dollars, stars, dashes in front, equals signs and colons.
patterns = st.text(
    st.characters(codec="utf-8", min_codepoint=0x20, exclude_characters="\x7f\x85"), min_size=1, max_size=12
)
patterns = patterns | st.sampled_from(["*.down_proj", "-b", "--json", "kind", "a=b", "a:b=c", "'", "$(ls)", "lm_head"])
amounts = st.floats(1e-9, 1e12) | st.integers(1, 10**6)
schemes = st.sampled_from(["w3a16g64", "w4a16g64", "w4a16g64asym", "w5a16g64", "w6a16g64", "w8a16g64", "w16a16"])
bounds = ["avg_bits", "size_mb", "gbitops", "latency_ms"]
limits = st.dictionaries(st.sampled_from(bounds), amounts, min_size=1)
kinds = st.sampled_from(LayerKind.__args__).map("kind:{}".format)  # type: ignore[attr-defined]


def some(
    fields: dict[str, st.SearchStrategy[Any]], **always: st.SearchStrategy[Any]
) -> st.SearchStrategy[dict[str, Any]]:
    """Documents with any of `fields`, and `always` those."""
    return st.fixed_dictionaries(always, optional=fields)


requests = some(
    {
        "target": st.sampled_from(sorted(TARGETS)),
        "calibration": some(
            {
                "dataset": st.just("python-docs") | names,
                "samples": st.integers(2, 4096),
                "sequence_length": st.integers(8, 8192),
                "seed": st.integers(0, 2**31 - 1),
            }
        ),
        "space": some(
            {
                "schemes": st.lists(schemes, min_size=1, max_size=5),
                "quantizer": st.sampled_from(["rtn", "mse"]),
                "granularity": st.sampled_from(["layer", "block"]),
                "ignore": st.lists(patterns, max_size=3),
                "pin": st.dictionaries(patterns, schemes, max_size=3),
            }
        )
        | st.integers(1, 10**6).map(lambda channels: {"granularity": "channels", "channels": channels}),
        "latency": some({"tokens": st.integers(1, 10**6)}, profile=patterns),
        "sensitivity": st.lists(st.sampled_from(["fisher", "kl", "hessian_trace"]), min_size=1, max_size=3),
        "optimizer": some(
            {
                "method": st.sampled_from(["auto", "ilp", "refine", "evolution"]),
                "points": st.integers(1, 200),
                "evaluations": st.integers(1, 10_000),
            }
        ),
    },
    model=names,
    budgets=some(
        {
            **dict.fromkeys(bounds, amounts),
            "limits": st.dictionaries(
                kinds | patterns.filter(lambda text: not text.startswith("kind:")), limits, max_size=3
            ),
        },
        loss_increase=amounts,
    ),
).filter(lambda body: "latency" not in body or body.get("space", {}).get("granularity") != "channels")


def typed(line: str) -> SearchRequest:
    """What the command line asks for when `line` is typed."""
    program, *arguments = shlex.split(line)
    assert program == "bitfrontier"
    result = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    return SearchRequest.model_validate_json(result.stdout)


@settings(max_examples=25, deadline=None)
@given(requests)
def test_what_is_typed_asks_for_the_same(body: dict[str, Any]) -> None:
    request = SearchRequest.model_validate(body)
    assert typed(command_line(request)) == request


@settings(max_examples=25, deadline=None)
@given(requests)
def test_what_curl_posts_asks_for_the_same(body: dict[str, Any]) -> None:
    request = SearchRequest.model_validate(body)
    words = shlex.split(curl_line(request, URL))
    assert words[:2] == ["curl", f"{URL}/v1/searches"]
    assert SearchRequest.model_validate_json(words[-1]) == request


def test_the_objective_is_typed_too() -> None:
    body = {"model": "m", "budgets": {"loss_increase": 0.01}, "optimizer": {"objective": "size_mb"}}
    request = SearchRequest.model_validate(body)
    assert typed(command_line(request)) == request


def test_defaults_are_left_out() -> None:
    request = SearchRequest.model_validate({"model": "my-model", "budgets": {"avg_bits": 4.25, "size_mb": 70}})
    assert command_line(request) == "bitfrontier search my-model --budget avg_bits=4.25 --budget size_mb=70"
    assert json.loads(shlex.split(curl_line(request, URL))[-1]) == {
        "model": "my-model",
        "budgets": {"avg_bits": 4.25, "size_mb": 70},
    }


def test_what_a_shell_would_expand_is_quoted() -> None:
    body = {"model": "m", "budgets": {"limits": {"*.down_proj": {"avg_bits": 6.25}}}, "space": {"ignore": []}}
    line = command_line(SearchRequest.model_validate(body))
    assert line == "bitfrontier search m --limit '*.down_proj:avg_bits=6.25' --ignore ''"


@pytest.mark.parametrize(
    ("typed_budget", "budgets"),
    [
        ("70MB", {"size_mb": 70}),
        ("1.5GB", {"size_mb": 1500}),
        ("4.25bits", {"avg_bits": 4.25}),
        ("12 ms", {"latency_ms": 12}),
        ("loss_increase=0.01", {"loss_increase": 0.01}),
    ],
)
def test_a_budget_may_be_its_amount(typed_budget: str, budgets: dict[str, float]) -> None:
    result = CliRunner().invoke(app, ["search", "m", "-b", typed_budget, "--dry-run"])
    assert json.loads(result.stdout) == {"model": "m", "budgets": budgets}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-b", "avg_bits=4", "-b", "avg_bits=5"], "avg_bits is given twice, 4.0 and 5.0"),
        (["-b", "avg_bits=4", "-b", "4.5bits"], "avg_bits is given twice, 4.0 and 4.5"),
        (["--limit", "*:avg_bits=6", "--limit", "*:avg_bits=3"], "*:avg_bits is given twice, 6.0 and 3.0"),
        (["--pin", "*query=w4a16", "--pin", "*query=w8a16"], "*query is given twice, w4a16 and w8a16"),
    ],
)
def test_what_is_given_twice_is_refused_and_not_silently_the_last(options: list[str], told: str) -> None:
    result = CliRunner().invoke(app, ["search", "m", "-b", "size_mb=70", *options, "--dry-run"])
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())
