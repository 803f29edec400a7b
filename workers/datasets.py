"""Data sets: real text built in, files and folders of the data sets folder, and the Hugging Face hub.

Nothing outside of the data sets folder and the hub's cache is read, by no name and through no link; and how much a file
unpacks to is known before it is unpacked.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pyarrow.parquet import ParquetFile, read_table

from db.engine import data_directory
from search.errors import InvalidCalibration
from search.names import is_dataset_name

BUILT_IN = "python-docs"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
TEXT_COLUMNS = ("text", "sentence", "content")
HUB_FILES = ["*.parquet", "*.jsonl", "*.txt"]
MOST_BYTES = 2**30
"""Of the text of a data set, unpacked."""
MOST_ARRAY_BYTES = 2**33
"""Of the arrays of one, unpacked."""
MOST_ROWS = 2**24
"""Of one table."""
MOST_PIXELS = 2**26
"""Of one image."""
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
    if name == BUILT_IN:
        return _python_docs()
    local = path_of(name)
    path, root = (local, datasets_directory()) if local else (_from_hub(name), _hub_cache())
    found = _read_folder(path, root, name) if path.is_dir() else _read([path], root, name)
    if not (found.documents if isinstance(found, Texts) else found.images):
        raise _refused(name, f"'{name}' is empty")
    return found


def _python_docs() -> Texts:
    from pydoc_data.topics import topics

    return Texts([text for _, text in sorted(topics.items())])


def path_of(name: str) -> Path | None:
    """The file or folder that `name` means in the data sets folder; None when it means none there."""
    if not is_dataset_name(name):
        return None
    root = _resolved(datasets_directory())
    for suffix in ("", *READERS):
        path = _resolved(root / f"{name}{suffix}")
        if path.exists() and path.is_relative_to(root) and path != root:
            return path
    return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.count("/") != 1 or not is_dataset_name(name):
        raise _refused(name, f"there is no data set '{name}'")
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _refused(name, f"there is no data set '{name}' here, and the hub gives none: {reason}") from error


def open_image(path: Path, *, grey: bool) -> NDArray[np.uint8]:
    """The image at `path`, height × width × channels (1 if `grey`, else 3).

    Raises ValueError when it is damaged, of another kind than its ending may say, or has more than `MOST_PIXELS`.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(
                    f"{path.name} has {opened.width} × {opened.height} pixels; at most {MOST_PIXELS:,} are unpacked"
                )
            return np.atleast_3d(np.asarray(opened.convert("L" if grey else "RGB")))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).replace(f"{path.parent}/", "")) from error


def _read_folder(folder: Path, root: Path, name: str) -> Texts | Images:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        for file in images:
            _confined(file, root, name)
        return _image_folder(folder, images)
    return _read([file for file in files if file.suffix in TEXT_READERS], root, name)


def _read(files: list[Path], root: Path, name: str) -> Texts | Images:
    """What is in `files` together, which messages call `name`: texts, or the images of one file."""
    parts: list[Texts | Images] = []
    for file, place in [(file, _confined(file, root, name)) for file in files]:
        if file.suffix not in READERS:
            raise _refused(name, f"'{file.name}' is of a kind that cannot be read")
        try:
            _check_sizes(place, file.suffix, parts)
            parts.append(READERS[file.suffix](place))
        except Exception as error:  # of a damaged file the libraries raise anything
            raise _refused(name, f"'{file.name}' cannot be read: {error or type(error).__name__}") from error
    if len(parts) == 1:
        return parts[0]
    texts = [part for part in parts if isinstance(part, Texts)]
    labelled = bool(texts) and all(part.labels is not None for part in texts)
    return Texts(
        [document for part in texts for document in part.documents],
        [label for part in texts for label in part.labels or []] if labelled else None,
    )


def _confined(file: Path, root: Path, name: str) -> Path:
    """`file` with all links resolved. Raises InvalidCalibration when that is not below `root`."""
    place = _resolved(file)
    if not place.is_relative_to(_resolved(root)):
        raise _refused(name, f"'{file.name}' of '{name}' is a link out of the data sets folder")
    return place


def _check_sizes(file: Path, suffix: str, before: Iterable[Texts | Images]) -> None:
    """Raise ValueError when `file`, together with what was read before it, unpacks to more than may be read."""
    read = sum(len(document) for part in before if isinstance(part, Texts) for document in part.documents)
    unpacked = read + (_UNPACKED[suffix](file) if suffix in _UNPACKED else file.stat().st_size)
    most = MOST_BYTES if suffix in TEXT_READERS else MOST_ARRAY_BYTES
    if unpacked > most:
        raise ValueError(f"it unpacks to {unpacked / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are read")


def _image_folder(folder: Path, files: list[Path]) -> Images:
    classes = sorted({file.parent for file in files if file.parent != folder})
    labelled = bool(classes) and all(file.parent in classes for file in files)
    return Images(files, [classes.index(file.parent) for file in files] if labelled else None)


def _read_text(path: Path) -> Texts:
    text = path.read_text(encoding="utf-8")
    return Texts([text] if text.strip() else [])


def _text_column(names: Iterable[str]) -> str:
    names = list(map(str, names))
    column = next((column for column in TEXT_COLUMNS if column in names), None)
    if column is None:
        raise ValueError(f"no column of {', '.join(TEXT_COLUMNS)} among {', '.join(names)}")
    return column


def _read_records(records: pd.DataFrame) -> Texts:
    column = _text_column(records.columns)
    records = records.dropna(subset=[column])
    labels = [int(label) for label in records["label"]] if "label" in records else None
    return Texts([str(text) for text in records[column]], labels)


def _read_jsonl(path: Path) -> Texts:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        return Texts([])
    return _read_records(pd.DataFrame([{"text": row} if isinstance(row, str) else row for row in rows]))


def _read_parquet(path: Path) -> Texts:
    with ParquetFile(path) as file:
        if file.metadata.num_rows > MOST_ROWS:
            raise ValueError(f"it has {file.metadata.num_rows:,} rows; at most {MOST_ROWS:,} are read")
        columns = _wanted(file)
    # A text that a dictionary holds once stays one text, in however many rows it stands.
    return _read_records(read_table(path, columns=columns, read_dictionary=columns[:1]).to_pandas())


def _unpacked_parquet(path: Path) -> int:
    with ParquetFile(path) as file:
        about, wanted = file.metadata, _wanted(file)
        columns = [
            about.row_group(group).column(column)
            for group in range(about.num_row_groups)
            for column in range(about.num_columns)
        ]
        return sum(one.total_uncompressed_size for one in columns if one.path_in_schema.split(".")[0] in wanted)


def _wanted(file: ParquetFile) -> list[str]:
    """The column of the text, and that of the labels."""
    names = file.schema_arrow.names
    return [_text_column(names), *(["label"] if "label" in names else [])]


def _read_arrays(path: Path) -> Images:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        images, found = stored, None
    else:
        images, found = stored.get("images"), stored.get("labels")
    if images is None or images.ndim != 4:
        raise ValueError("`images` must be an array of four dimensions")
    labels = None if found is None else [int(label) for label in found]
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"there are {len(images)} `images` and {len(labels)} `labels`")
    return Images(list(images), labels)


def _unpacked_arrays(path: Path) -> int:
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


_UNPACKED: dict[str, Callable[[Path], int]] = {
    ".parquet": _unpacked_parquet,
    ".npz": _unpacked_arrays,
    ".npy": _unpacked_arrays,
}
"""Files that hold more than their size says → how many bytes they unpack to."""

TEXT_READERS: dict[str, Callable[[Path], Texts]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
READERS: dict[str, Callable[[Path], Texts | Images]] = {**TEXT_READERS, ".npz": _read_arrays, ".npy": _read_arrays}


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _refused(name: str, detail: str) -> InvalidCalibration:
    return InvalidCalibration(detail, field="calibration.dataset", value=name, accepted=ACCEPTED)
