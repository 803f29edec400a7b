// 16-bit floats on a CPU: conversions that round to nearest even, and arithmetic on pairs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

inline unsigned bits_of(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return float_of(static_cast<unsigned>(value.bits) << 16); }

inline float to_float(f16 value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    float magnitude = std::ldexp(float(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
    if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
    return value.bits >> 15 ? -magnitude : magnitude;
}

inline void assign(float& result, float value) { result = value; }

inline void assign(f16& result, double value) {
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (std::isnan(value)) {
        result.bits = 0x7FFF;
    } else if (magnitude >= 65520) {
        result.bits = sign | 0x7C00;
    } else {
        // In units of the last place a normal number is 1024 to 2047: the carry of 2048 is the next exponent.
        const int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -14) : -14;
        const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
        result.bits = static_cast<unsigned short>(sign | (units + ((exponent + 14) << 10)));
    }
}

inline void assign(bf16& result, float value) {
    const unsigned bits = bits_of(value);
    result.bits = std::isnan(value) ? 0x7FFF : static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <class Float>
Float half_of(unsigned pair, int which) {
    return {static_cast<unsigned short>(pair >> 16 * which)};
}

inline unsigned add_f16x2(unsigned a, unsigned b) {
    unsigned pair = 0;
    for (int which = 0; which < 2; ++which) {
        f16 sum;
        assign(sum, double(to_float(half_of<f16>(a, which))) + to_float(half_of<f16>(b, which)));
        pair |= static_cast<unsigned>(sum.bits) << 16 * which;
    }
    return pair;
}

inline unsigned fused_bf16x2(unsigned a, unsigned b, unsigned c) {
    unsigned pair = 0;
    for (int which = 0; which < 2; ++which) {
        bf16 sum;
        assign(sum, std::fma(to_float(half_of<bf16>(a, which)), to_float(half_of<bf16>(b, which)),
                             to_float(half_of<bf16>(c, which))));
        pair |= static_cast<unsigned>(sum.bits) << 16 * which;
    }
    return pair;
}
