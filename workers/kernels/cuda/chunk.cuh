// 32 inputs as the tensor cores take them, with codes or with 16-bit floats as activations.
//
// `Weights` is the A fragment of 16 rows × 32 inputs, `Inputs` the B fragment of 32 inputs × 8 tokens; `Sum` is what the
// tensor cores add up in.
#pragma once

#include "layout.cuh"
#include "primitives.cuh"
#include "unpack.cuh"

template <class In>
struct Chunk {
    using Sum = float;
    // Two MMAs of 16 inputs; the h-th takes inputs 4h … 4h + 3 of every lane's eight.
    struct Weights {
        unsigned a[2][4];

        template <int BITS>
        DEVICE void take(const unsigned (&codes)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                unsigned pairs[2];
                widen<BITS>(In{}, codes[i], pairs);
                a[i >> 1][i & 1] = pairs[0];
                a[i >> 1][(i & 1) + 2] = pairs[1];
            }
        }
    };
    struct Inputs {
        unsigned b[4];

        // `within`: whether the token reaches so far.
        DEVICE void load(const In* from, bool within) {
            b[0] = b[1] = b[2] = b[3] = 0;
            if (within) load_cached16(b, from);
        }
    };
    static DEVICE int stride(int inputs) { return inputs; }

    static DEVICE void multiply(Sum (&d)[4], const Weights& weights, const Inputs& inputs, const Sum (&c)[4]) {
        mma_float(In{}, d, weights.a[0], inputs.b[0], inputs.b[1], c);
        mma_float(In{}, d, weights.a[1], inputs.b[2], inputs.b[3], d);
    }

    // A group's sum starts at `START`; `value` is what has been added to it.
    static constexpr Sum START = 0;
    static DEVICE float value(Sum sum) { return sum; }
};

template <>
struct Chunk<signed char> {
    using Sum = int;
    struct Weights {
        unsigned a[4];

        template <int BITS>
        DEVICE void take(const unsigned (&codes)[4]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = codes[i];
        }
    };
    struct Inputs {
        unsigned b[2];

        DEVICE void load(const signed char* from, bool) { load_cached8(b, from); }
    };
    static DEVICE int stride(int inputs) { return padded_inputs(inputs); }

    static DEVICE void multiply(Sum (&d)[4], const Weights& weights, const Inputs& inputs, const Sum (&c)[4]) {
        mma_s8(d, weights.a, inputs.b[0], inputs.b[1], c);
    }

    // As bits, 1.5 · 2^23 + n is the float 1.5 · 2^23 plus n for |n| < 2^22, above 128 · 128 · 127: no conversion.
    static constexpr Sum START = 0x4B400000;
    static DEVICE float value(Sum sum) { return add(float_of(sum), -12582912.0f); }
};
