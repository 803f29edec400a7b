"""Whether files changed, without reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from search.errors import BitfrontierError


class ModelChanged(BitfrontierError):
    """A model or its data is not what the search began with: its files changed, or differ between machines."""

    status = 409
    type = "model-changed"
    title = "The model or its data is not the same everywhere and all the time"


def fingerprint(*paths: Path) -> str:
    """A hash of the names, sizes and modification times of files, and of all files in folders; missing ones count."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat() if file.exists() else None
            total.update(f"{file}\0{stat and (stat.st_size, stat.st_mtime_ns, stat.st_ino)}\0".encode())
    return total.hexdigest()


@contextmanager
def unchanged(model: str, *paths: Path) -> Iterator[None]:
    """Within, what is read of a model's files is one version of them: raises ModelChanged at the end otherwise."""
    before = fingerprint(*paths)
    yield
    if fingerprint(*paths) != before:
        raise ModelChanged(
            f"the files of '{model}' changed while they were read",
            field="model",
            value=model,
            accepted="files that nobody writes to while a search runs",
        )
