// What the products work on: the packed weight, activations made ready for them, and small parts of both.
//
// Vectors are 512 bits: 16 numbers of float32 or, for the dot products, 16 pairs of bfloat16 or 16 times four bytes.
// Everything that is not bfloat16 arithmetic or a dot product of bytes is done in float32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <utility>

// Repeated by hand in Python: DTYPE_NUMBERS in packed.py, Weight in native.py.
enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Weight {
  uint32_t* words;        // [panels, steps, 64]
  const uint16_t* scale;  // float16 [panels, groups, 64]
  const uint16_t* zero;   // the same, or null
  int64_t outputs, inputs;
  int64_t group;  // columns that share a scale, a multiple of 32; 0: the whole row
  int64_t bits;
};

namespace {

constexpr int PANEL = 64;  // outputs of a panel: four vectors of 16 float32 sums

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }
int64_t columns_of_step(const Weight& w) { return 32 / w.bits; }
int64_t steps_of(const Weight& w) { return ceil_div(w.inputs, columns_of_step(w)); }
int64_t panels_of(const Weight& w) { return ceil_div(w.outputs, PANEL); }
int64_t groups_of(const Weight& w) { return w.group ? ceil_div(w.inputs, w.group) : 1; }

// --- loops ---------------------------------------------------------------------------------------------------

// Calls f(0) ... f(N - 1) with constants, a loop that is always unrolled. An array of vectors stays in registers only
// if every index into it is a constant; a sum in memory costs a load and a store per multiplication.
template <int... I, class F>
inline __attribute__((always_inline)) void each(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
#define EACH(i, count) each(std::make_integer_sequence<int, count>{}, [&](auto i) __attribute__((always_inline)) {
#define END \
  })

// With few rows the time is that of reading the weight from memory. The processor fetches ahead by itself, but not across
// a page of 4 KiB, so every page would begin with a wait. Asked for this many bytes ahead, the next page is on its way
// into the second-level cache by then: 33 GB/s instead of 22 on two cores that read 34 at most.
// A macro: GCC takes a function that only prefetches for one without effect, and drops its calls.
constexpr int FETCH_AHEAD = 4096;
#define FETCH_FROM(place) _mm_prefetch(reinterpret_cast<const char*>(place) + FETCH_AHEAD, _MM_HINT_T1)

// --- numbers in and out -----------------------------------------------------------------------------------

// bfloat16 is the upper half of a float32: widening is a shift.
__m512 widened(__m256i bfloat16s) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16s), 16));
}

// To bfloat16, to nearest even, as PyTorch rounds: adding 0x7FFF, and one more if the bit that will be the last is odd,
// carries into the upper half exactly where rounding goes up. NaN is set apart: the sum could carry it to infinity.
__m256i narrowed(__m512 x) {
  __m512i bits = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

__mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

__m512 load(const void* from, int64_t at, __mmask16 mask, int type) {
  if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
  __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  return type == BFLOAT16 ? widened(halves) : _mm512_cvtph_ps(halves);
}

void store(void* to, int64_t at, __mmask16 mask, int type, __m512 x) {
  if (type == FLOAT32) return _mm512_mask_storeu_ps(static_cast<float*>(to) + at, mask, x);
  __m256i halves = type == BFLOAT16 ? narrowed(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + at, mask, halves);
}

__m512 halves_at(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// sum += a * b for 16 pairs of bfloat16. Without the instruction, a product of two bfloat16 is still exact in float32.
#ifdef __AVX512BF16__
__m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
__m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
  const __m512i upper = _mm512_set1_epi32(0xFFFF0000);
  auto low = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
  auto high = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, upper)); };
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), sum));
}
#endif

// x / (1 + exp(-x)). exp(-x) = 2^y with y = -x / ln 2; y = n + f with n an integer and |f| <= 1/2. 2^n goes into the
// exponent, 2^f is its Taylor series, (ln 2)^i / i! from i = 6 down to 0: off by 1e-7, less than float32 rounds. y is
// kept within what the exponent holds; beyond, silu(x) is x, or below 1e-34.
__m512 silu(__m512 x) {
  __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  y = _mm512_max_ps(_mm512_min_ps(y, _mm512_set1_ps(126.0f)), _mm512_set1_ps(-126.0f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = _mm512_sub_ps(y, n);
  __m512 power = _mm512_set1_ps(1.54035304e-4f);
  for (float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(term));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(power, n)));
}

// --- activations ------------------------------------------------------------------------------------------

// Rows ready for the tiles.
struct Activations {
  const char* data;
  int64_t row_bytes;
  int64_t block;       // columns that share a sum (and, rounded, a scale)
  int64_t blocks;
  const float* scale;  // [rows, blocks], rounded only
  const float* total;  // [rows, blocks]: sum of the numbers; null where nothing needs it
  const int32_t* sum;  // [rows, blocks]: sum of the codes, rounded only
};

// The bytes of a row in the order in which `vpdpbusd` meets the columns, which is that of the bits of a word (see
// packed_product.cpp). INT8: columns 0 2 1 3. INT4, lower halves of the four bytes first: 0 4 1 5, then 2 6 3 7.
__m128i order_of_bytes(const Weight& w) {
  return w.bits == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                     : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
}

// The largest magnitude of some columns; NaN if one is infinite or NaN, so that a row with such a number becomes NaN.
float largest_of(const void* x, int64_t from, int64_t to, int type) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 not_finite = 0;
  for (int64_t k = from; k < to; k += 16) {
    const __m512 size = _mm512_abs_ps(load(x, k, first(to - k), type));
    not_finite |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(FLT_MAX), _CMP_NLE_UQ);
    largest = _mm512_max_ps(largest, size);
  }
  return not_finite ? NAN : _mm512_reduce_max_ps(largest);
}

// Where a row of bytes goes, and what belongs to its blocks: `sum` and `total` are what the offset of the weight's codes
// and the zero points multiply, both for all columns of a block alike.
struct Bytes {
  int8_t* codes;
  float *scale, *total;
  int32_t* sum;

  void finish_block(int64_t b, float unit, __m512i counted) const {
    scale[b] = unit;
    sum[b] = _mm512_reduce_add_epi32(counted);
    total[b] = unit * static_cast<float>(sum[b]);
  }
};

// Round one row to INT8, a scale per block: code = x * (127 / largest magnitude). The same operations in the same
// order as `round_activations` in primitives.py, which tests compare it with.
void round_row(const Weight& w, const void* x, int64_t start, int type, int64_t block, const Bytes& to) {
  const __m128i order = order_of_bytes(w);
  for (int64_t from = 0, b = 0; from < w.inputs; from += block, ++b) {
    const int64_t end = std::min(from + block, w.inputs);
    const float most = largest_of(x, start + from, start + end, type);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m512i counted = _mm512_setzero_si512();
    for (int64_t k = from; k < end; k += 16) {
      __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, start + k, first(end - k), type), inverse));
      counted = _mm512_add_epi32(counted, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to.codes + k), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(code), order));
    }
    to.finish_block(b, most / 127.0f, counted);
  }
}

// Write one row as integers of some bytes, the lowest first, each byte a row of its own: x = unit * (d0 + 256 d1 + 65536 d2
// ...) with digits from -128 to 127 and a unit per block, a power of two. Integers have two bits less than their bytes, so
// the last digit is at most 64. With three bytes a bfloat16 (8 bits) is exact unless it is below 2^-14 of the largest of
// its block, and what is lost of others is below 2^-23 of that one, where a sum in float32 rounds, too. float32 has 24
// bits of its own and takes four.
constexpr int MOST_DIGITS = 4;
int digits_for(int type) { return type == FLOAT32 ? 4 : 3; }

template <class F>  // a digit's number to its `Bytes`
void digits_of_row(const Weight& w, const void* x, int64_t start, int type, int64_t block, F to) {
  const int digits = digits_for(type), bits = 8 * digits - 2;
  const __m128i order = order_of_bytes(w);
  for (int64_t from = 0, b = 0; from < w.inputs; from += block, ++b) {
    const int64_t end = std::min(from + block, w.inputs);
    const float most = largest_of(x, start + from, start + end, type);
    int exponent = 0;
    std::frexp(most, &exponent);
    exponent = std::max(exponent, -80);  // 2^(bits - exponent) must not be infinite
    const __m512 inverse = _mm512_set1_ps(most > 0 ? std::ldexp(1.0f, bits - exponent) : 0.0f);
    float unit = std::isnan(most) ? most : std::ldexp(1.0f, exponent - bits);
    __m512i counted[MOST_DIGITS] = {};
    for (int64_t k = from; k < end; k += 16) {
      __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(load(x, start + k, first(end - k), type), inverse));
      for (int d = 0; d < digits; ++d) {
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);  // the lowest byte with its sign
        rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, digit), 8);
        counted[d] = _mm512_add_epi32(counted[d], digit);
        const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(digit), order);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to(d).codes + k), bytes);
      }
    }
    for (int d = 0; d < digits; ++d, unit *= 256) to(d).finish_block(b, unit, counted[d]);
  }
}

// Split one row into `parts` rows of bfloat16 whose sum it is (1 for bfloat16, 2 float16, 3 float32): bfloat16 has 8
// bits of mantissa, float16 11, float32 24. So inputs of any type have exact products with codes, by one kernel.
void split_row(const Weight& w, const void* x, int64_t start, int type, int parts, char* to, int64_t row_bytes) {
  for (int64_t k = 0; k < w.inputs; k += 16) {
    __m512 rest = load(x, start + k, first(w.inputs - k), type);
    for (int part = 0; part < parts; ++part) {
      __m256i piece = narrowed(rest);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * row_bytes + 2 * k), piece);
      rest = _mm512_sub_ps(rest, widened(piece));
    }
  }
}

// Sums of the inputs over each group: what zero points multiply.
void add_up_row(const Weight& w, const void* x, int64_t start, int type, float* total) {
  for (int64_t from = 0, g = 0; from < w.inputs; from += w.group, ++g) {
    __m512 sum = _mm512_setzero_ps();
    int64_t to = std::min(from + w.group, w.inputs);
    for (int64_t k = from; k < to; k += 16) sum = _mm512_add_ps(sum, load(x, start + k, first(to - k), type));
    total[g] = _mm512_reduce_add_ps(sum);
  }
}

}  // namespace
