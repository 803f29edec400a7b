"""A latency profile: what products of weights and tokens took on one device, and whole models beside them; its file.

Needs only the standard library: a bare GPU machine writes the file, and a service without any GPU reads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, TypeVar

from search.errors import InvalidRequest
from search.scheme import Scheme

SCHEMA: Final = "bitfrontier/latency-profile"
VERSION: Final = 1

MOST_BYTES = 20_000_000
"""Of a file that is read."""
MOST_ENTRIES = 100_000
MOST_COUNT = 10**9
MOST_US = 1e9
LONGEST_TEXT = 200
LONGEST_SHOWN = 100

_HEX = re.compile(r"[0-9a-f]{64}")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Of a product: a weight of `rows` output channels × `columns` inputs, and the `tokens` it multiplies at once."""

    rows: int
    columns: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.columns} by {self.tokens} token{'' if self.tokens == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of a repeated measurement, in microseconds."""

    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class Times:
    """Of one product, its weight in no cache. `replayed`: one of many in a CUDA graph (on a CPU, called one after the
    other). `cold`: launched alone on an idle device."""

    replayed: Quantiles
    cold: Quantiles


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """A forward pass of a whole model beside the sum of the medians of its layers, `layers_us`.

    The forward pass also has what no layer counts: attention, norms, lookups. `replayed`: in a CUDA graph.
    """

    layers_us: float
    forward: Quantiles
    replayed: bool

    @property
    def discrepancy(self) -> float:
        """By what share the sum lies above the forward pass (below zero: under it)."""
        return self.layers_us / self.forward.p50 - 1


Product = tuple[Shape, Scheme]
Forward = tuple[str, int, Scheme]
"""A model's digest, the tokens (or images) of one pass, and the scheme of all layers that can take it."""


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """What was measured on a `device` with its `driver` (of a CPU, what computes there), by a kernel `backend` whose
    source has the digest `sources`, on tokens of type `dtype`; last added to at `created` (ISO 8601)."""

    device: str
    driver: str
    backend: str
    sources: str
    dtype: str
    created: str
    times: Mapping[Product, Times] = field(default_factory=dict)
    checks: Mapping[Forward, CrossCheck] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Names what may be compared: device, driver, backend, source and type, but not what was multiplied."""
        parts = (self.device, self.driver, self.backend, self.sources, self.dtype)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def tokens(self) -> list[int]:
        """The numbers of tokens that occur."""
        return sorted({shape.tokens for shape, _ in self.times})

    @property
    def schemes(self) -> list[Scheme]:
        """The schemes that occur."""
        return sorted({scheme for _, scheme in self.times})

    def with_newer(self, newer: LatencyProfile) -> LatencyProfile:
        """Both, of the same key; where both have measured, the newer."""
        assert newer.key == self.key
        return replace(newer, times={**self.times, **newer.times}, checks={**self.checks, **newer.checks})


def to_json(profile: LatencyProfile) -> dict[str, Any]:
    """As plain JSON; `docs/formats.md` describes it."""
    return {
        "schema": SCHEMA,
        "version": VERSION,
        **{name: getattr(profile, name) for name in ("device", "driver", "backend", "sources", "dtype", "created")},
        "times": [
            {"rows": shape.rows, "columns": shape.columns, "tokens": shape.tokens, "scheme": str(scheme)}
            | {"replayed_us": _listed(times.replayed), "cold_us": _listed(times.cold)}
            for (shape, scheme), times in sorted(profile.times.items())
        ],
        "checks": [
            {"model": model, "tokens": tokens, "scheme": str(scheme), "layers_us": check.layers_us}
            | {"forward_us": _listed(check.forward), "replayed": check.replayed}
            for (model, tokens, scheme), check in sorted(profile.checks.items())
        ],
    }


def write_profile(profile: LatencyProfile) -> str:
    """The file: one line for each product and each forward pass."""
    document = to_json(profile)
    lists = {name: document.pop(name) for name in ("times", "checks")}
    head = json.dumps(document, indent=2, ensure_ascii=False).removesuffix("\n}")
    parts = []
    for name, entries in lists.items():
        lines = ",\n".join("    " + json.dumps(entry, ensure_ascii=False) for entry in entries)
        parts.append(f'  "{name}": [\n{lines}\n  ]' if lines else f'  "{name}": []')
    return ",\n".join([head, *parts]) + "\n}\n"


def read_profile(text: str | bytes) -> LatencyProfile:
    """The inverse of `write_profile`, of a file that anybody may have written.

    Raises InvalidRequest naming the field, its value and what is accepted.
    """
    if len(text) > MOST_BYTES:
        raise InvalidRequest(
            f"the file is longer than a latency profile may be, {MOST_BYTES:,} bytes",
            field="file",
            accepted=f"at most {MOST_BYTES:,} bytes",
        )
    try:
        document = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"the file is no latency profile: {_cut(str(error))}",
            field="file",
            accepted="the JSON that `bitfrontier latency export` writes",
        ) from error
    return from_json(document)


def from_json(document: Any) -> LatencyProfile:
    """The inverse of `to_json`, as strict as `read_profile`."""
    names = ("schema", "version", "device", "driver", "backend", "sources", "dtype", "created", "times", "checks")
    found = _fields(document, "profile", names)
    if found["schema"] != SCHEMA:
        raise _refused("schema", found["schema"], SCHEMA)
    if type(found["version"]) is not int or found["version"] != VERSION:
        raise _refused("version", found["version"], VERSION)
    if not (isinstance(found["sources"], str) and _HEX.fullmatch(found["sources"])):
        raise _refused("sources", found["sources"], "a SHA-256 digest in hexadecimal")
    return LatencyProfile(
        device=_text(found["device"], "device"),
        driver=_text(found["driver"], "driver"),
        backend=_text(found["backend"], "backend"),
        sources=found["sources"],
        dtype=_text(found["dtype"], "dtype"),
        created=_moment(found["created"], "created"),
        times=_entries(found["times"], "times", _product),
        checks=_entries(found["checks"], "checks", _forward),
    )


def _product(entry: Any, at: str) -> tuple[Product, Times]:
    found = _fields(entry, at, ("rows", "columns", "tokens", "scheme", "replayed_us", "cold_us"))
    shape = Shape(*(_count(found[name], f"{at}.{name}") for name in ("rows", "columns", "tokens")))
    replayed, cold = (_quantiles(found[name], f"{at}.{name}") for name in ("replayed_us", "cold_us"))
    return (shape, _scheme(found["scheme"], f"{at}.scheme")), Times(replayed, cold)


def _forward(entry: Any, at: str) -> tuple[Forward, CrossCheck]:
    found = _fields(entry, at, ("model", "tokens", "scheme", "layers_us", "forward_us", "replayed"))
    if type(found["replayed"]) is not bool:
        raise _refused(f"{at}.replayed", found["replayed"], "true or false")
    key = (
        _text(found["model"], f"{at}.model"),
        _count(found["tokens"], f"{at}.tokens"),
        _scheme(found["scheme"], f"{at}.scheme"),
    )
    layers_us = _microseconds(found["layers_us"], f"{at}.layers_us")
    return key, CrossCheck(layers_us, _quantiles(found["forward_us"], f"{at}.forward_us"), found["replayed"])


def _entries(value: Any, at: str, entry: Callable[[Any, str], tuple[Any, Value]]) -> dict[Any, Value]:
    if not isinstance(value, list) or len(value) > MOST_ENTRIES:
        raise _refused(at, value, f"a list of at most {MOST_ENTRIES:,} entries")
    found: dict[Any, Value] = {}
    for index, item in enumerate(value):
        key, measured = entry(item, f"{at}[{index}]")
        if key in found:
            raise _refused(f"{at}[{index}]", item, "each measurement once")
        found[key] = measured
    return found


def _fields(value: Any, at: str, names: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(at, value, f"an object with the fields {', '.join(names)}")
    wrong = [name for name in value if name not in names] or [name for name in names if name not in value]
    if wrong:
        known = "a field that is not known" if wrong[0] in value else "a field that is missing"
        raise InvalidRequest(
            f"{at} has {known}: {_shown(wrong[0])}", field=at, value=_shown(wrong[0]), accepted=list(names)
        )
    return value


def _text(value: Any, at: str) -> str:
    if not (isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()):
        raise _refused(at, value, f"printable text of 1 to {LONGEST_TEXT} characters")
    return value


def _moment(value: Any, at: str) -> str:
    try:
        known = datetime.fromisoformat(_text(value, at)).tzinfo is not None
    except ValueError:
        known = False
    if not known:
        raise _refused(at, value, "a time with its zone, such as 2026-11-22T12:00:00+00:00")
    return str(value)


def _scheme(value: Any, at: str) -> Scheme:
    scheme = Scheme.parse(_text(value, at), at)
    if str(scheme) != value:
        raise _refused(at, value, str(scheme))
    return scheme


def _count(value: Any, at: str) -> int:
    if type(value) is not int or not 1 <= value <= MOST_COUNT:
        raise _refused(at, value, f"a whole number from 1 to {MOST_COUNT:,}")
    return value


def _quantiles(value: Any, at: str) -> Quantiles:
    if not isinstance(value, list) or len(value) != 3:
        raise _refused(at, value, "a list of the 10 %, 50 % and 90 % quantiles")
    found = Quantiles(*(_microseconds(item, f"{at}[{index}]") for index, item in enumerate(value)))
    if not found.p10 <= found.p50 <= found.p90:
        raise _refused(at, value, "quantiles in increasing order")
    return found


def _microseconds(value: Any, at: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= MOST_US or not math.isfinite(value):
        raise _refused(at, value, f"microseconds above 0, and at most {MOST_US:g}")
    return float(value)


def _listed(quantiles: Quantiles) -> list[float]:
    return [quantiles.p10, quantiles.p50, quantiles.p90]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _refused(at: str, value: Any, accepted: object) -> InvalidRequest:
    detail = f"{at} of a latency profile cannot be {_shown(value)}; accepted: {accepted}"
    return InvalidRequest(detail, field=at, value=_shown(value), accepted=accepted)


def _shown(value: Any) -> str:
    """As much of a value as a message can hold, in characters that every terminal and encoding can."""
    return _cut(repr(value) if not isinstance(value, str) or value.isprintable() else ascii(value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
