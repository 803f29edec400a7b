"""Enumerate a model's quantizable layers, and see each one's weight as a rows × columns matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from search.inventory import Layer, LayerKind, whole_and_channels
from workers.hooks import removing

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(slots=True)
class WeightedLayer:
    """A layer, or a part of one, together with the module that runs it and the parameter that holds its weight.

    `channels` are the output channels that a part has of its layer.
    """

    layer: Layer
    module: nn.Module
    parameter: nn.Parameter
    channels: slice = field(default_factory=lambda: slice(None))

    @property
    def weight(self) -> Tensor:
        """The weight as it is now; of a part, a view of its layer's."""
        return self.of(self.parameter.detach())

    def of(self, whole: Tensor) -> Tensor:
        """What a tensor that is shaped as the parameter says of this layer or part: a view, shaped as `weight`."""
        return whole[..., self.channels] if self.layer.transposed else whole[self.channels]

    def replaced(self, whole: Tensor, weight: Tensor) -> Tensor:
        """`whole`, shaped as the parameter, with another `weight` of this layer or part."""
        if weight.shape == whole.shape:
            return weight
        whole = whole.clone()
        self.of(whole).copy_(weight)
        return whole

    def part(self, channels: range) -> WeightedLayer:
        """Some of its output channels. Raises what `Layer.part` raises."""
        return replace(self, layer=self.layer.part(channels), channels=slice(channels.start, channels.stop))

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight`, shaped as the layer's, as rows × columns."""
        if self.layer.transposed:
            weight = weight.transpose(-1, -2)
        columns = weight.shape[-1] if self.layer.kind == "experts" else weight[0].numel()
        return weight.reshape(-1, columns)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        shape = self.weight.shape
        if self.layer.transposed:
            return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()
        return matrix.reshape(shape)


class Layers(dict[str, WeightedLayer]):
    """Whole layers by name, in the order they first run; parts of them are found by their names, too."""

    def __missing__(self, name: str) -> WeightedLayer:
        whole, channels = whole_and_channels(name)
        if channels is None or whole not in self:
            raise KeyError(name)
        return self[whole].part(channels)


def enumerate_layers(model: nn.Module, run_one_item: Callable[[], object]) -> list[WeightedLayer]:
    """All quantizable layers that take part in the forward pass of one input item, in the order they first run.

    Linear layers (also GPT-2's transposed ones), convolutions (grouped ones too), embeddings and fused experts.
    `run_one_item` runs the model on one token or one image; multiply-accumulates are counted in it. Modules that share
    a weight are one layer with aliases.
    """
    described = [weighted for name, module in model.named_modules() for weighted in _describe(name, module)]
    found = {weighted.layer.name: weighted for weighted in described}
    macs: dict[str, int] = {}
    calls: Counter[str] = Counter()
    by_module: dict[nn.Module, list[str]] = {}
    for name, weighted in found.items():
        by_module.setdefault(weighted.module, []).append(name)

    def count(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        for name in by_module[module]:
            counted = _macs(found[name], inputs, output)
            macs[name] = macs.get(name, 0) + counted
            calls[name] += counted > 0

    hooks = [module.register_forward_hook(count) for module in by_module]
    with removing(hooks), torch.no_grad():
        run_one_item()

    layers: dict[int, WeightedLayer] = {}
    for name, layer_macs in macs.items():
        weighted = found[name]
        first = layers.get(id(weighted.parameter))
        if first is None:
            weighted.layer = replace(weighted.layer, macs=layer_macs, calls=calls[name])
            layers[id(weighted.parameter)] = weighted
        else:
            first.layer = replace(
                first.layer,
                macs=first.layer.macs + layer_macs,
                calls=first.layer.calls + calls[name],
                aliases=(*first.layer.aliases, name),
            )
    return list(layers.values())


def used_outside(model: nn.Module, layers: Iterable[WeightedLayer], run: Callable[[], object]) -> list[str]:
    """The layers whose weights some operation of the model takes while none of the modules that hold them runs.

    What follows a layer's module, as most metrics do, does not see such a use.
    """
    holders = {
        id(weighted.parameter): (
            weighted.layer.name,
            {weighted.module, *map(model.get_submodule, weighted.layer.aliases)},
        )
        for weighted in layers
    }
    running: list[nn.Module] = []
    found: dict[str, None] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            # Attributes of a weight, such as its dtype, are asked for everywhere.
            if isinstance(result, Tensor) and function.__name__ != "__get__":
                for value in (*args, *(kwargs or {}).values()):
                    name, modules = holders.get(id(value), ("", set()))
                    if name and not modules & set(running):
                        found[name] = None
            return result

    def enter(module: nn.Module, _inputs: object) -> None:
        running.append(module)

    def leave(*_: object) -> None:
        running.pop()

    hooks: list[RemovableHandle] = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    with removing(hooks), torch.no_grad(), Watch():
        run()
    return list(found)


def _describe(name: str, module: nn.Module) -> list[WeightedLayer]:
    if name.rpartition(".")[2] == "experts" and not isinstance(module, nn.ModuleList):
        return [
            _weighted(f"{name}.{leaf}", "experts", module, parameter, bool(getattr(module, "is_transposed", False)))
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        ]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return []
    if isinstance(module, nn.Linear):
        return [_weighted(name, "linear", module, weight)]
    if type(module).__name__ == "Conv1D" and weight.dim() == 2:
        return [_weighted(name, "linear", module, weight, transposed=True)]
    if isinstance(module, CONVOLUTIONS):
        return [_weighted(name, "conv", module, weight)]
    if isinstance(module, nn.Embedding):
        return [_weighted(name, "embedding", module, weight)]
    return []


def _weighted(
    name: str, kind: LayerKind, module: nn.Module, parameter: nn.Parameter, transposed: bool = False
) -> WeightedLayer:
    weighted = WeightedLayer(Layer(name, kind, 0, 0, transposed=transposed), module, parameter)
    rows, columns = weighted.matrix(parameter.detach()).shape
    weighted.layer = replace(weighted.layer, rows=rows, columns=columns)
    return weighted


def _macs(weighted: WeightedLayer, inputs: tuple[object, ...], output: object) -> int:
    layer = weighted.layer
    if layer.kind == "embedding":
        return 0
    if layer.kind == "experts":
        # Inputs of the fused experts are (hidden states, chosen experts, their weights): top-k experts per token.
        chosen = inputs[1] if len(inputs) > 1 else None
        active = chosen.numel() if isinstance(chosen, Tensor) else weighted.parameter.shape[0]
        return layer.weights // weighted.parameter.shape[0] * active
    assert isinstance(output, Tensor)
    return output.numel() * layer.columns
