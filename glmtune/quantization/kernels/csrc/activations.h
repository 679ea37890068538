// What the products work on: the packed weight, and activations made ready for them.
//
// Everything that is not bfloat16 arithmetic or a dot product of bytes is done in float32.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "vectors.h"

// Repeated by hand in Python: Weight in native.py.
struct Weight {
  uint32_t* words;        // [panels, steps, 64]
  const uint16_t* scale;  // float16 [panels, groups, 64]
  const uint16_t* zero;   // the same, or null
  int64_t outputs, inputs;
  int64_t group;  // columns that share a scale, a multiple of 32; 0: the whole row
  int64_t bits;
};

namespace {

constexpr int PANEL = 64;  // outputs of a panel

inline int64_t ceil_div(int64_t number, int64_t by) { return (number + by - 1) / by; }
int64_t columns_of_step(const Weight& w) { return 32 / w.bits; }
int64_t steps_of(const Weight& w) { return ceil_div(w.inputs, columns_of_step(w)); }
int64_t panels_of(const Weight& w) { return ceil_div(w.outputs, PANEL); }
int64_t groups_of(const Weight& w) { return w.group ? ceil_div(w.inputs, w.group) : 1; }

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
  Floats largest = all(0.0f);
  Flags not_finite = 0;
  for (int64_t k = from; k < to; k += LANES) {
    const Floats size = magnitude(load(x, k, first(to - k), type));
    not_finite |= not_at_most(size, all(FLT_MAX));
    largest = larger(largest, size);
  }
  return not_finite ? NAN : largest_lane(largest);
}

// Where a row of bytes goes, and what belongs to its blocks: `sum` and `total` are what the offset of the weight's codes
// and the zero points multiply, both for all columns of a block alike.
struct Bytes {
  int8_t* codes;
  float *scale, *total;
  int32_t* sum;

  void finish_block(int64_t b, float unit, Words counted) const {
    scale[b] = unit;
    sum[b] = added_words(counted);
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
    const Floats inverse = all(most > 0 ? 127.0f / most : 0.0f);
    Words counted = all_words(0);
    for (int64_t k = from; k < end; k += LANES) {
      const Words code = nearest(load(x, start + k, first(end - k), type) * inverse);
      counted = add_words(counted, code);
      store_bytes(to.codes + k, code, order);
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
    const Floats inverse = all(most > 0 ? std::ldexp(1.0f, bits - exponent) : 0.0f);
    float unit = std::isnan(most) ? most : std::ldexp(1.0f, exponent - bits);
    Words counted[MOST_DIGITS] = {};
    for (int64_t k = from; k < end; k += LANES) {
      Words rest = nearest(load(x, start + k, first(end - k), type) * inverse);
      for (int d = 0; d < digits; ++d) {
        const Words digit = signed_byte(rest);  // the lowest byte with its sign
        rest = without_byte(less(rest, digit));
        counted[d] = add_words(counted[d], digit);
        store_bytes(to(d).codes + k, digit, order);
      }
    }
    for (int d = 0; d < digits; ++d, unit *= 256) to(d).finish_block(b, unit, counted[d]);
  }
}

// Sums of the inputs over each group: what zero points multiply.
void add_up_row(const Weight& w, const void* x, int64_t start, int type, float* total) {
  for (int64_t from = 0, g = 0; from < w.inputs; from += w.group, ++g) {
    Floats sum = all(0.0f);
    int64_t to = std::min(from + w.group, w.inputs);
    for (int64_t k = from; k < to; k += LANES) sum = sum + load(x, start + k, first(to - k), type);
    total[g] = added(sum);
  }
}

}  // namespace
