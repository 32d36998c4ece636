// Plain C++ for what an instruction set lacks: float16, and moving bits under a mask.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = float(fraction) * float_of(0x33800000);  // 2^-24, exact
    return sign ? -small : small;
}

// To nearest even.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return uint16_t(sign | 0x7E00 | (magnitude >> 13 & 0x1FF));
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7C00);
    if (magnitude < 0x38800000) {
        // Below the smallest normal half: adding 0.5 rounds at its last place, 2^-24.
        return uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    }
    const uint32_t raised = magnitude + 0xFFF + (magnitude >> 13 & 1);
    return uint16_t(sign | ((raised >> 13) - (112u << 10)));
}

inline uint64_t portable_deposit(uint64_t bits, uint64_t mask) {
    uint64_t result = 0;
    for (; mask; mask &= mask - 1, bits >>= 1) {
        if (bits & 1) result |= mask & (~mask + 1);
    }
    return result;
}
inline uint64_t portable_extract(uint64_t bits, uint64_t mask) {
    uint64_t result = 0;
    for (uint64_t target = 1; mask; mask &= mask - 1, target <<= 1) {
        if (bits & mask & (~mask + 1)) result |= target;
    }
    return result;
}

}  // namespace
