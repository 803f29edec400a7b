"""Every kernel on a GPU: integer sums equal to the reference bit for bit, float sums within what their types allow.

Needs torch, CuPy, transformers and pytest alone, so that it runs on a bare GPU machine:

    python -m pytest -m gpu --noconftest -p no:cacheprovider tests/workers/kernels/test_gpu.py
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from search.scheme import Scheme
from workers.kernels import autotune, launch, reference
from workers.kernels.backend import BACKENDS, VARIABLE, choose, matmul, matmul_codes
from workers.kernels.catalogue import Kernel, Prefill, program, quantise
from workers.kernels.compile import load_module
from workers.kernels.errors import KernelError
from workers.kernels.linear import QuantLinear, swapped
from workers.kernels.pack import ACTIVATION_BITS, GROUP_SIZES, MOST_COLUMNS, WEIGHT_BITS, Packed, pack
from workers.kernels.plans import Decode, Problem, candidates, default

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: NOTHING was run on a GPU"),
]

CUDA = torch.device("cuda", 0)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)

TOKENS = (1, 13, 32, 33, 64, 300)
"""One for every kernel of a weight, full and not; the last for several tiles of tokens."""

SCHEMES = tuple(Scheme(*parts) for parts in product(WEIGHT_BITS, ACTIVATION_BITS, GROUP_SIZES))


def cases() -> list[tuple[Scheme, torch.dtype]]:
    """Every scheme, with the types in turn: of each width of weights, all."""
    of_codes, of_floats = cycle(FLOATS), cycle(FLOATS[:2])
    return [(scheme, next(of_codes if scheme.quantizes_activations else of_floats)) for scheme in SCHEMES]


every_scheme = pytest.mark.parametrize(("scheme", "dtype"), cases(), ids=str)


def weight(scheme: Scheme, rows: int, columns: int, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (scheme.weight_bits - 1)
    codes = torch.randint(-most, most, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, columns // (scheme.group_size or columns), generator=generator) / 64
    return pack(codes.to(CUDA), scales.half().to(CUDA), scheme)


def ragged(scheme: Scheme) -> Packed:
    """Of 3 wgmma strips and some rows more, and inputs that end within a tile."""
    return weight(scheme, 203, 5 * 128 + max(scheme.group_size or 0, 32))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def same(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.cpu(), expected.cpu().contiguous()
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def plan_problem(packed: Packed, tokens: int, dtype: torch.dtype) -> Problem:
    return launch.problem(packed, tokens, dtype)


def cut(packed: Packed, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """How a product's sums are cut: as the reference is told."""
    plan = autotune.chosen(plan_problem(packed, tokens, dtype))
    return {"slices": plan.slices, "warps": plan.kernel.warps if isinstance(plan.kernel, Decode) else 1}


def expected(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """The reference's result of codes, computed on the CPU."""
    bias = None if bias is None else bias.cpu()
    return reference.matmul(x.cpu(), packed.to("cpu"), bias, **cut(packed, len(x), x.dtype))


def near(found: Tensor, x: Tensor, packed: Packed, bias: Tensor | None) -> bool:
    """Within the reference's tolerance, and what rounding weights (in prefill) and results costs."""
    weight, step = reference.dequantize(packed).double(), torch.finfo(x.dtype).eps / 2
    wanted = reference.matmul(x, packed, bias, out_dtype=torch.float32)
    written_out = len(x) > 64
    bound = (step * written_out + 4 * packed.columns * 2**-24) * (x.double().abs() @ weight.abs().T)
    bound = bound * (1 + step) + step * (wanted.abs() + (0 if bias is None else bias.float().abs()))
    return bool(((found.double() - wanted).abs() <= bound).all())


def agrees(x: Tensor, packed: Packed, bias: Tensor | None = None) -> bool:
    found = matmul(x, packed, bias, backend="cupy")
    if packed.scheme.quantizes_activations:
        return same(found, expected(x, packed, bias))
    return near(found, x, packed, bias)


def needed() -> dict[str, Kernel]:
    """By name, the kernels of the tests over all schemes."""
    kernels = [quantise(layout, dtype) for layout in ("ROWS", "TILES", "NIBBLES") for dtype in FLOATS]
    for (scheme, dtype), tokens in product(cases(), TOKENS):
        kernels.append(default(plan_problem(ragged(scheme), tokens, dtype)).kernel)
    return {kernel.name: kernel for kernel in kernels}


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compiles on all cores what would be compiled one after the other."""
    architecture = launch.machine(CUDA).architecture
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: load_module(program([kernel]), architecture), needed().values()))


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Memory that torch has just allocated is NaN, so that what no kernel writes shows; no plan was remembered."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_CHOSEN", {})
    _reduce_in_halves(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8, device=CUDA).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    _reduce_in_halves(True)


def _reduce_in_halves(allowed: bool) -> None:
    """Whether cuBLAS may add partial sums in 16 bits, as torch lets it by default."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = allowed
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


class TestProducts:
    @every_scheme
    def test_of_every_scheme_are_the_references(self, scheme: Scheme, dtype: torch.dtype) -> None:
        packed = ragged(scheme)
        for tokens in TOKENS:
            bias = random(packed.rows, dtype=dtype) if tokens % 2 else None
            assert agrees(random(tokens, packed.columns, dtype=dtype, seed=tokens), packed, bias), tokens

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("of_bias", FLOATS, ids=str)
    def test_take_every_type_of_tokens_and_bias(self, dtype: torch.dtype, of_bias: torch.dtype) -> None:
        packed = ragged(Scheme(6, 8))
        for tokens in (3, 70):
            assert agrees(random(tokens, packed.columns, dtype=dtype), packed, random(packed.rows, dtype=of_bias))
        if dtype != torch.float32:
            packed = ragged(Scheme(6, 16))
            assert agrees(random(3, packed.columns, dtype=dtype), packed, random(packed.rows, dtype=of_bias))

    @pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, 129, 1000])
    @pytest.mark.parametrize("columns", [32, 96, 128, 160, 4096])
    def test_of_every_ragged_shape_are_the_references(self, rows: int, columns: int) -> None:
        for scheme in (Scheme(6, 8), Scheme(4, 8, 32), Scheme(4, 16, 32)):
            packed = weight(scheme, rows, columns)
            for tokens in (1, 9, 40, 129):
                assert agrees(random(tokens, columns, dtype=torch.float16), packed), (str(scheme), tokens)

    @pytest.mark.parametrize("scheme", ["w6a8", "w8a8", "w4a8g128", "w6a8g32", "w6a16", "w4a16g128"])
    @pytest.mark.parametrize("tokens", [1, 16, 512, 2500])
    def test_that_fill_the_gpu_are_the_references(self, scheme: str, tokens: int) -> None:
        packed = weight(Scheme.parse(scheme), 4096 + 48, 4096)
        x = random(tokens, packed.columns, dtype=torch.float16)
        found = matmul(x, packed, backend="cupy")
        if packed.scheme.quantizes_activations:
            # On the GPU: the CPU would take minutes.
            assert same(found, reference.matmul(x, packed, **cut(packed, tokens, x.dtype)))
        else:
            assert near(found, x, packed, None)

    def test_add_up_the_most_products_without_overflow(self) -> None:
        scheme, columns = Scheme(8, 8), MOST_COLUMNS
        packed = pack(
            torch.full((64, columns), -128, dtype=torch.int8, device=CUDA),
            torch.full((64, 1), 2.0**-24, device=CUDA),
            scheme,
        )
        for tokens, code in product((1, 40), (127, -128)):
            codes = torch.full((tokens, columns), code, dtype=torch.int8, device=CUDA)
            found = matmul_codes(codes, torch.ones(tokens, device=CUDA), packed, backend="cupy")
            assert (found == -128 * code * columns * 2.0**-24).all()

    @pytest.mark.parametrize("scheme", ["w6a8", "w4a4", "w5a6g64"])
    @pytest.mark.parametrize("tokens", [1, 13, 32, 33, 300])
    def test_of_given_codes_are_the_references(self, scheme: str, tokens: int) -> None:
        packed = ragged(Scheme.parse(scheme))
        # More than the scheme's bits: a caller may round as it likes.
        codes = random(tokens, packed.columns).mul(40).clamp(-128, 127).to(torch.int8)
        scales, bias = torch.rand(tokens, device=CUDA), random(packed.rows)
        found = matmul_codes(codes, scales, packed, bias, torch.float16, backend="cupy")
        split = cut(packed, tokens, torch.float16)
        operands = codes.cpu(), scales.cpu(), packed.to("cpu"), bias.cpu()
        assert same(found, reference.matmul_codes(*operands, **split, out_dtype=torch.float16))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("scheme", ["w6a8", "w4a8g64", "w4a4"])
    @pytest.mark.parametrize("tokens", [3, 40])
    def test_of_a_token_that_is_not_finite_are_nan_there_alone(self, value: float, scheme: str, tokens: int) -> None:
        packed = ragged(Scheme.parse(scheme))
        x = random(tokens, packed.columns, dtype=torch.float16)
        x[1, 7] = value
        found = matmul(x, packed, backend="cupy")
        assert found.isnan().all(1).tolist() == [token == 1 for token in range(tokens)]
        assert int(found.isfinite().all(1).sum()) == tokens - 1

    @pytest.mark.parametrize("tokens", [3, 40, 100])
    def test_of_float_tokens_keep_what_is_not_finite_in_its_token(self, tokens: int) -> None:
        packed = ragged(Scheme(6, 16))
        x = random(tokens, packed.columns, dtype=torch.float16)
        x[1, 7] = torch.nan
        found = matmul(x, packed, backend="cupy")
        assert found.isnan().all(1).tolist() == [token == 1 for token in range(tokens)]

    def test_of_zeros_are_the_bias(self) -> None:
        packed, bias = ragged(Scheme(6, 8)), random(203, dtype=torch.float16)
        found = matmul(torch.zeros(40, packed.columns, dtype=torch.float16, device=CUDA), packed, bias, backend="cupy")
        assert torch.equal(found, bias.expand(40, -1))

    @pytest.mark.parametrize(("scheme", "tokens"), [("w6a8", 3), ("w6a8", 40), ("w6a16", 3), ("w6a16", 100)])
    def test_of_tokens_at_any_address_are_the_references(self, scheme: str, tokens: int) -> None:
        packed = ragged(Scheme.parse(scheme))
        x = random(tokens * packed.columns + 1, dtype=torch.float16)[1:].view(tokens, -1)
        assert x.data_ptr() % 16
        assert agrees(x, packed)

    def test_of_no_tokens_are_empty(self) -> None:
        packed = ragged(Scheme(6, 8))
        assert matmul(random(0, packed.columns), packed, backend="cupy").shape == (0, packed.rows)


SLICED = Scheme(6, 8), Scheme(4, 8, 64), Scheme(6, 16)
"""Of narrow weights, whose inputs are cut into slices that meet by tickets."""


def narrow(scheme: Scheme) -> Packed:
    packed = weight(scheme, 96, 8192)
    assert cut(packed, 8, torch.float16)["slices"] > 1
    return packed


class TestRepetition:
    @pytest.mark.parametrize("tokens", [8, 40, 300])
    @pytest.mark.parametrize("scheme", SLICED, ids=str)
    def test_20_times_gives_the_same_bits(self, scheme: Scheme, tokens: int) -> None:
        packed = narrow(scheme)
        x = random(tokens, packed.columns, dtype=torch.float16)
        first = matmul(x, packed, backend="cupy")
        assert all(same(matmul(x, packed, backend="cupy"), first) for _ in range(19))

    @pytest.mark.parametrize("scheme", SLICED, ids=str)
    def test_on_streams_beside_one_another_gives_the_same_bits(self, scheme: Scheme) -> None:
        packed, streams = narrow(scheme), [torch.cuda.Stream() for _ in range(4)]
        xs = [random(8, packed.columns, dtype=torch.float16, seed=seed) for seed in range(len(streams))]
        alone = [matmul(x, packed, backend="cupy") for x in xs]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[] for _ in streams]
        for _ in range(50):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[index].append(matmul(xs[index], packed, backend="cupy"))
        torch.cuda.synchronize()
        assert all(same(one, alone[index]) for index, ones in enumerate(found) for one in ones)

    def test_runs_on_torchs_current_stream(self) -> None:
        packed, stream = ragged(Scheme(6, 8)), torch.cuda.Stream()
        x = random(8, packed.columns, dtype=torch.float16)
        wanted = matmul(x, packed, backend="cupy")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Had the kernel run elsewhere, it would have read the tokens before they were there.
            late = torch.zeros_like(x)
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            found = matmul(late, packed, backend="cupy")
            copied = found.clone()
        stream.synchronize()
        assert same(copied, wanted)


class TestGraphs:
    @pytest.mark.parametrize("tokens", [1, 40, 100])
    @pytest.mark.parametrize("scheme", SLICED, ids=str)
    def test_replay_what_was_captured_on_new_tokens(self, scheme: Scheme, tokens: int) -> None:
        packed, graph = narrow(scheme), torch.cuda.CUDAGraph()
        launch.warm(packed, tokens, torch.float16)
        x = random(tokens, packed.columns, dtype=torch.float16)
        with torch.cuda.graph(graph):
            found = matmul(x, packed, backend="cupy")
        for seed in range(3):
            x.copy_(random(tokens, packed.columns, dtype=torch.float16, seed=seed))
            graph.replay()
            assert same(found, matmul(x, packed, backend="cupy"))

    def test_replay_beside_one_another(self) -> None:
        packed = narrow(Scheme(6, 8))
        launch.warm(packed, 8, torch.float16)
        streams, graphs, found = [torch.cuda.Stream() for _ in range(2)], [], []
        xs = [random(8, packed.columns, dtype=torch.float16, seed=seed) for seed in range(2)]
        for x in xs:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1]):
                found.append([matmul(x, packed, backend="cupy") for _ in range(20)])
        for _ in range(20):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for x, ones in zip(xs, found, strict=True):
            wanted = matmul(x, packed, backend="cupy")
            assert all(same(one, wanted) for one in ones)


class TestPlans:
    @pytest.mark.parametrize("scheme", ["w6a8", "w4a4", "w4a8g128", "w6a16"])
    @pytest.mark.parametrize("tokens", [1, 16, 32, 300])
    def test_all_give_the_same_bits(self, scheme: str, tokens: int) -> None:
        packed = weight(Scheme.parse(scheme), 520, 4096)
        x = random(tokens, packed.columns, dtype=torch.float16)
        plans = candidates(plan_problem(packed, tokens, x.dtype))
        with ThreadPoolExecutor() as pool:
            architecture = launch.machine(CUDA).architecture
            list(pool.map(lambda plan: load_module(program([plan.kernel]), architecture), plans))
        first = launch.multiply(plans[0], x, packed, None)
        assert all(same(launch.multiply(plan, x, packed, None), first) for plan in plans[1:])

    def test_that_were_timed_are_used_from_then_on(self) -> None:
        packed = weight(Scheme(6, 8), 2048, 2048)
        wanted = plan_problem(packed, 1, torch.float16)
        before = matmul(random(1, 2048, dtype=torch.float16), packed, backend="cupy")
        plan = launch.tune(packed, 1, torch.float16)
        assert plan in candidates(wanted)
        assert autotune.chosen(wanted) == autotune.recalled(wanted) == plan
        assert same(matmul(random(1, 2048, dtype=torch.float16), packed, backend="cupy"), before)

    def test_stay_within_the_registers_and_shared_memory_of_the_gpu(self) -> None:
        for kernel in needed().values():
            function = launch._function(kernel, CUDA)
            assert function.local_size_bytes == 0, kernel.name
            assert kernel.threads <= function.max_threads_per_block
            limit = torch.cuda.get_device_properties(CUDA).shared_memory_per_block_optin
            assert function.shared_size_bytes + kernel.shared_bytes <= limit
            if isinstance(kernel, Prefill):
                assert function.max_dynamic_shared_size_bytes >= kernel.shared_bytes


class TestChoice:
    @every_scheme
    def test_falls_on_our_kernels(self, scheme: Scheme, dtype: torch.dtype) -> None:
        assert choose(ragged(scheme), 1, dtype) is BACKENDS["cupy"]

    def test_falls_on_the_reference_for_wide_tokens_with_the_reason_when_asked(self) -> None:
        packed = ragged(Scheme(6, 16))
        assert choose(packed, 1, torch.float32) is BACKENDS["reference"]
        with pytest.raises(KernelError, match="not float32"):
            matmul(random(1, packed.columns), packed, backend="cupy")

    def test_never_falls_back_where_a_kernel_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(text: str, architecture: str) -> None:
            raise KernelError("it does not compile", field="kernel")

        monkeypatch.setattr(launch, "load_module", broken)
        monkeypatch.setattr(launch, "_function", launch._function.__wrapped__)
        packed = ragged(Scheme(6, 8))
        with pytest.raises(KernelError, match="does not compile"):
            matmul(random(1, packed.columns), packed)


@pytest.fixture(scope="module")
def language_model() -> nn.Module:
    """A Llama of four layers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(CUDA, torch.float16).eval()


class TestModels:
    @pytest.mark.parametrize("tokens", [1, 30, 200])
    @pytest.mark.parametrize("scheme", ["w6a8", "w4a4", "w3a6"])
    @torch.no_grad()
    def test_give_the_references_logits_bit_for_bit(self, language_model: nn.Module, scheme: str, tokens: int) -> None:
        ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(CUDA)
        layers = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
        allocation = dict.fromkeys(layers, Scheme.parse(scheme))
        logits = {}
        for backend in ("cupy", "reference"):
            with swapped(language_model, allocation, backend=backend):
                assert isinstance(language_model.get_submodule(layers[0]), QuantLinear)
                logits[backend] = language_model(ids).logits
        assert same(logits["cupy"], logits["reference"])
        assert logits["cupy"].isfinite().all()

    # Rounding to codes makes more of a last bit that differs.
    @pytest.mark.parametrize("tokens", [30, 200])
    @pytest.mark.parametrize(("scheme", "tolerance"), [("w6a16", 5e-3), ("w4a16g32", 5e-3), ("w5a8g32", 2e-2)])
    @torch.no_grad()
    def test_with_float_sums_are_near_the_references(
        self, language_model: nn.Module, scheme: str, tolerance: float, tokens: int
    ) -> None:
        ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(CUDA)
        layers = [name for name, module in language_model.named_modules() if isinstance(module, nn.Linear)]
        logits = {}
        for backend in ("cupy", "reference"):
            with swapped(language_model, dict.fromkeys(layers, Scheme.parse(scheme)), backend=backend):
                logits[backend] = language_model(ids).logits.double()
        error = (logits["cupy"] - logits["reference"]).norm() / logits["reference"].norm()
        assert error < tolerance
