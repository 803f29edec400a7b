"""An evaluator: one copy of a model, its data, and what can be asked of them.

Weights are swapped in place, never copied per candidate, and the originals always come back bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from search.errors import UnsupportedModel
from search.inventory import Inventory, by_whole, whole_and_channels
from search.measurement import Samples, metrics
from search.request import Calibration
from search.scheme import FULL_PRECISION, Scheme
from workers.calibration import Batch, Data, Split, load_data, one_item
from workers.kernels.backend import deploys
from workers.kernels.linear import StandIns, pack_rounded, refusal, reroute, stand_in
from workers.layers import CONVOLUTIONS, Layers, WeightedLayer, enumerate_layers
from workers.loss import divergence, next_token_loss
from workers.models import LoadedModel, load_model
from workers.placement import Placement
from workers.prefix import BlockChain, find_chain
from workers.quantizers import Grid, choose_grid, round_to_grid
from workers.quantizers.activation import round_activation
from workers.settings import Dtype


@dataclass(frozen=True, slots=True)
class EvaluatorSpec:
    """What an evaluator is built from: anything that agrees in this may share one.

    `files` fingerprints the files behind `source` and the data set: a model or data set that was replaced is another.
    `device` is torch's, or `auto` for all GPUs that the evaluator sees; `dtype` is what the model computes in.
    """

    source: str
    calibration: Calibration
    quantizer: str = "rtn"
    device: str = "cpu"
    files: str = ""
    dtype: Dtype = "float32"


class Evaluator:
    """A model that can be given any allocation and asked for its loss."""

    def __init__(self, loaded: LoadedModel, data: Data, quantizer: str = "rtn") -> None:
        """Enumerate the model's layers and find its chain of blocks.

        Raises UnsupportedModel when it has no quantizable layer, KernelError where BITFRONTIER_KERNELS names no backend
        that could multiply on its device.
        """
        self.loaded = loaded
        self.data = data
        self.quantizer = quantizer
        self.kernels = deploys(loaded.device)
        """Whether candidates are measured through the kernels that deployment would use."""
        self._stand_ins: StandIns = {}
        self._packed: dict[str, tuple[Scheme, StandIns]] = {}
        self.chain = self._find_chain()
        self.layers = _layers(loaded, self.chain)
        self._originals = {name: layer.parameter.data for name, layer in self.layers.items()}
        self._grids: dict[tuple[str, Scheme], Grid] = {}
        self._applied: dict[str, dict[str, Scheme]] = {}
        self._references: dict[tuple[str, int], Any] = {}
        self.reached: dict[tuple[str, int], tuple[int, Any]] = {}
        """(split, batch) → a number of blocks and the output of the last of them at full precision: where a walk of
        `sensitivity.variants` stopped, and the next one may go on."""
        spread = len({parameter.device for parameter in loaded.model.parameters()}) > 1
        for name, layer in self.layers.items():
            for module in self.modules(name):
                if spread:
                    module.register_forward_pre_hook(brought_to(layer.parameter.device), with_kwargs=True)
                module.register_forward_pre_hook(by_position(module), with_kwargs=True)
            for module in self.modules_that_round(name):
                module.register_forward_pre_hook(self._round_input(name, module))

    @classmethod
    def build(cls, spec: EvaluatorSpec, *, shared: bool = False) -> Evaluator:
        """Load what `spec` names; `shared`: with weights that evaluators in other processes of this machine share."""
        device: Placement = "auto" if spec.device == "auto" else torch.device(spec.device)
        loaded = load_model(spec.source, device, spec.dtype, shared=shared)
        return cls(loaded, load_data(spec.calibration, loaded), spec.quantizer)

    @property
    def inventory(self) -> Inventory:
        """The model without its weights."""
        return inventory(self.loaded, self.layers)

    def modules(self, name: str) -> list[nn.Module]:
        """The modules that use a layer's weight: its own, and its aliases'."""
        layer = self.layers[name]
        return [layer.module, *map(self.loaded.model.get_submodule, layer.layer.aliases)]

    def modules_that_round(self, name: str) -> list[nn.Module]:
        """Those of `modules` whose input a scheme may round."""
        return list(filter(rounds_input, self.modules(name)))

    def apply(self, allocation: Mapping[str, Scheme]) -> None:
        """Give each named layer, or part of one, its scheme and everything else full precision.

        Raises ValueError for a part whose scheme quantizes activations: its layer has one input.
        """
        rounded = {name: scheme for name, scheme in allocation.items() if scheme != FULL_PRECISION}
        asked = {whole: {name: rounded[name] for name in names} for whole, names in by_whole(rounded).items()}
        for whole in self._applied.keys() | asked.keys():
            schemes = asked.get(whole, {})
            if self._applied.get(whole, {}) != schemes:
                self.layers[whole].parameter.data = self.assembled(whole, schemes)
                self._applied[whole] = schemes

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Within, the original weights and activations; then the present allocation again, nothing recomputed."""
        applied, self._applied = self._applied, {}
        rounded = {name: self.layers[name].parameter.data for name in applied}
        stand_ins = self._multiply_by({})
        try:
            for name in applied:
                self.layers[name].parameter.data = self._originals[name]
            yield
        finally:
            for name, weight in rounded.items():
                self.layers[name].parameter.data = weight
            self._applied = applied
            self._multiply_by(stand_ins)

    @contextmanager
    def deployed(self, allocation: Mapping[str, Scheme]) -> Iterator[None]:
        """Within, the model as `allocation` would run: layers that the kernels can multiply through them, if this
        evaluator has any, and the others rounded."""
        self.apply(allocation)
        whole = [name for name, parts in by_whole(allocation).items() if parts == [name]]
        through = {name: allocation[name] for name in whole if self._through_kernels(name, allocation[name])}
        # Most of what one candidate packs another has, too.
        self._packed = {name: self._packed_as(name, scheme) for name, scheme in through.items()}
        before = self._multiply_by({module: one for _, those in self._packed.values() for module, one in those.items()})
        try:
            yield
        finally:
            self._multiply_by(before)

    def _packed_as(self, name: str, scheme: Scheme) -> tuple[Scheme, StandIns]:
        known = self._packed.get(name)
        if known is not None and known[0] == scheme:
            return known
        matrix = self.layers[name].matrix(self._originals[name])
        packed = pack_rounded(matrix, scheme, self.grid(name, scheme))
        return scheme, {module: stand_in(module, packed) for module in self.modules(name)}

    def _multiply_by(self, stand_ins: StandIns) -> StandIns:
        """Returns what was multiplied by before."""
        before, self._stand_ins = reroute(self._stand_ins, stand_ins), stand_ins
        return before

    def _through_kernels(self, name: str, scheme: Scheme) -> bool:
        """What rounds weights alone is the same either way in float32: integers times scales are exact there."""
        if not self.kernels or not scheme.quantizes_weights:
            return False
        if not scheme.quantizes_activations and self.layers[name].parameter.dtype == torch.float32:
            return False
        # A module that computes as its stand-in does, does not compute as its class.
        if any(refusal(module, scheme) for module in self.modules(name) if module not in self._stand_ins):
            return False
        return bool(self.grid(name, scheme).scale.isfinite().all())

    def batches(self, split: Split) -> list[Batch]:
        """The batches of a split."""
        batches: list[Batch] = getattr(self.data, split)
        return batches

    def reference(self, split: Split, index: int) -> Tensor:
        """The full-precision output on a batch.

        A language model's logits are not kept but recomputed from its last block's output: they would outweigh the
        model.
        """
        batch, key = self.batches(split)[index], (split, index)
        with torch.no_grad(), self.full_precision():
            if self.loaded.task != "causal-lm" or self.chain is None:
                if key not in self._references:
                    self._references[key] = self.loaded(batch)
                output: Tensor = self._references[key]
                return output
            last = len(self.chain)
            if key not in self._references:
                self._references[key] = self.chain.output_of(last - 1, lambda: self.loaded(batch))
            with self.chain.resumed(last, self._references[key]):
                return self.loaded(batch)

    def losses(self, batch: Batch, output: Tensor, reference: Tensor) -> Tensor:
        """The loss of every sample of a batch, shape (samples,), for `output` against `reference`."""
        return divergence(self.loaded.task, output, reference, batch.get("attention_mask"))

    def measure(self, allocation: Mapping[str, Scheme], split: Split = "held_out") -> dict[str, float]:
        """`loss` (mean over samples), `loss_stderr`, and `perplexity` or `accuracy` where they exist.

        Raises UnsupportedModel when the output is not finite.
        """
        return metrics(self.measure_samples(allocation, split))

    @torch.no_grad()
    def measure_samples(
        self, allocation: Mapping[str, Scheme], split: Split = "held_out", batches: range | None = None
    ) -> Samples:
        """Of every sample of a split, or of some of its batches: `loss`, and `next_token_loss` or `correct` where they
        exist.

        Raises UnsupportedModel when the output is not finite.
        """
        found: dict[str, list[Tensor]] = {}
        with self.deployed(allocation):
            for index in batches if batches is not None else range(len(self.batches(split))):
                batch = self.batches(split)[index]
                output = self.loaded(batch)
                found.setdefault("loss", []).append(self.losses(batch, output, self.reference(split, index)))
                if self.loaded.task == "causal-lm":
                    next_token = next_token_loss(output, batch["input_ids"], batch["attention_mask"])
                    found.setdefault("next_token_loss", []).append(next_token)
                elif "labels" in batch:
                    found.setdefault("correct", []).append(output.argmax(-1) == batch["labels"])
        if not all(losses.isfinite().all() for losses in found["loss"]):
            raise UnsupportedModel(f"the output of this {self.loaded.architecture} is not finite", field="model")
        return {name: torch.cat(values).double().tolist() for name, values in found.items()}

    def grid(self, name: str, scheme: Scheme) -> Grid:
        """The grid that the quantizer chooses for the weight of a layer, or of a part of one."""
        key = (name, replace(scheme, activation_bits=16))
        if key not in self._grids:
            matrix = self.layers[name].matrix(self._original(name))
            self._grids[key] = choose_grid(matrix, scheme, self.quantizer)
        return self._grids[key]

    def rounding(self, name: str, scheme: Scheme) -> Tensor:
        """Q(W) − W of a layer or part, shaped as its weight; float32."""
        return self.weight(name, scheme).float() - self._original(name).float()

    def rounding_error(self, name: str, scheme: Scheme) -> float:
        """‖Q(W) − W‖² of a layer or part, summed over its weights."""
        return float(self.rounding(name, scheme).double().square().sum())

    def weight(self, name: str, scheme: Scheme) -> Tensor:
        """Q(W) of a layer or part, shaped as its weight; W itself where the scheme keeps it."""
        original = self._original(name)
        if not scheme.quantizes_weights:
            return original
        layer = self.layers[name]
        return layer.unmatrix(round_to_grid(layer.matrix(original), self.grid(name, scheme), scheme))

    def assembled(self, whole: str, schemes: Mapping[str, Scheme]) -> Tensor:
        """The weight of a layer at its scheme among `schemes`, and in it each part that these name at its own.

        Raises ValueError for a part whose scheme quantizes activations.
        """
        weight = self.weight(whole, schemes.get(whole, FULL_PRECISION))
        parts = {name: scheme for name, scheme in schemes.items() if name != whole}
        if parts:
            weight = weight.clone()
        for name, scheme in parts.items():
            if scheme.quantizes_activations:
                raise ValueError(f"{name} is part of a layer, whose one input {scheme} would quantize")
            self.layers[name].of(weight).copy_(self.weight(name, scheme))
        return weight

    def _original(self, name: str) -> Tensor:
        return self.layers[name].of(self._originals[whole_and_channels(name)[0]])

    def _round_input(self, name: str, module: nn.Module) -> Any:
        def round_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            scheme = self._applied.get(name, {}).get(name)
            if scheme is None or not scheme.quantizes_activations or _module in self._stand_ins:
                return None
            return (round_activation(inputs[0], scheme.activation_bits, token_dims(module, inputs[0])), *inputs[1:])

        return round_input

    def _find_chain(self) -> BlockChain | None:
        batch = {key: value[:1] for key, value in self.data.calibration[0].items()}
        return find_chain(self.loaded.model, lambda: self.loaded(batch))


def describe_model(loaded: LoadedModel) -> Inventory:
    """The inventory of a model for which there is no data yet.

    Raises UnsupportedModel when it does not run on one item, or has no quantizable layer.
    """
    item = one_item(loaded)
    try:
        with torch.no_grad():
            loaded(item)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UnsupportedModel(
            f"{loaded.architecture} does not run on one {'token' if loaded.is_text else 'image'}: {error}",
            field="model",
            value=loaded.architecture,
        ) from error
    return inventory(loaded, _layers(loaded, find_chain(loaded.model, lambda: loaded(item))))


def inventory(loaded: LoadedModel, layers: Mapping[str, WeightedLayer]) -> Inventory:
    """The inventory of a loaded model's enumerated layers."""
    return Inventory(
        digest=loaded.digest,
        architecture=loaded.architecture,
        task=loaded.task,
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        layers=tuple(weighted.layer for weighted in layers.values()),
    )


def rounds_input(module: nn.Module) -> bool:
    """Whether a scheme rounds what the module is given: not tokens, as an embedding."""
    return not isinstance(module, nn.Embedding)


def token_dims(module: nn.Module, x: Tensor) -> int:
    """How many trailing dimensions of a layer's input are one token: an image's all but the first."""
    return x.dim() - 1 if isinstance(module, CONVOLUTIONS) else 1


def kept_tokens(batch: Batch, x: Tensor) -> Tensor | None:
    """1 for each token of a layer's input x that is no padding, shaped to multiply x; None where x is not of tokens."""
    mask = batch.get("attention_mask")
    if mask is None or x.dim() < 2:
        return None
    if x.shape[:2] == mask.shape:
        return mask.view(*mask.shape, *[1] * (x.dim() - 2)).to(x)
    return mask.view(-1, 1).to(x) if x.shape[:-1] == (mask.numel(),) else None


def by_position(module: nn.Module) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """A hook after which what a module is called with by name stands in its place: other hooks see no names."""
    signature = inspect.signature(module.forward)

    def rearrange(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if args or not kwargs:
            return None
        bound = signature.bind(**kwargs)
        return bound.args, bound.kwargs

    return rearrange


def brought_to(device: torch.device) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A hook after which what a module is called with lies on `device`: other hooks see it beside the weight."""
    from accelerate.utils import send_to_device

    def bring(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return send_to_device(args, device), send_to_device(kwargs, device)

    return bring


def _layers(loaded: LoadedModel, chain: BlockChain | None) -> Layers:
    item = one_item(loaded)
    found = enumerate_layers(loaded.model, lambda: loaded(item))
    layers = Layers({weighted.layer.name: weighted for weighted in found})
    if not layers:
        raise UnsupportedModel(
            f"{loaded.architecture} has no quantizable layer",
            field="model",
            value=loaded.architecture,
            accepted="models with linear, convolution or embedding layers",
        )
    for name, weighted in layers.items():
        weighted.layer = replace(weighted.layer, block=chain.block_of(name) if chain else None)
    return layers
