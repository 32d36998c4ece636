// Sixteen lanes as an array, for any processor; the compiler uses what vectors there are (SSE2 on x86-64).
// Products and sums are rounded separately here, other than with FMA.
#pragma once

#include "portable.h"

namespace {

struct F {
    float v[16];
};
struct H {
    uint16_t v[16];
};

constexpr int DENSE_ROWS = 1, DENSE_INPUTS = 2, DENSE_ROWS_ALONE = 1;
constexpr int DELTA_ROWS = 1, DELTA_INPUTS = 2;

template <typename Function>
inline F each(Function function) {
    F result;
    for (int i = 0; i < 16; ++i) result.v[i] = function(i);
    return result;
}
template <typename Function>
inline H each16(Function function) {
    H result;
    for (int i = 0; i < 16; ++i) result.v[i] = uint16_t(function(i));
    return result;
}
template <typename Function>
inline uint32_t bits_where(Function function) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= uint32_t(function(i)) << i;
    return bits;
}

inline F zero() { return F{}; }
inline F splat(float v) { return each([=](int) { return v; }); }
inline F load(const float* p) {
    F result;
    std::memcpy(&result, p, 64);
    return result;
}
inline void store(float* p, F v) { std::memcpy(p, &v, 64); }
inline H load16(const uint16_t* p) {
    H result;
    std::memcpy(&result, p, 32);
    return result;
}
inline void store16(uint16_t* p, H v) { std::memcpy(p, &v, 32); }

inline F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F abs(F a) { return each([&](int i) { return float_of(bits_of(a.v[i]) & 0x7FFFFFFF); }); }
inline uint32_t greater(F a, F b) { return bits_where([&](int i) { return a.v[i] > b.v[i]; }); }
inline uint32_t at_least(F a, F b) { return bits_where([&](int i) { return a.v[i] >= b.v[i]; }); }
inline uint32_t bits_differ(F a, F b) { return bits_where([&](int i) { return bits_of(a.v[i]) != bits_of(b.v[i]); }); }
inline F select(uint32_t bits, F yes, F no) { return each([&](int i) { return bits >> i & 1 ? yes.v[i] : no.v[i]; }); }
inline H select16(uint32_t bits, H yes, H no) {
    return each16([&](int i) { return bits >> i & 1 ? yes.v[i] : no.v[i]; });
}
inline F add_where(uint32_t bits, F total, F v) { return add(total, select(bits, v, zero())); }

inline F from_bf16(H v) { return each([&](int i) { return float_of(uint32_t(v.v[i]) << 16); }); }
inline F from_f16(H v) { return each([&](int i) { return half_to_float(v.v[i]); }); }
inline H upper_half(F v) { return each16([&](int i) { return bits_of(v.v[i]) >> 16; }); }
inline H to_f16(F v) { return each16([&](int i) { return float_to_half(v.v[i]); }); }
// To nearest even; every NaN becomes 0x7FC0, as in torch.
inline H to_bf16(F v) {
    return each16([&](int i) {
        const uint32_t bits = bits_of(v.v[i]);
        return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0u : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    });
}
// The lowest `low_bits` bits rounded away, to nearest even.
inline F round_low_bits(F v, int low_bits) {
    return each([&](int i) {
        const uint32_t bits = bits_of(v.v[i]), unit = 1u << low_bits;
        return float_of((bits + (bits >> low_bits & 1) + (unit >> 1) - 1) & (~unit + 1));
    });
}

// Numbers that follow each other, at the set bits; zeros elsewhere.
template <typename Number, typename Widen>
inline F expand_with(const Number* p, uint32_t bits, Widen widen) {
    return each([&](int i) { return bits >> i & 1 ? widen(*p++) : 0.0f; });
}
inline F expand_load(const float* p, uint32_t bits) {
    return expand_with(p, bits, [](float v) { return v; });
}
inline F expand_bf16(const uint16_t* p, uint32_t bits) {
    return expand_with(p, bits, [](uint16_t v) { return float_of(uint32_t(v) << 16); });
}
inline F expand_f16(const uint16_t* p, uint32_t bits) { return expand_with(p, bits, half_to_float); }
// The reverse.
inline void compress_store(float* p, F v, uint32_t bits) {
    for (; bits; bits &= bits - 1) std::memcpy(p++, &v.v[__builtin_ctz(bits)], 4);
}

// Sum of the lanes, halves first.
inline float lane_sum(F v) {
    for (int width = 8; width; width /= 2) {
        for (int i = 0; i < width; ++i) v.v[i] += v.v[i + width];
    }
    return v.v[0];
}

struct Entries {
    F values;
    uint32_t kept;
};
inline Entries signs_of(uint32_t kept, uint32_t negative) { return {select(negative, splat(-1.0f), splat(1.0f)), kept}; }
inline Entries values_of(uint32_t kept, F values) { return {values, kept}; }
// Inputs of columns that are not kept do not matter, whatever they are.
template <bool IS_SIGN>
inline F multiply_add(const Entries& e, F x, F total) {
    return select(e.kept, add(total, mul(e.values, x)), total);
}

inline uint64_t deposit(uint64_t bits, uint64_t mask) { return portable_deposit(bits, mask); }
inline uint64_t extract(uint64_t bits, uint64_t mask) { return portable_extract(bits, mask); }

}  // namespace
