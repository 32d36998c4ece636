// Sixteen lanes in four NEON registers (any 64-bit ARM).
#pragma once

#include <arm_neon.h>

#include "portable.h"

namespace {

struct F {
    float32x4_t v[4];
};
struct H {
    uint16x4_t v[4];
};

constexpr int DENSE_ROWS = 2, DENSE_INPUTS = 3, DENSE_ROWS_ALONE = 2;  // sums that fit 32 registers
constexpr int DELTA_ROWS = 1, DELTA_INPUTS = 4;

template <typename Function>
inline F each(Function function) {
    return {{function(0), function(1), function(2), function(3)}};
}
template <typename Function>
inline H each16(Function function) {
    return {{function(0), function(1), function(2), function(3)}};
}

inline F splat(float v) {
    return each([=](int) { return vdupq_n_f32(v); });
}
inline F zero() { return splat(0.0f); }
inline F load(const float* p) {
    return each([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]);
}
inline H load16(const uint16_t* p) {
    return each16([=](int i) { return vld1_u16(p + 4 * i); });
}
inline void store16(uint16_t* p, H v) {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, v.v[i]);
}

inline F add(F a, F b) {
    return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F sub(F a, F b) {
    return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F mul(F a, F b) {
    return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F div(F a, F b) {
    return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F fma(F a, F b, F c) {
    return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F abs(F a) {
    return each([&](int i) { return vabsq_f32(a.v[i]); });
}

// Four lanes of all ones or zeros to the bits of a number, and back.
template <typename Function>
inline uint32_t bits_where(Function function) {
    const uint32_t powers[4] = {1, 2, 4, 8};
    const uint32x4_t power = vld1q_u32(powers);
    uint32_t bits = 0;
    for (int i = 0; i < 4; ++i) bits |= vaddvq_u32(vandq_u32(function(i), power)) << (4 * i);
    return bits;
}
inline uint32x4_t lanes(uint32_t bits, int part) {
    const uint32_t powers[4] = {1, 2, 4, 8};
    return vtstq_u32(vdupq_n_u32(bits >> (4 * part)), vld1q_u32(powers));
}
inline uint32_t greater(F a, F b) {
    return bits_where([&](int i) { return vcgtq_f32(a.v[i], b.v[i]); });
}
inline uint32_t at_least(F a, F b) {
    return bits_where([&](int i) { return vcgeq_f32(a.v[i], b.v[i]); });
}
inline uint32_t bits_differ(F a, F b) {
    return bits_where([&](int i) {
        return vmvnq_u32(vceqq_u32(vreinterpretq_u32_f32(a.v[i]), vreinterpretq_u32_f32(b.v[i])));
    });
}
inline F select(uint32_t bits, F yes, F no) {
    return each([&](int i) { return vbslq_f32(lanes(bits, i), yes.v[i], no.v[i]); });
}
inline H select16(uint32_t bits, H yes, H no) {
    return each16([&](int i) { return vbsl_u16(vmovn_u32(lanes(bits, i)), yes.v[i], no.v[i]); });
}
inline float32x4_t masked(float32x4_t v, uint32x4_t mask) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), mask));
}
inline F add_where(uint32_t bits, F total, F v) {
    return each([&](int i) { return vaddq_f32(total.v[i], masked(v.v[i], lanes(bits, i))); });
}

inline F from_bf16(H v) {
    return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(v.v[i], 16)); });
}
inline F from_f16(H v) {
    return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(v.v[i])); });
}
inline H upper_half(F v) {
    return each16([&](int i) { return vshrn_n_u32(vreinterpretq_u32_f32(v.v[i]), 16); });
}
inline H to_f16(F v) {
    return each16([&](int i) { return vreinterpret_u16_f16(vcvt_f16_f32(v.v[i])); });
}
// Half of the last place that stays, and one more where that place is odd.
inline uint32x4_t round_to_even(float32x4_t v, int low_bits) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshlq_u32(bits, vdupq_n_s32(-low_bits)), vdupq_n_u32(1));
    return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32((1u << low_bits >> 1) - 1)));
}
// To nearest even; every NaN becomes 0x7FC0, as in torch.
inline H to_bf16(F v) {
    return each16([&](int i) {
        const uint32x4_t is_number = vceqq_f32(v.v[i], v.v[i]);
        return vshrn_n_u32(vbslq_u32(is_number, round_to_even(v.v[i], 16), vdupq_n_u32(0x7FC00000)), 16);
    });
}
// The lowest `low_bits` bits rounded away, to nearest even.
inline F round_low_bits(F v, int low_bits) {
    const uint32x4_t unit = vdupq_n_u32(~(1u << low_bits) + 1);
    return each([&](int i) { return vreinterpretq_f32_u32(vandq_u32(round_to_even(v.v[i], low_bits), unit)); });
}

// Numbers that follow each other, at the set bits; zeros elsewhere.
template <typename Number, typename Widen>
inline F expand_with(const Number* p, uint32_t bits, Widen widen) {
    float found[16] = {};
    for (; bits; bits &= bits - 1) found[__builtin_ctz(bits)] = widen(*p++);
    return load(found);
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
    float all[16];
    store(all, v);
    for (; bits; bits &= bits - 1) std::memcpy(p++, &all[__builtin_ctz(bits)], 4);
}

// Sum of the lanes, halves first.
inline float lane_sum(F v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.v[0], v.v[2]), vaddq_f32(v.v[1], v.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

// Kept entries of 16 columns, ready for several input vectors. Inputs of columns that are not kept do not matter,
// whatever they are.
struct Entries {
    F values;
    uint32x4_t kept[4];
};
inline Entries values_of(uint32_t kept, F values) {
    return {values, {lanes(kept, 0), lanes(kept, 1), lanes(kept, 2), lanes(kept, 3)}};
}
inline Entries signs_of(uint32_t kept, uint32_t negative) {
    return values_of(kept, select(negative, splat(-1.0f), splat(1.0f)));
}
template <bool IS_SIGN>
inline F multiply_add(const Entries& e, F x, F total) {
    return each([&](int i) { return vfmaq_f32(total.v[i], e.values.v[i], masked(x.v[i], e.kept[i])); });
}

inline uint64_t deposit(uint64_t bits, uint64_t mask) { return portable_deposit(bits, mask); }
inline uint64_t extract(uint64_t bits, uint64_t mask) { return portable_extract(bits, mask); }

}  // namespace
