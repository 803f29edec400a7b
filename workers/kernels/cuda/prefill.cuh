// What the prefill kernels share: the problem, the order of its tiles and the way of sums to memory.
#pragma once

#include "layout.cuh"
#include "primitives.cuh"

DEVICE int minimum(int a, int b) { return a < b ? a : b; }

// y = codes · weightᵀ, scaled: tokens × rows, row-major.
template <class OUT>
struct Prefill {
    const unsigned char* weights;  // packed tiles
    const f16* scales;             // groups × padded rows
    const unsigned char* codes;    // the kernel's layout of activations
    const float* token_scales;
    const float* bias;             // of every row, or null
    OUT* y;
    int rows, inputs, tokens;
    int tokens_padded;  // of `codes`, a multiple of 8

    DEVICE int rows_padded() const { return (rows + 63) / 64 * 64; }
    DEVICE int steps() const { return padded_inputs(inputs) / TILE_INPUTS; }
};

// Tiles of ROWS × TOKENS of y in an order that keeps what runs at one time nearly square, so that L2 serves most loads:
// bands of 2048 tokens, in a band all of its tiles for one run of rows after the other.
template <int ROWS, int TOKENS>
struct TileOrder {
    static constexpr int BAND = 2048 / TOKENS;
    int down, across;

    DEVICE TileOrder(int rows, int tokens) : down((rows + ROWS - 1) / ROWS), across((tokens + TOKENS - 1) / TOKENS) {}

    DEVICE int count() const { return down * across; }

    DEVICE void place(int tile, int& row, int& token) const {
        const int band = tile / (BAND * down), width = minimum(BAND, across - band * BAND);
        const int within = tile - band * BAND * down;
        row = within / width * ROWS;
        token = (band * BAND + within % width) * TOKENS;
    }
};

// Sums of 16 rows × TOKENS as a warp holds them: those of mma.m16n8k32 for each 8 tokens, element 4j + 2p + e being
// row 8p + g and token 8j + 2t + e. Products are of weights times 2^SHIFT, which is taken back exactly. Grouped: `sums`
// of the groups so far, each already by its scale.
template <int SHIFT, int GROUP, int TOKENS>
struct Sums {
    int products[TOKENS / 2];
    float sums[GROUP ? TOKENS / 2 : 1];

    DEVICE void clear() {
#pragma unroll
        for (int& product : products) product = 0;
#pragma unroll
        for (float& sum : sums) sum = 0;
    }

    // The scales of a lane's two rows, for `fold`.
    static DEVICE void load(float (&scale)[2], const f16* scales) {
#pragma unroll
        for (int p = 0; p < 2; ++p) scale[p] = multiply(to_float(scales[lane() / 4 + 8 * p]), 1.0f / (1 << SHIFT));
    }

    // Add a group's products with 8 tokens.
    DEVICE void fold(int j, const int* group, const float (&scale)[2]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * j + i] = fused(rounded(group[i]), scale[i / 2], sums[4 * j + i]);
    }

    DEVICE float finished(int i, float token_scale, float channel_scale) const {
        if constexpr (GROUP) return multiply(sums[i], token_scale);
        return multiply(multiply(rounded(products[i] >> SHIFT), token_scale), channel_scale);
    }
};

// Of a warp, through which its results turn from columns into rows: TOKENS × 16 rows at a time, padded against bank
// conflicts.
template <class OUT>
struct Turn {
    static constexpr int TOKENS = sizeof(OUT) == 2 ? 64 : 32;
    static constexpr int PITCH = TILE_ROWS + 16 / sizeof(OUT);
    static constexpr int BYTES = TOKENS * PITCH * sizeof(OUT);
};

// Copy `tokens` × `count` of at most 16 turned results to rows of length `stride`.
template <class OUT>
DEVICE void write(const OUT* turn, OUT* to, int stride, int tokens, int count) {
    constexpr int PITCH = Turn<OUT>::PITCH, PIECE = 16 / sizeof(OUT), PIECES = TILE_ROWS / PIECE;
    if (stride % PIECE == 0) {
        // Every piece is aligned, and inside or outside.
#pragma unroll 4
        for (int i = lane(); i < tokens * PIECES; i += 32) {
            const int column = i / PIECES, offset = i % PIECES * PIECE;
            if (offset < count)
                *reinterpret_cast<uint4*>(to + static_cast<long long>(column) * stride + offset) =
                    *reinterpret_cast<const uint4*>(turn + column * PITCH + offset);
        }
    } else {
#pragma unroll 1
        for (int i = lane(); i < tokens * TILE_ROWS; i += 32) {
            const int column = i / TILE_ROWS, offset = i % TILE_ROWS;
            if (offset < count) to[static_cast<long long>(column) * stride + offset] = turn[column * PITCH + offset];
        }
    }
}

// Write a warp's 16 rows × TOKENS from `row` and `token` on; `turn` is the warp's own Turn<OUT>::BYTES.
template <int SHIFT, int GROUP, int TOKENS, class OUT>
DEVICE void store(const Sums<SHIFT, GROUP, TOKENS>& sums, const Prefill<OUT>& problem, int row, int token, OUT* turn) {
    constexpr int PITCH = Turn<OUT>::PITCH, TURNED = Turn<OUT>::TOKENS;
    const int g = lane() / 4, t = lane() % 4;
    float scale[2], bias[2];
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const int channel = row + 8 * p + g;
        scale[p] = GROUP ? 0 : to_float(problem.scales[channel]);
        // Adding −0 changes nothing, not even a zero's sign.
        bias[p] = problem.bias && channel < problem.rows ? problem.bias[channel] : -0.0f;
    }
#pragma unroll
    for (int first = 0; first < TOKENS; first += TURNED) {
        const int tokens = minimum(problem.tokens - token - first, TURNED);
        if (tokens <= 0) break;
#pragma unroll
        for (int i = 0; i < TURNED / 2; ++i) {
            const int j = i / 4, p = i / 2 % 2, e = i % 2, column = 8 * j + 2 * t + e;
            const float token_scale = column < tokens ? problem.token_scales[token + first + column] : 0;
            const float value = add(sums.finished(first / 2 + i, token_scale, scale[p]), bias[p]);
            assign(turn[column * PITCH + 8 * p + g], value);
        }
        warp_barrier();
        write(turn, problem.y + static_cast<long long>(token + first) * problem.rows + row, problem.rows, tokens,
              minimum(problem.rows - row, TILE_ROWS));
        warp_barrier();
    }
}
