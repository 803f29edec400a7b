"""What a hostile client sends: bodies, names, numbers, texts, and requests that are no HTTP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator

from search.request import SearchRequest
from tests.api.examples import MODEL

HTML = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">'\"><b>"
SQL = "x'; DROP TABLE searches; SELECT pg_sleep(60); --"

TEXTS = {
    "SQL": SQL,
    "a union": "' UNION SELECT digest FROM api_keys --",
    "HTML": HTML,
    "a template": "{{7*7}}${7*7}#{7*7}<%= 7*7 %>",
    "a format": "%s%n%x{0.__class__}",
    "a command": "$(touch /tmp/hacked);`id`|id&",
    "a log entry": "x\r\nSet-Cookie: hacked=1\r\n\r\n<html>",
    "a lookup": "${jndi:ldap://169.254.169.254/x}",
    "right to left": "\u202etxt.exe\u2066",
    "a long text": "A" * 50_000,
    "many combining marks": "e" + "\u0301" * 5000,
    "a terminal escape": "\x1b]0;hacked\x07\x1b[2J",
    "NUL": "a\0b",
}

ESCAPES = (
    "..", "../x", "../../etc/passwd", "/etc/passwd", "//etc/passwd", "\\\\host\\share", "..\\..\\x", "C:\\x", "tiny/..",
    "tiny/../../outside", "./tiny/../../outside", "a/b/../../../outside", "outside\0", "tiny\0.safetensors", "~",
    "~root", "~/x", "$HOME", "%2e%2e", "%2e%2e%2foutside", "..%2foutside", "..%c0%afoutside", "..;/outside",
    "....//outside", "\uff0e\uff0e/outside", "․․/outside", "file:///etc/passwd", "file:outside",
    "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:22/", "//169.254.169.254/x", "hub:org/name",
    "hub:../outside", "hub://x", "s3://bucket/x", "data:,x", "/dev/zero", "/dev/stdin", "/proc/self/environ",
    "/proc/self/cwd", "CON", "NUL.", "-rf", "--help", "|id", "tiny\n", " tiny", "tiny ", "", ".", ".hidden", "a//b",
    "org/name/more", "@{u}", "org/name@main", "org/name?x#y", "*", "t?ny", "[t]iny",
)  # fmt: skip
"""Names that would lead out of a folder, or to another machine, for whoever is careless with them."""
HARMLESS = {"CON", "NUL."}
"""Those that are names by their form: a folder may be called so."""

NUMBERS = (
    "-1", "0", "-0", "01", "+1", "1.0", "1e0", "1e999", "1_0", "0x1", "0b1", "١", "１", "²", "½", "NaN", "nan",
    "Infinity", "-Infinity", str(2**63), str(2**64), str(-(2**63)), "9" * 400, "9" * 5000, "true", "null", "[]", "{}",
    "1;2", "1,2", "1 OR 1=1", "1'", "abc", "1 ", " 1", "1\n", "1\0", "", "1/../2", "../1", "1%00", "\u200b1", "-",
    "--1",
)  # fmt: skip
"""What is no number of a search, each in its own way."""


def _body(**changes: Any) -> bytes:
    return json.dumps({"model": MODEL, "budgets": {"avg_bits": 5.25}} | changes).encode()


BODY = _body()
NESTED = b'{"model": "' + MODEL.encode() + b'", "budgets": '

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "cut off": BODY[:-7],
    "two": BODY + BODY,
    "a tail": BODY + b"\0",
    "a comment": b"/* */" + BODY,
    "a trailing comma": BODY[:-1] + b",}",
    "single quotes": BODY.replace(b'"', b"'"),
    "a byte order mark": b"\xef\xbb\xbf" + BODY,
    "UTF-16": BODY.decode().encode("utf-16"),
    "UTF-16 without a mark": BODY.decode().encode("utf-16-le"),
    "UTF-32": BODY.decode().encode("utf-32"),
    "invalid UTF-8": BODY.replace(b"model", b"mod\xffel"),
    "overlong UTF-8": BODY.replace(b"/", b"\xc0\xaf").replace(b"-", b"\xc0\xad", 1),
    "a surrogate in UTF-8": BODY.replace(b"vllm", b"\xed\xa0\x80") + b"\xed\xa0\x80",
    "half a surrogate pair": _body(target="\ud800"),
    "a field twice": b'{"model": "other", ' + BODY[1:],
    "a nested field twice": BODY.replace(b'"avg_bits"', b'"avg_bits": 1, "avg_bits"'),
    "a field twice by an escape": b'{"mod\\u0065l": "other", ' + BODY[1:],
    "a deep list": b"[" * 100_000,
    "a deep closed list": NESTED + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a deep object": b'{"a":' * 100_000,
    "a deep closed object": NESTED + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a wide object": json.dumps({str(number): number for number in range(50_000)}).encode(),
    "NaN": NESTED + b'{"avg_bits": NaN}}',
    "Infinity": NESTED + b'{"avg_bits": Infinity}}',
    "beyond floats": NESTED + b'{"avg_bits": 1e999}}',
    "an exponent of a mile": NESTED + b'{"avg_bits": 1e99999999999999999999}}',
    "a number of a mile": NESTED + b'{"avg_bits": ' + b"9" * 100_000 + b"}}",
    "a fraction of a mile": NESTED + b'{"avg_bits": -0.' + b"9" * 100_000 + b"}}",
    "a number in hexadecimal": NESTED + b'{"avg_bits": 0x5}}',
    "a prototype": NESTED + b'{"avg_bits": 5}, "__proto__": {"admin": true}}',
    "an owner": NESTED + b'{"avg_bits": 5}, "key_id": 1, "priority": 99, "state": "succeeded"}',
    "an object": b"{}",
    "a list": b"[]",
    "a text": b'"model"',
    "a number": b"1",
    "null": b"null",
    "true": b"true",
    "a form": b"model=all-minilm-l6-v2&budgets=5",
    "XML": b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
    "a pickle": b"cos\nsystem\n(S'touch /tmp/hacked'\ntR.",
    "an unpacked bomb": b" " * 1_000_001 + BODY,
    "a packed bomb": gzip.compress(b" " * 50_000_000 + BODY),
    "noise": bytes(range(256)) * 16,
}
"""Bodies that are no search request, sent as JSON."""

CONTENT_TYPES = (
    "", "text/plain", "text/html", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
    "application/xml", "application/jsonp", "text/json", "*/*", "application", "/json", "application/json/x",
    "a" * 5000, "image/svg+xml", "application/octet-stream", "application/x-python-pickle",
    "text/plain; application/json", "\x00",
)  # fmt: skip
"""What a form of another site, or a careless client, calls its body."""

ENCODINGS = ("gzip", "deflate", "br", "zstd", "gzip, gzip, gzip", "identity, gzip", "x")


def whole_request() -> dict[str, Any]:
    """A request that is accepted, with every field filled in."""
    limits = {"*.dense": {"avg_bits": 12.0, "size_mb": 900.0, "gbitops": 900.0, "latency_ms": 900.0}}
    return {
        "model": MODEL,
        "target": "vllm",
        "calibration": {"dataset": "python-docs", "samples": 8, "sequence_length": 64, "seed": 0},
        "space": {
            "schemes": ["w4a16g64", "w8a16g64"], "quantizer": "mse", "ignore": ["lm_head"],
            "pin": {"pooler.*": "w8a16g64"}, "granularity": "layer", "channels": None,
        },
        "budgets": {
            "avg_bits": 9.0, "size_mb": 900.0, "gbitops": 900.0, "latency_ms": 900.0, "loss_increase": 1.0,
            "limits": limits,
        },
        "latency": {"profile": "NVIDIA H100 80GB HBM3", "tokens": 1},
        "sensitivity": ["fisher", "kl"],
        "optimizer": {"method": "ilp", "objective": "loss", "points": 2, "evaluations": 4},
    }  # fmt: skip


WRONG = (
    None, True, False, -1, 0, 0.5, 2**63, 10**400, -1e308, float("inf"), float("nan"), "", "5", "text", HTML, SQL, [],
    [[]], [None], [{}], {}, {"a": 1}, {"": {}}, "x" * 5000,
)  # fmt: skip


def wrong_requests() -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole request with one value that its JSON schema forbids, and the path of that; and with one too many."""
    schema = SearchRequest.model_json_schema()
    validator = Draft202012Validator(schema)
    whole = whole_request()
    assert validator.is_valid(whole)
    for path in _paths(whole):
        for wrong in WRONG:
            # What JSON does not have, no schema forbids.
            changed = _changed(whole, path, wrong)
            if wrong in (float("inf"),) or wrong != wrong or not validator.is_valid(changed):
                yield ".".join(map(str, path)), changed
        if isinstance(_at(whole, path), dict) and path[-1] not in ("pin", "limits"):
            yield ".".join(map(str, path)), _changed(whole, (*path, "drop table"), 1)


def _paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*above, key)
        yield from _paths(item, (*above, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    first, *rest = path
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[first] = _changed(copy[first], tuple(rest), new) if rest else new
    return copy


HEAD = b"POST /v1/searches HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/searches HTTP/1.1\r\nHost: localhost\r\n"

NO_HTTP: dict[str, bytes] = {
    "noise": bytes(range(256)) * 8,
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 300,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "no host": b"GET /v1/searches HTTP/1.1\r\n\r\n",
    "two hosts": GET + b"Host: evil.example\r\n\r\n",
    "NUL in a header": GET + b"X-A: a\0b\r\n\r\n",
    "a bare carriage return": GET + b"X-A: a\rb\r\n\r\n",
    "a blank before the colon": GET + b"X-A : b\r\n\r\n",
    "a header without a name": GET + b": b\r\n\r\n",
    "a header without a colon": GET + b"X-A\r\n\r\n",
    "a header in Chinese": GET + "头: b\r\n\r\n".encode(),
    "NUL in the path": b"GET /v1/\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a blank in the path": b"GET /v1/a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a huge header": GET + b"X-A: " + b"a" * 200_000 + b"\r\n\r\n",
    "a huge path": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "headers without end": GET + b"X-A: b\r\n" * 50_000,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "a length in words": HEAD + b"Content-Length: many\r\n\r\n" + BODY,
    "a length in hexadecimal": HEAD + b"Content-Length: 0x10\r\n\r\n" + BODY,
    "two lengths": HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n" + BODY,
    "an unknown transfer encoding": HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "chunked twice": HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "a chunk of words": HEAD + b"Transfer-Encoding: chunked\r\n\r\nmany\r\n" + BODY,
    "a negative chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n" + BODY,
    "a chunk that is longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n" + BODY,
    "a chunk of forty digits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 40 + b"\r\n" + BODY,
    "a huge chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFF\r\n" + b" " * 1_100_000,
    "a huge length": HEAD + b"Content-Length: 99999999999\r\n\r\n" + b" " * 1_100_000,
}  # fmt: skip
"""What is sent to the socket; each is refused and the connection closed, whatever came after it."""
