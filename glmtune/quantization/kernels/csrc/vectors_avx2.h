// AVX2 (with FMA and F16C, as every processor with AVX2 but a few of VIA has them): registers of 256 bits. See
// `vectors.h`. There are masked loads of 32-bit numbers only, so what is beyond the end of 16-bit ones goes by a copy.
#pragma once

namespace {

constexpr int LANES = 8;
using Floats = __m256;
using Words = __m256i;
using Halves = __m128i;
using Mask = int;  // how many of the LANES are there
using Flags = int;

inline Mask first(int64_t count) { return count >= LANES ? LANES : count <= 0 ? 0 : static_cast<int>(count); }

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Floats whole(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Flags not_at_most(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }

inline float added(Floats x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

inline float largest_lane(Floats x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// x * 2^n for whole n from -126 to 126, whose float32 is n + 127 in the bits of the exponent.
inline Floats times_power_of_two(Floats x, Floats n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline Words all_words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Words words_at(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
inline Words less(Words a, Words b) { return _mm256_sub_epi32(a, b); }
inline Words both(Words a, Words b) { return _mm256_and_si256(a, b); }
inline Words shifted_down(Words x, int64_t by) { return _mm256_srl_epi32(x, _mm_cvtsi64_si128(by)); }
inline Words signed_byte(Words x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24); }  // the lowest
inline Words without_byte(Words x) { return _mm256_srai_epi32(x, 8); }
inline Words nearest(Floats x) { return _mm256_cvtps_epi32(x); }
inline Floats as_floats(Words x) { return _mm256_cvtepi32_ps(x); }

inline int32_t added_words(Words x) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

// LANES integers as bytes, those within 16 (so within 8) put in the order given.
inline void store_bytes(int8_t* to, Words x, __m128i order) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm_packs_epi16(halves, halves), order));
}

inline __m256i lanes_of(Mask count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Floats masked_floats(const float* from, Mask count) {
  return count == LANES ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, lanes_of(count));
}

inline void store_floats(float* to, Mask count, Floats x) {
  if (count == LANES) return _mm256_storeu_ps(to, x);
  _mm256_maskstore_ps(to, lanes_of(count), x);
}

inline Halves masked_halves(const uint16_t* from, Mask count) {
  if (count == LANES) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  uint16_t copied[LANES] = {};
  std::memcpy(copied, from, 2 * count);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(copied));
}

inline void store_halves(uint16_t* to, Mask count, Halves x) {
  uint16_t copied[LANES];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(count == LANES ? to : copied), x);
  if (count < LANES) std::memcpy(to, copied, 2 * count);
}

inline Floats from_float16(Halves x) { return _mm256_cvtph_ps(x); }
inline Halves to_float16(Floats x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

// bfloat16 is the upper half of a float32: widening is a shift.
inline Floats widened(Halves bfloat16s) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloat16s), 16));
}

// To bfloat16, to nearest even, as in `vectors_avx512.h`.
inline Halves narrowed(Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q), nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan);
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

// 2 * LANES numbers of bfloat16, zeros from `count` on.
inline Words pairs_at(const uint16_t* from, int64_t count) {
  if (count >= 2 * LANES) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  uint16_t copied[2 * LANES] = {};
  std::memcpy(copied, from, 2 * count);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(copied));
}

// sum += a * b for 8 pairs of bfloat16, whose products are exact in float32.
inline Floats dot_pairs(Floats sum, Words a, Words b) {
  const __m256i upper = _mm256_set1_epi32(0xFFFF0000);
  auto low = [](__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); };
  auto high = [&](__m256i x) { return _mm256_castsi256_ps(_mm256_and_si256(x, upper)); };
  return _mm256_fmadd_ps(high(a), high(b), _mm256_fmadd_ps(low(a), low(b), sum));
}

}  // namespace
