"""The backend `cupy`: our CUDA kernels, loaded and launched by CuPy on torch's memory and torch's current stream.

Everything a product needs besides its operands comes from torch's caching allocator, so that it may be captured in a
CUDA graph, once `warm` has compiled and loaded what it launches: a capture must not.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from workers.kernels import autotune, catalogue
from workers.kernels.backend import backend, choose, matmul
from workers.kernels.catalogue import DEQUANTISE_WARPS, Decode, Kernel, Prefill, program
from workers.kernels.compile import load_module
from workers.kernels.errors import KernelError
from workers.kernels.pack import TILE_COLUMNS, TILE_ROWS, Packed
from workers.kernels.plans import MOST_PER_DECODE, Machine, Plan, Problem, bucket, candidates

ARCHITECTURES = {(8, 0): "sm_80", (8, 6): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a"}
"""By compute capability, what kernels are compiled for."""

ALIGNMENT = 16
"""Kernels load so many bytes at a time."""

_TICKETS: dict[tuple[torch.device, int], Tensor] = {}
"""By device and stream, counters that every kernel leaves at zero."""


@backend("cupy")
class Cupy:
    """Our kernels on CUDA devices from compute capability 8.0 to 9.0."""

    def device_refusal(self, device: torch.device) -> str | None:
        """Why no kernel of ours runs on a device; None where they do."""
        return _device_refusal(device)

    def refusal(self, packed: Packed, tokens: int, dtype: torch.dtype) -> str | None:
        """Why no kernel of ours can multiply this; None where one can."""
        reason = _device_refusal(packed.device)
        if reason is not None:
            return reason
        if not packed.scheme.quantizes_activations and dtype == torch.float32:
            return "tokens of 16 bits are float16 or bfloat16, not float32"
        if packed.tiles.data_ptr() % ALIGNMENT or packed.scales.data_ptr() % ALIGNMENT:
            return f"its tiles and scales do not begin at multiples of {ALIGNMENT} bytes"
        return None

    def matmul(self, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        """As `backend.matmul`. Raises KernelError where a kernel does not compile, load or start."""
        return multiply(autotune.chosen(problem(packed, len(x), x.dtype)), x, packed, bias)

    def matmul_codes(
        self, codes: Tensor, token_scales: Tensor, packed: Packed, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        """As `backend.matmul_codes`. Raises KernelError where a kernel does not compile, load or start."""
        # Given codes may be any int8, so they are multiplied as such: never by the kernel for int4.
        scheme = replace(packed.scheme, activation_bits=8)
        plan = autotune.chosen(replace(problem(packed, len(codes), out_dtype), scheme=scheme))
        output = torch.empty(len(codes), packed.rows, dtype=out_dtype, device=codes.device)
        if not len(codes):
            return output
        codes = functional.pad(codes, (0, packed.columns_padded - packed.columns))
        tokens_padded = padded_tokens(plan, len(codes))
        laid_out = tiles_of(codes, tokens_padded) if isinstance(plan.kernel, Prefill) else _aligned(codes)
        return product(plan, laid_out, token_scales, packed, bias, output)


def warm(packed: Packed, tokens: int, dtype: torch.dtype) -> None:
    """Multiply so many zeros once, after which the same product launches without compiling or loading anything.

    Needed before a product of that many tokens is captured in a CUDA graph. Raises KernelError where no kernel of ours
    can multiply them.
    """
    matmul(torch.zeros(tokens, packed.columns, dtype=dtype, device=packed.device), packed, backend="cupy")


def tune(packed: Packed, tokens: int, dtype: torch.dtype) -> Plan:
    """Time every plan for products of that many tokens by weights of this shape; the fastest is used from now on.

    Takes seconds for each plan that was not compiled before, and memory for copies of the weight. Raises KernelError
    where no kernel of ours can multiply them.
    """
    choose(packed, tokens, dtype, "cupy")
    wanted = problem(packed, tokens, dtype)
    plans = candidates(wanted)
    if len(plans) > 1:
        x = torch.randn(tokens, packed.columns, device=packed.device).to(dtype)
        copies = rotation(packed)

        def runs(plan: Plan) -> list[functools.partial[Tensor]]:
            multiply(plan, x, packed, None)
            return [functools.partial(multiply, plan, x, copy, None) for copy in copies]

        autotune.remember(wanted, *autotune.fastest(plans, runs, packed.device))
    return autotune.chosen(wanted)


def rotation(packed: Packed) -> list[Packed]:
    """Copies of a weight that are together larger than three times the device's L2 cache."""
    count = 1 + 3 * torch.cuda.get_device_properties(packed.device).L2_cache_size // packed.tiles.nbytes
    return [replace(packed, tiles=packed.tiles.clone(), scales=packed.scales.clone()) for _ in range(count)]


def problem(packed: Packed, tokens: int, dtype: torch.dtype) -> Problem:
    """What plans are chosen by."""
    tokens = bucket(max(tokens, 1))
    return Problem(machine(packed.device), packed.scheme, packed.rows, packed.columns, tokens, dtype)


def multiply(plan: Plan, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias by a plan of its problem."""
    if not len(x):
        return x.new_empty(0, packed.rows)
    x = _aligned(x)
    if not isinstance(plan.kernel, Decode | Prefill):
        weight = dequantize(packed, x.dtype)
        # Where the bias has another type, it is rounded to this one first.
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    output = x.new_empty(len(x), packed.rows)
    if not packed.scheme.quantizes_activations:
        return product(plan, x, None, packed, bias, output)
    layout = plan.kernel.layout if isinstance(plan.kernel, Prefill) else "ROWS"
    codes, scales = quantize(x, packed, layout, padded_tokens(plan, len(x)))
    return product(plan, codes, scales, packed, bias, output)


def quantize(x: Tensor, packed: Packed, layout: str, tokens_padded: int) -> tuple[Tensor, Tensor]:
    """Codes of the scheme's bits as bytes in `layout`, for so many tokens, and the scales of those that there are."""
    size = tokens_padded * packed.columns_padded // (2 if layout == "NIBBLES" else 1)
    codes = torch.empty(size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    most = 2 ** (packed.scheme.activation_bits - 1) - 1
    kernel = catalogue.quantise(layout, x.dtype)
    _launch(kernel, (tokens_padded, 1), x.device, x, codes, scales, len(x), packed.columns, most)
    return codes, scales


def product(
    plan: Plan, tokens: Tensor, token_scales: Tensor | None, packed: Packed, bias: Tensor | None, output: Tensor
) -> Tensor:
    """Fill `output` (M × N) from tokens as the plan's kernel takes them: 16-bit floats, or codes in its layout."""
    bias = None if bias is None else bias.float()
    kernel, sizes = plan.kernel, (packed.rows, packed.columns)
    if isinstance(kernel, Prefill):
        blocks = kernel.blocks(packed.rows, len(output), machine(packed.device).multiprocessors)
        operands = (packed.tiles, packed.scales, tokens, token_scales, bias, output)
        _launch(kernel, blocks, packed.device, *operands, *sizes, len(output), padded_tokens(plan, len(output)))
        return output
    assert isinstance(kernel, Decode)
    blocks = kernel.blocks(packed.rows, plan.slices)
    partial, tickets = _workspace(kernel, plan.slices, packed)
    rows = tokens.view(len(output), -1)
    for start in range(0, len(output), MOST_PER_DECODE):
        part = slice(start, start + MOST_PER_DECODE)
        scales, y = None if token_scales is None else token_scales[part], output[part]
        operands = (packed.tiles, packed.scales, rows[part], scales, bias, y)
        _launch(kernel, blocks, packed.device, *operands, partial, tickets, len(y), *sizes)
    return output


def dequantize(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight, N × K in float16 or bfloat16, each code times its scale rounded once."""
    weight = torch.empty(packed.rows, packed.columns, dtype=dtype, device=packed.device)
    blocks = packed.columns_padded // TILE_COLUMNS, packed.rows_padded // (TILE_ROWS * DEQUANTISE_WARPS)
    kernel = catalogue.dequantise(packed.scheme, dtype)
    _launch(kernel, blocks, packed.device, packed.tiles, packed.scales, weight, packed.rows, packed.columns)
    return weight


def tiles_of(codes: Tensor, tokens_padded: int) -> Tensor:
    """Codes of M × padded inputs in the layout TILES, as `quantise.cuh` writes it, zeros for tokens of the padding."""
    codes = functional.pad(codes, (0, 0, 0, tokens_padded - len(codes)))
    # Of 32 inputs, 8t + 4h + j stands at 16h + 4t + j.
    split = codes.view(tokens_padded // 8, 8, -1, 4, 4, 2, 4).permute(2, 0, 1, 3, 5, 4, 6)
    pieces = split.reshape(-1, tokens_padded // 8, 8, 8, 16)
    token = torch.arange(8, device=codes.device)[:, None]
    # Piece p of token r lies at p ^ r, so at p lies piece p ^ r.
    return pieces[:, :, token, token ^ token.T].contiguous()


def padded_tokens(plan: Plan, tokens: int) -> int:
    """For how many tokens the plan's kernel wants codes."""
    multiple = plan.kernel.multiple if isinstance(plan.kernel, Prefill) else 1
    return math.ceil(tokens / multiple) * multiple


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU as plans see it."""
    from cupy.cuda import runtime

    properties = torch.cuda.get_device_properties(device)
    architecture = ARCHITECTURES[properties.major, properties.minor]
    return Machine(properties.name, runtime.driverGetVersion(), architecture, properties.multi_processor_count)


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"kernels run on CUDA devices, not on {device}"
    if torch.version.cuda is None:
        return "torch was not built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability not in ARCHITECTURES:
        known = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES)
        return f"the device has compute capability {capability[0]}.{capability[1]}; kernels exist for {known}"
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    return None if cupy.cuda.is_available() else "CuPy sees no CUDA device"


def _launch(kernel: Kernel, blocks: tuple[int, int], device: torch.device, *arguments: Tensor | int | None) -> None:
    """Start a kernel on torch's current stream."""
    import cupy

    values = tuple(_value(argument) for argument in arguments)
    try:
        with cupy.cuda.Device(device.index), _stream(torch.cuda.current_stream(device)):
            function = _function(kernel, device)
            function(blocks, (kernel.threads,), values, shared_mem=kernel.shared_bytes)
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
        raise KernelError(f"{kernel.name} did not start: {error}", field="kernel", value=kernel.name) from error


@functools.cache
def _function(kernel: Kernel, device: torch.device) -> Any:
    """The kernel on the present device, ready for as much shared memory as it takes."""
    function = load_module(program([kernel]), machine(device).architecture).get_function(kernel.name)
    if kernel.shared_bytes:
        function.max_dynamic_shared_size_bytes = kernel.shared_bytes
    return function


@functools.lru_cache(maxsize=256)
def _stream(stream: torch.cuda.Stream) -> Any:
    """Torch's stream as CuPy's."""
    import cupy

    try:
        return cupy.cuda.Stream.from_external(stream)
    except (AttributeError, TypeError):  # a CuPy or a torch that does not know the CUDA stream protocol
        return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)


def _value(argument: Tensor | int | None) -> int | np.int32:
    """As CuPy passes it on: a Python integer as 64 bits."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    # CuPy would pass no argument at all for None.
    return 0 if argument is None else np.int32(argument)


def _workspace(kernel: Decode, slices: int, packed: Packed) -> tuple[Tensor | None, Tensor | None]:
    """Where the slices of a decode leave their sums, and the counters of those that have."""
    if slices == 1:
        return None, None
    blocks, slots = kernel.blocks(packed.rows, slices)
    size = blocks * slots * TILE_ROWS * kernel.strips * 8 * kernel.token_tiles
    partial = torch.empty(size, dtype=torch.int32, device=packed.device)
    return partial, _tickets(blocks, packed.device)


def _tickets(count: int, device: torch.device) -> Tensor:
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            # Of the graph alone, and zeroed at every replay: graphs may be replayed beside one another on any streams.
            return torch.zeros(count, dtype=torch.int32, device=device)
    stream = device, torch.cuda.current_stream(device).cuda_stream
    kept = _TICKETS.get(stream)
    if kept is None or len(kept) < count:
        kept = _TICKETS[stream] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return kept


def _aligned(tokens: Tensor) -> Tensor:
    return tokens.clone() if tokens.data_ptr() % ALIGNMENT else tokens
