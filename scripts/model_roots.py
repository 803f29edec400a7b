"""Let tests and benchmarks load models from where they make or find them."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path

from scripts.fetch_models import cache_folder


def open_roots() -> None:
    """Make models roots of the folder for temporary files, the installed packages and the cache of fetched models."""
    roots = (Path(tempfile.gettempdir()), Path(sysconfig.get_path("purelib")), cache_folder())
    os.environ["BITFRONTIER_MODELS"] = os.pathsep.join(map(str, roots))
