"""Write the weights of a checkpoint, one file at a time: the memory it takes is that of one file and one tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.compressed import DamagedCheckpoint, compress
from workers.checkpoint.folder import CannotWrite, writing
from workers.checkpoint.plan import Entry, shard_names, shards
from workers.checkpoint.progress import Bar
from workers.checkpoint.source import Reader
from workers.quantizers import choose_grid
from workers.sources import INDEX


def write_weights(
    entries: Sequence[Entry], folder: Path, quantizer: str, computed: torch.dtype, device: torch.device
) -> list[Path]:
    """Write every entry into `folder`: what is quantized as `quantizer` rounds it, in files of at most `SHARD_BYTES`
    with an index, or in one; the files.

    `computed` is what the model computed in when it was measured: the weights that were rounded are in it.
    Raises CannotWrite where the disk refuses, DamagedCheckpoint where what a file then holds is not what was written.
    """
    files = []
    parts = shards(entries)
    quantized = sum(bool(entry.modules) for entry in entries)
    places: dict[str, str] = {}
    with Reader() as reader, Bar(quantized, sum(entry.stored.nbytes for entry in entries)) as bar:
        for name, part in zip(shard_names(len(parts)), parts, strict=True):
            tensors: dict[str, Tensor] = {}
            for entry in part:
                tensors |= _written(entry, reader.read(entry.stored), quantizer, computed, device)
                bar.advance(entry.stored.nbytes, layer=bool(entry.modules))
            files.append(_save(tensors, folder / name))
            places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with writing(folder):
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        files.append(folder / INDEX)
    return files


def _written(
    entry: Entry, tensor: Tensor, quantizer: str, computed: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    if not entry.modules:
        return {entry.stored.name: tensor}
    matrix = tensor.to(device).to(computed)
    grid = choose_grid(matrix, entry.scheme, quantizer)
    parts = compress(matrix, entry.scheme, grid, entry.format)
    # Tensors that share memory cannot be saved.
    return {f"{module}.{part}": one.clone() for module in entry.modules for part, one in parts.items()}


def _save(tensors: dict[str, Tensor], file: Path) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with _refusing(file):
        # The library creates what only its user may read; who serves the folder is often another.
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, {"format": "pt"})
        file.chmod(mode)
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        same = names == tensors.keys() and all(_same(opened.get_tensor(name), tensors[name]) for name in names)
    if not same:
        raise DamagedCheckpoint(f"{file.name} does not hold what was written to it")
    return file


def _same(one: Tensor, other: Tensor) -> bool:
    # As bytes: what is no number is equal to itself, too.
    return one.dtype == other.dtype and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turn what the file system refuses, and the library passes on, into CannotWrite."""
    from safetensors import SafetensorError

    try:
        with writing(file.parent):
            yield
    except SafetensorError as error:
        where = file.parent.parent
        raise CannotWrite(f"{where} cannot be written to: {error}", field="output", value=str(where)) from error
