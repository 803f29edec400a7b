"""Whether files changed, without reading them."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(*paths: Path) -> str:
    """A hash of the names, sizes and modification times of files, and of all files in folders; missing ones count."""
    total = hashlib.sha256()
    for path in paths:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat() if file.exists() else None
            total.update(f"{file}\0{stat and (stat.st_size, stat.st_mtime_ns, stat.st_ino)}\0".encode())
    return total.hexdigest()
