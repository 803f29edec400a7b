"""A latency profile survives its file, and a file that anybody may have written is refused with what is wrong in it."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import InvalidRequest
from search.latency_profile import (
    MOST_BYTES,
    CrossCheck,
    LatencyProfile,
    Quantiles,
    Shape,
    Times,
    read_profile,
    to_json,
    write_profile,
)
from search.scheme import Scheme
from tests.search.profiles import profile_of
from tests.search.spaces import decoder

PROFILE = profile_of(decoder(), ("w4a16g32", "w8a8"))
DOCUMENT = to_json(PROFILE)

microseconds = st.floats(0.001, 1e9)
quantiles = st.lists(microseconds, min_size=3, max_size=3).map(lambda values: Quantiles(*sorted(values)))
counts = st.integers(1, 10**9)
schemes = st.sampled_from(["w3a16", "w4a4", "w6a8g64", "w8a16g128", "w16a16", "w4a16g32asym"]).map(Scheme.parse)
texts = st.text(min_size=1, max_size=30).filter(str.isprintable)
profiles = st.builds(
    LatencyProfile,
    device=texts,
    driver=texts,
    backend=texts,
    sources=st.text("0123456789abcdef", min_size=64, max_size=64),
    dtype=texts,
    created=st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat()),
    times=st.dictionaries(
        st.tuples(st.builds(Shape, counts, counts, counts), schemes), st.builds(Times, quantiles, quantiles), max_size=5
    ),
    checks=st.dictionaries(
        st.tuples(texts, counts, schemes), st.builds(CrossCheck, microseconds, quantiles, st.booleans()), max_size=3
    ),
)


@given(profiles)
def test_a_profile_survives_its_file(profile: LatencyProfile) -> None:
    assert read_profile(write_profile(profile)) == profile
    assert read_profile(write_profile(profile).encode()) == profile


def test_a_file_has_a_line_for_every_measurement() -> None:
    lines = write_profile(PROFILE).splitlines()
    assert sum('"replayed_us"' in line for line in lines) == len(PROFILE.times)
    assert json.loads(write_profile(PROFILE)) == DOCUMENT


@pytest.mark.parametrize("field", ["device", "driver", "backend", "sources", "dtype"])
def test_what_may_not_be_compared_has_another_key(field: str) -> None:
    assert replace(PROFILE, **{field: "b" * 64}).key != PROFILE.key  # type: ignore[arg-type]
    assert replace(PROFILE, created="2027-01-01T00:00:00+00:00", times={}).key == PROFILE.key


def changed(path: str, value: Any) -> str:
    """The document with one value replaced, by its path."""
    document = copy.deepcopy(DOCUMENT)
    *above, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    inner: Any = document
    for part in above:
        inner = inner[part]
    inner[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "bitfrontier/configuration"),
        ("version", 2),
        ("version", True),
        ("device", ""),
        ("device", "x" * 201),
        ("device", "two\nlines"),
        ("device", "\x1b[31mred"),
        ("device", "half \ud800"),
        ("device", 5),
        ("sources", "../../etc"),
        ("created", "yesterday"),
        ("created", "2026-11-22T12:00:00"),
        ("times", {}),
        ("times.0", []),
        ("times.0.rows", 0),
        ("times.0.rows", 1.0),
        ("times.0.rows", True),
        ("times.0.tokens", 10**30),
        ("times.0.columns", "64"),
        ("times.0.scheme", "int4"),
        ("times.0.scheme", "w04a16"),
        ("times.0.scheme", ["w4a16"]),
        ("times.0.replayed_us", [1, 2]),
        ("times.0.replayed_us", [3, 2, 1]),
        ("times.0.replayed_us", [0, 1, 2]),
        ("times.0.replayed_us", [-1, 1, 2]),
        ("times.0.replayed_us", [1, 2, 1e300]),
        ("times.0.cold_us", [1, 2, None]),
        ("checks.0.model", None),
        ("checks.0.layers_us", "80"),
        ("checks.0.replayed", 1),
    ],
)
def test_a_value_that_is_not_accepted_is_named(path: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_profile(changed(path, value))
    problem = refused.value.problem()
    places = [f"[{part}]" if part.isdecimal() else f".{part}" for part in path.split(".")]
    assert problem["field"].startswith("".join(places).removeprefix("."))
    assert problem["accepted"]
    assert problem["value"]
    assert problem["detail"].isprintable(), "it may go to a terminal"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[]",
        "null",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        write_profile(PROFILE).replace("8.0", "NaN", 1),
        write_profile(PROFILE).replace("8.0", "Infinity", 1),
        write_profile(PROFILE).replace('"version": 1', '"version": 1, "version": 1'),
        json.dumps(DOCUMENT | {"colour": "blue"}),
        json.dumps({name: value for name, value in DOCUMENT.items() if name != "backend"}),
        json.dumps(DOCUMENT | {"times": DOCUMENT["times"][:1] * 2}),
        json.dumps(DOCUMENT | {"times": [0] * 100_001}),
        b"\xff\xfe\x00",
        " " * (MOST_BYTES + 1),
    ],
    ids=lambda text: str(text)[:20],
)
def test_what_is_no_profile_is_refused_in_plain_words(text: str | bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_profile(text)
    assert len(refused.value.detail) < 600
    assert refused.value.accepted


def test_a_bare_machine_can_write_it() -> None:
    """Neither pydantic nor NumPy: only the standard library."""
    script = (
        "import sys, search.latency_profile; sys.exit(bool({'pydantic', 'numpy', 'sqlalchemy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
