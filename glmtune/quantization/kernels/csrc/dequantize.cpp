// Codes back to floating point, for PyTorch's products of whole matrices.
//
// The result is transposed ([inputs, outputs]): a panel has its outputs side by side, so a vector of them is written
// with one store, and a product of matrices reads either order equally well. Numbers are those of the plain path, bit
// for bit: code * scale is exact in float32 (8 and 11 bits), so it makes no difference if the compiler fuses it with the
// addition of the zero point.

#include "activations.h"

namespace {

// Codes of column k of a step for LANES outputs, see `packed_product.cpp` for their place.
Floats codes_at(const uint32_t* words, int64_t k, int64_t bits) {
  const Words code = shifted_down(words_at(words), 16 * (k % 2) + bits * (k / 2));
  return as_floats(less(both(code, all_words((1u << bits) - 1)), all_words(1u << (bits - 1))));
}

}  // namespace

extern "C" {

// out [inputs, 64 * count] of `type`: the weight of `count` panels from `start` on, transposed.
void glmtune_dequantize(const Weight* weight, int64_t start, int64_t count, int type, void* out, int threads) {
  const Weight& w = *weight;
  const int64_t steps = steps_of(w), width = columns_of_step(w), groups = groups_of(w);
#pragma omp parallel for num_threads(threads)
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t column = step * width, group = w.group ? column / w.group : 0;
    for (int64_t panel = 0; panel < count; ++panel)
      for (int64_t o = 0; o < PANEL; o += LANES) {
        const uint32_t* words = w.words + ((start + panel) * steps + step) * PANEL + o;
        const int64_t place = ((start + panel) * groups + group) * PANEL + o;
        const Floats scale = halves_at(w.scale + place);
        const Floats zero = w.zero ? halves_at(w.zero + place) : all(0.0f);
        for (int64_t k = 0; k < width && column + k < w.inputs; ++k) {
          const Floats number = codes_at(words, k, w.bits) * scale + zero;
          store(out, (column + k) * count * PANEL + panel * PANEL + o, first(LANES), type, number);
        }
      }
  }
}

}  // extern "C"
