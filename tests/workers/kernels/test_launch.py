"""Products by our kernels, whole: the emulator takes the place of CuPy, so that all but the GPU itself is run."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import autotune, launch, reference
from workers.kernels.backend import BACKENDS, deploys, matmul, matmul_codes
from workers.kernels.catalogue import Kernel, prefill, program, quantise
from workers.kernels.emulator.build import Emulated
from workers.kernels.errors import KernelError
from workers.kernels.pack import Packed, pack
from workers.kernels.plans import MOST_DECODED_FLOATS, Machine, Plan, candidates

pytestmark = pytest.mark.long

Compile = Callable[[str], Emulated]


@dataclass
class Launches:
    """The emulator in CuPy's place, and what it was asked to run."""

    emulated: Compile
    kernels: list[Kernel] = field(default_factory=list)

    def __call__(
        self, kernel: Kernel, blocks: tuple[int, int], device: torch.device, *arguments: Tensor | int | None
    ) -> None:
        self.kernels.append(kernel)
        library = self.emulated(program([kernel]))
        library.launch(kernel.name, blocks, kernel.threads, *arguments, shared_bytes=kernel.shared_bytes)


@pytest.fixture(params=["sm_80", "sm_90a"])
def launches(request: pytest.FixtureRequest, emulated: Compile, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """A machine of two multiprocessors, whose kernels run on the emulator."""
    machine, made = Machine("emulated", 0, request.param, 2), Launches(emulated)
    monkeypatch.setattr(launch, "machine", lambda device: machine)
    monkeypatch.setattr(launch, "_launch", made)
    monkeypatch.setattr(launch, "_tickets", lambda count, device: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    return made


def weight(text: str, rows: int, columns: int, seed: int = 0) -> Packed:
    scheme, generator = Scheme.parse(text), torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, columns // (scheme.group_size or columns), generator=generator) / 64
    return pack(codes, scales.half(), scheme)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def cut(packed: Packed, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """How a product's sums are cut: as the reference is told."""
    plan = autotune.chosen(launch.problem(packed, tokens, dtype))
    return {"slices": plan.slices, "warps": getattr(plan.kernel, "warps", 1)}


def near(found: Tensor, x: Tensor, packed: Packed, bias: Tensor | None) -> bool:
    """Within the reference's bounds: in decode of the sum, in prefill of weights in 16 bits too; and of the result's
    own rounding."""
    weight, half = reference.dequantize(packed).double(), torch.finfo(x.dtype).eps / 2
    expected = reference.matmul(x, packed, bias, out_dtype=torch.float32).double()
    prefills = len(x) > MOST_DECODED_FLOATS
    bound = (half * prefills + 4 * packed.columns * 2**-24) * (x.double().abs() @ weight.abs().T)
    if bias is not None:
        bound += half * prefills * bias.double().abs()
    if prefills:
        # A float16 weight below the normal numbers is off by up to half of the least.
        bound += torch.finfo(x.dtype).tiny * half * x.double().abs().sum(-1, keepdim=True)
    bound += half * (expected.abs() + bound) + torch.finfo(x.dtype).tiny * half
    return bool(((found.double() - expected).abs() <= bound).all())


shapes = {
    "tokens": st.sampled_from([1, 7, 16, 29, 33, 41, 70]),
    "rows": st.integers(1, 150),
    "chunks": st.integers(1, 5),
    "biased": st.booleans(),
    "seed": st.integers(0, 2**31),
}
few = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(**shapes)
@pytest.mark.parametrize(
    ("text", "dtype"),
    [("w6a8", torch.float16), ("w4a4", torch.float32), ("w5a6g64", torch.bfloat16)],
)
def test_of_codes_is_the_reference_bit_for_bit(
    launches: Launches, text: str, dtype: torch.dtype, tokens: int, rows: int, chunks: int, biased: bool, seed: int
) -> None:
    packed = weight(text, rows, chunks * (Scheme.parse(text).group_size or 32), seed)
    x, bias = random(tokens, packed.columns, dtype=dtype, seed=seed), random(rows, dtype=dtype) if biased else None
    found = BACKENDS["cupy"].matmul(x, packed, bias)
    assert same(found, reference.matmul(x, packed, bias, **cut(packed, tokens, dtype)))


@few
@given(**shapes)
@pytest.mark.parametrize("text", ["w6a8", "w4a4"])
def test_of_given_codes_is_the_reference_bit_for_bit(
    launches: Launches, text: str, tokens: int, rows: int, chunks: int, biased: bool, seed: int
) -> None:
    packed = weight(text, rows, chunks * (Scheme.parse(text).group_size or 32), seed)
    # More than the scheme's bits: a caller may round as it likes.
    codes = random(tokens, packed.columns, seed=seed).mul(40).clamp(-128, 127).to(torch.int8)
    scales, bias = torch.rand(tokens), random(rows) if biased else None
    found = BACKENDS["cupy"].matmul_codes(codes, scales, packed, bias, torch.float16)
    of_bytes = weight(text.replace("a4", "a8").replace("a6", "a8"), rows, packed.columns, seed)
    split = cut(of_bytes, tokens, torch.float16)
    assert same(found, reference.matmul_codes(codes, scales, packed, bias, **split, out_dtype=torch.float16))


@few
@given(**shapes)
@pytest.mark.parametrize(("text", "dtype"), [("w6a16", torch.float16), ("w4a16g32", torch.bfloat16)])
def test_of_floats_is_near_the_reference(
    launches: Launches, text: str, dtype: torch.dtype, tokens: int, rows: int, chunks: int, biased: bool, seed: int
) -> None:
    packed = weight(text, rows, 32 * chunks, seed)
    x, bias = random(tokens, packed.columns, dtype=dtype, seed=seed), random(rows) if biased else None
    found = BACKENDS["cupy"].matmul(x, packed, bias)
    assert (found.shape, found.dtype) == ((tokens, rows), dtype)
    assert near(found, x, packed, bias)


@pytest.mark.parametrize("text", ["w6a8", "w6a16"])
def test_of_no_tokens_launches_nothing(launches: Launches, text: str) -> None:
    packed, x = weight(text, 40, 64), torch.zeros(0, 64, dtype=torch.float16)
    assert BACKENDS["cupy"].matmul(x, packed, None).shape == (0, 40)
    assert launches.kernels == []


def test_of_no_codes_launches_nothing(launches: Launches) -> None:
    codes, scales = torch.zeros(0, 64, dtype=torch.int8), torch.zeros(0)
    assert BACKENDS["cupy"].matmul_codes(codes, scales, weight("w6a8", 40, 64), None, torch.float16).shape == (0, 40)
    assert launches.kernels == []


@pytest.mark.parametrize(("text", "tokens"), [("w6a8", 3), ("w6a8", 40), ("w6a16", 3)])
def test_of_tokens_at_any_address_is_the_same(launches: Launches, text: str, tokens: int) -> None:
    packed, x = weight(text, 40, 64), random(tokens, 64, dtype=torch.float16)
    shifted = torch.cat([torch.zeros(1, dtype=torch.float16), x.flatten()])[1:].view(tokens, 64)
    assert shifted.data_ptr() % 16
    assert same(BACKENDS["cupy"].matmul(shifted, packed, None), BACKENDS["cupy"].matmul(x, packed, None))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [3, 40])
def test_of_a_token_that_is_not_finite_is_nan(launches: Launches, value: float, tokens: int) -> None:
    x = random(tokens, 128, dtype=torch.float16)
    x[1, 5] = value
    found = BACKENDS["cupy"].matmul(x, weight("w6a8", 40, 128), None)
    assert found.isnan().all(1).tolist() == [token == 1 for token in range(tokens)]
    assert found.isfinite().all(1).sum() == tokens - 1


@pytest.mark.parametrize("launches", ["sm_80", "sm_90a"], indirect=True)
def test_launches_the_kernels_that_it_should(launches: Launches) -> None:
    def ran(text: str, tokens: int) -> list[str]:
        launches.kernels.clear()
        BACKENDS["cupy"].matmul(random(tokens, 64, dtype=torch.float16), weight(text, 100, 64), None)
        return [kernel.name.partition("_w")[0].removesuffix("_float16") for kernel in launches.kernels]

    native = launch.machine(torch.device("cpu")).architecture == "sm_80"
    assert ran("w6a8", 32) == ["quantise_rows", "decode"]
    assert ran("w6a8", 33) == ["quantise_tiles", "prefill_int8" if native else "prefill"]
    assert ran("w4a4", 33) == ["quantise_nibbles", "prefill_int4"] if native else ["quantise_tiles", "prefill"]
    assert ran("w6a16", 32) == ["decode"]
    assert ran("w6a16", 64) == ["decode", "decode"]
    assert ran("w6a16", 65) == ["dequantise"]


def test_codes_are_laid_out_as_the_kernel_would(emulated: Compile) -> None:
    x, packed = random(21, 384), weight("w6a8", 16, 384)
    codes, scales = torch.empty(24 * 384, dtype=torch.uint8), torch.empty(21)
    kernel = quantise("TILES", torch.float32)
    library = emulated(program([kernel]))
    library.launch(kernel.name, (24, 1), kernel.threads, x, codes, scales, 21, 384, 127)
    found = launch.tiles_of(reference.quantize_activations(x, 8)[0], 24)
    assert torch.equal(found.flatten().view(torch.uint8), codes)
    assert packed.columns_padded == 384


def test_a_decode_has_a_workspace_only_where_slices_meet(launches: Launches) -> None:
    packed = weight("w6a8", 16, 4096)
    plan = autotune.default(launch.problem(packed, 8, torch.float16))
    partial, tickets = launch._workspace(plan.kernel, 3, packed)
    assert (len(partial), len(tickets)) == (3 * 64 * 8, 4)
    assert launch._workspace(plan.kernel, 1, packed) == (None, None)


def test_tuning_times_on_the_weights_device(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def fastest(plans: tuple[Plan, ...], runs: object, device: torch.device) -> tuple[Plan, float]:
        asked.append(device)
        return plans[1], 1.0

    monkeypatch.setattr(launch, "choose", lambda *arguments: None)
    monkeypatch.setattr(launch, "rotation", lambda packed: [packed])
    monkeypatch.setattr(autotune, "fastest", fastest)
    monkeypatch.setattr(autotune, "remember", lambda problem, plan, time: autotune._CHOSEN.update({problem: plan}))
    packed = weight("w6a8", 40, 64)
    plan = launch.tune(packed, 1, torch.float16)
    assert plan == candidates(launch.problem(packed, 1, torch.float16))[1]
    assert asked == [packed.device]


class TestRefusal:
    def test_of_a_weight_on_the_cpu_says_so(self) -> None:
        with pytest.raises(KernelError, match="run on CUDA devices, not on cpu") as caught:
            matmul(random(2, 64), weight("w6a8", 8, 64), backend="cupy")
        assert caught.value.accepted == ["reference"]
        with pytest.raises(KernelError, match="not on cpu"):
            matmul_codes(torch.zeros(2, 64).char(), torch.ones(2), weight("w6a8", 8, 64), backend="cupy")
        for use in (launch.warm, launch.tune):
            with pytest.raises(KernelError, match="not on cpu"):
                use(weight("w6a8", 8, 64), 1, torch.float16)

    @pytest.mark.parametrize(
        ("cuda", "capability", "reason"),
        [
            (None, (9, 0), "not built for CUDA"),
            ("13.0", (7, 5), "capability 7.5; kernels exist for 8.0, 8.6, 8.9, 9.0"),
            ("13.0", (8, 7), "capability 8.7"),
            ("13.0", (12, 0), "capability 12.0"),
            ("13.0", (9, 0), "CuPy sees no CUDA device"),
        ],
    )
    def test_of_a_device_names_what_is_missing(
        self, monkeypatch: pytest.MonkeyPatch, cuda: str | None, capability: tuple[int, int], reason: str
    ) -> None:
        pytest.importorskip("cupy")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        if torch.cuda.is_available() and "CuPy" in reason:
            pytest.skip("CuPy sees one")
        found = launch._device_refusal.__wrapped__(torch.device("cuda", 0))
        assert reason in found

    @pytest.mark.parametrize("capability", [(7, 5), (8, 7), (12, 0)])
    def test_of_a_device_leaves_its_models_to_rounding(
        self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
    ) -> None:
        monkeypatch.delenv("BITFRONTIER_KERNELS", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(launch, "_device_refusal", launch._device_refusal.__wrapped__)
        device = torch.device("cuda", 0)
        assert not deploys(device)
        monkeypatch.setenv("BITFRONTIER_KERNELS", "cupy")
        with pytest.raises(KernelError, match="has compute capability"):
            deploys(device)
        with pytest.raises(KernelError, match="not on cpu"):
            deploys(torch.device("cpu"))

    def test_of_none_deploys_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("BITFRONTIER_KERNELS", raising=False)
        monkeypatch.setattr(launch, "_device_refusal", lambda device: None)
        assert deploys(torch.device("cuda", 0))

    def test_without_cupy_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert "CuPy cannot be imported" in launch._device_refusal.__wrapped__(torch.device("cuda", 0))

    def test_of_what_kernels_cannot_load_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "_device_refusal", lambda device: None)

        def refusal(text: str, dtype: torch.dtype, tiles: Tensor | None = None) -> str | None:
            packed = weight(text, 8, 64)
            on_cuda = SimpleNamespace(
                device=torch.device("cuda", 0),
                scheme=packed.scheme,
                tiles=packed.tiles if tiles is None else tiles,
                scales=packed.scales,
            )
            return launch.Cupy().refusal(on_cuda, 1, dtype)

        assert refusal("w6a8", torch.float32) is None
        assert refusal("w6a16", torch.float16) is None
        assert refusal("w6a16", torch.float32) == "tokens of 16 bits are float16 or bfloat16, not float32"
        shifted = torch.zeros(64 * 128, dtype=torch.uint8)[1:]
        assert refusal("w6a8", torch.float16, shifted) == "its tiles and scales do not begin at multiples of 16 bytes"


class FakeCupy:
    """What `_launch` uses of CuPy; `calls` are the launches, `modules` the programs loaded."""

    class DriverError(RuntimeError):
        pass

    def __init__(self, protocol: bool = True, failing: bool = False) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.modules: list[str] = []
        self.entered: list[object] = []
        self.failing = failing
        stream = SimpleNamespace(from_external=lambda stream: self._entering(("protocol", stream.cuda_stream)))
        self.cuda = SimpleNamespace(
            Device=lambda index: self._entering(("device", index)),
            Stream=stream if protocol else SimpleNamespace(),
            ExternalStream=lambda pointer, device: self._entering(("pointer", pointer, device)),
            driver=SimpleNamespace(CUDADriverError=self.DriverError),
            runtime=SimpleNamespace(CUDARuntimeError=self.DriverError),
        )

    def _entering(self, what: object) -> object:
        @contextmanager
        def entered() -> Iterator[None]:
            self.entered.append(what)
            yield

        class Again:
            def __enter__(self) -> None:
                self.context = entered()
                self.context.__enter__()

            def __exit__(self, *error: object) -> None:
                self.context.__exit__(None, None, None)

        return Again()

    def load(self, text: str, architecture: str) -> object:
        self.modules.append(text)
        return SimpleNamespace(get_function=lambda name: Function(self, name))


class Function:
    """A loaded kernel."""

    def __init__(self, cupy: FakeCupy, name: str) -> None:
        self.cupy, self.name = cupy, name
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], values: tuple[object, ...], shared_mem: int
    ) -> None:
        if self.cupy.failing:
            raise FakeCupy.DriverError("CUDA_ERROR_INVALID_VALUE")
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.cupy.calls.append((self.name, grid, block, values))


class TestLaunch:
    KERNEL = prefill(Scheme(6, 8), "sm_90a", torch.float16)
    DEVICE = torch.device("cuda", 1)

    @pytest.fixture
    def made(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCupy]:
        def make(**options: bool) -> FakeCupy:
            cupy = FakeCupy(**options)
            monkeypatch.setitem(sys.modules, "cupy", cupy)
            monkeypatch.setattr(launch, "load_module", cupy.load)
            monkeypatch.setattr(launch, "machine", lambda device: Machine("fake", 0, "sm_90a", 2))
            monkeypatch.setattr(launch, "_function", functools.cache(launch._function.__wrapped__))
            monkeypatch.setattr(launch, "_stream", launch._stream.__wrapped__)
            stream = SimpleNamespace(cuda_stream=77, device_index=1)
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
            return cupy

        return make

    def test_passes_pointers_as_64_bits_and_integers_as_32(self, made: Callable[..., FakeCupy]) -> None:
        cupy, tensor = made(), torch.zeros(3)
        launch._launch(self.KERNEL, (5, 1), self.DEVICE, tensor, None, 2**31 - 1)
        name, grid, block, values = cupy.calls[0]
        assert (name, grid, block) == (self.KERNEL.name, (5, 1), (self.KERNEL.threads,))
        assert values == (tensor.data_ptr(), 0, 2**31 - 1)
        assert [type(value) for value in values] == [int, int, np.int32]

    def test_is_on_the_tensors_device_and_torchs_stream(self, made: Callable[..., FakeCupy]) -> None:
        cupy = made()
        launch._launch(self.KERNEL, (5, 1), self.DEVICE)
        assert cupy.entered == [("device", 1), ("protocol", 77)]

    def test_takes_the_streams_pointer_where_cupy_does_not_know_the_protocol(
        self, made: Callable[..., FakeCupy]
    ) -> None:
        cupy = made(protocol=False)
        launch._launch(self.KERNEL, (5, 1), self.DEVICE)
        assert cupy.entered == [("device", 1), ("pointer", 77, 1)]

    def test_loads_a_kernel_once_for_a_device(self, made: Callable[..., FakeCupy]) -> None:
        cupy = made()
        for device in (self.DEVICE, self.DEVICE, torch.device("cuda", 0)):
            launch._launch(self.KERNEL, (5, 1), device)
        assert cupy.modules == [program([self.KERNEL])] * 2

    def test_that_fails_is_an_error_that_names_the_kernel(self, made: Callable[..., FakeCupy]) -> None:
        made(failing=True)
        with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_VALUE") as caught:
            launch._launch(self.KERNEL, (5, 1), self.DEVICE)
        assert caught.value.value == self.KERNEL.name


def test_torchs_streams_are_cupys_without_a_warning() -> None:
    pytest.importorskip("cupy")
    stream = SimpleNamespace(cuda_stream=0, device_index=0, __cuda_stream__=lambda: (0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch._stream.__wrapped__(stream).ptr == 0


def test_importing_it_imports_no_cupy() -> None:
    script = "import sys; import workers.kernels.launch; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
