"""The emulator computes what the PTX ISA says, and fails where a GPU would hang, fault or compute garbage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kernels.emulator.build import Emulated
from workers.kernels.errors import KernelError

Compile = Callable[[str], Emulated]

PROGRAM = """
#include "unpack.cuh"

template <class Sum, class Multiply>
DEVICE void product(const unsigned* a, const unsigned* b, Sum* d, Multiply multiply) {
    unsigned fragment[4];
    Sum sums[4];
    for (int i = 0; i < 4; ++i) fragment[i] = a[4 * lane() + i], sums[i] = d[4 * lane() + i];
    multiply(sums, fragment, b[2 * lane()], b[2 * lane() + 1]);
    for (int i = 0; i < 4; ++i) d[4 * lane() + i] = sums[i];
}

#define PRODUCT(name, Sum, call)                                                           \\
    auto multiply = [](Sum(&d)[4], const unsigned(&a)[4], unsigned b0, unsigned b1) { call; }; \\
    product(a, b, d, multiply);

extern "C" __global__ void product_s8(const unsigned* a, const unsigned* b, int* d) {
    PRODUCT(s8, int, mma_s8(d, a, b0, b1, d))
}
extern "C" __global__ void product_s4(const unsigned* a, const unsigned* b, int* d) {
    PRODUCT(s4, int, mma_s4(d, a, b0, b1, d))
}
extern "C" __global__ void product_f16(const unsigned* a, const unsigned* b, float* d) {
    PRODUCT(f16, float, mma_float(f16{}, d, a, b0, b1, d))
}
extern "C" __global__ void product_bf16(const unsigned* a, const unsigned* b, float* d) {
    PRODUCT(bf16, float, mma_float(bf16{}, d, a, b0, b1, d))
}

extern "C" __global__ void matrices(const uint4* rows, unsigned* fragments) {
    auto* shared = reinterpret_cast<uint4*>(dynamic_shared());
    shared[lane()] = rows[lane()];
    warp_barrier();
    unsigned r[4];
    ldmatrix_x4(r, shared + lane());
    for (int i = 0; i < 4; ++i) fragments[4 * lane() + i] = r[i];
}

extern "C" __global__ void copy(const uint4* from, uint4* to, int waits) {
    auto* shared = reinterpret_cast<uint4*>(dynamic_shared());
    copy_async16(shared + thread(), from + thread());
    copy_async_commit();
    copy_async16(shared + 64 + thread(), from + thread());
    copy_async_commit();
    if (waits == 1) copy_async_wait<1>();
    if (waits == 2) copy_async_wait<0>();
    barrier();
    const int other = 63 - thread();
    to[thread()] = shared[other];
    to[64 + thread()] = shared[64 + other];
}

extern "C" __global__ void exchange(const unsigned* from, unsigned* to) {
    to[thread()] = shuffle(from[thread()], (lane() + 5) % 32) + shuffle_xor(from[thread()], 16);
}

extern "C" __global__ void arrive(unsigned* counter, unsigned* order) {
    const int block = block_x() + blocks_x() * block_y();
    if (thread() == 0) order[block] = ticket(counter, blocks_x() * blocks_y());
}

extern "C" __global__ void to_floats(const f16* half, const bf16* brain, float* from_half, float* from_brain,
                                     int count) {
    for (int i = thread(); i < count; i += 32) from_half[i] = to_float(half[i]), from_brain[i] = to_float(brain[i]);
}
extern "C" __global__ void from_floats(const float* values, f16* half, bf16* brain, int count) {
    for (int i = thread(); i < count; i += 32) assign(half[i], values[i]), assign(brain[i], values[i]);
}

template <int BITS>
DEVICE void widened(const unsigned* codes, unsigned* half, unsigned* brain) {
    for (int i = thread(); i < (1 << BITS) / 4; i += 32) {
        unsigned pairs[2];
        widen<BITS>(f16{}, codes[i], pairs);
        half[2 * i] = pairs[0], half[2 * i + 1] = pairs[1];
        widen<BITS>(bf16{}, codes[i], pairs);
        brain[2 * i] = pairs[0], brain[2 * i + 1] = pairs[1];
    }
}
extern "C" __global__ void widened_8(const unsigned* codes, unsigned* half, unsigned* brain) {
    widened<8>(codes, half, brain);
}
extern "C" __global__ void widened_6(const unsigned* codes, unsigned* half, unsigned* brain) {
    widened<6>(codes, half, brain);
}

extern "C" __global__ void half_a_barrier() {
    if (thread() < 32) barrier();
}
extern "C" __global__ void two_instructions() {
    if (lane() < 16)
        shuffle(1, 0);
    else
        warp_barrier();
}
extern "C" __global__ void misaligned(const unsigned char* from) {
    unsigned words[4];
    load_streaming16(words, from + 4);
}
"""


@pytest.fixture(scope="module")
def program(emulated: Compile) -> Emulated:
    return emulated(PROGRAM)


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int16).tolist()


class TestProducts:
    """Against the ISA's own statement of which element of a matrix each lane's element i is."""

    @staticmethod
    def places(per: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, column) of every lane's elements of a, b and d, lanes × elements × 2, with `per` elements to a word."""
        lanes = np.arange(32)[:, None]
        group, member = lanes // 4, lanes % 4
        i = np.arange(4 * per)
        a = np.stack(
            np.broadcast_arrays(
                np.where((i < per) | ((2 * per <= i) & (i < 3 * per)), group, group + 8),
                member * per + i % per + np.where(i < 2 * per, 0, 4 * per),
            ),
            -1,
        )
        i = np.arange(2 * per)
        b = np.stack(np.broadcast_arrays(member * per + i % per + np.where(i < per, 0, 4 * per), group), -1)
        i = np.arange(4)
        d = np.stack(np.broadcast_arrays(np.where(i < 2, group, group + 8), member * 2 + i % 2), -1)
        return a, b, d

    @pytest.mark.parametrize(("kind", "per"), [("s8", 4), ("s4", 8), ("f16", 2), ("bf16", 2)])
    def test_are_those_of_the_matrices(self, program: Emulated, kind: str, per: int) -> None:
        rng = np.random.default_rng(0)
        most = {"s8": 128, "s4": 8, "f16": 32, "bf16": 32}[kind]
        a, b = (rng.integers(-most, most, shape) for shape in ((16, 8 * per), (8 * per, 8)))
        d = rng.integers(-1000, 1000, (16, 8))
        at_a, at_b, at_d = self.places(per)

        def words(matrix: np.ndarray, at: np.ndarray) -> Tensor:
            elements = torch.from_numpy(matrix[at[..., 0], at[..., 1]])
            if kind == "s4":
                nibbles = (elements & 15).view(32, -1, 8) << 4 * torch.arange(8)
                return nibbles.sum(-1).to(torch.uint32).view(torch.int32)
            types = {"s8": torch.int8, "f16": torch.float16, "bf16": torch.bfloat16}
            return elements.to(types[kind]).contiguous().view(torch.int32)

        sums = torch.int32 if per > 2 else torch.float32
        found = torch.from_numpy(d[at_d[..., 0], at_d[..., 1]]).to(sums).contiguous()
        program.launch(f"product_{kind}", (1, 1), 32, words(a, at_a), words(b, at_b), found)
        assert np.array_equal(found.numpy(), (d + a @ b)[at_d[..., 0], at_d[..., 1]])

    def test_that_leave_int32_are_errors(self, program: Emulated) -> None:
        ones = torch.full((32, 4), 0x01010101, dtype=torch.int32)
        sums = torch.full((32, 4), 2**31 - 32, dtype=torch.int32)
        with pytest.raises(KernelError, match="left int32"):
            program.launch("product_s8", (1, 1), 32, ones, ones, sums)

    def test_take_matrices_from_shared_memory(self, program: Emulated) -> None:
        rows, found = random_bytes(4, 8, 16), torch.empty(32, 4, 4, dtype=torch.int8)
        program.launch("matrices", (1, 1), 32, rows, found, shared_bytes=512)
        assert torch.equal(found, rows.view(4, 32, 4).transpose(0, 1))


class TestThreads:
    @pytest.mark.parametrize("waits", [0, 1, 2])
    def test_see_a_copy_only_after_waiting_for_it(self, program: Emulated, waits: int) -> None:
        given, found = random_bytes(64, 16), torch.zeros(2, 64, 16, dtype=torch.int8)
        program.launch("copy", (1, 1), 64, given, found, waits, shared_bytes=2048)
        assert [torch.equal(copied, given.flip(0)) for copied in found] == [waits > 0, waits > 1]

    @pytest.mark.parametrize("reverse", [False, True])
    def test_of_a_warp_exchange_values(self, program: Emulated, reverse: bool) -> None:
        values, found = torch.arange(64, dtype=torch.int32), torch.empty(64, dtype=torch.int32)
        program.launch("exchange", (1, 1), 64, values, found, reverse=reverse)
        lanes = values.view(2, 32)
        assert torch.equal(found.view(2, 32), lanes.roll(-5, 1) + lanes.roll(16, 1))

    @pytest.mark.parametrize("reverse", [False, True])
    def test_of_every_block_draw_a_ticket(self, program: Emulated, reverse: bool) -> None:
        counter, order = torch.zeros(1, dtype=torch.int32), torch.empty(6, dtype=torch.int32)
        program.launch("arrive", (3, 2), 32, counter, order, reverse=reverse)
        assert order.tolist() == (list(range(6))[::-1] if reverse else list(range(6)))
        assert counter.item() == 0

    @pytest.mark.parametrize(
        ("kernel", "reason"),
        [
            ("half_a_barrier", "every thread waits for another"),
            ("two_instructions", "different instructions"),
            ("misaligned", "misaligned access"),
        ],
    )
    def test_that_do_what_a_gpu_cannot_are_errors(self, program: Emulated, kernel: str, reason: str) -> None:
        with pytest.raises(KernelError, match=reason):
            program.launch(kernel, (1, 1), 64, *([random_bytes(64)] if kernel == "misaligned" else []))

    def test_that_write_behind_their_shared_memory_are_errors(self, program: Emulated) -> None:
        rows, found = random_bytes(4, 8, 16), torch.empty(32, 4, 4, dtype=torch.int8)
        with pytest.raises(KernelError, match="behind its shared memory"):
            program.launch("matrices", (1, 1), 32, rows, found, shared_bytes=256)


class TestConversions:
    def test_from_sixteen_bits_are_torchs(self, program: Emulated) -> None:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
        half, brain = patterns.view(torch.float16), patterns.view(torch.bfloat16)
        found = torch.empty(2, len(patterns))
        program.launch("to_floats", (1, 1), 32, half, brain, found[0], found[1], len(patterns))
        np.testing.assert_array_equal(found, torch.stack([half.float(), brain.float()]))

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.floats(width=32) | st.floats(-70000, 70000, width=32), min_size=1, max_size=20))
    def test_to_sixteen_bits_are_torchs(self, program: Emulated, values: list[float]) -> None:
        wide = torch.tensor(values, dtype=torch.float32)
        for dtype, index in ((torch.float16, 0), (torch.bfloat16, 1)):
            found = [torch.empty(len(wide), dtype=torch.float16), torch.empty(len(wide), dtype=torch.bfloat16)]
            program.launch("from_floats", (1, 1), 32, wide, *found, len(wide))
            expected = wide.to(dtype)
            assert torch.equal(found[index].isnan(), expected.isnan())
            assert bits(found[index][~expected.isnan()]) == bits(expected[~expected.isnan()])

    @pytest.mark.parametrize("bits", [6, 8])
    def test_of_top_aligned_codes_to_sixteen_bits_are_exact(self, program: Emulated, bits: int) -> None:
        codes = torch.arange(-128, 128, 2 ** (8 - bits)).to(torch.int8)
        half, brain = torch.empty(len(codes), dtype=torch.float16), torch.empty(len(codes), dtype=torch.bfloat16)
        program.launch(f"widened_{bits}", (1, 1), 32, codes, half, brain)
        assert torch.equal(half, codes.half())
        assert torch.equal(brain, codes.bfloat16())


def test_a_program_that_does_not_compile_is_an_error_with_the_compilers_words(emulated: Compile) -> None:
    with pytest.raises(KernelError, match="no_such_name"):
        emulated("void f() { no_such_name(); }")


@pytest.mark.usefixtures("emulated")
def test_a_program_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'extern "C" __global__ void answer(int* to) { *to = 42; }'
    Emulated(text, tmp_path)
    monkeypatch.setenv("PATH", "")
    found = torch.zeros(1, dtype=torch.int32)
    Emulated(text, tmp_path).launch("answer", (1, 1), 1, found)
    assert found.item() == 42
    with pytest.raises(KernelError, match=r"g\+\+ is not installed"):
        Emulated(text + "// changed", tmp_path)


def test_arguments_that_a_kernel_does_not_take_are_errors(program: Emulated) -> None:
    with pytest.raises(KernelError, match="another number of arguments"):
        program.launch("exchange", (1, 1), 32, random_bytes(128))
    with pytest.raises(KernelError, match="contiguous"):
        program.launch("exchange", (1, 1), 32, random_bytes(128), random_bytes(8, 32).T)


def test_a_kernel_that_does_not_exist_is_an_error(program: Emulated) -> None:
    with pytest.raises(AttributeError, match="no_such_kernel"):
        program.launch("no_such_kernel", (1, 1), 32)
