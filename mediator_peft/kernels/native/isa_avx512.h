// Sixteen lanes in one AVX-512 register (F, BW, DQ, VL; with FMA, F16C and BMI2).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using F = __m512;   // 16 x float32
using H = __m256i;  // 16 x 16 bits

constexpr int DENSE_ROWS = 4, DENSE_INPUTS = 4, DENSE_ROWS_ALONE = 4;  // sums that fit the registers
constexpr int DELTA_ROWS = 4, DELTA_INPUTS = 4;

inline F zero() { return _mm512_setzero_ps(); }
inline F splat(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline H load16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store16(uint16_t* p, H v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline uint32_t at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline uint32_t bits_differ(F a, F b) {
    return _mm512_cmpneq_epi32_mask(_mm512_castps_si512(a), _mm512_castps_si512(b));
}
inline F select(uint32_t bits, F yes, F no) { return _mm512_mask_blend_ps(__mmask16(bits), no, yes); }
inline H select16(uint32_t bits, H yes, H no) { return _mm256_mask_blend_epi16(__mmask16(bits), no, yes); }
inline F add_where(uint32_t bits, F total, F v) { return _mm512_mask_add_ps(total, __mmask16(bits), total, v); }

inline F from_bf16(H v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline F from_f16(H v) { return _mm512_cvtph_ps(v); }
inline H upper_half(F v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(v), 16)); }
inline H to_f16(F v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// To nearest even; every NaN becomes 0x7FC0, as in torch.
inline H to_bf16(F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i raised = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(raised, is_nan, _mm512_set1_epi32(0x7FC00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// The lowest `low_bits` bits rounded away, to nearest even.
inline F round_low_bits(F v, int low_bits) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srl_epi32(bits, _mm_cvtsi32_si128(low_bits)), _mm512_set1_epi32(1));
    const int unit = 1 << low_bits;
    const __m512i raised = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32((unit >> 1) - 1)));
    return _mm512_castsi512_ps(_mm512_and_si512(raised, _mm512_set1_epi32(-unit)));
}

// Numbers that follow each other, at the set bits; zeros elsewhere. May read 16 numbers.
inline F expand_load(const float* p, uint32_t bits) { return _mm512_maskz_expand_ps(__mmask16(bits), load(p)); }
inline F expand_bf16(const uint16_t* p, uint32_t bits) {
    return _mm512_maskz_expand_ps(__mmask16(bits), from_bf16(load16(p)));
}
inline F expand_f16(const uint16_t* p, uint32_t bits) {
    return _mm512_maskz_expand_ps(__mmask16(bits), from_f16(load16(p)));
}
// The reverse. May write 16 numbers, of which the first popcount(bits) count.
inline void compress_store(float* p, F v, uint32_t bits) { store(p, _mm512_maskz_compress_ps(__mmask16(bits), v)); }

// Sum of the lanes, halves first.
inline float lane_sum(F v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// Kept entries of 16 columns, ready for several input vectors. Inputs of columns that are not kept do not matter,
// whatever they are.
struct Entries {
    F values;
    __mmask16 kept;
};
inline Entries signs_of(uint32_t kept, uint32_t negative) {
    return {_mm512_mask_blend_ps(__mmask16(negative), splat(1.0f), splat(-1.0f)), __mmask16(kept)};
}
inline Entries values_of(uint32_t kept, F values) { return {values, __mmask16(kept)}; }
template <bool IS_SIGN>
inline F multiply_add(const Entries& e, F x, F total) {
    return _mm512_mask3_fmadd_ps(e.values, x, total, e.kept);
}

inline uint64_t deposit(uint64_t bits, uint64_t mask) { return _pdep_u64(bits, mask); }
inline uint64_t extract(uint64_t bits, uint64_t mask) { return _pext_u64(bits, mask); }

}  // namespace
