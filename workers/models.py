"""Load a model from the files of its source. Safetensors and GGUF only; never remote code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.errors import ModelTooLarge, UnsupportedModel
from search.inventory import Task
from workers.fingerprint import unchanged
from workers.headers import Shapes, read_gguf, read_safetensors
from workers.memory import check_fits
from workers.placement import Placement, devices_of, place
from workers.settings import Dtype
from workers.sharing import digest_key, load_shared
from workers.sources import CONFIG, POOLING_FILE, ModelFiles, find_model, read_json

TASKS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "sequence-classification",
    "Model": "embedding",
}
"""What an architecture's name ends with → its task; longer endings first."""

POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
"""`pooling_mode` of a sentence-transformers folder → the flag that said so before version 6 of the library."""

FROM_ELSEWHERE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""The settings that may ask for code of the model's own."""

MOST_LABELS = 2**20

Build = Callable[..., tuple[nn.Module, str]]
"""Makes the model of a task, a configuration and what else the library needs to find its weights; with the digest of
its files."""


@dataclass(slots=True)
class LoadedModel:
    """A model in evaluation mode with what is needed to feed it.

    `digest` is a hash of its weights and configuration; `preprocessor` a tokenizer (text) or image processor (images,
    None where the model came without one); `pooling` says how an embedding is drawn from token states ("mean", "cls").
    """

    model: nn.Module
    task: Task
    architecture: str
    digest: str
    preprocessor: Any = None
    pooling: str = "mean"

    @property
    def device(self) -> torch.device:
        """Where the model's first parameters are: what it is fed with goes there."""
        return next(self.model.parameters()).device

    @property
    def is_text(self) -> bool:
        """Whether inputs are tokens."""
        return self.task != "image-classification"

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """The output that the loss is measured on: logits, or one embedding per sequence (samples × features)."""
        if not self.is_text:
            output = self.model(batch["pixel_values"])
            classified: Tensor = output if isinstance(output, Tensor) else output.logits
            return classified
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if self.task == "embedding":
            states: Tensor = self.model(**inputs).last_hidden_state
            if self.pooling == "cls":
                return states[:, 0]
            weights = batch["attention_mask"].unsqueeze(-1).to(states)
            return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        if self.task == "causal-lm":
            inputs["use_cache"] = False  # type: ignore[assignment]
        logits: Tensor = self.model(**inputs).logits
        return logits


def load_model(source: str, device: Placement, dtype: Dtype = "float32", *, shared: bool = False) -> LoadedModel:
    """Load `source` (see `workers.sources`), to compute in `dtype`, which is part of its digest; `shared`: with weights
    that other processes of this machine share, where they lie in its memory.

    Raises UnsupportedModel when there is no such model, its files are pickles, damaged or incomplete, it asks for code
    of its own, is quantized already, holds numbers that are not finite, or its architecture has no known task;
    ModelTooLarge when it does not fit into the memory that is free, ModelChanged when its files change meanwhile.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    files = find_model(source)
    shapes = _headers(files)
    with files.opened() as folder:
        load = _load_gguf if files.gguf else _load_folder
        build = partial(_instantiate, files, folder, shapes, device, getattr(torch, dtype), shared)
        loaded = load(files, folder, shapes, build)
    if dtype != "float32":
        loaded.digest += f":{dtype}"
    return loaded


def _load_folder(files: ModelFiles, folder: Path, shapes: Shapes, build: Build) -> LoadedModel:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    _check_settings(files, len(shapes))
    with _refusing(files.name, f"the configuration of {files.name} cannot be read", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        architecture = (config.architectures or [type(config).__name__.removesuffix("Config") + "Model"])[0]
    task = _task(architecture, config, files.name)
    preprocessor = AutoImageProcessor if task == "image-classification" else AutoTokenizer
    pooling = _pooling(files)
    model, digest = build(task, config)
    return LoadedModel(
        model=model,
        task=task,
        architecture=architecture,
        digest=digest,
        preprocessor=_preprocessor(preprocessor, folder, required=task != "image-classification"),
        pooling=pooling,
    )


def _load_gguf(files: ModelFiles, folder: Path, shapes: Shapes, build: Build) -> LoadedModel:
    from transformers import AutoConfig, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": files.name}
    with _refusing(files.name, f"{files.name} cannot be loaded", folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
        _check_counts(config.to_dict(), len(shapes), files.name)
    model, digest = build("causal-lm", config, **options)
    return LoadedModel(
        model=model,
        task="causal-lm",
        architecture=type(model).__name__,
        digest=digest,
        preprocessor=_preprocessor(AutoTokenizer, folder, **options),
    )


def _headers(files: ModelFiles) -> Shapes:
    read = read_gguf if files.gguf else read_safetensors
    shapes: Shapes = {}
    for name, file in files.weights.items():
        shapes |= read(file, name if files.gguf else f"{name} of {files.name}")
    if not shapes:
        raise UnsupportedModel(f"{files.name} holds no weights", field="model", value=files.name)
    return shapes


def _check_settings(files: ModelFiles, tensors: int) -> None:
    """Raise UnsupportedModel for settings that ask for code from elsewhere, or more of anything than is there."""
    for name in FROM_ELSEWHERE:
        if name not in files.settings:
            continue
        settings = read_json(files.settings[name], name, files.name)
        asked = [
            key
            for key in settings
            if key == "auto_map" or (key.endswith("_implementation") and "/" in str(settings[key]))
        ]
        if asked:
            raise UnsupportedModel(
                f"{files.name} asks for code of its own ({asked[0]} in {name}), which is never run",
                field="model",
                value=files.name,
                accepted="an architecture that the transformers library has",
            )
        if name == CONFIG:
            _check_counts(settings, tensors, files.name)


def _check_counts(settings: dict[str, Any], tensors: int, model: str) -> None:
    """Raise UnsupportedModel where a configuration counts more layers than there are tensors, or labels without end.

    The library would build them all before it missed their weights.
    """
    for key, value in settings.items():
        if key.endswith("_config") and isinstance(value, dict):
            _check_counts(value, tensors, model)
        most = tensors if "layer" in key or "depth" in key else MOST_LABELS if "label" in key else None
        for count in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(count, int | float) and count > most:
                raise UnsupportedModel(
                    f"the configuration of {model} cannot be read: {key} is {str(count)[:20]}, "
                    f"and there are {tensors} tensors",
                    field="model",
                    value=model,
                )


def _instantiate(
    files: ModelFiles,
    folder: Path,
    shapes: Shapes,
    device: Placement,
    dtype: torch.dtype,
    shared: bool,
    task: Task,
    config: Any,
    **options: Any,
) -> tuple[nn.Module, str]:
    import transformers

    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }
    making = making_options(task, config)

    def load() -> nn.Module:
        model, report = classes[task].from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **making,
            **options,
        )
        missing = sorted(report["missing_keys"])
        if missing:
            # They were filled with random numbers.
            raise UnsupportedModel(
                f"{files.name} lacks {len(missing)} of its model's tensors, {missing[0]} among them",
                field="model",
                value=files.name,
            )
        _check_finite(files.name, model)
        return _in_dtype(model.eval().requires_grad_(False), dtype)

    # The digest reads the files, and the library reads them again.
    with unchanged(files.name, *files.identifying), _refusing(files.name, f"{files.name} cannot be loaded", folder):
        _check_size(files.name, classes[task], config, shapes, devices_of(device), dtype)
        digest = files_digest(files)
        # Weights that go to a GPU pass through this machine's memory only.
        share = shared and (files.gguf is not None or devices_of(device)[0].type == "cpu")
        model = load_shared(digest_key(digest, dtype), config, making, load) if share else load()
        return place(model, device), digest


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`model` in `dtype`, as it would have been loaded in it: what is no weight, such as rotary frequencies, stays."""
    saved = model.state_dict().keys()
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    model.to(dtype)
    for name, buffer in computed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    return model


def making_options(task: Task, config: Any) -> dict[str, Any]:
    """What a model's class is made with beside its configuration."""
    # The pooled output of these encoders takes no part in a sentence embedding.
    unpooled = task == "embedding" and config.model_type in ("bert", "roberta", "xlm-roberta")
    return {"add_pooling_layer": False} if unpooled else {}


def files_digest(files: ModelFiles) -> str:
    """The digest of a model that computes in float32; one that computes in another type has it as a suffix."""
    total = hashlib.sha256()
    for file in files.identifying:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _check_size(
    name: str, auto: Any, config: Any, shapes: Shapes, devices: list[torch.device], dtype: torch.dtype
) -> None:
    """Raise ModelTooLarge, or UnsupportedModel where the configuration describes a far larger model than the files.

    The model is built without memory for its weights, to count them.
    """
    held = sum(map(math.prod, shapes.values()))
    # Some models of the library cannot be built without weights.
    with torch.device("meta"):
        empty = auto.from_config(config, trust_remote_code=False)
    described = sum(parameter.numel() for parameter in empty.parameters())
    if described > 2 * held:
        raise UnsupportedModel(
            f"{name} cannot be loaded: its configuration describes {described:,} weights, and its files hold {held:,}",
            field="model",
            value=name,
        )
    buffers = sum(buffer.numel() for buffer in empty.buffers())
    check_fits(name, max(held, described) + buffers, dtype.itemsize, *devices)


def _check_finite(name: str, model: nn.Module) -> None:
    broken = [key for key, one in model.state_dict().items() if one.is_floating_point() and not one.isfinite().all()]
    if broken:
        raise UnsupportedModel(
            f"{len(broken)} of the tensors of {name} hold values that are not finite, {broken[0]} among them",
            field="model",
            value=name,
            accepted="weights that are finite numbers",
        )


def _preprocessor(auto: Any, folder: Path, *, required: bool = True, **options: Any) -> Any:
    try:
        with _refusing(folder.name, f"the tokenizer of {folder.name} cannot be loaded", folder):
            return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except UnsupportedModel:
        if required:
            raise
        return None


@contextmanager
def _refusing(name: str, detail: str, folder: Path) -> Iterator[None]:
    """Turn whatever the libraries raise over a file they cannot make sense of into UnsupportedModel."""
    try:
        yield
    except UnsupportedModel:
        raise
    except BaseException as error:
        # Of a damaged file the libraries raise anything; those written in Rust raise what is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ModelTooLarge(f"memory ran out while {name} was loaded", field="model", value=name) from error
        reason = _first_line(error).replace(f"{folder.parent}/", "")
        raise UnsupportedModel(f"{detail}: {reason}", field="model", value=name) from error


def _task(architecture: str, config: Any, name: str) -> Task:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"{name} is quantized already", field="model", value=name, accepted="the model in full precision"
        )
    for ending, task in TASKS.items():
        if architecture.endswith(ending) and not (task == "embedding" and config.is_encoder_decoder):
            return task
    raise UnsupportedModel(
        f"{architecture} of {name} has no task that can be searched",
        field="model",
        value=architecture,
        accepted=[f"…{ending} ({task})" for ending, task in TASKS.items()],
    )


def _pooling(files: ModelFiles) -> str:
    file = files.settings.get(POOLING_FILE)
    config = read_json(file, POOLING_FILE, files.name) if file else {"pooling_mode": "mean"}
    for mode, older_key in POOLINGS.items():
        if config.get("pooling_mode") == mode or config.get(older_key):
            return mode
    raise UnsupportedModel(
        f"{files.name} pools its token states in a way that is not known",
        field="model",
        value=files.name,
        accepted=list(POOLINGS),
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
