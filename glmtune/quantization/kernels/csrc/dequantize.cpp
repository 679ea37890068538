// Codes back to floating point, for PyTorch's products of whole matrices.
//
// The result is transposed ([inputs, outputs]): a panel has its outputs side by side, so 16 of them are written with
// one store, and a product of matrices reads either order equally well. Numbers are those of the plain path, bit for
// bit: code * scale is exact in float32 (8 and 11 bits), so it makes no difference if the compiler fuses it with the
// addition of the zero point.

#include "activations.h"

namespace {

// Codes of column k of a step for 16 outputs, see `packed_product.cpp` for their place.
__m512 codes_at(const uint32_t* words, int64_t k, int64_t bits) {
  const __m512i code = _mm512_srl_epi32(_mm512_loadu_si512(words), _mm_cvtsi64_si128(16 * (k % 2) + bits * (k / 2)));
  const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), offset = _mm512_set1_epi32(1 << (bits - 1));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(code, mask), offset));
}

}  // namespace

extern "C" {

// out [inputs, 64 * count] of `type`: the weight of `count` panels from `first` on, transposed.
void glmtune_dequantize(const Weight* weight, int64_t first, int64_t count, int type, void* out, int threads) {
  const Weight& w = *weight;
  const int64_t steps = steps_of(w), width = columns_of_step(w), groups = groups_of(w);
#pragma omp parallel for num_threads(threads)
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t column = step * width, group = w.group ? column / w.group : 0;
    for (int64_t panel = 0; panel < count; ++panel)
      for (int64_t o = 0; o < PANEL; o += 16) {
        const uint32_t* words = w.words + ((first + panel) * steps + step) * PANEL + o;
        const int64_t place = ((first + panel) * groups + group) * PANEL + o;
        const __m512 scale = halves_at(w.scale + place);
        const __m512 zero = w.zero ? halves_at(w.zero + place) : _mm512_setzero_ps();
        for (int64_t k = 0; k < width && column + k < w.inputs; ++k) {
          const __m512 number = _mm512_add_ps(_mm512_mul_ps(codes_at(words, k, w.bits), scale), zero);
          store(out, (column + k) * count * PANEL + panel * PANEL + o, 0xFFFF, type, number);
        }
      }
  }
}

}  // extern "C"
