"""Linear layers and convolutions that multiply by packed weights, in place of a model's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from search.inventory import whole_and_channels
from search.scheme import FULL_PRECISION, Scheme
from workers.kernels.backend import INPUT_TYPES, matmul, matmul_codes
from workers.kernels.errors import KernelError
from workers.kernels.pack import Packed, check_scheme, check_shape, pack
from workers.kernels.reference import quantize_activations
from workers.quantizers import Grid, choose_grid, codes_on_grid


class QuantLinear(nn.Module):
    """A linear layer, GPT-2's transposed Conv1D too, with a packed weight; the activations of a token share a scale.

    `backend` names the only backend to use; None: the best there is.
    """

    tiles: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, backend: str | None = None) -> None:
        super().__init__()
        self.scheme, self.rows, self.columns, self.backend = packed.scheme, packed.rows, packed.columns, backend
        self.register_buffer("tiles", packed.tiles)
        # As integers, for `module.to(dtype)` would convert them.
        self.register_buffer("scales", packed.scales.view(torch.int16))
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, scheme: Scheme, grid: Grid | str, backend: str | None = None
    ) -> QuantLinear:
        """The layer with its weight rounded to `grid`, or to the one that the named quantizer chooses.

        Raises KernelError with the reason that `refusal` gives.
        """
        return QuantLinear(_packed(linear, scheme, grid), _bias(linear), backend)

    @property
    def packed(self) -> Packed:
        """The weight."""
        return Packed(self.scheme, self.rows, self.columns, self.tiles, self.scales.view(torch.float16))

    def forward(self, input: Tensor) -> Tensor:
        """… × inputs to … × outputs."""
        return matmul(input.contiguous(), self.packed, self.bias, self.backend)

    def extra_repr(self) -> str:
        """As torch prints it."""
        return f"{self.columns}, {self.rows}, scheme={self.scheme}"


class QuantConv2d(QuantLinear):
    """A convolution as the product of its packed weight and the unfolded image, whose activations share a scale."""

    def __init__(
        self, convolution: nn.Conv2d, packed: Packed, bias: Tensor | None = None, backend: str | None = None
    ) -> None:
        """Take kernel size, stride, padding and dilation from `convolution`."""
        super().__init__(packed, bias, backend)
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        assert isinstance(convolution.padding, tuple)
        self.padding, self.dilation = convolution.padding, convolution.dilation

    @classmethod
    def from_convolution(
        cls, convolution: nn.Conv2d, scheme: Scheme, grid: Grid | str, backend: str | None = None
    ) -> QuantConv2d:
        """The convolution with its weight rounded to `grid`, or to the one that the named quantizer chooses.

        Raises KernelError with the reason that `refusal` gives.
        """
        return QuantConv2d(convolution, _packed(convolution, scheme, grid), _bias(convolution), backend)

    def forward(self, input: Tensor) -> Tensor:
        """Images × channels × height × width, or one image."""
        if input.dim() == 3:
            return self.forward(input[None])[0]
        packed, (images, _, *sizes) = self.packed, input.shape
        if packed.scheme.quantizes_activations:
            # Rounded before they are unfolded: as patches they would have a scale each.
            codes, scales = quantize_activations(input.flatten(1), packed.scheme.activation_bits)
            patches = self._patches(codes.view(input.shape).to(input.dtype)).to(torch.int8)
            scales = scales.repeat_interleave(patches.shape[1])
            output = matmul_codes(patches.flatten(0, 1), scales, packed, self.bias, input.dtype, self.backend)
        else:
            output = matmul(self._patches(input), packed, self.bias, self.backend)
        shape = zip(sizes, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        height, width = (
            (size + 2 * pad - apart * (long - 1) - 1) // step + 1 for size, long, step, pad, apart in shape
        )
        return output.view(images, height, width, self.rows).permute(0, 3, 1, 2).contiguous()

    def _patches(self, images: Tensor) -> Tensor:
        """Images × places × inputs of one place."""
        patches = functional.unfold(images, self.kernel_size, self.dilation, self.padding, self.stride)
        return patches.transpose(1, 2).contiguous()


StandIns = dict[nn.Module, QuantLinear]
"""By module, the packed layer that computes in its place."""


@contextmanager
def swapped(
    model: nn.Module, allocation: Mapping[str, Scheme], quantizer: str = "rtn", backend: str | None = None
) -> Iterator[None]:
    """Within, each named layer multiplies by its packed weight, and so does every module that shares the weight.

    Modules, their weights and their hooks stay where they are: only what they compute changes. Raises KernelError
    naming the first layer that cannot be multiplied so, with the reason; the model is then untouched.
    """
    stand_ins: StandIns = {}
    for name, scheme in allocation.items():
        if scheme != FULL_PRECISION:
            modules = _holders(model, name)
            for path, module in modules.items():
                reason = refusal(module, scheme)
                if reason is not None:
                    raise KernelError(f"{path} cannot run in {scheme}: {reason}", field="layer", value=path)
            packed = pack_rounded(_matrix(model.get_submodule(name)), scheme, quantizer)
            stand_ins |= {module: stand_in(module, packed, backend) for module in modules.values()}
    before = reroute({}, stand_ins)
    try:
        yield
    finally:
        reroute(stand_ins, before)


def reroute(present: StandIns, stand_ins: StandIns) -> StandIns:
    """Let modules compute as their stand-ins do, and those of `present` as they do themselves; returns `present`.

    Not the modules are replaced but what they compute: a model may read their weights' types, or hook them.
    """
    for module in present:
        vars(module).pop("forward", None)
    for module, quantized in stand_ins.items():
        vars(module)["forward"] = quantized.forward
    return present


def stand_in(module: nn.Module, packed: Packed, backend: str | None = None) -> QuantLinear:
    """The packed layer that computes what a module does, by another weight."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d(module, packed, _bias(module), backend)
    return QuantLinear(packed, _bias(module), backend)


def refusal(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a layer's module cannot multiply by a weight packed in `scheme`; None where it can."""
    if "forward" in vars(module):
        return "its forward pass is not that of its class"
    if isinstance(module, nn.Embedding):
        return "an embedding looks rows up and multiplies nothing"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is multiplied by the attention around it"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"its {module.groups} groups of channels would be a product each"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"it pads with {module.padding_mode}, {module.padding}; known is a number of zeros"
    elif not isinstance(module, nn.Linear) and not _is_transposed(module):
        return f"a {type(module).__name__} is neither linear nor a two-dimensional convolution"
    if is_parametrized(module):
        return "its weight is computed anew every time"
    if module.weight.dtype not in INPUT_TYPES:
        return f"its weight is {module.weight.dtype}"
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(module, kind) and type(module).forward is not kind.forward:
            return f"{type(module).__name__} computes more than {kind.__name__}"
    try:
        check_scheme(scheme)
        check_shape(scheme, *_matrix(module).shape)
    except KernelError as error:
        return error.detail
    return None


def pack_rounded(matrix: Tensor, scheme: Scheme, grid: Grid | str) -> Packed:
    """The codes of `quantizers.codes_on_grid`, packed; `grid` may name the quantizer that chooses it."""
    matrix = matrix.detach().float().contiguous()
    if isinstance(grid, str):
        grid = choose_grid(matrix, scheme, grid)
    return pack(codes_on_grid(matrix, grid, scheme), grid.scale.squeeze(-1).contiguous(), scheme)


def _packed(module: nn.Module, scheme: Scheme, grid: Grid | str) -> Packed:
    reason = refusal(module, scheme)
    if reason is not None:
        raise KernelError(f"this layer cannot run in {scheme}: {reason}", field="layer", value=type(module).__name__)
    return pack_rounded(_matrix(module), scheme, grid)


def _holders(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """By path, the modules that hold a layer's weight."""
    if whole_and_channels(name)[1] is not None:
        raise KernelError(f"{name} is part of a layer, which has one scheme", field="layer", value=name)
    try:
        own = model.get_submodule(name)
        weight = own.weight
    except AttributeError as error:
        raise KernelError(f"the model has no layer {name} with one weight", field="layer", value=name) from error
    modules = model.named_modules(remove_duplicate=False)
    return {name: own} | {path: one for path, one in modules if getattr(one, "weight", None) is weight}


def _matrix(module: nn.Module) -> Tensor:
    """The weight as outputs × inputs."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if _is_transposed(module) else weight.flatten(1)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D, which stores inputs × outputs."""
    return type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor) and module.weight.dim() == 2


def _bias(module: nn.Module) -> Tensor | None:
    return module.bias.detach() if isinstance(module.bias, Tensor) else None
