"""Load a model from a Hugging Face folder, a hub id or a GGUF file. Safetensors and GGUF only; never remote code."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from search.errors import UnsupportedModel
from search.inventory import Task

TASKS: dict[str, Task] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "sequence-classification",
    "Model": "embedding",
}
"""What an architecture's name ends with → its task; longer endings first."""

Dtype = Literal["float32", "bfloat16"]

POOLING_FILE = "1_Pooling/config.json"
POOLINGS = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
"""`pooling_mode` of a sentence-transformers folder → the flag that said so before version 6 of the library."""

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"]


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
        """Where the model's parameters are."""
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


HUB = "hub:"


def dtype() -> Dtype:
    """What models compute in, as `BITFRONTIER_DTYPE` says: float32 (default) or bfloat16. Raises ValueError."""
    chosen = os.environ.get("BITFRONTIER_DTYPE", "float32")
    if chosen not in get_args(Dtype):
        raise ValueError(f"BITFRONTIER_DTYPE is '{chosen}'; accepted: {', '.join(get_args(Dtype))}")
    return cast(Dtype, chosen)


def source_of(given: str) -> str:
    """The source that a person means: the absolute path of what exists here, else a hub id (`hub:org/name`)."""
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else HUB + given


def load_model(source: str, device: torch.device, dtype: Dtype = "float32") -> LoadedModel:
    """Load `source`: a folder, a `.gguf` file, or `hub:org/name`, to compute in `dtype`, which is part of its digest.

    Raises UnsupportedModel when there is no such model, its files are pickles, damaged or incomplete, it is quantized
    already, or its architecture has no known task.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = _from_hub(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    gguf = path.suffix == ".gguf" and path.is_file()
    loaded = _load_gguf(path, device) if gguf else _load_folder(path, device)
    if dtype != "float32":
        loaded.model.to(getattr(torch, dtype))
        loaded.digest += f":{dtype}"
    return loaded


def _load_folder(folder: Path, device: torch.device) -> LoadedModel:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise UnsupportedModel(
            f"{folder.name} has no config.json",
            field="model",
            value=folder.name,
            accepted="a Hugging Face model folder",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(kind))
        raise UnsupportedModel(
            f"{folder.name} has no safetensors weights"
            + (f"; {pickles[0]} is a pickle, which can run code when it is loaded" if pickles else ""),
            field="model",
            value=folder.name,
            accepted="weights in .safetensors, or a .gguf file",
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UnsupportedModel(
            f"the configuration of {folder.name} cannot be read: {_first_line(error)}", field="model", value=folder.name
        ) from error
    architecture = (config.architectures or [type(config).__name__.removesuffix("Config") + "Model"])[0]
    task = _task(architecture, config, folder.name)
    preprocessor = AutoImageProcessor if task == "image-classification" else AutoTokenizer
    return LoadedModel(
        model=_instantiate(folder, folder.name, task, config, {}).to(device),
        task=task,
        architecture=architecture,
        digest=_digest([folder / "config.json", *weights, *folder.glob(POOLING_FILE)]),
        preprocessor=_preprocessor(preprocessor, folder, folder.name, required=task != "image-classification"),
        pooling=_pooling(folder),
    )


def _load_gguf(file: Path, device: torch.device) -> LoadedModel:
    from transformers import AutoTokenizer

    model = _instantiate(file.parent, file.name, "causal-lm", None, {"gguf_file": file.name})
    return LoadedModel(
        model=model.to(device),
        task="causal-lm",
        architecture=type(model).__name__,
        digest=_digest([file]),
        preprocessor=_preprocessor(AutoTokenizer, file.parent, file.name, gguf_file=file.name),
    )


def _instantiate(folder: Path, name: str, task: Task, config: Any, options: dict[str, Any]) -> nn.Module:
    import transformers
    from safetensors import SafetensorError

    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "image-classification": transformers.AutoModelForImageClassification,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }
    if task == "embedding" and config is not None and config.model_type in ("bert", "roberta", "xlm-roberta"):
        # The pooled output of these encoders takes no part in a sentence embedding.
        options = options | {"add_pooling_layer": False}
    try:
        model, report = classes[task].from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        raise UnsupportedModel(f"{name} cannot be loaded: {_first_line(error)}", field="model", value=name) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # They were filled with random numbers.
        raise UnsupportedModel(
            f"{name} lacks {len(missing)} of its model's tensors, {missing[0]} among them", field="model", value=name
        )
    assert isinstance(model, nn.Module)
    return model.eval().requires_grad_(False)


def _preprocessor(auto: Any, folder: Path, name: str, *, required: bool = True, **options: str) -> Any:
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # of a damaged file the tokenizers library says nothing more specific
        if not required:
            return None
        raise UnsupportedModel(
            f"the tokenizer of {name} cannot be loaded: {_first_line(error)}", field="model", value=name
        ) from error


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UnsupportedModel(
            f"'{source}' is neither a registered model nor one that can be fetched from the hub: {_first_line(error)}",
            field="model",
            value=source,
            accepted="a registered name (GET /v1/models), or a Hugging Face id such as org/name",
        ) from error


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


def _pooling(folder: Path) -> str:
    file = folder / POOLING_FILE
    config = json.loads(file.read_text()) if file.is_file() else {"pooling_mode": "mean"}
    for mode, older_key in POOLINGS.items():
        if config.get("pooling_mode") == mode or config.get(older_key):
            return mode
    raise UnsupportedModel(
        f"{folder.name} pools its token states in a way that is not known",
        field="model",
        value=folder.name,
        accepted=list(POOLINGS),
    )


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
