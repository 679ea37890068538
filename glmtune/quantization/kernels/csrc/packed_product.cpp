// Activations times INT4 or INT8 weights on a CPU with AVX-512 or AVX2, and the layout that makes it fast.
//
// A weight is packed once into panels of 64 outputs. A step is a run of neighbouring columns whose codes fill a
// 32-bit word per output: 8 columns of INT4, 4 of INT8. A panel holds its steps one after the other, a step the
// words of 64 outputs (a picture: kernels/packed.py). Codes are stored unsigned (code + 8, code + 128); the code of
// column 2t + h of a step lies at bit 16h + bits * t. So
//   - a shift brings the codes of columns 2t and 2t + 1 to the bottom of the two halves of every word, where
//     `vpermw` turns them into a pair of bfloat16 for `vdpbf16ps` (weight-only product, exact products); INT8
//     takes two shifts per pair, the upper four bits count sixteen;
//   - a mask leaves bytes for `vpdpbusd`: activations rounded to INT8 by blocks of columns, or, exactly, the digits of
//     integers that they are multiples of (`digits_of_row`), where that is the faster way.
// Both read the weight once per tile of up to ROWS rows, in registers; one row runs at the speed of memory.
//
// A tile is ROWS rows times a panel. Its sums stay in registers over all columns (AVX2: `tiles_avx2.h`):
//
//              weight: 4 vectors of 16 outputs      32 registers: 24 sums
//              [  n=0  ][  n=1  ][  n=2  ][  n=3  ]                4 weights
//     x row 0    sum00    sum01    sum02    sum03                  1 activation, broadcast
//       ...                                                        2 tables (or a mask)
//     x row 5    sum50    sum51    sum52    sum53
//
// Every weight vector, once decoded, serves six rows, and every broadcast activation four vectors; with fewer sums the
// loads would cost more than the products, with more they would spill into memory.
//
// Plain C interface, no PyTorch headers: it compiles in seconds and does not depend on PyTorch's version.

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "activations.h"

#ifndef HAS_AVX512
#include "tiles_avx2.h"
#endif

namespace {

constexpr int BLOCK = 256;  // columns of activations that share a scale where the weight has no groups (packed.py too)
constexpr int MANY_ROWS = 48;  // rows (8 tiles) from which INT8 codes are widened once instead of in every tile

#ifdef HAS_AVX512

constexpr int VECTORS = 4;   // registers of 16 outputs that make a panel
constexpr int ROWS = 6;      // rows of a tile: 24 accumulators of 32 registers
constexpr bool WIDENS = true;          // see MANY_ROWS
constexpr bool DEFERS_SCALES = true;   // see `byte_tile`
constexpr int EXACT_BYTES = 2;         // of an activation ready for exact products, a bfloat16

// Rows of bfloat16 that add up to a row of this type: bfloat16 has 8 bits of mantissa, float16 11, float32 24. So inputs
// of any type have exact products with codes, by one kernel.
int parts_of(int type) { return type == BFLOAT16 ? 1 : type == FLOAT16 ? 2 : 3; }

// bfloat16 rows of whole steps are read where they lie; all else is converted, with zeros beyond the last column, as a
// step or a vector may reach over it.
bool is_read_in_place(const Weight& w, int type) { return type == BFLOAT16 && w.inputs % columns_of_step(w) == 0; }

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

// --- tiles: `rows` rows times a panel ---------------------------------------------------------------------

// bfloat16 of (index - 8) * factor or index * factor for the 16 values of four bits, twice: `vpermw` looks at five.
__m512i table(int offset, int factor) {
  alignas(64) uint16_t entries[32];
  for (int i = 0; i < 32; ++i) {
    float value = static_cast<float>((i % 16 - offset) * factor);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    entries[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(entries);
}

int word_at(const char* from) {
  int word;
  std::memcpy(&word, from, 4);
  return word;
}

// result += sum * scale [+ zero * total], for one row and 16 outputs.
inline void add_scaled(const Weight& w, int64_t place, __m512 sum, float factor, float total, float* result) {
  __m512 scale = _mm512_mul_ps(halves_at(w.scale + place), _mm512_set1_ps(factor));
  __m512 all = _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(result));
  if (w.zero) all = _mm512_fmadd_ps(halves_at(w.zero + place), _mm512_set1_ps(total), all);
  _mm512_storeu_ps(result, all);
}

// Exact products of bfloat16: codes become such numbers (which hold them exactly) through a table of 16 entries in a
// register. An INT8 code is taken in two nibbles: the even steps s bring the lower one (0 .. 15), the odd ones the upper
// one, whose table counts sixteen and takes the offset of 128 off. BITS == 16: codes that `widen_panel` has made bfloat16
// already.
template <int BITS, int COUNT>
void widened_tile(const Weight& w, const uint32_t* words, int64_t panel, const Activations& x, int64_t row,
                      float (*out)[PANEL]) {
  const __m512i even = BITS == 4 ? table(8, 1) : table(0, 1), odd = BITS == 4 ? table(8, 1) : table(8, 16);
  const int64_t steps = ceil_div(w.inputs, 32 / BITS), groups = groups_of(w), row_bytes = x.row_bytes;
  const int64_t group_steps = w.group ? w.group * BITS / 32 : steps;
  const char* data = x.data + row * row_bytes;
  for (int64_t g = 0, step = 0; g < groups; ++g) {
    __m512 sum[COUNT][VECTORS];
    EACH(i, COUNT * VECTORS) sum[i / VECTORS][i % VECTORS] = _mm512_setzero_ps(); END;
    for (int64_t end = std::min(step + group_steps, steps); step < end; ++step) {
      const uint32_t* from = words + step * PANEL;
      const char* at = data + step * (64 / BITS);
      EACH(s, BITS == 16 ? 1 : 4)  // shifts by a nibble: 4 pairs of INT4 columns; 2 of INT8, two nibbles each
        __m512i weight[VECTORS];
        EACH(n, VECTORS)
          if (s == 0) FETCH_FROM(from + 16 * n);
          weight[n] = _mm512_loadu_si512(from + 16 * n);
          if (BITS < 16) weight[n] = _mm512_permutexvar_epi16(_mm512_srli_epi16(weight[n], 4 * s), s % 2 ? odd : even);
        END;
        EACH(r, COUNT)
          __m512i pair = _mm512_set1_epi32(word_at(at + r * row_bytes + 4 * (BITS == 4 ? s : s / 2)));
          EACH(n, VECTORS) sum[r][n] = dot_pairs(sum[r][n], weight[n], pair); END;
        END;
      END;
    }
    EACH(i, COUNT * VECTORS)
      constexpr int r = i / VECTORS, n = i % VECTORS;
      const float total = w.zero ? x.total[(row + r) * x.blocks + g] : 0.0f;
      add_scaled(w, (panel * groups + g) * PANEL + 16 * n, sum[r][n], 1.0f, total, out[r] + 16 * n);
    END;
  }
}

#ifdef __AVX512VNNI__
// Sums under the very type the instruction has: as __m512i, GCC 12 moves them to memory and back.
using Ints = int __attribute__((vector_size(64)));

inline __attribute__((always_inline)) Ints dot_bytes(Ints sum, __m512i weight, __m512i four) {
  return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), weight, four));
}

// Activations in bytes: sums of INT8 times codes, exact in int32, scaled once per block of columns. `vpdpbusd`
// multiplies unsigned bytes by signed ones and adds four neighbours; AVX-512 has no product of signed by signed. The
// activations are the signed ones, so the codes have to be unsigned, stored with their offset, and
//     sum x (code + offset) = sum x code + offset * sum x :
// every sum starts at -offset * (sum of the activations' codes), which was added up with them.
// SAME_SCALE: a row has one scale and no zero point, so blocks are added up first and the scale comes at the end.
template <int BITS, int COUNT, bool SAME_SCALE>
void byte_tile(const Weight& w, const uint32_t* words, int64_t panel, const Activations& x, int64_t row,
                  float (*out)[PANEL]) {
  const __m512i low = _mm512_set1_epi8(0x0F);
  const int64_t steps = steps_of(w), groups = groups_of(w), block_steps = x.block * BITS / 32, row_bytes = x.row_bytes;
  const char* data = x.data + row * row_bytes;
  const int64_t blocks = x.blocks;
  const int32_t* code_sum = x.sum + row * blocks;
  const float *factor = x.scale + row * blocks, *total = x.total + row * blocks;
  for (int64_t b = 0, step = 0; b < blocks; ++b) {
    // Keeps the compiler from holding `out` in registers between blocks, which would push the sums out of them.
    asm volatile("" ::: "memory");
    Ints sum[COUNT][VECTORS];
    EACH(r, COUNT)
      const Ints start = Ints{} - (1 << (BITS - 1)) * code_sum[r * blocks + b];
      EACH(n, VECTORS) sum[r][n] = start; END;
    END;
    for (int64_t end = std::min(step + block_steps, steps); step < end; ++step) {
      const uint32_t* from = words + step * PANEL;
      const char* at = data + step * (32 / BITS);
      EACH(s, 8 / BITS)  // INT4: the lower half of every byte, then the upper one
        __m512i weight[VECTORS];
        EACH(n, VECTORS)
          if (s == 0) FETCH_FROM(from + 16 * n);
          weight[n] = _mm512_loadu_si512(from + 16 * n);
          if (s == 1) weight[n] = _mm512_srli_epi16(weight[n], 4);
          if (BITS == 4) weight[n] = _mm512_and_si512(weight[n], low);
        END;
        EACH(r, COUNT)
          __m512i four = _mm512_set1_epi32(word_at(at + r * row_bytes + 4 * s));
          EACH(n, VECTORS) sum[r][n] = dot_bytes(sum[r][n], weight[n], four); END;
        END;
      END;
    }
    const int64_t place = (panel * groups + (groups > 1 ? b : 0)) * PANEL;
    EACH(i, COUNT * VECTORS)
      constexpr int r = i / VECTORS, n = i % VECTORS;
      const int64_t entry = r * blocks + b;
      const __m512 exact = _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sum[r][n]));
      float* result = out[r] + 16 * n;
      if (SAME_SCALE) {
        const __m512 one = _mm512_set1_ps(factor[entry]);
        _mm512_storeu_ps(result, _mm512_fmadd_ps(exact, one, _mm512_loadu_ps(result)));
      } else {
        add_scaled(w, place + 16 * n, exact, factor[entry], total[entry], result);
      }
    END;
  }
  if (SAME_SCALE) {
    EACH(i, COUNT * VECTORS)
      constexpr int r = i / VECTORS, n = i % VECTORS;
      const __m512 scale = halves_at(w.scale + panel * PANEL + 16 * n);
      _mm512_storeu_ps(out[r] + 16 * n, _mm512_mul_ps(_mm512_loadu_ps(out[r] + 16 * n), scale));
    END;
  }
}
#else
template <int BITS, int COUNT, bool SAME_SCALE>
void byte_tile(const Weight&, const uint32_t*, int64_t, const Activations&, int64_t, float (*)[PANEL]) {}
#endif

// Exact products of bytes, three or four to a number (`digits_of_row`), or of bfloat16? On AMD (Zen 4 and later)
// `vdpbf16ps` takes as long as `vpdpbusd`, which has twice the columns; on Intel four times as long (0.8 and 0.2 ns,
// Emerald Rapids: one row reads INT4 codes from the cache at 13 GB/s by pairs of bfloat16, at 33 by three bytes), and
// where it is missing its stand-in takes longer still.
bool products_by_digits() {
#if defined(__AVX512VNNI__) && defined(__AVX512BF16__)
  static const bool slow = !__builtin_cpu_is("amd");
  return slow;
#elif defined(__AVX512VNNI__)
  return true;
#else
  return false;
#endif
}

// INT8 codes of a panel as pairs of bfloat16: worth it for many rows, as the tiles then need neither tables nor two
// products per code. A thread's own memory, in the layout of a panel with steps of two columns.
void widen_panel(const uint32_t* words, int64_t steps, uint32_t* pairs) {
  const __m512i byte = _mm512_set1_epi32(0xFF), offset = _mm512_set1_epi32(128);
  auto number = [&](__m512i word, int shift) {
    __m512i code = _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(word, shift), byte), offset);
    return _mm512_castps_si512(_mm512_cvtepi32_ps(code));
  };
  for (int64_t i = 0; i < steps * PANEL; i += 16) {
    const __m512i word = _mm512_loadu_si512(words + i);
    uint32_t* to = pairs + i / PANEL * 2 * PANEL + i % PANEL;
    for (int t = 0; t < 2; ++t) {
      __m512i pair = _mm512_or_si512(_mm512_srli_epi32(number(word, 8 * t), 16), number(word, 16 + 8 * t));
      _mm512_storeu_si512(to + t * PANEL, pair);
    }
  }
}

int products() {
#ifdef __AVX512VNNI__
  return 3;
#else
  return 1;
#endif
}

#endif  // HAS_AVX512

using Tile = void (*)(const Weight&, const uint32_t*, int64_t, const Activations&, int64_t, float (*)[PANEL]);

enum Way { WIDENED, BYTES, BYTES_SAME_SCALE };

template <int BITS, int... I>
Tile tile_for(Way way, int64_t rows, std::integer_sequence<int, I...>) {
  constexpr int CODE_BITS = BITS == 16 ? 8 : BITS;  // widened codes are never met by rounded activations
  static constexpr Tile tiles[][sizeof...(I)] = {{widened_tile<BITS, I + 1>...},
                                                 {byte_tile<CODE_BITS, I + 1, false>...},
                                                 {byte_tile<CODE_BITS, I + 1, DEFERS_SCALES>...}};
  return tiles[way][rows - 1];
}

Tile tile_for(int bits, Way way, int64_t rows) {
  constexpr std::make_integer_sequence<int, ROWS> counts;
  if (WIDENS && bits == 16) return tile_for<WIDENS ? 16 : 8>(way, rows, counts);
  return bits == 4 ? tile_for<4>(way, rows, counts) : tile_for<8>(way, rows, counts);
}

// The sum of LANES outputs over the parts that a row was split into (`split_row`): each part was a row of the tile.
Floats added_up(const float (*result)[PANEL], int parts, int64_t o) {
  Floats number = masked_floats(result[0] + o, first(LANES));
  for (int part = 1; part < parts; ++part) number = number + masked_floats(result[part] + o, first(LANES));
  return number;
}

}  // namespace

extern "C" {

// Bit 0: the weight-only product, bit 1: that with rounded activations.
int glmtune_products() { return products(); }

int64_t glmtune_words(const Weight* w) { return panels_of(*w) * steps_of(*w) * PANEL; }

// Ask for huge pages: a weight read from end to end for every token misses the TLB on each small one. Advice only, so
// errors are ignored: without them reading is slower, no more. The first call is for pages not touched yet, the second
// one moves those that are.
void glmtune_use_huge_pages(void* from, int64_t bytes) {
  const uintptr_t huge = 1 << 21, begin = (reinterpret_cast<uintptr_t>(from) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(from) + bytes) & ~(huge - 1);
  if (end <= begin) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, 25 /* MADV_COLLAPSE, Linux 6.1 */);
}

// Pack codes as the released files hold them: a byte per INT8 code; INT4 two, the even column in the upper half.
void glmtune_pack(const Weight* w, const int8_t* codes, int threads) {
  const int64_t steps = steps_of(*w), width = columns_of_step(*w), row_bytes = w->inputs * w->bits / 8;
  const int bits = static_cast<int>(w->bits), offset = 1 << (bits - 1);
#pragma omp parallel for num_threads(threads)
  for (int64_t o = 0; o < panels_of(*w) * PANEL; ++o) {
    const int8_t* row = codes + o * row_bytes;
    for (int64_t step = 0; step < steps; ++step) {
      uint32_t word = 0;
      for (int64_t k = 0; k < width; ++k) {
        int64_t column = step * width + k;
        int code = 0;
        if (o < w->outputs && column < w->inputs) {
          code = bits == 8 ? row[column] : column % 2 ? static_cast<int8_t>(row[column / 2] << 4) >> 4 : row[column / 2] >> 4;
        }
        word |= static_cast<uint32_t>(code + offset) << (16 * (k % 2) + bits * (k / 2));
      }
      w->words[(o / PANEL * steps + step) * PANEL + o % PANEL] = word;
    }
  }
}

// The inverse of `glmtune_pack`.
void glmtune_unpack(const Weight* w, int8_t* codes, int threads) {
  const int64_t steps = steps_of(*w), width = columns_of_step(*w), row_bytes = w->inputs * w->bits / 8;
  const int bits = static_cast<int>(w->bits), offset = 1 << (bits - 1);
#pragma omp parallel for num_threads(threads)
  for (int64_t o = 0; o < w->outputs; ++o) {
    int8_t* row = codes + o * row_bytes;
    for (int64_t column = 0; column < w->inputs; ++column) {
      int64_t k = column % width;
      uint32_t word = w->words[(o / PANEL * steps + column / width) * PANEL + o % PANEL];
      int code = static_cast<int>(word >> (16 * (k % 2) + bits * (k / 2)) & ((1u << bits) - 1)) - offset;
      if (bits == 8) row[column] = static_cast<int8_t>(code);
      else if (column % 2) row[column / 2] |= static_cast<int8_t>(code & 0x0F);
      else row[column / 2] = static_cast<int8_t>(code << 4);
    }
  }
}

// out [rows, outputs] = x [rows, inputs] @ weight.T, both of `type` and contiguous; `rounded`: activations to INT8.
// `gated`: out [rows, outputs / 2] = silu(first half) * second half of that; the halves are whole panels.
void glmtune_product(const Weight* weight, const void* x, int64_t rows, int type, void* out, int rounded, int gated,
                     int threads) {
  const Weight& w = *weight;
  const bool digits = !rounded && products_by_digits(), bytes = rounded || digits;
  const int parts = rounded ? 1 : digits ? digits_for(type) : parts_of(type);
  const int64_t width = ceil_div(w.inputs, 64) * 64 + 64;
  Activations a{};
  a.block = w.group ? w.group : bytes ? BLOCK : w.inputs;
  a.blocks = ceil_div(w.inputs, a.block);
  const bool as_they_are = !bytes && is_read_in_place(w, type);
  a.row_bytes = as_they_are ? 2 * w.inputs : bytes ? width : EXACT_BYTES * width;
  std::unique_ptr<char[]> copied(as_they_are ? nullptr : new char[rows * parts * a.row_bytes]);
  std::unique_ptr<float[]> scale(bytes ? new float[rows * parts * a.blocks] : nullptr);
  std::unique_ptr<float[]> total(bytes || w.zero ? new float[rows * parts * a.blocks]() : nullptr);
  std::unique_ptr<int32_t[]> sum(bytes ? new int32_t[rows * parts * a.blocks] : nullptr);
  a.data = as_they_are ? static_cast<const char*>(x) : copied.get();
  a.scale = scale.get(), a.total = total.get(), a.sum = sum.get();
  auto bytes_of = [&](int64_t row) {  // of all rows times parts
    const int64_t at = row * a.blocks;
    int8_t* codes = reinterpret_cast<int8_t*>(copied.get() + row * a.row_bytes);
    return Bytes{codes, scale.get() + at, total.get() + at, sum.get() + at};
  };

  // Tiles of equal height: 7 rows are 4 + 3, not 6 + 1, as a tile of one row decodes the weight for one row alone.
  const int64_t most = ROWS / parts, tiles = ceil_div(rows, most), tall = ceil_div(rows, tiles);
  const int64_t steps = steps_of(w), halves = gated ? 2 : 1;
  const int64_t outputs = w.outputs / halves, panels = panels_of(w) / halves;
  const Way way = !bytes ? WIDENED : w.group || w.zero ? BYTES : BYTES_SAME_SCALE;
  const bool widened = WIDENS && !bytes && w.bits == 8 && rows * parts >= MANY_ROWS;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t start = r * w.inputs;
      if (!as_they_are) std::memset(copied.get() + r * parts * a.row_bytes, 0, parts * a.row_bytes);
      if (rounded)
        round_row(w, x, start, type, a.block, bytes_of(r));
      else if (digits)
        digits_of_row(w, x, start, type, a.block, [&](int digit) { return bytes_of(parts * r + digit); });
      else if (!as_they_are)
        split_row(w, x, start, type, parts, copied.get() + r * parts * a.row_bytes, a.row_bytes);
      if (!bytes && w.zero) add_up_row(w, x, start, type, total.get() + r * parts * a.blocks);
    }
    std::unique_ptr<uint32_t[]> pairs(widened ? new uint32_t[halves * 2 * steps * PANEL] : nullptr);
    // Panels are handed out one by one: threads may share a core with others and then fall behind.
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const uint32_t* words[2];
      for (int64_t half = 0; half < halves; ++half) {
        words[half] = w.words + (panel + half * panels) * steps * PANEL;
        if (widened) widen_panel(words[half], steps, pairs.get() + half * 2 * steps * PANEL);
        if (widened) words[half] = pairs.get() + half * 2 * steps * PANEL;
      }
      // Rows inside panels: the panel (128 KiB of INT4 at 4,096 inputs) stays in the cache for all of them.
      for (int64_t row = 0; row < rows; row += tall) {
        float result[2][ROWS][PANEL] = {};
        const int64_t count = std::min(tall, rows - row);
        const Tile tile = tile_for(widened ? 16 : w.bits, way, count * parts);
        for (int64_t half = 0; half < halves; ++half)
          tile(w, words[half], panel + half * panels, a, row * parts, result[half]);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t o = 0; o < PANEL && panel * PANEL + o < outputs; o += LANES) {
            Floats number = added_up(result[0] + r * parts, parts, o);
            if (gated) number = silu(number) * added_up(result[1] + r * parts, parts, o);
            store(out, (row + r) * outputs + panel * PANEL + o, first(outputs - panel * PANEL - o), type, number);
          }
      }
    }
  }
}

}  // extern "C"
