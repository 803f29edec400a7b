"""Run the peers' tests, each in its own environment, and write what was found to benchmarks/results/<date>-exports.md.

python -m scripts.exports_log [--only NAME …]
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "tests" / "peers"
WITHIN = {"compressed-tensors": ("compressed-tensors", "torch", "transformers")}
"""Peers that the main environment has, and the packages whose versions matter."""
COMMON = {"numpy", "pydantic", "pytest", "pyyaml"}
LIMIT_S = 1800

VERSIONS = """
import importlib.metadata, json, sys
known = {}
for name in sys.argv[1:]:
    try:
        known[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(known))
"""


@dataclass(frozen=True)
class Test:
    """One test, as the log shows it."""

    name: str
    says: str
    outcome: str
    reason: str
    found: str


@dataclass(frozen=True)
class Peer:
    """A tool, its environment's versions, and its tests."""

    name: str
    versions: dict[str, str]
    tests: list[Test]
    seconds: float
    failed: bool


def main() -> int:
    """Exit status 1 when a test failed or a peer could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these peers and write no log")
    only = parser.parse_args().only
    known = sorted({*WITHIN, *(path.stem for path in PEERS.glob("*.txt"))})
    for name in only or ():
        if name not in known:
            parser.error(f"'{name}' is not a peer; the peers are {', '.join(known)}")
    peers = [run(name) for name in only or known]
    if not only:
        path = ROOT / "benchmarks" / "results" / f"{date.today()}-exports.md"
        path.write_text(report(peers))
        print(f"wrote {path.relative_to(ROOT)}")
    return int(any(peer.failed for peer in peers))


def run(name: str) -> Peer:
    """Run the tests of one peer with its own interpreter; their output goes to the terminal."""
    environment = ROOT / (".venv" if name in WITHIN else f".venv-peer-{name}")
    if not (environment / ".done").exists() and name not in WITHIN:
        return Peer(
            name, {}, [Test("", "", "FAIL", f"it is not installed: make {environment.name}/.done", "")], 0, True
        )
    python = str(environment / "bin" / "python")
    packages = WITHIN.get(name) or required(name)
    versions = json.loads(subprocess.check_output([python, "-c", VERSIONS, *packages], text=True))
    tests = PEERS / f"test_{name.replace('-', '_')}.py"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        command = [python, "-m", "pytest", str(tests), "-q", "-p", "no:cacheprovider", "--junitxml", str(found)]
        try:
            failed = subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=False).returncode != 0
        except subprocess.TimeoutExpired:
            failed = True
        cases = [case(element) for element in _testcases(found)]
    failed |= not cases or any(test.outcome == "FAIL" for test in cases)
    return Peer(name, versions, cases, time.monotonic() - began, failed)


def _testcases(report: Path) -> Iterator[ElementTree.Element]:
    # pytest wrote the file.
    return ElementTree.parse(report).iter("testcase") if report.exists() else iter(())  # noqa: S314


def required(name: str) -> list[str]:
    """The packages that the peer's requirement files name, but for those that every peer has."""
    files = [path for path in (PEERS / f"{name}.no-deps", PEERS / f"{name}.txt") if path.exists()]
    lines = [line.strip() for path in files for line in path.read_text().splitlines()]
    names = [line.split("==")[0].split(">=")[0] for line in lines if line and not line.startswith(("#", "-"))]
    return [name for name in names if name not in COMMON]


def case(element: ElementTree.Element) -> Test:
    """One `<testcase>` of pytest's report."""
    outcome, reason = "PASS", ""
    for tag, word in (("skipped", "skipped"), ("failure", "FAIL"), ("error", "FAIL")):
        if (child := element.find(tag)) is not None:
            outcome, reason = word, (child.get("message") or "").splitlines()[0]
    if outcome == "skipped" and not element.get("classname"):
        # A whole module, because the tool cannot be imported where it should be.
        outcome = "FAIL"
    properties = [(one.get("name") or "", one.get("value") or "") for one in element.iter("property")]
    found = "; ".join(f"{key.removeprefix('found ')}: {value}" for key, value in properties if key.startswith("found "))
    return Test(element.get("name") or "", dict(properties).get("says", ""), outcome, reason, found)


def report(peers: list[Peer]) -> str:
    """The log as Markdown."""
    machine = f"{platform.system()}, {platform.machine()}, Python {platform.python_version()}, CPU only"
    lines = [
        f"# Exports in the tools they are for, {date.today()}",
        "",
        f"`make test-exports` on {machine}. Each tool reads a file that `search.exports` rendered, in an environment",
        "of its own, and is asked what it made of it: `tests/peers/`.",
        "",
        "| tool | versions | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|---|",
        *(f"| {summary(peer)} |" for peer in peers),
    ]
    for peer in peers:
        lines += ["", f"## {peer.name}", "", "| | test | what was asserted | found |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row(test))} |" for test in peer.tests]
    return "\n".join(lines) + "\n"


def summary(peer: Peer) -> str:
    """A row of the first table."""
    counts = [sum(test.outcome == word for test in peer.tests) for word in ("PASS", "FAIL", "skipped")]
    versions = ", ".join(f"{name} {version}" for name, version in peer.versions.items())
    return " | ".join([peer.name, versions, *map(str, counts), f"{peer.seconds:.0f}"])


def row(test: Test) -> list[str]:
    """The cells of a test: outcome, name, what was asserted, and what was found or why there is nothing."""
    told = "; ".join(part for part in (test.found, test.reason) if part)
    return [test.outcome, *(text.replace("|", "\\|") for text in (f"`{test.name}`", test.says, told))]


if __name__ == "__main__":
    sys.exit(main())
