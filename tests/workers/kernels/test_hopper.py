"""The emulator's Hopper: wgmma reads memory as the PTX ISA says, and what is asynchronous is not there early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kernels.emulator.build import Emulated
from workers.kernels.errors import KernelError

Compile = Callable[[str], Emulated]

PROGRAM = """
#include "hopper.cuh"

// One wgmma of 64 × 32 (its fragments in `a`) by 32 × 2·SUMS, from byte `offset` of the atoms in `b` on.
template <int SUMS>
DEVICE void product(const unsigned* a, const uint4* b, int* d, int offset, int accumulate, int waits) {
    auto* shared = reinterpret_cast<uint4*>(dynamic_shared());
    if (thread() == 0) mbarrier_init_fence();
    for (int i = thread(); i < 2 * SUMS * 128 / 16; i += 128) shared[i] = b[i];
    barrier();
    unsigned fragment[4];
    int sums[SUMS];
    for (int i = 0; i < 4; ++i) fragment[i] = a[4 * thread() + i];
    for (int i = 0; i < SUMS; ++i) sums[i] = d[SUMS * thread() + i];
    wgmma_fence();
    wgmma_s8(sums, fragment, wgmma_descriptor(dynamic_shared()) + offset / 16, accumulate);
    wgmma_commit();
    if (waits) wgmma_wait<0>();
    for (int i = 0; i < SUMS; ++i) d[SUMS * thread() + i] = sums[i];
}

extern "C" __global__ void product128(const unsigned* a, const uint4* b, int* d, int offset, int accumulate, int waits)
{
    product<64>(a, b, d, offset, accumulate, waits);
}
extern "C" __global__ void product256(const unsigned* a, const uint4* b, int* d, int offset, int accumulate, int waits)
{
    product<128>(a, b, d, offset, accumulate, waits);
}

extern "C" __global__ void other_swizzle(int* d) {
    if (thread() == 0) mbarrier_init_fence();
    barrier();
    int sums[64];
    unsigned a[4] = {};
    wgmma_s8(sums, a, wgmma_descriptor(dynamic_shared()) & ~(3ull << 62), false);
    wgmma_commit();
    wgmma_wait<0>();
    d[thread()] = sums[0];
}

// Copies `bytes` in two parts and announces `announced`; thread 32 reads, after waiting if `waits`.
extern "C" __global__ void copy(const unsigned char* from, unsigned char* to, int bytes, int announced, int waits) {
    unsigned char* shared = dynamic_shared();
    auto* full = reinterpret_cast<MBarrier*>(shared + 4096);
    if (thread() == 0) {
        mbarrier_init(full, 1);
        mbarrier_init_fence();
    }
    barrier();
    if (thread() == 0) {
        mbarrier_arrive_expect(full, announced);
        copy_bulk(shared, from, bytes / 2, full);
        copy_bulk(shared + bytes / 2, from + bytes / 2, bytes / 2, full);
    }
    barrier();
    if (thread() == 32) {
        if (waits) mbarrier_wait(full, 0);
        for (int i = 0; i < bytes; ++i) to[i] = shared[i];
    }
}

// Each phase needs all of 4 warps; counts the phases that thread 0 saw.
extern "C" __global__ void phases(int* count, int rounds, int arriving) {
    auto* all = reinterpret_cast<MBarrier*>(dynamic_shared());
    if (thread() == 0) {
        mbarrier_init(all, 4);
        mbarrier_init_fence();
        mbarrier_wait(all, 1);
    }
    barrier();
    for (int round = 0; round < rounds; ++round) {
        // No lane may be a whole phase behind: it would take the next but one for the one that it waits for.
        warp_barrier();
        if (lane() == 0 && warp() < arriving) mbarrier_arrive(all);
        mbarrier_wait(all, round & 1);
        if (thread() == 0) ++*count;
    }
}
"""


@pytest.fixture(scope="module")
def library(emulated: Compile) -> Emulated:
    return emulated(PROGRAM)


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def fragments(a: Tensor) -> Tensor:
    """128 lanes × 4 registers × 4 bytes of 64 × 32: lane 4g + t of warp w, register p + 2h, byte j."""
    return a.view(4, 2, 8, 2, 4, 4).permute(0, 2, 4, 3, 1, 5).reshape(128, 4, 4).contiguous()


def atoms(b: Tensor) -> Tensor:
    """Columns × 128 bytes in shared memory: address bits 4 to 6 are exclusive-or'd with bits 7 to 9."""
    address = torch.arange(b.numel())
    swizzled = torch.empty(b.numel(), dtype=torch.int8)
    swizzled[address ^ ((address >> 7 & 7) << 4)] = b.flatten()
    return swizzled


def matrix(d: Tensor, columns: int) -> Tensor:
    """64 × columns, of 128 lanes × sums: lane 4g + t of warp w, element 4j + 2p + e."""
    return d.view(4, 8, 4, columns // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, columns)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([128, 256]), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
def test_wgmma_is_the_product_of_any_32_inputs_of_an_atom(
    library: Emulated, columns: int, chunk: int, accumulate: bool, seed: int
) -> None:
    a, b = integers((64, 32), seed), integers((columns, 128), seed + 1)
    d = integers((128, columns // 2), seed + 2).to(torch.int32)
    start = matrix(d.clone(), columns) if accumulate else 0
    library.launch(f"product{columns}", (1, 1), 128, fragments(a), atoms(b), d, 32 * chunk, accumulate, 1)
    expected = a.int() @ b[:, 32 * chunk : 32 * chunk + 32].int().T
    assert torch.equal(matrix(d, columns), expected + start)


def test_sums_are_not_there_before_the_wait(library: Emulated) -> None:
    d = torch.full((128, 64), 5, dtype=torch.int32)
    operands = fragments(integers((64, 32), 0)), atoms(integers((128, 128), 1)), d
    library.launch("product128", (1, 1), 128, *operands, 0, 0, 0)
    assert (d == 5).all()


def test_another_swizzle_is_refused(library: Emulated) -> None:
    with pytest.raises(KernelError, match="only the 128-byte swizzle"):
        library.launch("other_swizzle", (1, 1), 128, torch.zeros(128, dtype=torch.int32))


def test_a_bulk_copy_is_whole_after_the_wait_only(library: Emulated) -> None:
    source = integers((64,), 0)
    waited, early = torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.int8)
    library.launch("copy", (1, 1), 64, source, waited, 64, 64, 1)
    assert torch.equal(waited, source)
    library.launch("copy", (1, 1), 64, source, early, 64, 64, 0)
    assert not torch.equal(early, source)


@pytest.mark.parametrize(("size", "announced", "message"), [(64, 80, "waits for another"), (40, 40, "multiple of 16")])
def test_a_bulk_copy_that_a_gpu_would_hang_or_fault_at_fails(
    library: Emulated, size: int, announced: int, message: str
) -> None:
    source = integers((64,), 0)
    with pytest.raises(KernelError, match=message):
        library.launch("copy", (1, 1), 64, source, torch.zeros(64, dtype=torch.int8), size, announced, 1)


def test_a_barrier_flips_its_phase_with_the_last_arrival(library: Emulated) -> None:
    count = torch.zeros(1, dtype=torch.int32)
    library.launch("phases", (1, 1), 128, count, 5, 4)
    assert count.item() == 5
    with pytest.raises(KernelError, match="waits for another"):
        library.launch("phases", (1, 1), 128, count, 1, 3)
