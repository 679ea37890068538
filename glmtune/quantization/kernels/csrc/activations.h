// What the products work on: the packed weight, and activations made ready for them.
//
// Everything that is not bfloat16 arithmetic or a dot product of bytes is done in float32.
#pragma once

#include <algorithm>
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

// Round one row to INT8, a scale per block: code = x * (127 / largest magnitude). The same operations in the same
// order as `round_activations` in primitives.py, which tests compare it with. `sum` and `total` are what the offset of
// the weight's codes and the zero points multiply: both belong to all columns of a block alike.
void round_row(const Weight& w, const void* x, int64_t start, int type, int64_t block, int8_t* codes, float* scale,
               float* total, int32_t* sum) {
  // Bytes in the order in which a product of bytes meets the columns, which is that of the bits of a word (see
  // packed_product.cpp). INT8: columns 0 2 1 3. INT4, lower halves of the four bytes first: 0 4 1 5, then 2 6 3 7.
  const __m128i order = w.bits == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                    : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  for (int64_t from = 0, b = 0; from < w.inputs; from += block, ++b) {
    int64_t to = std::min(from + block, w.inputs);
    Floats largest = all(0.0f);
    for (int64_t k = from; k < to; k += LANES)
      largest = larger(largest, magnitude(load(x, start + k, first(to - k), type)));
    float most = largest_of(largest);
    Floats inverse = all(most > 0 ? 127.0f / most : 0.0f);
    Words counted = all_words(0);
    for (int64_t k = from; k < to; k += LANES) {
      const Words code = nearest(load(x, start + k, first(to - k), type) * inverse);
      counted = add_words(counted, code);
      store_bytes(codes + k, code, order);
    }
    scale[b] = most / 127.0f;
    sum[b] = added_words(counted);
    total[b] = scale[b] * static_cast<float>(sum[b]);
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
