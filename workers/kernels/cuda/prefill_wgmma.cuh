// Prefill on Hopper (sm_90a): a producer warp copies packed weights and codes to shared memory in bulk; two warpgroups
// unpack 64 rows each into registers and multiply them by all tokens of the tile.
//
// Activations are TILES: [inputs / 128][tokens_padded / 8] atoms of 8 tokens × 128 bytes in wgmma's 128-byte swizzle,
// so the atoms of a step are contiguous, as the tiles of a strip of weights are. CTAs stay and walk the tiles of y; the
// producer runs ahead into the next tile while the consumers store.
#pragma once

#include "hopper.cuh"
#include "prefill.cuh"
#include "unpack.cuh"

template <int BITS, int GROUP, int TOKENS, int STAGES, class OUT>
struct PrefillWgmma {
    static constexpr int ROWS = 128, STRIPS = ROWS / TILE_ROWS, ATOM_TOKENS = 8, ATOM_BYTES = 1024;
    static constexpr int WARPGROUP = 4, CONSUMERS = 2, THREADS = 32 * WARPGROUP * (1 + CONSUMERS);
    static constexpr int SCALE_BYTES = TILE_ROWS * 2;  // of a group, of a strip
    // A stage: codes, weights, and the scales of every group of the step.
    static constexpr int GROUPS = GROUP ? TILE_INPUTS / (GROUP ? GROUP : 1) : 0;
    static constexpr int WEIGHTS = TOKENS * TILE_INPUTS, SCALES = WEIGHTS + STRIPS * tile_bytes(BITS);
    static constexpr int STAGE_END = SCALES + GROUPS * STRIPS * SCALE_BYTES;
    static constexpr int STAGE_BYTES = (STAGE_END + ATOM_BYTES - 1) / ATOM_BYTES * ATOM_BYTES;
    static constexpr int TURN = STAGES * STAGE_BYTES, BARRIERS = TURN + STRIPS * Turn<OUT>::BYTES;
    static constexpr int SHARED_BYTES = BARRIERS + 2 * STAGES * 8;
    static_assert(!GROUP || TOKENS == 128, "sums of groups and of tokens share the registers");

    using Order = TileOrder<ROWS, TOKENS>;
    using Accumulated = Sums<8 - BITS, GROUP, TOKENS>;

    // A place in the ring of stages; `parity` flips each time around.
    struct Ring {
        int stage = 0, parity = 0;

        DEVICE void advance() {
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    };

    const Prefill<OUT>& problem;
    unsigned char* shared;
    MBarrier* full;
    MBarrier* empty;

    DEVICE explicit PrefillWgmma(const Prefill<OUT>& problem)
        : problem(problem),
          shared(dynamic_shared()),
          full(reinterpret_cast<MBarrier*>(shared + BARRIERS)),
          empty(full + STAGES) {}

    // Where a token's atom lies in a step; `token` is a multiple of the atom's.
    static DEVICE long long from(int token) { return static_cast<long long>(token) / ATOM_TOKENS * ATOM_BYTES; }

    DEVICE void run() {
        if (thread() == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(full + stage, 1);
                mbarrier_init(empty + stage, CONSUMERS * WARPGROUP);
            }
            mbarrier_init_fence();
        }
        barrier();
        if (warp() < WARPGROUP) {
            give_registers<40>();
            if (thread() == 0) produce();
        } else {
            take_registers<232>();
            consume();
        }
    }

    DEVICE void produce() {
        const Order order(problem.rows, problem.tokens);
        const int steps = problem.steps(), rows_padded = problem.rows_padded();
        Ring ring;
        for (int tile = block_x(); tile < order.count(); tile += blocks_x()) {
            int row, token;
            order.place(tile, row, token);
            const int strips = minimum(STRIPS, (rows_padded - row) / TILE_ROWS);
            const int atoms = minimum(TOKENS, problem.tokens_padded - token) / ATOM_TOKENS;
            const long long step_bytes = static_cast<long long>(problem.tokens_padded) * TILE_INPUTS;
            const long long strip_bytes = static_cast<long long>(steps) * tile_bytes(BITS);
            const unsigned char* codes = problem.codes + from(token);
            const unsigned char* weights = problem.weights + row / TILE_ROWS * strip_bytes;
            for (int step = 0; step < steps; ++step, ring.advance()) {
                MBarrier* ready = full + ring.stage;
                unsigned char* stage = shared + ring.stage * STAGE_BYTES;
                mbarrier_wait(empty + ring.stage, ring.parity ^ 1);
                mbarrier_arrive_expect(ready, atoms * ATOM_BYTES + strips * (tile_bytes(BITS) + GROUPS * SCALE_BYTES));
                copy_bulk(stage, codes + step * step_bytes, atoms * ATOM_BYTES, ready);
#pragma unroll 1
                for (int strip = 0; strip < strips; ++strip) {
                    copy_bulk(stage + WEIGHTS + strip * tile_bytes(BITS),
                              weights + strip * strip_bytes + step * tile_bytes(BITS), tile_bytes(BITS), ready);
                }
#pragma unroll 1
                for (int group = 0; group < GROUPS; ++group) {
                    copy_bulk(stage + SCALES + group * STRIPS * SCALE_BYTES,
                              problem.scales + (static_cast<long long>(step) * GROUPS + group) * rows_padded + row,
                              strips * SCALE_BYTES, ready);
                }
            }
        }
    }

    DEVICE void consume() {
        const Order order(problem.rows, problem.tokens);
        const int strip = warp() - WARPGROUP;
        OUT* turn = reinterpret_cast<OUT*>(shared + TURN + strip * Turn<OUT>::BYTES);
        Ring ring;
        for (int tile = block_x(); tile < order.count(); tile += blocks_x()) {
            int row, token;
            order.place(tile, row, token);
            row += strip * TILE_ROWS;
            Accumulated sums;
            sums.clear();
            if constexpr (GROUP) {
                accumulate_groups(sums, ring, strip);
            } else {
                accumulate(sums, ring, strip);
            }
            // Rows are padded to what a warpgroup has, so either all of its warps store or none.
            if (row < problem.rows_padded()) store(sums, problem, row, token, turn);
        }
    }

    // Wait for a stage and load the warp's strip of it.
    DEVICE void load(Planes<BITS>& planes, const Ring& ring, int strip) const {
        mbarrier_wait(full + ring.stage, ring.parity);
        planes.template load<FromShared>(shared + ring.stage * STAGE_BYTES + WEIGHTS + strip * tile_bytes(BITS));
    }

    static DEVICE void unpack(unsigned (&a)[CHUNKS][4], const Planes<BITS>& planes) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            planes.unpack(c, a[c]);
            settle(a[c]);
        }
    }

    DEVICE void release(int stage) const {
        warp_barrier();
        if (lane() == 0) mbarrier_arrive(empty + stage);
    }

    // All steps into one sum. Weights are unpacked into one set of registers while the products of the other run.
    DEVICE void accumulate(Accumulated& sums, Ring& ring, int strip) const {
        const int steps = problem.steps();
        unsigned even[CHUNKS][4], odd[CHUNKS][4];
        int previous = -1;
        const auto multiply = [&](unsigned (&a)[CHUNKS][4]) {
            Planes<BITS> planes;
            load(planes, ring, strip);
            unpack(a, planes);
            const unsigned long long codes = wgmma_descriptor(shared + ring.stage * STAGE_BYTES);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) wgmma_s8(sums.products, a[c], codes + 2 * c, true);
            wgmma_commit();
            wgmma_wait<1>();
            if (previous >= 0) release(previous);
            previous = ring.stage;
            ring.advance();
        };
        for (int step = 0; step + 1 < steps; step += 2) {
            multiply(even);
            multiply(odd);
        }
        if (steps % 2) multiply(even);
        wgmma_wait<0>();
        settle(sums.products);
        release(previous);
    }

    // One sum a group, folded into float32 while the other warpgroup multiplies. The next step's weights are loaded,
    // but not unpacked, while the last group's products run.
    DEVICE void accumulate_groups(Accumulated& sums, Ring& ring, int strip) const {
        constexpr int GROUP_CHUNKS = CHUNKS / GROUPS;
        const int steps = problem.steps();
        Planes<BITS> planes;
        load(planes, ring, strip);
        for (int step = 0; step < steps; ++step) {
            const int current = ring.stage;
            const unsigned char* stage = shared + current * STAGE_BYTES;
            const f16* scales = reinterpret_cast<const f16*>(stage + SCALES) + strip * TILE_ROWS;
            unsigned a[CHUNKS][4];
            unpack(a, planes);
            ring.advance();
            // Unrolled, the sums of four groups wait for one another in too many registers.
#pragma unroll(GROUPS > 2 ? 1 : GROUPS)
            for (int group = 0; group < GROUPS; ++group) {
                const unsigned long long codes = wgmma_descriptor(stage) + 2 * GROUP_CHUNKS * group;
                float scale[2];
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < GROUP_CHUNKS; ++c) wgmma_s8(sums.products, a[c], codes + 2 * c, c > 0);
                wgmma_commit();
                Accumulated::load(scale, scales + group * ROWS);
                if (group == GROUPS - 1 && step + 1 < steps) load(planes, ring, strip);
                wgmma_wait<0>();
                settle(sums.products);
#pragma unroll
                for (int j = 0; j < TOKENS / 8; ++j) sums.fold(j, sums.products + 4 * j, scale);
                // The next group's weights to the front: registers are indexed by constants.
#pragma unroll
                for (int i = 0; i < 4 * (CHUNKS - GROUP_CHUNKS); ++i) a[i / 4][i % 4] = a[i / 4 + GROUP_CHUNKS][i % 4];
            }
            release(current);
        }
    }
};

template <int BITS, int GROUP, int TOKENS, int STAGES, class OUT>
DEVICE void prefill_wgmma(const unsigned char* weights, const f16* scales, const unsigned char* codes,
                        const float* token_scales, const float* bias, OUT* y, int rows, int inputs, int tokens,
                        int tokens_padded) {
    const Prefill<OUT> problem{weights, scales, codes, token_scales, bias, y, rows, inputs, tokens, tokens_padded};
    PrefillWgmma<BITS, GROUP, TOKENS, STAGES, OUT>(problem).run();
}
