"""Plans cover their problem, fit the GPU and agree with one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from search.scheme import Scheme
from workers.kernels import reference
from workers.kernels.catalogue import HOPPER_SHARED, LEAST_SHARED, Decode, Prefill, program
from workers.kernels.emulator.build import Emulated
from workers.kernels.pack import ACTIVATION_BITS, GROUP_SIZES, WEIGHT_BITS, pack
from workers.kernels.plans import (
    MOST_PER_DECODE,
    STATIC_SHARED,
    Machine,
    Plan,
    Problem,
    bucket,
    candidates,
    default,
    shared_bytes,
    split,
)

Compile = Callable[[str], Emulated]

H100 = Machine("H100", 13000, "sm_90a", 132)

machines = st.builds(
    Machine,
    name=st.just("a GPU"),
    driver=st.just(13000),
    architecture=st.sampled_from(["sm_80", "sm_86", "sm_89", "sm_90a"]),
    multiprocessors=st.integers(1, 200),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    scheme = Scheme(*(draw(st.sampled_from(values)) for values in (WEIGHT_BITS, ACTIVATION_BITS, GROUP_SIZES)))
    columns = draw(st.integers(1, 256)) * (scheme.group_size or 32)
    dtypes = [torch.float16, torch.bfloat16] + [torch.float32] * scheme.quantizes_activations
    rows, tokens, dtype = draw(st.integers(1, 40_000)), draw(st.integers(1, 8192)), draw(st.sampled_from(dtypes))
    return Problem(draw(machines), scheme, rows, columns, bucket(tokens), dtype)


class TestBuckets:
    @given(st.integers(1, 2**20))
    def test_are_the_next_power_of_two(self, tokens: int) -> None:
        assert tokens <= bucket(tokens) < 2 * tokens
        assert bucket(tokens).bit_count() == 1


class TestCandidates:
    @given(problems())
    def test_are_at_most_12_different_ones_from_the_default_on(self, problem: Problem) -> None:
        plans = candidates(problem)
        assert 1 <= len(set(plans)) == len(plans) <= 12
        assert plans[0] == default(problem)

    @given(problems())
    def test_reach_every_row_token_and_input_once(self, problem: Problem) -> None:
        for plan in candidates(problem):
            kernel = plan.kernel
            if isinstance(kernel, Decode):
                strips, slices = kernel.blocks(problem.rows, plan.slices)
                assert strips * 16 * kernel.strips == -(-problem.rows // 64) * 64
                assert slices == plan.slices
                assert 8 * kernel.token_tiles >= min(problem.tokens, MOST_PER_DECODE)
            elif isinstance(kernel, Prefill):
                blocks, _ = kernel.blocks(problem.rows, problem.tokens, problem.machine.multiprocessors)
                tiles = -(-problem.rows // kernel.tile_rows) * -(-problem.tokens // kernel.tile_tokens)
                assert blocks == min(tiles, problem.machine.multiprocessors if kernel.persistent else tiles)
            else:
                assert not problem.scheme.quantizes_activations

    @given(problems())
    def test_fit_into_a_multiprocessor(self, problem: Problem) -> None:
        most = HOPPER_SHARED if problem.machine.architecture == "sm_90a" else LEAST_SHARED
        for plan in candidates(problem):
            assert plan.kernel.shared_bytes <= most
            assert plan.kernel.threads <= 1024
            if isinstance(plan.kernel, Decode):
                assert shared_bytes(plan.kernel) <= STATIC_SHARED

    @given(problems())
    def test_cut_float_sums_alike_whatever_the_tokens(self, problem: Problem) -> None:
        if problem.decodes and not problem.exact:
            cuts = {
                (plan.slices, plan.kernel.threads)
                for tokens in (1, 8, 16, 32)
                for plan in candidates(replace(problem, tokens=tokens))
            }
            assert len(cuts) == 1

    @given(problems())
    def test_leave_no_slice_without_inputs(self, problem: Problem) -> None:
        tiles = -(-problem.columns // 128)
        for plan in candidates(problem):
            if isinstance(plan.kernel, Decode) and plan.slices > 1:
                assert plan.slices * plan.kernel.warps <= tiles

    def test_of_a_large_weight_split_among_warps_before_slices(self) -> None:
        assert split(8192, 8192, 132) == (1, 4)
        assert split(4096, 4096, 132) == (1, 8)
        assert split(1024, 8192, 132) == (3, 8)

    def test_of_many_tokens_take_the_wide_tile_first_where_it_leaves_no_multiprocessor_idle(self) -> None:
        wide, narrow = (Problem(H100, Scheme(6, 8), 8192, 8192, tokens, torch.float16) for tokens in (4096, 64))
        assert [plan.kernel.tile_tokens for plan in candidates(wide)] == [256, 128]
        assert [plan.kernel.tile_tokens for plan in candidates(narrow)] == [128, 256]


EMULATED = tuple(
    Problem(Machine("a GPU", 13000, "sm_90a", multiprocessors), Scheme(*scheme), rows, columns, 16, dtype)
    for multiprocessors, scheme, rows, columns, dtype in (
        (2, (6, 8, None), 70, 2048, torch.float16),
        (30, (4, 8, None), 64, 4096 + 32, torch.float32),
        (30, (5, 8, 64), 64, 2112, torch.bfloat16),
    )
)


@pytest.mark.parametrize("problem", EMULATED, ids=lambda problem: str(problem.scheme))
def test_all_candidates_give_the_references_bits(emulated: Compile, problem: Problem) -> None:
    plans = candidates(problem)
    library = emulated(program({plan.kernel.name: plan.kernel for plan in plans}.values()))
    generator = torch.Generator().manual_seed(0)
    most, groups = (
        2 ** (problem.scheme.weight_bits - 1),
        problem.columns // (problem.scheme.group_size or problem.columns),
    )
    weights = torch.randint(-most, most, (problem.rows, problem.columns), dtype=torch.int8, generator=generator)
    packed = pack(weights, torch.rand(problem.rows, groups, generator=generator).half(), problem.scheme)
    codes = torch.randint(-127, 128, (13, problem.columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(13, generator=generator)
    for plan in plans:
        found = decoded(library, plan, codes, scales, packed.tiles, packed.scales, problem)
        warps = plan.kernel.threads // 32
        expected = reference.matmul_codes(codes, scales, packed, None, plan.slices, warps, problem.dtype)
        assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def decoded(
    library: Emulated, plan: Plan, codes: Tensor, scales: Tensor, tiles: Tensor, of_rows: Tensor, problem: Problem
) -> Tensor:
    assert isinstance(plan.kernel, Decode)
    padded = torch.nn.functional.pad(codes, (0, -problem.columns % 128))
    output = torch.full((len(codes), problem.rows), -777.0, dtype=problem.dtype)
    blocks = plan.kernel.blocks(problem.rows, plan.slices)
    partial = torch.full((plan.slices * 64 * -(-problem.rows // 64) * 8 * plan.kernel.token_tiles,), -1).int()
    tickets = torch.zeros(blocks[0], dtype=torch.int32)
    operands = (tiles, of_rows, padded, scales, None, output, partial, tickets)
    sizes = len(codes), problem.rows, problem.columns
    library.launch(plan.kernel.name, blocks, plan.kernel.threads, *operands, *sizes)
    return output
