"""Every kernel compiles for every architecture, stays in registers, and is made of the instructions it should be."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import pickle
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import cycle, islice, product, repeat
from pathlib import Path

import pytest
import torch

from search.scheme import Scheme
from workers.kernels.catalogue import NATIVE_INT4, Kernel, decode, dequantise, prefill, program, quantise
from workers.kernels.compile import (
    ARCHITECTURES,
    SOURCES,
    Compiled,
    compile_source,
    inlined,
    key,
    load_module,
    options,
    write_at_once,
)
from workers.kernels.errors import KernelError
from workers.kernels.pack import GROUP_SIZES, WEIGHT_BITS

pytestmark = pytest.mark.long

pytest.importorskip("cupy", reason="no CuPy: nothing was compiled for GPUs")

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)

ONE = Scheme(6, 8)
WHOLE = ("sm_80", "sm_90a")
"""For these every kernel is compiled: for the first, and for the one with instructions of its own. For those between,
which have the first's, kernels of every number of bits and every group size are, and all of them in a slow test."""


def schemes(architecture: str, activation_bits: int, whole: bool) -> list[Scheme]:
    pairs = product(WEIGHT_BITS, GROUP_SIZES)
    if not whole and architecture not in WHOLE:
        # Each architecture pairs them in another way.
        turn = ARCHITECTURES.index(architecture)
        pairs = zip(WEIGHT_BITS, islice(cycle(GROUP_SIZES), turn, None), strict=False)
    return [Scheme(bits, activation_bits, group) for bits, group in pairs]


def prefills(architecture: str, whole: bool) -> list[Kernel]:
    """The types of results in turn."""
    outs = cycle(FLOATS)
    kernels: list[Kernel] = [prefill(one, architecture, next(outs)) for one in schemes(architecture, 8, whole)]
    if architecture in NATIVE_INT4:
        kernels += [prefill(Scheme(4, 4, group), architecture, next(outs)) for group in (None, 64, 128)]
    if architecture == "sm_90a":
        kernels += [prefill(Scheme(bits, 8), architecture, next(outs), 256) for bits in WEIGHT_BITS]
    return kernels


def decodes_of_codes(architecture: str, whole: bool) -> list[Kernel]:
    outs = cycle(FLOATS)
    return [decode(one, torch.int8, next(outs)) for one in schemes(architecture, 8, whole)]


def decodes_of_floats(architecture: str, whole: bool) -> list[Kernel]:
    """The two types in turn, and on the next architecture the other for the same scheme."""
    types = cycle(HALVES if ARCHITECTURES.index(architecture) % 2 else HALVES[::-1])
    return [decode(one, kind, kind) for one, kind in zip(schemes(architecture, 16, whole), types, strict=False)]


def others(architecture: str, whole: bool) -> list[Kernel]:
    types = cycle(HALVES)
    kernels = [dequantise(one, next(types)) for one in schemes(architecture, 16, whole)]
    return kernels + [quantise(layout, kind) for layout, kind in product(("ROWS", "TILES", "NIBBLES"), FLOATS)]


def compile_once(text: str, architecture: str, kept: Path) -> Compiled:
    file = kept / key(text, architecture)
    if not file.exists():
        write_at_once(file, pickle.dumps(compile_source(text, architecture)))
    made: Compiled = pickle.loads(file.read_bytes())
    return made


Programs = dict[tuple[str, str], tuple[list[Kernel], Compiled]]


@pytest.fixture(scope="module")
def compiled(kept: Path) -> Programs:
    return compile_all(kept, whole=False)


def compile_all(kept: Path, whole: bool) -> Programs:
    """The programs by architecture and kind of kernel. In processes: in one, NVRTC compiles one at a time."""
    kinds = {made.__name__: made for made in (prefills, decodes_of_codes, decodes_of_floats, others)}
    # The longest first.
    jobs = {
        (architecture, kind): kinds[kind](architecture, whole) for kind in kinds for architecture in ARCHITECTURES[::-1]
    }
    texts, architectures = [program(kernels) for kernels in jobs.values()], [architecture for architecture, _ in jobs]
    missing = not all((kept / key(*asked)).exists() for asked in zip(texts, architectures, strict=True))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) if missing else nullcontext() as pool:
        made = (pool.map if pool else map)(compile_once, texts, architectures, repeat(kept))
        return {job: (jobs[job], each) for job, each in zip(jobs, made, strict=True)}


@pytest.fixture(scope="module")
def nvdisasm() -> Path:
    files = importlib.metadata.files("nvidia-cuda-nvdisasm") or ()
    return next(Path(str(file.locate())) for file in files if file.name == "nvdisasm")


def instructions(nvdisasm: Path, cubin: bytes, folder: Path) -> dict[str, list[str]]:
    """The instructions of every kernel in machine code, as `IGMMA.64x256x32.S8.S8`."""
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    listing = subprocess.run([nvdisasm, "-c", file], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)[1:]
    found = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
    return {name: found.findall(text) for name, text in zip(sections[::2], sections[1::2], strict=True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_its_values_in_registers(compiled: Programs, architecture: str) -> None:
    assert_sound({job: made for job, made in compiled.items() if job[0] == architecture})


@pytest.mark.slow
def test_every_kernel_of_every_architecture_keeps_its_values_in_registers(kept: Path) -> None:
    assert_sound(compile_all(kept, whole=True))


def assert_sound(programs: Programs) -> None:
    """No kernel spills, and ptxas warns of nothing."""
    assert programs
    for job, (kernels, made) in programs.items():
        assert set(made.resources) == {kernel.name for kernel in kernels}, job
        spilled = {name: used for name, used in made.resources.items() if used.spill_bytes or used.stack_bytes}
        assert (spilled, made.warnings) == ({}, ()), job


def test_on_hopper_prefill_multiplies_by_asynchronous_warpgroup_instructions(
    compiled: Programs, nvdisasm: Path, tmp_path: Path
) -> None:
    kernels, made = compiled["sm_90a", "prefills"]
    sass = instructions(nvdisasm, made.cubin, tmp_path)
    assert set(sass) == {kernel.name for kernel in kernels}
    for name, used in sass.items():
        tokens = name.rpartition("_")[2]
        multiplied = {one for one in used if "MMA" in one}
        assert multiplied == {f"IGMMA.64x{tokens}x32.S8.S8"}
        assert any(one.startswith("UBLKCP") for one in used)
        assert {one.split(".")[1] for one in used if one.startswith("USETMAXREG")} == {"TRY_ALLOC", "DEALLOC"}


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one != "sm_90a"])
def test_int4_is_native_where_it_is_used(compiled: Programs, nvdisasm: Path, tmp_path: Path, architecture: str) -> None:
    for name, used in instructions(nvdisasm, compiled[architecture, "prefills"][1].cubin, tmp_path).items():
        operands = "S4.S4" if name.startswith("prefill_int4") else "S8.S8"
        multiplied = {one for one in used if "MMA" in one}
        assert multiplied
        assert all(operands in one for one in multiplied)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_90a"])
def test_int4_that_would_be_emulated_is_not_used(architecture: str) -> None:
    for group in GROUP_SIZES:
        kernel = prefill(Scheme(4, 4, group), architecture, torch.float16)
        assert "Int4" not in kernel.text
        assert kernel.layout == "TILES"


def test_sources_include_each_other_once() -> None:
    text = inlined('#include "prefill_wgmma.cuh"\n#include "decode.cuh"\n')
    assert "#include" not in text
    assert "#pragma once" not in text
    assert text.count("DEVICE void mma_s8(") == 1
    assert (SOURCES / "unpack.cuh").exists()


def test_a_key_names_all_that_machine_code_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = program([prefill(ONE, "sm_80", torch.float16)])
    keys = {key(text, "sm_80"), key(text, "sm_86"), key(text + "\n", "sm_80")}
    for source in SOURCES.glob("*.cuh"):
        (tmp_path / source.name).write_text(source.read_text())
    monkeypatch.setattr("workers.kernels.compile.SOURCES", tmp_path)
    assert key(text, "sm_80") in keys
    layout = tmp_path / "layout.cuh"
    layout.write_text(layout.read_text() + "\n")
    assert key(text, "sm_80") not in keys


def test_machine_code_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    text = program([quantise("ROWS", torch.float16)])
    load_module(text, "sm_80")
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == compile_source(text, "sm_80").cubin
    monkeypatch.setattr("workers.kernels.compile.compile_source", None)
    load_module(text, "sm_80")
    assert list((tmp_path / "cache").iterdir()) == [kept]


def test_machine_code_is_kept_by_the_process_where_the_cache_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    loaded: list[str] = []
    monkeypatch.setattr("cupy.RawModule", lambda path: loaded.append(path))
    text = program([quantise("ROWS", torch.float16)])
    load_module(text, "sm_80")
    assert Path(loaded[0]).read_bytes() == compile_source(text, "sm_80").cubin


@pytest.mark.parametrize("missing", [RuntimeError("failed to load libnvrtc.so.13"), ImportError("no libnvrtc.so.13")])
def test_without_a_compiler_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, missing: Exception) -> None:
    def version() -> tuple[int, int]:
        raise missing

    monkeypatch.setattr("cupy.cuda.nvrtc.getVersion", version)
    for use in (compile_source, load_module):
        with pytest.raises(KernelError, match=r"cannot be compiled: .*libnvrtc") as caught:
            use('extern "C" __global__ void empty() {}', "sm_80")
        assert caught.value.value == "NVRTC"


def test_what_does_not_compile_is_refused_with_the_log() -> None:
    with pytest.raises(KernelError, match=r"identifier .missing. is undefined") as caught:
        compile_source('extern "C" __global__ void broken() { missing(); }', "sm_80")
    assert caught.value.field == "architecture"


def test_spills_and_warnings_are_read_from_the_report() -> None:
    spilling = """
    extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
        float kept[64];
        for (int i = 0; i < 64; ++i) kept[i] = x[i];
        __syncthreads();
        for (int i = 0; i < 64; ++i) x[i] = kept[63 - i] * kept[i];
    }"""
    resources = compile_source(spilling, "sm_80").resources["spilling"]
    assert resources.registers == 32
    assert resources.spill_bytes > 0
    assert resources.stack_bytes > 0
    # setmaxnreg without a bound on registers is ignored.
    ignored = 'extern "C" __global__ void ignored() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }'
    assert any("setmaxnreg" in warning for warning in compile_source(ignored, "sm_90a").warnings)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_100a", "90a"])
def test_other_architectures_are_refused(architecture: str) -> None:
    with pytest.raises(KernelError) as caught:
        options(architecture)
    assert (caught.value.field, caught.value.accepted) == ("architecture", ARCHITECTURES)


@pytest.mark.parametrize(
    ("field", "scheme", "architecture", "tile_tokens"),
    [
        ("scheme", Scheme(6, 16), "sm_90a", 128),
        ("scheme", Scheme(7, 8), "sm_90a", 128),
        ("architecture", ONE, "sm_75", 128),
        ("tile_tokens", ONE, "sm_90", 256),
        ("tile_tokens", Scheme(6, 8, 64), "sm_90a", 256),
        ("tile_tokens", ONE, "sm_90a", 64),
    ],
)
def test_prefill_refuses_what_no_kernel_does(field: str, scheme: Scheme, architecture: str, tile_tokens: int) -> None:
    with pytest.raises(KernelError) as caught:
        prefill(scheme, architecture, torch.float16, tile_tokens)
    assert caught.value.field == field
