"""Data sets: real text built in, files and folders of the data sets folder, and the Hugging Face hub."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from db.engine import data_directory
from search.errors import InvalidCalibration

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
TEXT_COLUMNS = ("text", "sentence", "content")
HUB_FILES = ["*.parquet", "*.jsonl", "*.txt"]
ACCEPTED = (
    "`python-docs`; a .txt, .md, .jsonl, .npz or .npy file, a folder of text files or a folder of images (one "
    "sub-folder per class gives labels) in the data sets folder; or a Hugging Face data set id such as org/name"
)


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents, with a class index for each where the data set has them."""

    documents: list[str]
    labels: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Images:
    """Images: arrays (float channels × height × width as the model takes them, or uint8 height × width × channels) or
    paths of image files; with a class index for each where the data set has them."""

    images: list[Any]
    labels: list[int] | None = None


def datasets_directory() -> Path:
    """Where files that requests may name are kept."""
    return data_directory() / "datasets"


def load(name: str) -> Texts | Images:
    """The data set called `name`. Raises InvalidCalibration when there is none, or nothing is in it."""
    if name == "python-docs":
        return _python_docs()
    found = _read(path_of(name) or _from_hub(name), name)
    if not (found.documents if isinstance(found, Texts) else found.images):
        raise _refused(name, f"'{name}' is empty")
    return found


def _python_docs() -> Texts:
    from pydoc_data.topics import topics

    return Texts([text for _, text in sorted(topics.items())])


def path_of(name: str) -> Path | None:
    """The file or folder that `name` means in the data sets folder; None when it means none there."""
    root = datasets_directory().resolve()
    for suffix in ("", *READERS):
        path = (root / f"{name}{suffix}").resolve()
        if path.exists() and path.is_relative_to(root) and path != root:
            return path
    return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1:
        raise _refused(name, f"there is no data set '{name}'")
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _refused(name, f"there is no data set '{name}' here, and the hub gives none: {reason}") from error


def _read(path: Path, name: str) -> Texts | Images:
    if path.is_dir():
        return _read_folder(path, name)
    if path.suffix not in READERS:
        raise _refused(name, f"'{path.name}' is of a kind that cannot be read")
    try:
        return READERS[path.suffix](path)
    except (ValueError, TypeError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise _refused(name, f"'{path.name}' cannot be read: {error}") from error


def _read_folder(folder: Path, name: str) -> Texts | Images:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        return _image_folder(folder, images)
    parts = [_read(file, name) for file in files if file.suffix in READERS]
    texts = [part for part in parts if isinstance(part, Texts)]
    labelled = bool(texts) and all(part.labels is not None for part in texts)
    return Texts(
        [document for part in texts for document in part.documents],
        [label for part in texts for label in part.labels or []] if labelled else None,
    )


def _image_folder(folder: Path, files: list[Path]) -> Images:
    classes = sorted({file.parent for file in files if file.parent != folder})
    labelled = bool(classes) and all(file.parent in classes for file in files)
    return Images(files, [classes.index(file.parent) for file in files] if labelled else None)


def _read_text(path: Path) -> Texts:
    text = path.read_text(encoding="utf-8")
    return Texts([text] if text.strip() else [])


def _read_records(records: pd.DataFrame) -> Texts:
    column = next((column for column in TEXT_COLUMNS if column in records), None)
    if column is None:
        raise ValueError(f"no column of {', '.join(TEXT_COLUMNS)} among {', '.join(map(str, records.columns))}")
    records = records.dropna(subset=[column])
    labels = [int(label) for label in records["label"]] if "label" in records else None
    return Texts([str(text) for text in records[column]], labels)


def _read_jsonl(path: Path) -> Texts:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        return Texts([])
    return _read_records(pd.DataFrame([{"text": row} if isinstance(row, str) else row for row in rows]))


def _read_parquet(path: Path) -> Texts:
    return _read_records(pd.read_parquet(path))


def _read_arrays(path: Path) -> Images:
    stored = np.load(path, allow_pickle=False)
    arrays = {"images": stored} if isinstance(stored, np.ndarray) else dict(stored)
    if "images" not in arrays or arrays["images"].ndim != 4:
        raise ValueError("`images` must be an array of four dimensions")
    labels = [int(label) for label in arrays["labels"]] if "labels" in arrays else None
    if labels is not None and len(labels) != len(arrays["images"]):
        raise ValueError(f"there are {len(arrays['images'])} `images` and {len(labels)} `labels`")
    return Images(list(arrays["images"]), labels)


READERS: dict[str, Callable[[Path], Texts | Images]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".npz": _read_arrays,
    ".npy": _read_arrays,
}


def _refused(name: str, detail: str) -> InvalidCalibration:
    return InvalidCalibration(detail, field="calibration.dataset", value=name, accepted=ACCEPTED)
