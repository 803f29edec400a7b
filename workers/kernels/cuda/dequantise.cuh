// Packed weights to a plain 16-bit matrix: code · scale, rounded once.
//
// Grid: tiles across (padded inputs / 128), padded rows / (16·WARPS). A warp unpacks a tile; threads: 32·WARPS.
#pragma once

#include "layout.cuh"
#include "primitives.cuh"
#include "unpack.cuh"

// Two 16-bit floats of one word.
template <class Out>
DEVICE unsigned pair_of(float low, float high) {
    Out first, second;
    assign(first, low);
    assign(second, high);
    return first.bits | static_cast<unsigned>(second.bits) << 16;
}

// weight: rows × inputs, in f16 or bf16. GROUP 0: a scale per output channel.
template <int BITS, int GROUP, int WARPS, class Out>
DEVICE void dequantise(const unsigned char* tiles, const f16* scales, Out* weight, int rows, int inputs) {
    const int tile = block_x(), strip = block_y() * WARPS + warp();
    const int g = lane() / 4, t = lane() % 4;
    Planes<BITS> planes;
    planes.template load<FromGlobal>(tiles + (static_cast<long long>(strip) * blocks_x() + tile) * tile_bytes(BITS));
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int k = TILE_INPUTS * tile + CHUNK_INPUTS * c + 8 * t;
        unsigned codes[4];
        planes.unpack(c, codes);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int row = TILE_ROWS * strip + g + 8 * p;
            if (row >= rows || k >= inputs) continue;
            const long long group = GROUP ? k / (GROUP ? GROUP : 1) : 0;
            const float scale = to_float(scales[group * padded_rows(rows) + row]);
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int top = static_cast<signed char>(codes[p + 2 * (i / 4)] >> 8 * (i % 4));
                values[i] = multiply(rounded(top >> (8 - BITS)), scale);
            }
            *reinterpret_cast<uint4*>(weight + static_cast<long long>(row) * inputs + k) =
                uint4{pair_of<Out>(values[0], values[1]), pair_of<Out>(values[2], values[3]),
                      pair_of<Out>(values[4], values[5]), pair_of<Out>(values[6], values[7])};
        }
    }
}
