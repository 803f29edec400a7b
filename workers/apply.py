"""Apply a point: write the model with the weights that it was measured with, as a checkpoint that runtimes load."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from sqlalchemy import Engine

from db.candidates import candidate
from db.exports import exported
from db.models import get_model
from db.searches import get_search
from search.candidate import Candidate
from search.errors import Conflict, InvalidRequest, NotFound
from search.exports import EXPORTS, Exported, render
from search.exports.native import check_document, read_native
from search.request import SearchRequest
from search.scheme import FULL_PRECISION
from workers.checkpoint.check import Check, check, measured_loss
from workers.checkpoint.folder import check_place, check_room, whole_folder, writing
from workers.checkpoint.plan import Entry, entries
from workers.checkpoint.sizes import Sizes, sizes
from workers.checkpoint.source import config_with, headers, kept_files, safetensors_of
from workers.checkpoint.writing import write_weights
from workers.evaluator import EvaluatorSpec, describe_model
from workers.fingerprint import unchanged
from workers.models import files_digest, load_model
from workers.profiling import evaluator_spec, source_of_model
from workers.quantizers import QUANTIZERS
from workers.settings import Dtype
from workers.sources import CONFIG, INDEX, SERVING, SETTINGS, ModelFiles, files_behind, find_model

FORMAT = "vllm"
"""The export whose configuration goes into config.json."""

OWN = EXPORTS["json"].filename
"""Our own document, by which a checkpoint that was written here is known."""

METHOD = "compressed-tensors"
"""What config.json of such a checkpoint calls the way it is quantized."""

WRITTEN = {OWN, INDEX, *SETTINGS, *SERVING}
SHARDS = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
"""The files of a checkpoint."""

MOST_DOCUMENT_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Asked:
    """What is applied: a point, where its model comes from, and how it was measured, where that is known."""

    exported: Exported
    source: str
    search: int | None = None
    measured_with: tuple[EvaluatorSpec, str] | None = None
    """What to build an evaluator from, and the digest of its data."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A checkpoint that was written. `files` are sizes in bytes by name."""

    folder: Path
    asked: Asked
    sizes: Sizes
    files: Mapping[str, int]
    dtype: str
    """Of what is not quantized, as config.json has it."""
    check: Check | None

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        point = self.asked.exported.candidate
        layers = Counter(map(str, self.asked.exported.schemes.values()))
        return {
            "path": str(self.folder),
            "model": self.asked.exported.model,
            "search": self.asked.search,
            "point": point.number,
            "bytes": sum(self.files.values()),
            "weight_bytes": self.sizes.stored,
            "predicted_bytes": self.sizes.predicted,
            "differences": self.sizes.differences,
            "avg_bits": point.costs.get("avg_bits"),
            "loss": measured_loss(point),
            "check": asdict(self.check) if self.check else None,
            "layers": dict(sorted(layers.items())),
            "dtype": self.dtype,
            "files": dict(self.files),
            "command": f"vllm serve {shlex.quote(str(self.folder))}",
        }


def point_of_search(engine: Engine, search_id: int, number: int) -> Asked:
    """Point `number` of a search. Raises NotFound, and Conflict when the model is no longer what was searched."""
    search = get_search(engine, search_id)
    point = candidate(engine, search_id, number)
    if point is None:
        raise NotFound(f"search {search_id} has no point {number}", field="number", value=number)
    found = exported(engine, search, point)
    spec = evaluator_spec(engine, SearchRequest.model_validate(search.request))
    spec = replace(spec, device=device(), dtype=_dtype(found))
    return Asked(found, spec.source, search_id, (spec, (search.summary or {})["data_digest"]))


def point_of_document(engine: Engine, file: Path, model: str | None) -> Asked:
    """The point that a document of ours describes, of the model registered as `model`, else as the document calls it.

    Raises InvalidRequest for another document, UnsupportedModel where there is no such model, Conflict where it is not
    the one that the document was made for.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_DOCUMENT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidRequest(f"{file} cannot be read: {reason}", field="config", value=str(file)) from error
    document = read_native(text)
    name = model or document.model.name
    source = source_of_model(engine, name)
    known = get_model(engine, name)
    inventory = known.inventory if known else None
    if inventory is None:
        inventory = describe_model(load_model(source, torch.device("cpu")))
    if _weights_digest(inventory.digest) != _weights_digest(document.model.digest):
        raise Conflict(
            f"'{name}' is not the model that {file.name} was made for: its weights or its configuration differ",
            field="model",
            value=name,
            accepted=f"the model with digest {document.model.digest}",
        )
    check_document(document, inventory)
    _check_known("quantizer", document.quantizer, QUANTIZERS)
    _check_known("model.digest", document.model.digest.partition(":")[2] or "float32", get_args(Dtype))
    point = Candidate(
        number=document.point.number,
        source=cast(Any, document.point.source),
        label=document.point.label,
        allocation={name: str(scheme) for name, scheme in document.schemes.items()},
        predicted=document.predicted,
        costs=document.costs,
        metrics=document.metrics,
    )
    inventory = replace(inventory, digest=document.model.digest)
    return Asked(Exported(name, inventory, document.target, document.quantizer, point), source)


def apply(asked: Asked, output: Path, *, overwrite: bool = False, verify: bool = False) -> Applied:
    """Write the checkpoint into the folder `output`, which comes to be whole or not at all; `verify` loads it again and
    measures its loss first.

    Raises ExportRefused where vLLM could not load it, InvalidRequest for a folder that is taken, Conflict when the
    model's files changed, CannotWrite where the disk refuses, DamagedCheckpoint where what was written is not right.
    """
    point = asked.exported
    output = Path(output).expanduser().absolute()
    check_place(output, _is_checkpoint, overwrite=overwrite)
    quantization = json.loads(render(FORMAT, point))
    if verify and asked.measured_with is None:
        raise InvalidRequest(
            "a document does not say which data it was measured on: its checkpoint cannot be checked",
            field="check",
            accepted="a point of a search",
        )
    files = find_model(asked.source)
    _check_apart(output, asked, files)
    placing = whole_folder(output, ours=_is_checkpoint, overwrite=overwrite)
    with placing as folder, unchanged(point.model, *files.identifying):
        _check_digest(files, point)
        if files.gguf:
            check_room(output, 4 * point.inventory.parameters)
        with safetensors_of(files, asked.source, folder) as unpacked:
            found = _write(unpacked, point, quantization, folder, output)
        checked = _check(asked, folder, found) if verify else None
        written = {
            str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
        }
        config = json.loads((folder / CONFIG).read_text())
    stored = sum(size for name, size in written.items() if name.endswith(".safetensors"))
    measured = sizes(found, point.inventory, stored, point.candidate.costs.get("size_bytes"))
    return Applied(output, asked, measured, written, str(config.get("dtype") or config.get("torch_dtype")), checked)


def device() -> str:
    """Where weights are rounded."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(
    files: ModelFiles, point: Exported, quantization: Mapping[str, Any], folder: Path, output: Path
) -> list[Entry]:
    stored = headers(files)
    found = entries(point, quantization, stored)
    settings = {CONFIG: config_with(files, quantization, stored), OWN: render("json", point)}
    kept = kept_files(files)
    others = sum(len(text.encode()) for text in settings.values()) + sum(file.stat().st_size for file in kept.values())
    check_room(output, sum(entry.nbytes for entry in found) + others)
    with writing(output):
        for name, text in settings.items():
            (folder / name).write_text(text)
        for name, file in kept.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    write_weights(found, folder, point.quantizer, getattr(torch, _dtype(point)), torch.device(device()))
    return found


def _check(asked: Asked, folder: Path, found: list[Entry]) -> Check:
    assert asked.measured_with is not None
    schemes = {name: scheme for name, scheme in asked.exported.schemes.items() if scheme != FULL_PRECISION}
    spec, data_digest = asked.measured_with
    return replace(check(folder, found, spec, schemes, data_digest), measured=measured_loss(asked.exported.candidate))


def _check_digest(files: ModelFiles, point: Exported) -> None:
    if files_digest(files) != _weights_digest(point.inventory.digest):
        raise Conflict(
            f"the files of '{point.model}' changed since it was searched: its points are of other weights",
            field="model",
            value=point.model,
            accepted="the files that were searched, or a new search",
        )


def _weights_digest(digest: str) -> str:
    return digest.partition(":")[0]


def _dtype(point: Exported) -> Dtype:
    return cast(Dtype, point.inventory.digest.partition(":")[2] or "float32")


def _check_known(field: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise InvalidRequest(
            f"the document's {field} names '{value[:200]}', which is not known here",
            field=field,
            value=value,
            accepted=sorted(known),
        )


def _check_apart(output: Path, asked: Asked, files: ModelFiles) -> None:
    """Raise InvalidRequest where the model itself lies in `output`: it would be replaced by what is made of it."""
    place = Path(os.path.realpath(output))
    if any(file.is_relative_to(place) for file in (*files.all.values(), *files_behind(asked.source))):
        raise InvalidRequest(
            f"{output} holds the files of '{asked.exported.model}' itself, and is not overwritten",
            field="output",
            value=str(output),
            accepted="another folder",
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether `apply` wrote it, and nothing else is in it."""
    if not all(
        _is_ours(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()
    ):
        return False
    try:
        read_native((folder / OWN).read_text())
        config = json.loads((folder / CONFIG).read_text())
        return bool(config["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InvalidRequest):
        return False


def _is_ours(file: Path) -> bool:
    return str(file) in WRITTEN or SHARDS.fullmatch(str(file)) is not None
