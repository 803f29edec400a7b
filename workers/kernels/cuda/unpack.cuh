// From a lane's bit planes to MMA fragments of its weights.
//
// `Planes<BITS>` is what a lane holds of a tile: 2·BITS words, loaded in pieces of 16 (or 8) bytes that coalesce
// over the warp. `unpack(c, a)` gives chunk c as the A fragment of an int8 MMA, top-aligned: code · 2^(8 − BITS), so
// that neither sign extension nor a zero point is needed. Register a[i], i = p + 2h, holds four inputs of row 8p + g.
// `c` must be a constant once loops are unrolled.
#pragma once

#include "layout.cuh"
#include "primitives.cuh"

// Where planes are read from.

struct FromGlobal {
    static DEVICE void load16(unsigned* words, const void* from) { load_streaming16(words, from); }
    static DEVICE void load8(unsigned* words, const void* from) { load_streaming8(words, from); }
};

struct FromShared {
    static DEVICE void load16(unsigned* words, const void* from) {
        const uint4 loaded = *static_cast<const uint4*>(from);
        words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
    }
    static DEVICE void load8(unsigned* words, const void* from) {
        const uint2 loaded = *static_cast<const uint2*>(from);
        words[0] = loaded.x, words[1] = loaded.y;
    }
};

// The planes of a tile.

DEVICE unsigned shifted(unsigned word, int left) { return left >= 0 ? word << left : word >> -left; }

struct Nibbles {
    static constexpr int BYTES = 1024;
    unsigned words[8];

    template <class From>
    DEVICE void load(const unsigned char* plane) {
        From::load16(words, plane + 16 * lane());
        From::load16(words + 4, plane + 512 + 16 * lane());
    }

    // The four nibbles of register i, at bits 7 to 4 of each byte.
    DEVICE unsigned top(int c, int i) const { return shifted(words[2 * c + (i & 1)], 4 * (i >> 1)) & 0xF0F0F0F0; }
};

struct Crumbs {
    static constexpr int BYTES = 512;
    unsigned words[4];

    template <class From>
    DEVICE void load(const unsigned char* plane) {
        From::load16(words, plane + 16 * lane());
    }

    // The four crumbs of register i, at bits AT + 1 and AT of each byte.
    template <int AT>
    DEVICE unsigned at(int c, int i) const {
        return shifted(words[c], AT - 2 * i) & (0x03030303u << AT);
    }
};

struct Bits {
    static constexpr int BYTES = 256;
    unsigned words[2];

    template <class From>
    DEVICE void load(const unsigned char* plane) {
        From::load8(words, plane + 8 * lane());
    }

    // The four bits of register i, at bit AT of each byte.
    template <int AT>
    DEVICE unsigned at(int c, int i) const {
        return shifted(words[c >> 1], AT - 4 * (c & 1) - i) & (0x01010101u << AT);
    }
};

struct Bytes {
    static constexpr int BYTES = 2048;
    unsigned words[16];

    template <class From>
    DEVICE void load(const unsigned char* plane) {
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) From::load16(words + 4 * piece, plane + 512 * piece + 16 * lane());
    }
};

template <int BITS>
struct Planes;

template <>
struct Planes<8> {
    Bytes bytes;

    template <class From>
    DEVICE void load(const unsigned char* tile) {
        bytes.load<From>(tile);
    }

    DEVICE void unpack(int c, unsigned (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = bytes.words[4 * c + i];
    }
};

template <>
struct Planes<6> {
    Nibbles nibbles;
    Crumbs crumbs;

    template <class From>
    DEVICE void load(const unsigned char* tile) {
        nibbles.load<From>(tile);
        crumbs.load<From>(tile + Nibbles::BYTES);
    }

    DEVICE void unpack(int c, unsigned (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = nibbles.top(c, i) | crumbs.at<2>(c, i);
    }
};

template <>
struct Planes<5> {
    Nibbles nibbles;
    Bits bits;

    template <class From>
    DEVICE void load(const unsigned char* tile) {
        nibbles.load<From>(tile);
        bits.load<From>(tile + Nibbles::BYTES);
    }

    DEVICE void unpack(int c, unsigned (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = nibbles.top(c, i) | bits.at<3>(c, i);
    }
};

template <>
struct Planes<4> {
    Nibbles nibbles;

    template <class From>
    DEVICE void load(const unsigned char* tile) {
        nibbles.load<From>(tile);
    }

    DEVICE void unpack(int c, unsigned (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = nibbles.top(c, i);
    }
};

template <>
struct Planes<3> {
    Crumbs crumbs;
    Bits bits;

    template <class From>
    DEVICE void load(const unsigned char* tile) {
        crumbs.load<From>(tile);
        bits.load<From>(tile + Crumbs::BYTES);
    }

    DEVICE void unpack(int c, unsigned (&a)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = crumbs.at<6>(c, i) | bits.at<5>(c, i);
    }
};

// Four top-aligned codes to two pairs of 16-bit floats, exactly.

// 0x64uu is the float16 1024 + uu, and uu = code + 128.
template <int BITS>
DEVICE void widen(f16, unsigned codes, unsigned (&pairs)[2]) {
    constexpr unsigned MINUS_1152 = 0xE480E480;
    const unsigned biased = codes ^ 0x80808080;
    pairs[0] = add_f16x2(permute(biased, 0x64646464, 0x4140), MINUS_1152);
    pairs[1] = add_f16x2(permute(biased, 0x64646464, 0x4342), MINUS_1152);
}

// bfloat16 keeps 7 bits behind the first: 0x4300 + u is 128 + u for u < 128.
template <int BITS>
DEVICE void widen(bf16, unsigned codes, unsigned (&pairs)[2]) {
    constexpr unsigned ONE = 0x3F803F80, TWO = 0x40004000, MINUS_384 = 0xC3C0C3C0;
    // The lowest bit of up to 7 is always 0, so that no byte shifts into another: u = code / 2 + 64.
    const unsigned halves = BITS < 8 ? (codes >> 1) ^ 0x40404040 : codes;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
        const unsigned spread = permute(halves, 0x43434343, pair ? 0x4342 : 0x4140);
        // The sign bit of 8 is worth −128: it makes the addend −128 = 0xC300 into −256 = 0xC380.
        pairs[pair] = BITS < 8 ? fused_bf16x2(spread, TWO, MINUS_384)
                               : fused_bf16x2(spread & 0xFF7FFF7F, ONE, (spread & 0x00800080) | 0xC300C300);
    }
}
