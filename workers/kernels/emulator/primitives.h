// The names of cuda/primitives.cuh on a CPU, from the fragment layouts of the PTX ISA.
//
// What a GPU would refuse or leave undefined fails here: a misaligned load, an overflowing integer sum, lanes of a warp
// at different instructions. What it cannot find are races between warps and missing memory fences.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include "floats.h"
#include "machine.h"

#define DEVICE inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline int thread() { return emulator::machine.current; }
inline int lane() { return emulator::machine.current % emulator::LANES; }
inline int warp() { return emulator::machine.current / emulator::LANES; }
inline int block_x() { return emulator::machine.block_x; }
inline int block_y() { return emulator::machine.block_y; }
inline int blocks_x() { return emulator::machine.blocks_x; }
inline int blocks_y() { return emulator::machine.blocks_y; }

inline unsigned char* dynamic_shared() { return emulator::shared_memory; }

inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - emulator::shared_memory);
}

// Order among threads.

inline void barrier() { emulator::meet(emulator::machine.barrier, emulator::machine.threads, [] {}); }

inline void warp_barrier() {
    int nothing = 0;
    emulator::collective(nothing, [](int**) {});
}

inline unsigned ticket(unsigned* counter, unsigned count) {
    const unsigned before = *counter;
    *counter = before + 1 < count ? before + 1 : 0;
    return before;
}

// Values of other lanes.

struct Shuffled {
    unsigned value;
    int from;
    unsigned result;
};

inline unsigned shuffle(unsigned value, int from) {
    Shuffled mine{value, from, 0};
    emulator::collective(mine, [](Shuffled** lanes) {
        for (int lane = 0; lane < emulator::LANES; ++lane) lanes[lane]->result = lanes[lanes[lane]->from & 31]->value;
    });
    return mine.result;
}

inline unsigned shuffle_xor(unsigned value, int mask) { return shuffle(value, lane() ^ mask); }

// Loads and copies.

inline void check_aligned(const void* pointer, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) emulator::fail("misaligned access");
}

inline void load_cached16(unsigned* words, const void* from) {
    check_aligned(from, 16);
    std::memcpy(words, from, 16);
}

inline void load_cached8(unsigned* words, const void* from) {
    check_aligned(from, 8);
    std::memcpy(words, from, 8);
}

inline void load_streaming16(unsigned* words, const void* from) { load_cached16(words, from); }
inline void load_streaming8(unsigned* words, const void* from) { load_cached8(words, from); }

inline unsigned load_streaming4(const void* from) {
    unsigned word;
    check_aligned(from, 4);
    std::memcpy(&word, from, 4);
    return word;
}

inline unsigned load_coherent4(const void* from) { return load_streaming4(from); }

// Performed at the wait, so that a missing wait leaves `shared` as it was.
inline void copy_async16(void* shared, const void* global) {
    check_aligned(shared, 16);
    check_aligned(global, 16);
    emulator::fiber().copies.push_back({shared, global, 16});
}

inline void copy_async_commit() {
    emulator::fiber().committed.push_back(std::move(emulator::fiber().copies));
    emulator::fiber().copies.clear();
}

template <int GROUPS>
void copy_async_wait() {
    auto& groups = emulator::fiber().committed;
    while (groups.size() > GROUPS) {
        for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

struct MatrixRows {
    const void* row;
    unsigned result[4];
};

inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
    check_aligned(row, 16);
    MatrixRows mine{row, {}};
    emulator::collective(mine, [](MatrixRows** lanes) {
        for (int lane = 0; lane < emulator::LANES; ++lane)
            for (int matrix = 0; matrix < 4; ++matrix) {
                const auto* from = static_cast<const unsigned char*>(lanes[8 * matrix + lane / 4]->row);
                std::memcpy(&lanes[lane]->result[matrix], from + 4 * (lane % 4), 4);
            }
    });
    std::memcpy(r, mine.result, sizeof r);
}

// Arithmetic.

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float rounded(int value) { return static_cast<float>(value); }

inline int nearest(float value) {
    if (std::isnan(value)) return 0;
    return static_cast<int>(std::clamp(std::nearbyint(static_cast<double>(value)), double(INT_MIN), double(INT_MAX)));
}

inline unsigned permute(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

// Matrix products: m16n8, and k = 8 words' worth of elements, `PER` to a word. Lane 4g + t holds of `a` rows g and
// g + 8 (registers 0 and 1) of columns PER·t …, and of columns 4·PER on in registers 2 and 3; of `b` the same columns
// of column g; of the result rows g and g + 8, columns 2t and 2t + 1.

template <class Sum>
struct Product {
    const unsigned* a;
    unsigned b[2];
    const Sum* c;
    Sum d[4];
};

inline void store_sum(int& result, int64_t sum) {
    if (sum < INT_MIN || sum > INT_MAX) emulator::fail("an integer sum left int32");
    result = static_cast<int>(sum);
}

inline void store_sum(float& result, double sum) { result = static_cast<float>(sum); }

template <int PER, class Wide, class Element, class Sum>
void multiply_matrices(Product<Sum>** lanes, Element element) {
    Wide left[16][8 * PER], right[8][8 * PER];
    for (int lane = 0; lane < emulator::LANES; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int j = 0; j < PER; ++j) {
            for (int i = 0; i < 4; ++i)
                left[g + 8 * (i % 2)][PER * (4 * (i / 2) + t) + j] = element(lanes[lane]->a[i], j);
            for (int i = 0; i < 2; ++i) right[g][PER * (4 * i + t) + j] = element(lanes[lane]->b[i], j);
        }
    }
    for (int lane = 0; lane < emulator::LANES; ++lane)
        for (int i = 0; i < 4; ++i) {
            const auto& row = left[lane / 4 + 8 * (i / 2)];
            const auto& column = right[2 * (lane % 4) + i % 2];
            Wide sum = lanes[lane]->c[i];
            for (int k = 0; k < 8 * PER; ++k) sum += row[k] * column[k];
            store_sum(lanes[lane]->d[i], sum);
        }
}

template <class Sum, class Operation>
void mma(Sum (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Sum (&c)[4], Operation operation) {
    Product<Sum> mine{a, {b0, b1}, c, {}};
    emulator::collective(mine, operation);
    std::memcpy(d, mine.d, sizeof d);
}

inline void mma_s8(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    mma(d, a, b0, b1, c, [](Product<int>** lanes) {
        multiply_matrices<4, int64_t>(lanes, [](unsigned word, int j) { return int8_t(word >> 8 * j); });
    });
}

inline void mma_s4(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const int (&c)[4]) {
    mma(d, a, b0, b1, c, [](Product<int>** lanes) {
        multiply_matrices<8, int64_t>(lanes, [](unsigned word, int j) { return int8_t(word >> 4 * j << 4) >> 4; });
    });
}

// The hardware sums in an order of its own; here all products are added exactly enough to round once.
template <class Float>
void mma_float(Float, float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
    mma(d, a, b0, b1, c, [](Product<float>** lanes) {
        multiply_matrices<2, double>(lanes, [](unsigned word, int j) { return to_float(half_of<Float>(word, j)); });
    });
}
