"""Whether a checkpoint that was written loses what was measured: it is loaded again, and its loss measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from search.candidate import Candidate
from search.errors import Conflict
from search.measurement import metrics
from search.scheme import FULL_PRECISION, Scheme
from workers.calibration import Split
from workers.checkpoint.compressed import DamagedCheckpoint, decompress
from workers.checkpoint.plan import Entry
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel, making_options

TOLERANCE = 1e-4
"""By so small a share the losses of equal weights may differ: the order of a sum may depend on where numbers lie."""


@dataclass(frozen=True, slots=True)
class Check:
    """Losses on one split: what the search `measured`, None where it did not measure the point in full; of the same
    rounding, measured `again` here; and of the `reloaded` checkpoint."""

    split: Split
    measured: float | None
    again: float
    reloaded: float


def check(
    folder: Path, entries: Sequence[Entry], spec: EvaluatorSpec, schemes: Mapping[str, Scheme], data_digest: str
) -> Check:
    """Measure the checkpoint in `folder` against the model that `spec` names, with activations rounded as `schemes`
    say; `measured` is left open.

    Raises Conflict where the calibration data is not that of `data_digest`, DamagedCheckpoint where a weight or the
    losses differ.
    """
    original = Evaluator.build(spec)
    # Rounded weights, multiplied as any others: what is compared is the weights.
    original.kernels = False
    if original.data.digest != data_digest:
        raise Conflict(
            "the calibration data is no longer what the search measured with: the checkpoint cannot be checked",
            field="calibration.dataset",
            value=spec.calibration.dataset,
        )
    split: Split = "held_out"
    again = original.measure(schemes, split)["loss"]
    model = _reloaded(folder, entries, original.loaded)
    _compare(model, original.loaded.model)
    original.apply({})
    copy = Evaluator(replace(original.loaded, model=model), original.data, spec.quantizer)
    copy.kernels = False
    reloaded = _loss(copy, original, schemes, split)
    if not abs(reloaded - again) <= TOLERANCE * abs(again):
        raise DamagedCheckpoint(
            f"the checkpoint's loss is {reloaded:.9g}, and that of the rounding that was measured is {again:.9g}",
            value=reloaded,
            accepted=again,
        )
    return Check(split, None, again, reloaded)


def measured_loss(candidate: Candidate) -> float | None:
    """What the search measured on the held-out data; None for a point that it did not report there."""
    told = candidate.metrics
    return candidate.loss if "acceptance_loss" in told or "calibration_loss" not in told else None


def _compare(model: nn.Module, measured: nn.Module) -> None:
    expected = measured.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise DamagedCheckpoint(f"{name} of the checkpoint is not the weight that was measured", field=name)


@torch.no_grad()
def _loss(copy: Evaluator, original: Evaluator, schemes: Mapping[str, Scheme], split: Split) -> float:
    """Of the copy, whose weights are as rounded as they will be, against the original's full precision."""
    activations = {
        name: Scheme(FULL_PRECISION.weight_bits, scheme.activation_bits)
        for name, scheme in schemes.items()
        if scheme.quantizes_activations
    }
    found = []
    with copy.deployed(activations):
        for index, batch in enumerate(copy.batches(split)):
            found.append(copy.losses(batch, copy.loaded(batch), original.reference(split, index)))
    return metrics({"loss": torch.cat(found).double().tolist()})["loss"]


def _reloaded(folder: Path, entries: Sequence[Entry], loaded: LoadedModel) -> nn.Module:
    """The model that the files of a checkpoint make, where `loaded` is and in the type that it computes in."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    kind: Any = type(loaded.model)
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=_weights(folder, entries),
        dtype=torch.float32,
        output_loading_info=True,
        **making_options(loaded.task, config),
    )
    if report["missing_keys"]:
        raise DamagedCheckpoint(f"the checkpoint lacks {sorted(report['missing_keys'])[0]}")
    like = next(loaded.model.parameters())
    built: nn.Module = model.eval().requires_grad_(False).to(like.device, like.dtype)
    return built


def _weights(folder: Path, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Every weight that the files stand for, by the name that it has where nothing is quantized."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for entry in entries:
        for module in entry.modules:
            parts = {name: name.removeprefix(f"{module}.") for name in entry.layout if name.startswith(f"{module}.")}
            found[f"{module}.weight"] = decompress(
                {part: found.pop(name) for name, part in parts.items()}, entry.scheme
            )
    return found
