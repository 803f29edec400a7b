// Prefill on sm_80 to sm_90: a CTA computes 128 rows × 128 tokens. It copies weights and codes to shared memory some
// steps of 128 inputs ahead; each of its 8 warps multiplies 32 rows by 64 tokens.
#pragma once

#include "prefill.cuh"
#include "unpack.cuh"

// A step of a warp in int8 MMAs: weights of any width; activations as TILES, [inputs / 128][tokens_padded / 8] atoms of
// 8 tokens × 128 bytes, of which a step of a CTA's tokens is contiguous. A token's 16-byte pieces are swizzled there.
template <int BITS>
struct Int8 {
    static constexpr int SHIFT = 8 - BITS, MMAS = 4, PIECES = 8;

    unsigned weights[MMAS][4];
    unsigned codes[MMAS][2];

    static DEVICE long long from(int token, int piece, int step, int, int tokens_padded) {
        return (static_cast<long long>(step) * tokens_padded + token) * TILE_INPUTS + 16 * piece;
    }
    static DEVICE int to(int token, int piece) { return 16 * (PIECES * token + piece); }

    DEVICE void load_weights(const unsigned char* tile) {
        Planes<BITS> planes;
        planes.template load<FromShared>(tile);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) planes.unpack(c, weights[c]);
    }

    // Of 8 tokens, for COUNT MMAs from `first` on.
    template <int COUNT>
    DEVICE void load_codes(const unsigned char* stage, int token, int first) {
        const int row = token + lane() % 8, matrix = lane() / 8;
#pragma unroll
        for (int m = 0; m < COUNT; m += 2) {
            unsigned pieces[4];
            ldmatrix_x4(pieces, stage + to(row, (2 * (first + m) + matrix) ^ (row % 8)));
#pragma unroll
            for (int i = 0; i < 4; ++i) codes[m + i / 2][i % 2] = pieces[i];
        }
    }

    static DEVICE void multiply(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_s8(d, a, b[0], b[1], d);
    }
};

// In int4 MMAs, native up to sm_89: packed nibbles are their operands as they lie. Activations as NIBBLES,
// tokens_padded rows of inputs / 2 bytes; it is here that their pieces are swizzled.
struct Int4 {
    static constexpr int SHIFT = 0, MMAS = 2, PIECES = 4;

    unsigned weights[MMAS][4];
    unsigned codes[MMAS][2];

    static DEVICE long long from(int token, int piece, int step, int steps, int) {
        return (static_cast<long long>(token) * steps + step) * (TILE_INPUTS / 2) + 16 * piece;
    }
    static DEVICE int to(int token, int piece) { return 16 * (PIECES * token + (piece ^ (token / 2 % 4))); }

    DEVICE void load_weights(const unsigned char* tile) {
        Nibbles nibbles;
        nibbles.load<FromShared>(tile);
#pragma unroll
        for (int i = 0; i < 8; ++i) weights[i / 4][i % 4] = nibbles.words[i];
    }

    template <int COUNT>
    DEVICE void load_codes(const unsigned char* stage, int token, int) {
        static_assert(COUNT == MMAS);
        unsigned pieces[4];
        ldmatrix_x4(pieces, stage + to(token + lane() % 8, lane() / 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) codes[i / 2][i % 2] = pieces[i];
    }

    static DEVICE void multiply(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        mma_s4(d, a, b[0], b[1], d);
    }
};

template <class MMA, int BITS, int GROUP, int STAGES, class OUT>
struct PrefillMma {
    static constexpr int ROWS = 128, TILE_TOKENS = 128, STRIPS = ROWS / TILE_ROWS, THREADS = 256;
    static constexpr int WARP_STRIPS = 2, WARP_TOKENS = 64;
    static constexpr int CODE_BYTES = TILE_TOKENS * MMA::PIECES * 16;
    static constexpr int GROUPS = GROUP ? TILE_INPUTS / (GROUP ? GROUP : 1) : 1, GROUP_MMAS = MMA::MMAS / GROUPS;
    // A stage: codes, weights, and the scales of every group of the step.
    static constexpr int SCALES = CODE_BYTES + STRIPS * tile_bytes(BITS), SCALE_BYTES = GROUP ? GROUPS * ROWS * 2 : 0;
    static constexpr int STAGE_BYTES = SCALES + SCALE_BYTES, SHARED_BYTES = STAGES * STAGE_BYTES;
    // All groups at once would take more registers than there are.
    static constexpr int PASSES = GROUPS > 1 && MMA::MMAS > 2 ? 2 : 1;
    static constexpr int PASS_GROUPS = GROUPS / PASSES, PASS_MMAS = MMA::MMAS / PASSES;
    static_assert(GROUP_MMAS > 0, "a group has at least one MMA's inputs");
    static_assert(THREADS / 32 * Turn<OUT>::BYTES <= SHARED_BYTES, "results turn where the stages were");

    using Accumulated = Sums<MMA::SHIFT, GROUP, WARP_TOKENS>;

    const Prefill<OUT>& problem;
    unsigned char* shared;
    int row, token;

    DEVICE explicit PrefillMma(const Prefill<OUT>& problem) : problem(problem), shared(dynamic_shared()) {
        TileOrder<ROWS, TILE_TOKENS>(problem.rows, problem.tokens).place(block_x(), row, token);
    }

    DEVICE void run() {
        // A warp's place in the CTA's tile.
        const int strip = warp() / 2 * WARP_STRIPS, first = warp() % 2 * WARP_TOKENS, steps = problem.steps();
        Accumulated sums[WARP_STRIPS];
        for (Accumulated& one : sums) one.clear();
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) copy(ahead);
        for (int step = 0; step < steps; ++step) {
            copy_async_wait<STAGES - 2>();
            barrier();
            // Into the stage of the step before, which all warps have left.
            copy(step + STAGES - 1);
            accumulate(sums, step, strip, first);
        }
        barrier();
        OUT* turn = reinterpret_cast<OUT*>(shared + warp() * Turn<OUT>::BYTES);
#pragma unroll
        for (int s = 0; s < WARP_STRIPS; ++s) {
            const int top = row + (strip + s) * TILE_ROWS;
            if (top < problem.rows_padded()) store(sums[s], problem, top, token + first, turn);
        }
    }

    // Start to copy a step into its stage, but nothing beyond the padded rows and tokens.
    DEVICE void copy(int step) const {
        constexpr int STRIP_PIECES = tile_bytes(BITS) / 16;
        const int steps = problem.steps();
        if (step < steps) {
            unsigned char* stage = shared + step % STAGES * STAGE_BYTES;
#pragma unroll
            for (int i = thread(); i < CODE_BYTES / 16; i += THREADS) {
                const int column = i / MMA::PIECES, piece = i % MMA::PIECES;
                if (token + column < problem.tokens_padded) {
                    copy_async16(stage + MMA::to(column, piece),
                                 problem.codes + MMA::from(token + column, piece, step, steps, problem.tokens_padded));
                }
            }
#pragma unroll
            for (int i = thread(); i < STRIPS * STRIP_PIECES; i += THREADS) {
                const int strip = row / TILE_ROWS + i / STRIP_PIECES, piece = i % STRIP_PIECES;
                if (strip * TILE_ROWS < problem.rows_padded()) {
                    copy_async16(stage + CODE_BYTES + 16 * i, problem.weights + 16 * piece +
                                     (static_cast<long long>(strip) * steps + step) * tile_bytes(BITS));
                }
            }
            if (thread() < SCALE_BYTES / 16) {
                const int group = step * GROUPS + thread() / (ROWS / 8), top = row + thread() % (ROWS / 8) * 8;
                if (top < problem.rows_padded()) {
                    copy_async16(stage + SCALES + 16 * thread(),
                                 problem.scales + static_cast<long long>(group) * problem.rows_padded() + top);
                }
            }
        }
        copy_async_commit();
    }

    DEVICE void accumulate(Accumulated (&sums)[WARP_STRIPS], int step, int strip, int first) const {
        const unsigned char* stage = shared + step % STAGES * STAGE_BYTES;
        MMA operands[WARP_STRIPS];
#pragma unroll
        for (int s = 0; s < WARP_STRIPS; ++s)
            operands[s].load_weights(stage + CODE_BYTES + (strip + s) * tile_bytes(BITS));
#pragma unroll 1
        for (int pass = 0; pass < PASSES; ++pass) {
            float scale[WARP_STRIPS][PASS_GROUPS][2];
            if constexpr (GROUP) {
                const f16* scales = reinterpret_cast<const f16*>(stage + SCALES) + pass * PASS_GROUPS * ROWS;
#pragma unroll
                for (int i = 0; i < WARP_STRIPS * PASS_GROUPS; ++i) {
                    const int s = i / PASS_GROUPS, group = i % PASS_GROUPS;
                    Accumulated::load(scale[s][group], scales + group * ROWS + (strip + s) * TILE_ROWS);
                }
            }
#pragma unroll
            for (int j = 0; j < WARP_TOKENS / 8; ++j) {
                operands[0].template load_codes<PASS_MMAS>(stage, first + 8 * j, pass * PASS_MMAS);
#pragma unroll
                for (int s = 0; s < WARP_STRIPS; ++s) {
                    int* kept = sums[s].products + 4 * j;
#pragma unroll
                    for (int group = 0; group < PASS_GROUPS; ++group) {
                        int products[4];
#pragma unroll
                        for (int i = 0; i < 4; ++i) products[i] = GROUP ? 0 : kept[i];
#pragma unroll
                        for (int m = group * GROUP_MMAS; m < (group + 1) * GROUP_MMAS; ++m)
                            MMA::multiply(products, operands[s].weights[m], operands[0].codes[m]);
                        if constexpr (GROUP) sums[s].fold(j, products, scale[s][group]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) kept[i] = products[i];
                    }
                }
            }
            // The next pass's weights to the front: registers are indexed by constants.
#pragma unroll
            for (int i = 0; i < 4 * (MMA::MMAS - PASS_MMAS); ++i)
#pragma unroll
                for (MMA& one : operands) one.weights[i / 4][i % 4] = one.weights[i / 4 + PASS_MMAS][i % 4];
        }
    }
};

template <class MMA, int BITS, int GROUP, int STAGES, class OUT>
DEVICE void prefill_mma(const unsigned char* weights, const f16* scales, const unsigned char* codes,
                        const float* token_scales, const float* bias, OUT* y, int rows, int inputs, int tokens,
                        int tokens_padded) {
    const Prefill<OUT> problem{weights, scales, codes, token_scales, bias, y, rows, inputs, tokens, tokens_padded};
    PrefillMma<MMA, BITS, GROUP, STAGES, OUT>(problem).run();
}
