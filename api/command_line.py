"""A search request as what a person types: the `bitfrontier search` line, and the `curl` line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from search.request import SearchRequest

OPTIONS = {
    "target": "--target",
    "space.schemes": "--schemes",
    "space.quantizer": "--quantizer",
    "space.granularity": "--granularity",
    "space.channels": "--channels",
    "calibration.dataset": "--dataset",
    "calibration.samples": "--samples",
    "calibration.sequence_length": "--sequence-length",
    "calibration.seed": "--seed",
    "latency.profile": "--latency-profile",
    "latency.tokens": "--tokens",
    "sensitivity": "--sensitivity",
    "optimizer.method": "--method",
    "optimizer.objective": "--objective",
    "optimizer.points": "--points",
    "optimizer.evaluations": "--evaluations",
}
"""Fields that one option takes whole; lists are separated by commas. Those that may stand several times: see
`_repeated`."""


def command_line(request: SearchRequest) -> str:
    """The shell command that asks for `request`; what has its default value is left out."""
    body = minimal(request)
    words = ["bitfrontier", "search", request.model]
    for option, value in (*_repeated(body), *_single(body)):
        words += [option, value]
    return shlex.join(words)


def curl_line(request: SearchRequest, url: str) -> str:
    """The shell command that POSTs `request` to the service at `url`; what has its default value is left out."""
    body = json.dumps(minimal(request), ensure_ascii=False)
    words = ["curl", f"{url.rstrip('/')}/v1/searches", "-H", "content-type: application/json", "-d", body]
    return shlex.join(words)


def minimal(request: SearchRequest) -> dict[str, Any]:
    """The JSON body of `request` without what has its default value."""
    body: dict[str, Any] = _short(request.model_dump(mode="json", exclude_defaults=True))
    return body


def _repeated(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The options that may stand several times."""
    budgets, space = body["budgets"], body.get("space", {})
    for name, value in budgets.items():
        if name != "limits":
            yield "--budget", f"{name}={value}"
    for pattern, limit in budgets.get("limits", {}).items():
        for name, value in limit.items():
            yield "--limit", f"{pattern}:{name}={value}"
    # An empty pattern says that no layer is left out.
    for pattern in space.get("ignore", ()) or [""] * ("ignore" in space):
        yield "--ignore", pattern
    for pattern, scheme in space.get("pin", {}).items():
        yield "--pin", f"{pattern}={scheme}"


def _single(body: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, option in OPTIONS.items():
        *outer, name = path.split(".")
        place = body.get(outer[0], {}) if outer else body
        if name in place:
            value = place[name]
            yield option, ",".join(value) if isinstance(value, list) else str(value)


def _short(value: Any) -> Any:
    """`value` with whole numbers written as such."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
