// AVX-512: registers of 512 bits, masks for what is beyond the end. See `vectors.h`.
#pragma once

namespace {

constexpr int LANES = 16;
using Floats = __m512;
using Words = __m512i;
using Halves = __m256i;
using Mask = __mmask16;
using Flags = __mmask16;

inline Mask first(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Flags not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
inline float added(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_lane(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

inline Words all_words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Words words_at(const uint32_t* from) { return _mm512_loadu_si512(from); }
inline Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words less(Words a, Words b) { return _mm512_sub_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words shifted_down(Words x, int64_t by) { return _mm512_srl_epi32(x, _mm_cvtsi64_si128(by)); }
inline Words signed_byte(Words x) { return _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24); }  // the lowest
inline Words without_byte(Words x) { return _mm512_srai_epi32(x, 8); }
inline int32_t added_words(Words x) { return _mm512_reduce_add_epi32(x); }
inline Words nearest(Floats x) { return _mm512_cvtps_epi32(x); }
inline Floats as_floats(Words x) { return _mm512_cvtepi32_ps(x); }

// LANES integers as bytes, those within 16 put in the order given.
inline void store_bytes(int8_t* to, Words x, __m128i order) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(x), order));
}

inline Floats masked_floats(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline Halves masked_halves(const uint16_t* from, Mask mask) { return _mm256_maskz_loadu_epi16(mask, from); }
inline void store_floats(float* to, Mask mask, Floats x) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store_halves(uint16_t* to, Mask mask, Halves x) { _mm256_mask_storeu_epi16(to, mask, x); }

inline Floats from_float16(Halves x) { return _mm512_cvtph_ps(x); }
inline Halves to_float16(Floats x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

// bfloat16 is the upper half of a float32: widening is a shift.
inline Floats widened(Halves bfloat16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}

// To bfloat16, to nearest even, as PyTorch rounds: adding 0x7FFF, and one more if the bit that will be the last is odd,
// carries into the upper half exactly where rounding goes up. NaN is set apart: the sum could carry it to infinity.
inline Halves narrowed(Floats x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// 2 * LANES numbers of bfloat16, zeros from `count` on.
inline Words pairs_at(const uint16_t* from, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, from);
}

// sum += a * b for 16 pairs of bfloat16. Without the instruction, a product of two bfloat16 is still exact in float32.
#ifdef __AVX512BF16__
inline Floats dot_pairs(Floats sum, Words a, Words b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
inline Floats dot_pairs(Floats sum, Words a, Words b) {
  const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
  auto low = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  auto high = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper)); };
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
}
#endif

}  // namespace
