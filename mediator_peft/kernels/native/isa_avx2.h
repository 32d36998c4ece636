// Sixteen lanes in two AVX2 registers (with FMA, F16C and BMI2).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lane_tables.h"

namespace {

struct F {  // 16 x float32
    __m256 low, high;
};
using H = __m256i;  // 16 x 16 bits

constexpr int DENSE_ROWS = 2, DENSE_INPUTS = 3, DENSE_ROWS_ALONE = 4;  // sums that fit the registers
constexpr int DELTA_ROWS = 2, DELTA_INPUTS = 2;

inline __m256 both(float v) { return _mm256_set1_ps(v); }
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F splat(float v) { return {both(v), both(v)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
inline H load16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store16(uint16_t* p, H v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }
inline F abs(F a) {
    const __m256 sign = both(-0.0f);
    return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline uint32_t signs_to_bits(__m256 low, __m256 high) {
    return uint32_t(_mm256_movemask_ps(low)) | uint32_t(_mm256_movemask_ps(high)) << 8;
}
inline uint32_t greater(F a, F b) {
    return signs_to_bits(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
inline uint32_t at_least(F a, F b) {
    return signs_to_bits(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ));
}
inline uint32_t bits_differ(F a, F b) {
    const __m256i low = _mm256_cmpeq_epi32(_mm256_castps_si256(a.low), _mm256_castps_si256(b.low));
    const __m256i high = _mm256_cmpeq_epi32(_mm256_castps_si256(a.high), _mm256_castps_si256(b.high));
    return signs_to_bits(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)) ^ 0xFFFF;
}

// All bits of a lane set where its bit is: looked up, which takes one load for eight lanes.
inline __m256 lanes_of(uint32_t byte) {
    return _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(LANE_TABLES.all_ones[byte])));
}
inline __m256 lanes_low(uint32_t bits) { return lanes_of(bits & 255); }
inline __m256 lanes_high(uint32_t bits) { return lanes_of(bits >> 8 & 255); }
inline F select(uint32_t bits, F yes, F no) {
    return {_mm256_blendv_ps(no.low, yes.low, lanes_low(bits)), _mm256_blendv_ps(no.high, yes.high, lanes_high(bits))};
}
inline H select16(uint32_t bits, H yes, H no) {
    const __m256i one = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(bits)), one), one);
    return _mm256_blendv_epi8(no, yes, set);
}
inline F add_where(uint32_t bits, F total, F v) {
    return {_mm256_add_ps(total.low, _mm256_and_ps(v.low, lanes_low(bits))),
            _mm256_add_ps(total.high, _mm256_and_ps(v.high, lanes_high(bits)))};
}

inline __m256 widen_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
inline F from_bf16(H v) { return {widen_bf16(_mm256_castsi256_si128(v)), widen_bf16(_mm256_extracti128_si256(v, 1))}; }
inline F from_f16(H v) { return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))}; }
// The upper 16 bits of each lane.
inline H pack_upper(__m256i low, __m256i high) {
    const __m256i mixed = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
    return _mm256_permute4x64_epi64(mixed, 0xD8);
}
inline H upper_half(F v) { return pack_upper(_mm256_castps_si256(v.low), _mm256_castps_si256(v.high)); }
inline H to_f16(F v) {
    const __m128i low = _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m128i high = _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
inline __m256i round_to_even(__m256 v, int low_bits) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srl_epi32(bits, _mm_cvtsi32_si128(low_bits)), _mm256_set1_epi32(1));
    const __m256i below_half = _mm256_set1_epi32((1 << low_bits >> 1) - 1);
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, below_half));
}
// To nearest even; every NaN becomes 0x7FC0, as in torch.
inline __m256i bf16_bits(__m256 v) {
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 rounded = _mm256_castsi256_ps(round_to_even(v, 16));
    return _mm256_castps_si256(_mm256_blendv_ps(rounded, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), is_nan));
}
inline H to_bf16(F v) { return pack_upper(bf16_bits(v.low), bf16_bits(v.high)); }
// The lowest `low_bits` bits rounded away, to nearest even.
inline F round_low_bits(F v, int low_bits) {
    const __m256i unit = _mm256_set1_epi32(-(1 << low_bits));
    return {_mm256_castsi256_ps(_mm256_and_si256(round_to_even(v.low, low_bits), unit)),
            _mm256_castsi256_ps(_mm256_and_si256(round_to_even(v.high, low_bits), unit))};
}

inline __m256i lane_numbers(const uint8_t (&table)[256][8], uint32_t bits) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(table[bits & 255])));
}
inline F expand_halves(__m256 low, __m256 high, uint32_t bits) {
    return {_mm256_and_ps(_mm256_permutevar8x32_ps(low, lane_numbers(LANE_TABLES.expand, bits)), lanes_low(bits)),
            _mm256_and_ps(_mm256_permutevar8x32_ps(high, lane_numbers(LANE_TABLES.expand, bits >> 8)), lanes_high(bits))};
}
// Numbers that follow each other, at the set bits; zeros elsewhere. May read 16 numbers.
inline F expand_load(const float* p, uint32_t bits) {
    return expand_halves(_mm256_loadu_ps(p), _mm256_loadu_ps(p + __builtin_popcount(bits & 255)), bits);
}
inline __m128i load8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline F expand_bf16(const uint16_t* p, uint32_t bits) {
    return expand_halves(widen_bf16(load8(p)), widen_bf16(load8(p + __builtin_popcount(bits & 255))), bits);
}
inline F expand_f16(const uint16_t* p, uint32_t bits) {
    return expand_halves(_mm256_cvtph_ps(load8(p)), _mm256_cvtph_ps(load8(p + __builtin_popcount(bits & 255))), bits);
}
// The reverse. May write 16 numbers, of which the first popcount(bits) count.
inline void compress_store(float* p, F v, uint32_t bits) {
    _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(v.low, lane_numbers(LANE_TABLES.compress, bits)));
    _mm256_storeu_ps(p + __builtin_popcount(bits & 255),
                     _mm256_permutevar8x32_ps(v.high, lane_numbers(LANE_TABLES.compress, bits >> 8)));
}

// Sum of the lanes, halves first.
inline float lane_sum(F v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Kept entries of 16 columns, ready for several input vectors. Inputs of columns that are not kept do not matter,
// whatever they are.
struct Entries {
    F values;  // of SIGN: the sign bits alone
    F kept;
};
inline Entries signs_of(uint32_t kept, uint32_t negative) {
    // Bits of `negative` are a part of those of `kept`.
    const __m256 sign = both(-0.0f);
    return {{_mm256_and_ps(lanes_low(negative), sign), _mm256_and_ps(lanes_high(negative), sign)},
            {lanes_low(kept), lanes_high(kept)}};
}
inline Entries values_of(uint32_t kept, F values) { return {values, {lanes_low(kept), lanes_high(kept)}}; }
template <bool IS_SIGN>
inline F multiply_add(const Entries& e, F x, F total) {
    const F seen = {_mm256_and_ps(x.low, e.kept.low), _mm256_and_ps(x.high, e.kept.high)};
    if (IS_SIGN) {
        return add(total, {_mm256_xor_ps(seen.low, e.values.low), _mm256_xor_ps(seen.high, e.values.high)});
    }
    return fma(e.values, seen, total);
}

inline uint64_t deposit(uint64_t bits, uint64_t mask) { return _pdep_u64(bits, mask); }
inline uint64_t extract(uint64_t bits, uint64_t mask) { return _pext_u64(bits, mask); }

}  // namespace
