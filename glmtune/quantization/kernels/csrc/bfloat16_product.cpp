// A few rows of activations times a bfloat16 weight as it lies in memory: the head, and layers left unquantized.
//
// With few rows the time is that of reading the weight once. It is not packed (it would take memory and a pass over
// gigabytes at every start), so an output is a dot product along its row of the weight: 32 columns per load, 16 partial
// sums in a vector, added up at the end.

#include "activations.h"

namespace {

// Outputs computed at once: the processor fetches four streams from memory ahead, and every load of an activation
// serves four outputs. With four rows: 16 sums, 4 weights and an activation in 32 registers.
constexpr int OUTPUTS = 4;
constexpr int ROWS = 4;

// One tile: OUTPUTS rows of the weight (the last one repeated where there are fewer) with COUNT rows of activations.
template <int COUNT>
void dot_tile(const uint16_t* const (&weight)[OUTPUTS], const uint16_t* x, int64_t inputs, float (*out)[OUTPUTS]) {
  __m512 sum[COUNT][OUTPUTS];
  EACH(i, COUNT * OUTPUTS) sum[i / OUTPUTS][i % OUTPUTS] = _mm512_setzero_ps(); END;
  for (int64_t k = 0; k < inputs; k += 32) {
    const __mmask32 there = inputs - k >= 32 ? ~0u : (1u << (inputs - k)) - 1;
    __m512i columns[OUTPUTS];
    EACH(o, OUTPUTS) columns[o] = _mm512_maskz_loadu_epi16(there, weight[o] + k); END;
    EACH(r, COUNT)
      const __m512i row = _mm512_maskz_loadu_epi16(there, x + r * inputs + k);
      EACH(o, OUTPUTS) sum[r][o] = dot_pairs(sum[r][o], columns[o], row); END;
    END;
  }
  EACH(i, COUNT * OUTPUTS) out[i / OUTPUTS][i % OUTPUTS] = _mm512_reduce_add_ps(sum[i / OUTPUTS][i % OUTPUTS]); END;
}

// One function per number of rows, as a number known to the compiler keeps the sums in registers.
using Tile = void (*)(const uint16_t* const (&)[OUTPUTS], const uint16_t*, int64_t, float (*)[OUTPUTS]);
constexpr Tile TILES[ROWS] = {dot_tile<1>, dot_tile<2>, dot_tile<3>, dot_tile<4>};

float as_float(uint16_t bfloat16) { return _mm512_cvtss_f32(widened(_mm256_set1_epi16(bfloat16))); }

}  // namespace

// out [rows, outputs] = x [rows, inputs] @ weight [outputs, inputs].T + bias (null: 0), all bfloat16 and contiguous.
extern "C" void glmtune_bfloat16_product(const uint16_t* weight, const uint16_t* bias, int64_t outputs, int64_t inputs,
                                         const uint16_t* x, int64_t rows, uint16_t* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t o = 0; o < outputs; o += OUTPUTS) {
    const uint16_t* from[OUTPUTS];
    for (int i = 0; i < OUTPUTS; ++i) from[i] = weight + std::min(o + i, outputs - 1) * inputs;
    for (int64_t row = 0; row < rows; row += ROWS) {
      float sums[ROWS][OUTPUTS];
      const int64_t count = std::min<int64_t>(ROWS, rows - row);
      TILES[count - 1](from, x + row * inputs, inputs, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < OUTPUTS && o + i < outputs; ++i) {
          const __m512 number = _mm512_set1_ps(sums[r][i] + (bias ? as_float(bias[o + i]) : 0.0f));
          store(out, (row + r) * outputs + o + i, 1, BFLOAT16, number);
        }
    }
  }
}
