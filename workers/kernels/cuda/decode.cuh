// y = x · weightᵀ for a few tokens: as fast as the packed weights can be read.
//
// A CTA computes 16·R rows of up to 8·NT tokens. K is cut into blocks_y() · WARPS parts, contiguous runs of tiles, one
// for each warp: a warp streams the planes of its tiles from global memory straight into registers, ahead of the
// tensor cores, which take the weights as their rows and the tokens as their columns. The warps of a CTA add their
// sums in order, then the CTAs of the same rows theirs: the last to arrive, whichever it is, adds all in order.
// So a result depends on the shape of the grid, never on time.
//
//     tiles, scales  as packed                  partial   a word for every padded row, of 8·NT tokens and every slice
//     x              tokens × inputs: signed char codes padded to 128 inputs (layout ROWS), or f16 or bf16
//     token_scales   of codes                   tickets   one for every CTA of a slice: zero, and zero again after
//     bias           float, or null             y         tokens × rows
//
// Grid: padded rows / (16·R), slices. Threads: 32·WARPS. GROUP 0: a scale per output channel.
#pragma once

#include "chunk.cuh"
#include "layout.cuh"
#include "primitives.cuh"
#include "unpack.cuh"

template <int BITS, int GROUP, int R, int WARPS, int NT, class In, class Out>
struct Decode {
    static_assert(NT == 1 ? R <= 4 : R <= 2 && NT <= 4, "sums and weights of more would not fit into the registers");
    using C = Chunk<In>;
    static constexpr bool GROUPED = GROUP != 0;
    static constexpr int GROUPS = GROUPED ? TILE_INPUTS / GROUP : 1;  // of a tile
    static constexpr int GROUP_CHUNKS = CHUNKS / GROUPS;
    static constexpr int STAGES = R == 1 ? 3 : 2;  // so that two tiles or more are on their way to registers
    // Chunks of activations loaded together, so that their latency is waited for once: up to 16 registers of them.
    static constexpr int INPUT_BYTES = NT * sizeof(typename C::Inputs);
    static constexpr int AT_ONCE = INPUT_BYTES > 32 ? 1 : INPUT_BYTES > 16 ? 2 : 4;
    static constexpr int ROWS = TILE_ROWS * R;
    static constexpr int TOKENS = 8 * NT;
    static constexpr int THREADS = 32 * WARPS;
    // Unpacked weights are code · 2^(8 − BITS).
    static constexpr float UNIT = 1.0f / (1 << (8 - BITS));

    // A float sum of scaled groups, or the plain sum of a row.
    template <bool, class Sum>
    struct Choose {
        using Type = float;
    };
    template <class Sum>
    struct Choose<false, Sum> {
        using Type = Sum;
    };
    using Total = typename Choose<GROUPED, typename C::Sum>::Type;

    const unsigned char* tiles;
    const f16* scales;
    const In* x;
    const float* token_scales;
    const float* bias;
    Out* y;
    Total* partial;
    unsigned* tickets;
    int tokens, rows, inputs;

    // What a warp reads of the weights for one tile of inputs.
    struct Stage {
        Planes<BITS> planes[R];
        unsigned scales[R];  // lane 8·q + i: of group q, rows 2i and 2i + 1
    };

    DEVICE int across() const { return padded_inputs(inputs) / TILE_INPUTS; }

    DEVICE void load(Stage& stage, int tile) const {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            const int strip = block_x() * R + r;
            const long long index = static_cast<long long>(strip) * across() + tile;
            stage.planes[r].template load<FromGlobal>(tiles + index * tile_bytes(BITS));
            if (GROUPED && lane() < 8 * GROUPS) {
                const long long group = tile * GROUPS + lane() / 8;
                const int row = strip * TILE_ROWS + 2 * (lane() % 8);
                stage.scales[r] = load_streaming4(scales + group * padded_rows(rows) + row);
            }
        }
    }

    // The scale of row lane() / 4, or 8 below it, in the q-th group of a tile; whole warps ask.
    DEVICE float group_scale(const Stage& stage, int r, int q, int half) const {
        const int row = lane() / 4;
        const unsigned pair = shuffle(stage.scales[r], 8 * q + 4 * half + row / 2);
        return multiply(to_float(f16{static_cast<unsigned short>(row & 1 ? pair >> 16 : pair)}), UNIT);
    }

    // Chunks c … c + AT_ONCE − 1 of a tile; token lane() / 4 of each eight.
    DEVICE void load_inputs(typename C::Inputs (&loaded)[AT_ONCE][NT], int tile, int c) const {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int token = 8 * n + lane() / 4;
            // Columns without a token repeat the last one; nobody reads their sums.
            const long long row = token < tokens ? token : tokens - 1;
            const In* from = x + row * C::stride(inputs) + TILE_INPUTS * tile + 8 * (lane() % 4);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int k = CHUNK_INPUTS * (c + i);
                loaded[i][n].load(from + k, TILE_INPUTS * tile + k < C::stride(inputs));
            }
        }
        // Or ptxas moves each load down to its use, and every one is waited for.
        warp_barrier();
    }

    DEVICE void multiply_tile(Total (&totals)[R][NT][4], const Stage& stage, int tile) const {
        typename C::Sum sums[R][NT][4];
        typename C::Inputs loaded[AT_ONCE][NT];
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            if (c % AT_ONCE == 0) load_inputs(loaded, tile, c);
#pragma unroll
            for (int r = 0; r < R; ++r) {
                unsigned codes[4];
                typename C::Weights weights;
                stage.planes[r].unpack(c, codes);
                weights.template take<BITS>(codes);
#pragma unroll
                for (int n = 0; n < NT; ++n)
                    multiply_chunk(totals[r][n], sums[r][n], weights, loaded[c % AT_ONCE][n], c);
                if (GROUPED && c % GROUP_CHUNKS == GROUP_CHUNKS - 1)
                    scale_group(totals[r], sums[r], stage, r, c / GROUP_CHUNKS);
            }
        }
    }

    // Adds the sums of the q-th group of a tile, scaled.
    DEVICE void scale_group(Total (&totals)[NT][4], const typename C::Sum (&sums)[NT][4], const Stage& stage, int r,
                            int q) const {
        const float scale[2] = {group_scale(stage, r, q, 0), group_scale(stage, r, q, 1)};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) totals[n][i] = fused(C::value(sums[n][i]), scale[i >> 1], totals[n][i]);
    }

    DEVICE void multiply_chunk(Total (&total)[4], typename C::Sum (&sum)[4], const typename C::Weights& weights,
                               const typename C::Inputs& loaded, int c) const {
        if constexpr (GROUPED) {
            const typename C::Sum start[4] = {C::START, C::START, C::START, C::START};
            if (c % GROUP_CHUNKS == 0)
                C::multiply(sum, weights, loaded, start);
            else
                C::multiply(sum, weights, loaded, sum);
        } else {
            C::multiply(total, weights, loaded, total);
        }
    }

    DEVICE void multiply_part(Total (&totals)[R][NT][4]) const {
        const int parts = blocks_y() * WARPS, part = block_y() * WARPS + warp();
        const int width = (across() + parts - 1) / parts;
        const int first = part * width;
        const int last = first + width < across() ? first + width : across();
        Stage stages[STAGES];
#pragma unroll
        for (int s = 0; s < STAGES - 1; ++s)
            if (first + s < last) load(stages[s], first + s);
        for (int start = first; start < last; start += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; ++s) {
                const int tile = start + s, ahead = tile + STAGES - 1;
                if (ahead < last) load(stages[(s + STAGES - 1) % STAGES], ahead);
                if (tile < last) multiply_tile(totals, stages[s], tile);
            }
        }
    }

    static DEVICE int plus(int a, int b) { return a + b; }
    static DEVICE float plus(float a, float b) { return add(a, b); }

    static DEVICE void read(int& sum, const int* from) { sum = static_cast<int>(load_coherent4(from)); }
    static DEVICE void read(float& sum, const float* from) { sum = float_of(load_coherent4(from)); }

    DEVICE void finish(Total total, int token, int row) const {
        if (row >= rows) return;
        float value;
        if constexpr (sizeof(In) == 1 && GROUPED)
            value = multiply(total, token_scales[token]);
        else if constexpr (sizeof(In) == 1)
            value = multiply(multiply(rounded(total >> (8 - BITS)), token_scales[token]), to_float(scales[row]));
        else
            value = GROUPED ? total : multiply(total, multiply(to_float(scales[row]), UNIT));
        if (bias != nullptr) value = add(value, bias[row]);
        assign(y[static_cast<long long>(token) * rows + row], value);
    }

    // Of the slices of these rows, whether this CTA is the last to arrive; the others' sums are then to be seen.
    DEVICE bool arrives_last() const {
        __shared__ unsigned before;
        barrier();
        if (thread() == 0) before = ticket(tickets + block_x(), blocks_y());
        barrier();
        return before == blocks_y() - 1u;
    }

    DEVICE void run() const {
        // Four more than the rows, so that the lanes of a store fall into 32 banks.
        constexpr int PITCH = ROWS + 4;
        __shared__ Total shared[WARPS][TOKENS][PITCH];
        static_assert(sizeof(shared) <= 48 * 1024, "sums of a CTA must fit into static shared memory");

        Total totals[R][NT][4] = {};
        multiply_part(totals);
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    shared[warp()][8 * n + 2 * (lane() % 4) + (i & 1)][TILE_ROWS * r + lane() / 4 + 8 * (i >> 1)] =
                        totals[r][n][i];
        barrier();

        const int first_row = block_x() * ROWS;
        const bool alone = blocks_y() == 1;
        constexpr int SLOT = TOKENS * ROWS;
        Total* slots = partial + static_cast<long long>(block_x()) * blocks_y() * SLOT;
        for (int index = thread(); index < tokens * ROWS; index += THREADS) {
            const int token = index / ROWS, row = index % ROWS;
            Total total = shared[0][token][row];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) total = plus(total, shared[w][token][row]);
            if (alone)
                finish(total, token, first_row + row);
            else
                slots[block_y() * SLOT + index] = total;
        }
        if (alone || !arrives_last()) return;
        for (int index = thread(); index < tokens * ROWS; index += THREADS) {
            Total total, other;
            read(total, slots + index);
            for (int slice = 1; slice < blocks_y(); ++slice) {
                read(other, slots + slice * SLOT + index);
                total = plus(total, other);
            }
            finish(total, index / ROWS, first_row + index % ROWS);
        }
    }
};

template <int BITS, int GROUP, int R, int WARPS, int NT, class In, class Out>
DEVICE void decode(const unsigned char* tiles, const f16* scales, const In* x, const float* token_scales,
                   const float* bias, Out* y, void* partial, unsigned* tickets, int tokens, int rows, int inputs) {
    using Kernel = Decode<BITS, GROUP, R, WARPS, NT, In, Out>;
    auto* sums = static_cast<typename Kernel::Total*>(partial);
    Kernel{tiles, scales, x, token_scales, bias, y, sums, tickets, tokens, rows, inputs}.run();
}
