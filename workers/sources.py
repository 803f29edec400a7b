"""Where models come from: the models roots and the hub. What is not in them is brought in, or refused.

A source is what is stored of a registered model: a path relative to the models roots, which may lie elsewhere on every
machine, or `hub:org/name`. A model is a few known files; nothing else of a folder is ever opened.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from db.engine import data_directory
from search.errors import InvalidRequest, ModelTooLarge, UnsupportedModel
from search.names import HUB, model_name
from workers.headers import ACCEPTED, REFUSED
from workers.memory import check_loads

ROOTS_VARIABLE = "BITFRONTIER_MODELS"

CONFIG = "config.json"
POOLING_FILE = "1_Pooling/config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SETTINGS = (
    CONFIG,
    POOLING_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What is read of a model's folder beside its weights, if it is there."""

SERVING = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""What whoever serves a model reads beside them, and a search does not: it is brought along, and never opened."""

WANTED: dict[str, Any] = {
    "allow_patterns": [*SETTINGS, *SERVING, INDEX, "*.safetensors"],
    "ignore_patterns": ["*/*.safetensors", "consolidated*"],
}
"""Of a model of the hub."""

SPARE_BYTES = 2**28
"""Of the disk that models are fetched to, so much is left free."""

MOST_SETTINGS_BYTES = 2**28
"""Of one file of `SETTINGS`, or an index."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model: `settings` and `weights` by their name in the model's folder, with all links resolved;
    `serving` are for who serves it.

    `name` is that of the folder or the GGUF file.
    """

    name: str
    settings: Mapping[str, Path]
    weights: Mapping[str, Path]
    serving: Mapping[str, Path] = field(default_factory=dict)

    @property
    def gguf(self) -> str | None:
        """The name of the GGUF file, if it is one."""
        return next((name for name in self.weights if name.endswith(".gguf")), None)

    @property
    def all(self) -> dict[str, Path]:
        """Every file."""
        return {**self.settings, **self.serving, **self.weights}

    @property
    def identifying(self) -> list[Path]:
        """Those that the model's digest is of: what makes it the model it is."""
        read = [self.settings.get(CONFIG), *self.weights.values(), self.settings.get(POOLING_FILE)]
        return [file for file in read if file is not None]

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Within, a folder that holds settings and weights alone. What is not in it cannot be read by mistake."""
        with tempfile.TemporaryDirectory(prefix="bitfrontier-model-") as scratch:
            folder = Path(scratch) / self.name
            for name, file in {**self.settings, **self.weights}.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(file)
            yield folder


def models_roots() -> list[Path]:
    """The folders that models may lie in, resolved: those of `BITFRONTIER_MODELS` (by default `models` in the data
    directory), then the hub's cache. They need not exist."""
    return [*_own_roots(), _hub_cache()]


def find_model(source: str) -> ModelFiles:
    """The files behind a source; one of the hub is fetched unless it is in the hub's cache.

    Raises UnsupportedModel when there is no such model, a file of it lies outside of the models roots, or its weights
    are no safetensors or GGUF; ModelTooLarge before anything is fetched that has no room here.
    """
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        found = gather(_from_hub(name), name.rpartition("/")[2])
    else:
        found = gather(locate(source))
    for name, file in found.all.items():
        if not _is_inside(file):
            raise _refused(
                f"{name} of {found.name} is a link to a file outside of the models roots",
                found.name,
                "files that lie in a models root, not links out of it",
            )
    return found


def locate(source: str) -> Path:
    """The folder or file of a source that is none of the hub, resolved. Raises UnsupportedModel when it is in no root.

    An absolute path is a source only if it lies in a root.
    """
    for root in models_roots() if source and "\0" not in source else []:
        path = _resolved(root / source)
        if path.exists() and _is_inside(path):
            return path
    raise _refused(
        f"there is no model '{Path(source).name}' in the models roots",
        Path(source).name,
        f"a folder or .gguf file in a folder of {ROOTS_VARIABLE}; 'bitfrontier models add' brings one in",
    )


def files_behind(source: str) -> list[Path]:
    """What to watch for changes: the folder or file of a source, and nothing for one of the hub.

    Raises UnsupportedModel as `locate` does.
    """
    return [] if source.startswith(HUB) else [locate(source)]


def register(name: str, given: str, *, replace: bool = False) -> tuple[str, str | None]:
    """The source of what a person calls `given`: a path on this machine, else a Hugging Face id; and what was done.

    What lies outside of the models roots is brought into the first of them as `name`: hard links where the file system
    allows, else copies. With `replace`, over what is there under this name.
    Raises InvalidRequest for a wrong name or id, UnsupportedModel for what cannot be searched or is already there.
    """
    model_name(name)
    path = _resolved(Path(given).expanduser())
    if not path.exists():
        if not given.count("/") == 1 or given.startswith(("/", ".", "~")):
            raise _refused(
                f"there is no folder or file '{given}' here", given, "a path, or a Hugging Face id (org/name)"
            )
        return HUB + model_name(given), None
    if _is_inside(path):
        return _relative(path), None
    if "/" in name:
        raise _refused(f"'{name}' would be read as a Hugging Face id", name, "a name without a slash for a path")
    found = gather(path)
    home = _own_roots()[0] / (f"{name}.gguf" if found.gguf else name)
    done = _bring(found, home, replace=replace)
    return _relative(home), done


def gather(path: Path, name: str | None = None) -> ModelFiles:
    """The files of the model at `path`, a folder or a GGUF file, wherever they lie; links are resolved once, here.
    Messages call it `name`, or as its folder is called.

    Raises UnsupportedModel when it has no weights that may be read, its index names files outside of its folder or
    that are missing, or a settings file is out of all proportion.
    """
    name = name or path.name
    if path.suffix == ".gguf" and path.is_file():
        return ModelFiles(name, {}, {name: _resolved(path)})
    if path.suffix == ".safetensors" and path.is_file():
        raise _refused(f"{name} holds weights, and no configuration", name, "the folder that holds both")
    if path.is_file():
        raise _refused(f"{name} is {REFUSED.get(path.suffix, 'no model')}", name, ACCEPTED)
    if not (path / CONFIG).is_file():
        raise _refused(f"{name} has no {CONFIG}", name, "a Hugging Face model folder")
    settings, serving = (
        {file: _resolved(path / file) for file in names if (path / file).is_file()} for names in (SETTINGS, SERVING)
    )
    for file, place in {**settings, **serving}.items():
        _check_size(place, file, name)
    weights = {file: _resolved(path / file) for file in _weight_names(path, name)}
    if WEIGHTS not in weights:
        settings[INDEX] = _resolved(path / INDEX)
    return ModelFiles(name, settings, weights, serving)


def read_json(file: Path, name: str, model: str) -> dict[str, Any]:
    """The JSON object in `file`, which messages call `name` of `model`. Raises UnsupportedModel when it is none."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(f"{name} of {model} cannot be read: {error or 'it is nested too deep'}", model) from error
    if not isinstance(content, dict):
        raise _refused(f"{name} of {model} cannot be read: it is no JSON object", model)
    return content


def _weight_names(folder: Path, model: str) -> list[str]:
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return _shards(folder, model)
    others = sorted(file.name for file in folder.iterdir() if file.suffix in REFUSED)
    reason = f"; {others[0]} is {REFUSED[Path(others[0]).suffix]}" if others else ""
    raise _refused(f"{model} has no safetensors weights{reason}", model, ACCEPTED)


def _shards(folder: Path, model: str) -> list[str]:
    _check_size(folder / INDEX, INDEX, model)
    index = read_json(_resolved(folder / INDEX), INDEX, model)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise _refused(f"{INDEX} of {model} does not say which file holds which tensor", model)
    names = sorted(set(places.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise _refused(
                f"{INDEX} of {model} names '{name[:200]}', which is no safetensors file of its folder",
                model,
                "names of .safetensors files beside the index",
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise _refused(f"{model} lacks {missing[0]} ({len(missing)} of its {len(names)} shards)", model)
    _check_total(index, sum((folder / name).stat().st_size for name in names), model)
    return names


def _check_total(index: dict[str, Any], held: int, model: str) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size", held) if isinstance(metadata, dict) else held
    # Tensors that share memory are counted once by some writers, and by others as often as they are named.
    if isinstance(total, bool) or not isinstance(total, int | float) or not 0 <= total <= 4 * held:
        raise _refused(f"{INDEX} of {model} claims {total} bytes of weights, and its shards have {held:,}", model)


def _check_size(file: Path, name: str, model: str) -> None:
    size = file.stat().st_size
    if size > MOST_SETTINGS_BYTES:
        raise _refused(
            f"{name} of {model} has {size / 1e6:.3f} MB", model, f"at most {MOST_SETTINGS_BYTES // 10**6} MB"
        )


def _bring(found: ModelFiles, home: Path, *, replace: bool) -> str:
    there = home.exists()
    if there and _same(found, home):
        return f"{home} holds it already"
    if there and not replace:
        raise _refused(
            f"{home} exists and holds something else",
            home.name,
            "another name, or --replace to put this model in its place",
        )
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bringing-", dir=home.parent) as scratch:
        made = Path(scratch) / "model"
        copied = [name for name, file in found.all.items() if not _link(file, made / name)]
        made.chmod(0o755)
        if there:
            home.rename(Path(scratch) / "old")
        (made / found.gguf if found.gguf else made).rename(home)
    size = sum(file.stat().st_size for file in found.all.values()) / 1e6
    return f"{'copied' if copied else 'linked'} {size:.1f} MB into {home}"


def _link(file: Path, to: Path) -> bool:
    """Link `to` to the same content, or copy it; whether it could be linked."""
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copy2(file, to)
        return False
    return True


def _same(found: ModelFiles, home: Path) -> bool:
    if found.gguf:
        return home.is_file() and filecmp.cmp(found.weights[found.gguf], home)
    held = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()}
    return held == set(found.all) and all(filecmp.cmp(file, home / name) for name, file in found.all.items())


def _relative(path: Path) -> str:
    """`path` as every machine may find it. Raises UnsupportedModel when another root has something of that name."""
    relative = next(str(path.relative_to(root)) for root in models_roots() if path.is_relative_to(root))
    if (found := locate(relative)) != path:
        raise _refused(f"{path} is hidden by {found}, of the same name in an earlier models root", path.name)
    return relative


def _is_inside(path: Path) -> bool:
    return any(path != root and path.is_relative_to(root) for root in models_roots())


def _resolved(path: Path) -> Path:
    # Path.resolve raises where links go round in circles; this leaves them, and they are no files.
    return Path(os.path.realpath(path))


def _own_roots() -> list[Path]:
    given = [Path(one).expanduser() for one in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if one]
    return [_resolved(root) for root in given or [data_directory() / "models"]]


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return _resolved(Path(HF_HUB_CACHE))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        model_name(name)
        _check_room(name)
        return Path(snapshot_download(name, **WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, InvalidRequest) as error:
        raise _refused(
            f"'{name}' is neither a registered model nor one that can be fetched from the hub: "
            + (str(error).strip() or type(error).__name__).splitlines()[0][:300],
            name,
            "a registered name (GET /v1/models), or a Hugging Face id such as org/name",
        ) from error


def _check_room(name: str) -> None:
    """Raise ModelTooLarge where what would have to be fetched of a model fits neither the disk nor the memory."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(name, dry_run=True, **WANTED)
    except DryRunError:
        # Without the hub there is only what was fetched before.
        return
    missing = [file for file in files if file.will_download]
    sizes = {file.filename: file.file_size or 0 for file in missing}
    needed, free = sum(sizes.values()) + SPARE_BYTES, _free_disk(_hub_cache())
    if missing and needed > free:
        raise ModelTooLarge(
            f"{name} would take {needed / 1e9:.1f} GB of the disk of the hub's cache, where {free / 1e9:.1f} GB are "
            f"free: {(needed - free) / 1e9:.1f} GB short",
            field="model",
            value=name,
            accepted=f"a model that takes at most {free / 1e9:.1f} GB, or HF_HUB_CACHE on a larger disk",
        )
    check_loads(name, sum(size for file, size in sizes.items() if file.endswith(".safetensors")))


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free


def _refused(detail: str, value: str, accepted: str | None = None) -> UnsupportedModel:
    return UnsupportedModel(detail, field="model", value=value, accepted=accepted)
