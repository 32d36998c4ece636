// SHA-256 (FIPS 180-4) of up to three streams side by side, by the processor's own instructions.
//
// Two rounds wait for the two before, so that one stream leaves the processor idle for half of the time; streams that
// know nothing of each other fill the gaps.
#include "sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

namespace {

alignas(16) constexpr uint32_t CONSTANTS[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

template <int N>
__attribute__((target("sha,sse4.1,ssse3"))) void hash_blocks(uint32_t* const* states, const uint8_t* const* data,
                                                             int64_t num_blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    // The instructions want the words of a state as (a, b, e, f) and (c, d, g, h), the highest lane first.
    __m128i abef[N], cdgh[N];
    for (int n = 0; n < N; n++) {
        const __m128i low = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(states[n])), 0xB1);
        const __m128i high = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(states[n] + 4)), 0x1B);
        abef[n] = _mm_alignr_epi8(low, high, 8);
        cdgh[n] = _mm_blend_epi16(high, low, 0xF0);
    }
    for (int64_t block = 0; block < num_blocks; block++) {
        __m128i words[N][4], abef_before[N], cdgh_before[N];
        for (int n = 0; n < N; n++) {
            abef_before[n] = abef[n];
            cdgh_before[n] = cdgh[n];
            for (int part = 0; part < 4; part++) {
                const uint8_t* place = data[n] + 64 * block + 16 * part;
                words[n][part] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place)), big_endian);
            }
        }
#pragma GCC unroll 16
        for (int four = 0; four < 16; four++) {
            const __m128i constants = _mm_load_si128(reinterpret_cast<const __m128i*>(CONSTANTS + 4 * four));
#pragma GCC unroll 3
            for (int n = 0; n < N; n++) {
                __m128i& current = words[n][four % 4];
                if (four >= 4) {
                    const __m128i last = words[n][(four + 3) % 4];
                    const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(current, words[n][(four + 1) % 4]),
                                                      _mm_alignr_epi8(last, words[n][(four + 2) % 4], 4));
                    current = _mm_sha256msg2_epu32(sum, last);
                }
                const __m128i input = _mm_add_epi32(current, constants);
                cdgh[n] = _mm_sha256rnds2_epu32(cdgh[n], abef[n], input);
                abef[n] = _mm_sha256rnds2_epu32(abef[n], cdgh[n], _mm_shuffle_epi32(input, 0x0E));
            }
        }
        for (int n = 0; n < N; n++) {
            abef[n] = _mm_add_epi32(abef[n], abef_before[n]);
            cdgh[n] = _mm_add_epi32(cdgh[n], cdgh_before[n]);
        }
    }
    for (int n = 0; n < N; n++) {
        const __m128i low = _mm_shuffle_epi32(abef[n], 0x1B), high = _mm_shuffle_epi32(cdgh[n], 0xB1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(states[n]), _mm_blend_epi16(low, high, 0xF0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(states[n] + 4), _mm_alignr_epi8(high, low, 8));
    }
}

}  // namespace

bool has_sha256() {
    unsigned a, b, c, d;
    const bool has_shuffles = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_SSSE3) && (c & bit_SSE4_1);
    return has_shuffles && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA);
}

void hash_side_by_side(uint32_t* const* states, const uint8_t* const* data, int64_t num_streams, int64_t num_blocks) {
    if (num_streams == 1) hash_blocks<1>(states, data, num_blocks);
    if (num_streams == 2) hash_blocks<2>(states, data, num_blocks);
    if (num_streams == 3) hash_blocks<3>(states, data, num_blocks);
}

#else

bool has_sha256() { return false; }
void hash_side_by_side(uint32_t* const*, const uint8_t* const*, int64_t, int64_t) {}

#endif
