// The tiles of `packed_product.cpp` for AVX2: the same panels, read by registers of 8 outputs, 16 of them.
//
// There are not enough registers for the sums of a whole panel times several rows. So a panel is taken in strips, and
// the columns in runs of at most RUN, a few KiB of codes that the first strip brings into the nearest cache for all:
//
//     run 0: strip 0, strip 1, ...    run 1: strip 0, strip 1, ...      (a strip: 8 registers of outputs for one row,
//                                                                         4 for two or three, 2 for four to six)
//
// Exact products are of bytes, too, three or four digits to a number (`digits_of_row`), where there is `vpdpbusd`. Else
// they are of float32, as there is no dot product of bfloat16. A code is used where it lies: the mask of its
// bits leaves code * 2^p, with p the place of its lowest bit, which float32 holds exactly, and the activation it meets
// has been multiplied by 2^-p. Per register of codes that is a mask, a subtraction (the offset), a conversion and a
// multiplication with addition. Inputs of every type become float32, so float32 ones cost no more than others.
//
// Bytes: `vpdpbusd`, where the processor has it for 256 bits (AVX-VNNI), else two steps: `vpmaddubsw`
// adds two products of unsigned and signed bytes to 16 bits, which `vpmaddwd` by ones adds in pairs to 32 bits. The
// first saturates, INT4 never reaches that (15 * 127 * 2 = 3,810). INT8 codes with their offset would
// (255 * 127 * 2 = 64,770), so there the code's sign goes to the activation: 128 * 127 * 2 = 32,512 < 32,768. A digit
// can be -128, for which that would not do (-128 has no opposite, and 128 * 128 * 2 is too large).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.h"

namespace {

constexpr int ROWS = 6;                // rows of a tile: two registers of outputs each, 12 sums of 16 registers
constexpr int RUN = 256;               // columns of codes: 8 KiB of INT4, 16 of INT8
constexpr bool WIDENS = false;         // decoding costs so little here that forming a panel first would gain nothing
constexpr bool DEFERS_SCALES = false;  // nor would this: a block of 256 columns costs one more product per output
constexpr int EXACT_BYTES = 4;         // of an activation ready for exact products

inline int parts_of(int) { return 1; }  // a number is one float32
inline bool is_read_in_place(const Weight&, int) { return false; }
inline void widen_panel(const uint32_t*, int64_t, uint32_t*) {}

constexpr int strip_of(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

// Where the code of column k of a step has its lowest bit.
constexpr int place_of(int k, int bits) { return 16 * (k % 2) + bits * (k / 2); }

// One row as float32, each number divided by 2^p of the code that it meets.
void split_row(const Weight& w, const void* x, int64_t start, int type, int, char* to, int64_t) {
  float share[LANES];
  for (int k = 0; k < LANES; ++k) share[k] = 1.0f / static_cast<float>(1u << place_of(k % (32 / w.bits), w.bits));
  const Floats shares = masked_floats(share, LANES);
  for (int64_t k = 0; k < w.inputs; k += LANES)
    store_floats(reinterpret_cast<float*>(to) + k, LANES, load(x, start + k, first(w.inputs - k), type) * shares);
}

// result += sum * scale [+ zero * total], for one row and 8 outputs.
inline void add_scaled(const Weight& w, int64_t place, Floats sum, float factor, float total, float* result) {
  Floats now = fma(sum, halves_at(w.scale + place) * all(factor), masked_floats(result, LANES));
  if (w.zero) now = fma(halves_at(w.zero + place), all(total), now);
  store_floats(result, LANES, now);
}

template <int BITS, int COUNT>
void widened_tile(const Weight& w, const uint32_t* words, int64_t panel, const Activations& x, int64_t row,
                      float (*out)[PANEL]) {
  constexpr int STRIP = strip_of(COUNT), WIDTH = 32 / BITS;
  const int64_t steps = steps_of(w), groups = groups_of(w), row_floats = x.row_bytes / 4;
  const int64_t run_steps = (w.group ? w.group : RUN) / WIDTH;
  const float* data = reinterpret_cast<const float*>(x.data) + row * row_floats;
  for (int64_t begin = 0, g = 0; begin < steps; begin += run_steps, g += w.group != 0) {
    const int64_t end = std::min(begin + run_steps, steps), place = (panel * groups + g) * PANEL;
    for (int o = 0; o < PANEL; o += STRIP * LANES) {
      Floats sum[COUNT][STRIP];
      EACH(i, COUNT * STRIP) sum[i / STRIP][i % STRIP] = all(0.0f); END;
      for (int64_t step = begin; step < end; ++step) {
        const uint32_t* from = words + step * PANEL + o;
        const float* at = data + step * WIDTH;
        EACH(k, WIDTH)
          constexpr int p = place_of(k, BITS);
          const Words mask = all_words(((1u << BITS) - 1) << p), offset = all_words(1u << (BITS - 1) << p);
          Floats weight[STRIP];
          EACH(n, STRIP)
            if (k == 0 && n % 2 == 0) FETCH_FROM(from + n * LANES);
            weight[n] = as_floats(less(both(words_at(from + n * LANES), mask), offset));
          END;
          EACH(r, COUNT)
            const Floats number = all(at[r * row_floats + k]);
            EACH(n, STRIP) sum[r][n] = fma(weight[n], number, sum[r][n]); END;
          END;
        END;
      }
      EACH(i, COUNT * STRIP)
        constexpr int r = i / STRIP, n = i % STRIP;
        const float total = w.zero ? x.total[(row + r) * x.blocks + g] : 0.0f;
        add_scaled(w, place + o + n * LANES, sum[r][n], 1.0f, total, out[r] + o + n * LANES);
      END;
    }
  }
}

// Sums under the very type of 32-bit integers: as Words, GCC 12 moves them to memory and back.
using Ints = int __attribute__((vector_size(32)));

#ifdef __AVXVNNI__
constexpr bool HAS_DOT = true;
inline __attribute__((always_inline)) Ints dot_bytes(Ints sum, Words weight, Words four) {
  return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<Words>(sum), weight, four));
}
#else
constexpr bool HAS_DOT = false;
inline __attribute__((always_inline)) Ints dot_bytes(Ints sum, Words weight, Words four) {
  const Words pairs = _mm256_maddubs_epi16(weight, four);
  return sum + reinterpret_cast<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// See `byte_tile` in packed_product.cpp for the offset, which sums begin with. SIGNED: codes without it.
template <int BITS, int COUNT, bool>
void byte_tile(const Weight& w, const uint32_t* words, int64_t panel, const Activations& x, int64_t row,
                  float (*out)[PANEL]) {
  constexpr int STRIP = strip_of(COUNT);
  constexpr bool SIGNED = BITS == 8 && !HAS_DOT;
  const Words low = all_words(0x0F0F0F0F), signs = all_words(0x80808080);
  const int64_t steps = steps_of(w), groups = groups_of(w), block_steps = x.block * BITS / 32, row_bytes = x.row_bytes;
  const char* data = x.data + row * row_bytes;
  for (int64_t b = 0, begin = 0; b < x.blocks; ++b, begin += block_steps) {
    const int64_t end = std::min(begin + block_steps, steps), place = (panel * groups + (groups > 1 ? b : 0)) * PANEL;
    for (int o = 0; o < PANEL; o += STRIP * LANES) {
      Ints sum[COUNT][STRIP];
      EACH(r, COUNT)
        const Ints start = Ints{} - (1 << (BITS - 1)) * (SIGNED ? 0 : x.sum[(row + r) * x.blocks + b]);
        EACH(n, STRIP) sum[r][n] = start; END;
      END;
      for (int64_t step = begin; step < end; ++step) {
        const uint32_t* from = words + step * PANEL + o;
        const char* at = data + step * (32 / BITS);
        EACH(s, 8 / BITS)  // INT4: the lower half of every byte, then the upper one
          Words weight[STRIP];
          EACH(n, STRIP)
            if (s == 0 && n % 2 == 0) FETCH_FROM(from + n * LANES);
            weight[n] = words_at(from + n * LANES);
            if (s == 1) weight[n] = _mm256_srli_epi16(weight[n], 4);
            if (BITS == 4) weight[n] = both(weight[n], low);
            if (SIGNED) weight[n] = _mm256_xor_si256(weight[n], signs);
          END;
          EACH(r, COUNT)
            int32_t four;
            std::memcpy(&four, at + r * row_bytes + 4 * s, 4);
            const Words codes = all_words(four);
            EACH(n, STRIP)
              sum[r][n] = SIGNED ? dot_bytes(sum[r][n], _mm256_abs_epi8(weight[n]), _mm256_sign_epi8(codes, weight[n]))
                                 : dot_bytes(sum[r][n], weight[n], codes);
            END;
          END;
        END;
      }
      EACH(i, COUNT * STRIP)
        constexpr int r = i / STRIP, n = i % STRIP;
        const int64_t entry = (row + r) * x.blocks + b;
        const Floats exact = as_floats(reinterpret_cast<Words>(sum[r][n]));
        add_scaled(w, place + o + n * LANES, exact, x.scale[entry], x.total[entry], out[r] + o + n * LANES);
      END;
    }
  }
}

// Exact products by digits (`digits_of_row`) need `vpdpbusd`. In its two steps they would gain 6 % for one row of INT4 and
// take 1.5 times as long from four rows on; for INT8 a digit can be -128 (see above). One way for any number of rows,
// as a row's result must not depend on how many there are.
bool products_by_digits() { return HAS_DOT; }

inline int products() { return 3; }

}  // namespace
