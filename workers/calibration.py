"""Calibration data: real samples of a data set, drawn by seed into three splits: to search, to accept, to report."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from search.errors import InvalidCalibration
from search.request import Calibration
from workers import datasets
from workers.datasets import Images, Texts
from workers.models import LoadedModel

Batch = dict[str, Tensor]

Split = Literal["calibration", "acceptance", "held_out"]
"""What a search learns from; what decides whether to believe what it learnt; what its results are reported on."""

SPLITS: tuple[Split, ...] = get_args(Split)

LOGITS_PER_BATCH = 2**25
"""Most logits (positions × vocabulary) in a batch of a language model: 128 MiB in float32."""

SEQUENCES_PER_BATCH = 8
IMAGES_PER_BATCH = 16

POOL = 16
"""Of a large text, at most so many times the samples needed are tokenized and drawn from."""


@dataclass(frozen=True, slots=True)
class Data:
    """Three disjoint splits as batches, and a hash of what is in them.

    A batch has `input_ids` and `attention_mask` (samples × tokens) or `pixel_values` (samples × channels × height ×
    width), and `labels` (samples) where the data set has them. `documents` numbers, for every sample of the first
    split, what it was cut from; where it is empty, each is of its own.
    """

    calibration: list[Batch]
    acceptance: list[Batch]
    held_out: list[Batch]
    digest: str
    documents: tuple[int, ...] = ()


def load_data(calibration: Calibration, loaded: LoadedModel) -> Data:
    """Draw `calibration.samples` samples for each split.

    Text is cut into pieces of at most `sequence_length` tokens, and what occurs twice counts once. The data set is cut
    in three first, by position after its documents are shuffled, so that the splits hold different documents (but for
    those that the cuts go through).
    Raises InvalidCalibration when the data set is unknown, empty, of the wrong kind or too short, its sequences are
    longer than the model takes, its images are not finite, its labels are not among the model's classes, or the model
    refuses its samples.
    """
    name = calibration.dataset or ("python-docs" if loaded.is_text else None)
    if name is None:
        raise InvalidCalibration(
            "image models have no built-in data set",
            field="calibration.dataset",
            accepted="a file or folder of the data sets folder, or a Hugging Face data set id",
        )
    _check_length(calibration, loaded)
    generator = np.random.default_rng(calibration.seed)
    found = datasets.load(name)
    samples, documents = (
        _text_samples(found, name, calibration, loaded, generator)
        if loaded.is_text
        else _image_samples(found, name, calibration, loaded, generator)
    )
    most = len(samples) // len(SPLITS)
    if most < calibration.samples:
        unit = f"sequences of {calibration.sequence_length} tokens" if loaded.is_text else "images"
        raise InvalidCalibration(
            f"'{name}' is too short: it gives {len(samples)} {unit}, "
            f"and three splits of {calibration.samples} are needed",
            field="calibration.samples",
            value=calibration.samples,
            accepted=f"at most {most}" if most >= 2 else "a larger data set, or a shorter calibration.sequence_length",
        )
    size = _batch_size(calibration, loaded)
    splits: list[list[Batch]] = []
    origins: list[tuple[int, ...]] = []
    for start in range(0, len(SPLITS) * most, most):
        drawn = sorted(start + generator.choice(most, calibration.samples, replace=False))
        splits.append(_batches([samples[index] for index in drawn], size, name, loaded))
        origins.append(tuple(documents[index] for index in drawn))
    output = _first_output(splits[0][0], name, loaded)
    if loaded.task != "embedding":
        _check_labels(list(chain(*splits)), output.shape[-1], name, loaded)
    calibrating, accepting, reporting = splits
    return Data(calibrating, accepting, reporting, _digest(splits), origins[0])


def sample_count(batch: Batch) -> int:
    """How many samples a batch has."""
    return len(next(iter(batch.values())))


def one_item(loaded: LoadedModel) -> Batch:
    """A smallest input: one token, or one image of zeros in the size that the model's configuration states."""
    device = loaded.device
    if loaded.is_text:
        return {
            "input_ids": torch.zeros((1, 1), dtype=torch.long, device=device),
            "attention_mask": torch.ones((1, 1), dtype=torch.long, device=device),
        }
    config = getattr(loaded.model, "config", None)
    size = getattr(config, "image_size", None) or _processor_size(loaded.preprocessor) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.zeros((1, _channels(loaded), height, width), device=device)}


def _processor_size(processor: object) -> tuple[int, int] | None:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None)
    if size is None:
        return None
    edge = size.get("shortest_edge")
    return (size.get("height", edge), size.get("width", edge))


def _text_samples(
    found: Texts | Images, name: str, calibration: Calibration, loaded: LoadedModel, generator: np.random.Generator
) -> tuple[list[Batch], Sequence[int]]:
    """Samples, and the document that each is cut from, or begins in."""
    if not isinstance(found, Texts):
        raise _wrong_kind(name, "images", loaded)
    # What occurs twice would stand in two splits.
    once = {document: index for index, document in enumerate(found.documents)}
    documents = generator.permutation(list(once.values()))
    labels, most = found.labels, len(SPLITS) * POOL * calibration.samples
    length, tokenizer = calibration.sequence_length, loaded.preprocessor
    if loaded.task == "causal-lm":
        separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        stream: list[int] = []
        begins: list[int] = []
        for index in documents:
            begins.append(len(stream))
            stream += [*tokenizer(found.documents[index], add_special_tokens=False)["input_ids"], *separator]
            if len(stream) >= most * length:
                break
        whole = range(0, len(stream) - length + 1, length)
        samples = [{"input_ids": torch.tensor(stream[start : start + length])} for start in whole]
        return samples, [int(documents[bisect_right(begins, start) - 1]) for start in whole]
    samples, origins = [], []
    for index in documents:
        if len(samples) >= most:
            break
        encoded = tokenizer(
            found.documents[index], truncation=True, max_length=length, return_overflowing_tokens=labels is None
        )
        pieces = encoded["input_ids"]
        for piece in pieces if pieces and isinstance(pieces[0], list) else [pieces]:
            if not piece:
                continue
            sample = {"input_ids": torch.tensor(piece)}
            if labels is not None:
                sample["labels"] = torch.tensor(labels[index])
            samples.append(sample)
            origins.append(int(index))
    return samples, origins


def _image_samples(
    found: Texts | Images, name: str, calibration: Calibration, loaded: LoadedModel, generator: np.random.Generator
) -> tuple[list[Batch], Sequence[int]]:
    if not isinstance(found, Images):
        raise _wrong_kind(name, "text", loaded)
    samples = []
    for index in generator.permutation(len(found.images))[: len(SPLITS) * calibration.samples]:
        image = found.images[index]
        if isinstance(image, np.ndarray) and image.dtype.kind == "f":
            pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
            if not pixels.isfinite().all():
                raise InvalidCalibration(
                    f"image {index} of '{name}' has values that are not finite",
                    field="calibration.dataset",
                    value=name,
                    accepted="images of finite numbers",
                )
        elif loaded.preprocessor is not None:
            pixels = _preprocessed(image, name, loaded)
        else:
            raise InvalidCalibration(
                f"'{name}' holds raw images, and the model came without a preprocessor_config.json",
                field="calibration.dataset",
                value=name,
                accepted="a .npz file with float `images` (samples × channels × height × width), model-ready",
            )
        sample = {"pixel_values": pixels}
        if found.labels is not None:
            sample["labels"] = torch.tensor(int(found.labels[index]))
        samples.append(sample)
    return samples, range(len(samples))


def _preprocessed(image: Any, name: str, loaded: LoadedModel) -> Tensor:
    try:
        if isinstance(image, Path):
            image = datasets.open_image(image, grey=_channels(loaded) == 1)
        processed = loaded.preprocessor(image, input_data_format="channels_last", return_tensors="pt")
    except (ValueError, OSError) as error:
        raise InvalidCalibration(
            f"an image of '{name}' cannot be read: {error}", field="calibration.dataset", value=name
        ) from error
    pixels: Tensor = processed["pixel_values"][0]
    return pixels


def _channels(loaded: LoadedModel) -> int:
    return int(getattr(getattr(loaded.model, "config", None), "num_channels", 3))


def _check_length(calibration: Calibration, loaded: LoadedModel) -> None:
    most = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if loaded.is_text and most is not None and calibration.sequence_length > most:
        raise InvalidCalibration(
            f"this {loaded.architecture} takes at most {most} tokens",
            field="calibration.sequence_length",
            value=calibration.sequence_length,
            accepted=f"at most {most}",
        )


def _first_output(batch: Batch, name: str, loaded: LoadedModel) -> Tensor:
    try:
        with torch.no_grad():
            return loaded({key: value[:1] for key, value in batch.items()})
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{key} {'×'.join(map(str, value.shape[1:]))}" for key, value in batch.items())
        raise InvalidCalibration(
            f"this {loaded.architecture} does not take the samples of '{name}' ({shapes}): {error}",
            field="calibration.dataset",
            value=name,
        ) from error


def _check_labels(batches: list[Batch], classes: int, name: str, loaded: LoadedModel) -> None:
    labels = {label for batch in batches if "labels" in batch for label in batch["labels"].tolist()}
    unknown = sorted(label for label in labels if not 0 <= label < classes)
    if unknown:
        raise InvalidCalibration(
            f"'{name}' has the label {unknown[-1]}, and this {loaded.architecture} has {classes} classes",
            field="calibration.dataset",
            value=name,
            accepted=f"labels from 0 to {classes - 1}, as the model numbers its classes, or none",
        )


def _wrong_kind(name: str, kind: str, loaded: LoadedModel) -> InvalidCalibration:
    return InvalidCalibration(
        f"'{name}' holds {kind}, which a {loaded.task} model does not take",
        field="calibration.dataset",
        value=name,
        accepted="text" if loaded.is_text else "images",
    )


def _batch_size(calibration: Calibration, loaded: LoadedModel) -> int:
    if not loaded.is_text:
        return IMAGES_PER_BATCH
    if loaded.task == "causal-lm":
        vocabulary = loaded.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return int(max(1, min(SEQUENCES_PER_BATCH, LOGITS_PER_BATCH // (calibration.sequence_length * vocabulary))))
    return SEQUENCES_PER_BATCH


def _batches(samples: list[Batch], size: int, name: str, loaded: LoadedModel) -> list[Batch]:
    shapes = {tuple(sample["pixel_values"].shape) for sample in samples if "pixel_values" in sample}
    if len(shapes) > 1:
        raise InvalidCalibration(
            f"the images of '{name}' come in several shapes: {', '.join(map(str, sorted(shapes)))}",
            field="calibration.dataset",
            value=name,
            accepted="images of one shape",
        )
    return [_collate(samples[start : start + size], loaded) for start in range(0, len(samples), size)]


def _collate(samples: list[Batch], loaded: LoadedModel) -> Batch:
    batch: Batch = {}
    if loaded.is_text:
        rows = [sample["input_ids"] for sample in samples]
        padding = getattr(loaded.preprocessor, "pad_token_id", None) or 0
        batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True
        )
    else:
        batch["pixel_values"] = torch.stack([sample["pixel_values"] for sample in samples])
    if "labels" in samples[0]:
        batch["labels"] = torch.stack([sample["labels"] for sample in samples])
    return {key: value.to(loaded.device) for key, value in batch.items()}


def _digest(splits: list[list[Batch]]) -> str:
    total = hashlib.sha256()
    for split in splits:
        for batch in split:
            for key, value in sorted(batch.items()):
                total.update(f"{key}{tuple(value.shape)}".encode())
                total.update(value.cpu().numpy().tobytes())
    return total.hexdigest()
