// Activations to integer codes with one scale a token, chosen as the token arrives: scale = max|x| / most and
// code = round(x / scale) in float32, as quantize_activations of workers/kernels/reference.py.
//
// A CTA takes one token; a thread eight neighbouring inputs at a time. Inputs are padded with zero codes to a multiple
// of 128, and tokens to the grid, one CTA for each. A token with NaN or infinity gets scale NaN and codes 0.
#pragma once

#include "layout.cuh"
#include "primitives.cuh"

constexpr int ROWS = 0;     // tokens × padded inputs, one byte a code
constexpr int TILES = 1;    // for prefill: what ldmatrix and wgmma take, see `place`
constexpr int NIBBLES = 2;  // tokens × padded inputs / 2: for the native s4 MMA

constexpr float SMALLEST_MAXIMUM = 1e-12f;
constexpr unsigned INFINITE = 0x7F800000;  // as bits, every NaN is above it

// Eight inputs of a token.
DEVICE void load_values(float (&values)[8], const float* from) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        unsigned words[4];
        load_cached16(words, from + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[4 * half + i] = float_of(words[i]);
    }
}

template <class In>
DEVICE void load_values(float (&values)[8], const In* from) {
    unsigned words[4];
    load_cached16(words, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = to_float(In{static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))});
}

DEVICE unsigned magnitude(float value) { return bits_of(value) & 0x7FFFFFFF; }

DEVICE unsigned larger(unsigned a, unsigned b) { return a > b ? a : b; }

// The largest value of all threads of the CTA. Of magnitudes it finds the largest in their bits.
template <int THREADS>
DEVICE unsigned largest(unsigned value) {
    __shared__ unsigned of_warp[THREADS / 32];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    if (lane() == 0) of_warp[warp()] = value;
    barrier();
    for (int w = 0; w < THREADS / 32; ++w) value = larger(value, of_warp[w]);
    return value;
}

DEVICE unsigned code_of(float value, float scale, int most) {
    int code = nearest(divide(value, scale));
    code = code > most ? most : code;
    code = code < -most ? -most : code;
    return static_cast<unsigned>(code) & 0xFF;
}

// Four codes, the first in the lowest byte.
DEVICE unsigned codes_of(const float* values, float scale, int most) {
    unsigned codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= code_of(values[i], scale, most) << 8 * i;
    return codes;
}

// Where the codes of inputs 8·eighth … 8·eighth + 7 of a token lie: the first four in `low`, the others in `high`.
//
// TILES are atoms of 8 tokens × 128 inputs, 1 KiB each, in order [inputs / 128][tokens / 8]. In an atom, each 32 inputs
// of a token stand in the order of an MMA fragment: position 16h + 4t + j holds input 8t + 4h + j. Pieces of 16 bytes
// are swizzled by the token, as wgmma reads them without bank conflicts (PTX ISA, 128-byte swizzle).
template <int LAYOUT>
DEVICE void place(unsigned char* codes, int token, int tokens_padded, int inputs_padded, int eighth, unsigned low,
                  unsigned high) {
    if constexpr (LAYOUT == ROWS) {
        auto* row = reinterpret_cast<uint2*>(codes + static_cast<long long>(token) * inputs_padded);
        row[eighth] = uint2{low, high};
    } else if constexpr (LAYOUT == NIBBLES) {
        auto* row = reinterpret_cast<unsigned*>(codes + static_cast<long long>(token) * (inputs_padded / 2));
        row[eighth] = (low << 4 & 0xF0F0F0F0) | (high & 0x0F0F0F0F);
    } else {
        const int tile = eighth / 16, chunk = eighth / 4 % 4, t = eighth % 4;
        const long long atom = static_cast<long long>(tile) * (tokens_padded / 8) + token / 8;
        auto* pieces = reinterpret_cast<unsigned*>(codes + atom * 1024 + token % 8 * 128);
        pieces[4 * ((2 * chunk) ^ (token % 8)) + t] = low;
        pieces[4 * ((2 * chunk + 1) ^ (token % 8)) + t] = high;
    }
}

// x: tokens × inputs; codes: in LAYOUT, of as many tokens as CTAs; scales: tokens; most: 127, 31 or 7.
template <int LAYOUT, int THREADS, class In>
DEVICE void quantise(const In* x, unsigned char* codes, float* scales, int tokens, int inputs, int most) {
    const int token = block_x();
    const In* row = x + static_cast<long long>(token) * inputs;
    const int eighths = token < tokens ? inputs / 8 : 0;
    unsigned greatest = 0;
    for (int eighth = thread(); eighth < eighths; eighth += THREADS) {
        float values[8];
        load_values(values, row + 8 * eighth);
#pragma unroll
        for (int i = 0; i < 8; ++i) greatest = larger(greatest, magnitude(values[i]));
    }
    greatest = largest<THREADS>(greatest);
    const bool finite = greatest < INFINITE;
    const float scale = divide(float_of(larger(greatest, bits_of(SMALLEST_MAXIMUM))), rounded(most));
    for (int eighth = thread(); eighth < padded_inputs(inputs) / 8; eighth += THREADS) {
        float values[8] = {};
        if (finite && eighth < eighths) load_values(values, row + 8 * eighth);
        place<LAYOUT>(codes, token, blocks_x(), padded_inputs(inputs), eighth, codes_of(values, scale, most),
                      codes_of(values + 4, scale, most));
    }
    if (thread() == 0 && token < tokens) scales[token] = finite ? scale : float_of(0x7FC00000);
}
