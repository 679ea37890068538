// A few rows of activations times a bfloat16 weight as it lies in memory: the head, and layers left unquantized.
//
// With few rows the time is that of reading the weight once. It is not packed (it would take memory and a pass over
// gigabytes at every start), so an output is a dot product along its row of the weight: LANES pairs of columns per
// load, LANES partial sums in a vector, added up at the end.

#include "activations.h"

namespace {

// Outputs computed at once: the processor fetches four streams from memory ahead, and every load of an activation
// serves four outputs. With four rows: 16 sums, 4 weights and an activation in 32 registers; AVX2 has 16 of them.
constexpr int OUTPUTS = 4;
constexpr int ROWS = LANES == 16 ? 4 : 2;

// One tile: OUTPUTS rows of the weight (the last one repeated where there are fewer) with COUNT rows of activations.
template <int COUNT>
void dot_tile(const uint16_t* const (&weight)[OUTPUTS], const uint16_t* x, int64_t inputs, float (*out)[OUTPUTS]) {
  Floats sum[COUNT][OUTPUTS];
  EACH(i, COUNT * OUTPUTS) sum[i / OUTPUTS][i % OUTPUTS] = all(0.0f); END;
  for (int64_t k = 0; k < inputs; k += 2 * LANES) {
    Words columns[OUTPUTS];
    EACH(o, OUTPUTS) columns[o] = pairs_at(weight[o] + k, inputs - k); END;
    EACH(r, COUNT)
      const Words row = pairs_at(x + r * inputs + k, inputs - k);
      EACH(o, OUTPUTS) sum[r][o] = dot_pairs(sum[r][o], columns[o], row); END;
    END;
  }
  EACH(i, COUNT * OUTPUTS) out[i / OUTPUTS][i % OUTPUTS] = added(sum[i / OUTPUTS][i % OUTPUTS]); END;
}

// One function per number of rows, as a number known to the compiler keeps the sums in registers.
using Tile = void (*)(const uint16_t* const (&)[OUTPUTS], const uint16_t*, int64_t, float (*)[OUTPUTS]);
template <int... I>
Tile tile_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr Tile tiles[] = {dot_tile<I + 1>...};
  return tiles[rows - 1];
}

float as_float(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

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
      tile_for(count, std::make_integer_sequence<int, ROWS>{})(from, x + row * inputs, inputs, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = 0; i < OUTPUTS && o + i < outputs; ++i) {
          const Floats number = all(sums[r][i] + (bias ? as_float(bias[o + i]) : 0.0f));
          store(out, (row + r) * outputs + o + i, first(1), BFLOAT16, number);
        }
    }
  }
}
