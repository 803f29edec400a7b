"""Peers: the real tools that our exports are for. Each is shown a rendered file and asked what it made of it.

    make test-exports                             all of them, each in its own environment, and the dated log
    make .venv-peer-NAME/.done                    one environment
    python -m scripts.exports_log --only NAME …   some peers' tests, and no log

A peer NAME (lower case and dashes) is:
- `tests/peers/NAME.txt`, the requirements of its environment: pytest, and pydantic, numpy and pyyaml for `search`. The
  log names their versions. `-c ../../constraints.txt` where its own pins allow; `tests/peers/NAME.no-deps`, if there is
  one, is installed afterwards without what it requires;
- `tests/peers/test_NAME.py` (dashes as underscores). It begins with `pytest.importorskip("the_tool", reason=…)`, so
  that `make test` skips it, and imports nothing of ours but `search`, `tests.peers.tiny`, `tests.peers.checkpoints` and
  `tests.search.exports.examples`: the main environment's packages are not there.

A peer without a requirements file runs in `make test` already, and in the log beside the others: see
`scripts/exports_log.py`. A test's docstring is a sentence for the log: what the tool did with the file, and what was
found. `found(key=value)` adds numbers to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peers import tiny


@pytest.fixture(autouse=True)
def _says(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    says = " ".join((request.function.__doc__ or "").split())
    assert says, "the test has no docstring, which the log would show"
    record_property("says", says)


@pytest.fixture
def found(record_property: Callable[[str, Any], None]) -> Callable[..., None]:
    """Adds `key=value` to what the log says of the test."""

    def add(**values: Any) -> None:
        for key, value in values.items():
            record_property(f"found {key}", value)

    return add


@pytest.fixture
def llama() -> Any:
    """A Llama of 12 blocks with random weights; the test may change it."""
    return tiny.llama()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a Llama of 3 blocks, with a tokenizer; not to be changed."""
    return tiny.save(tiny.llama(blocks=3), tmp_path_factory.mktemp("checkpoint") / "tiny-llama")
