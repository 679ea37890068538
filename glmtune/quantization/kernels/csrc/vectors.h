// Numbers side by side in a register: one set of names over two instruction sets.
//
// AVX-512 has LANES = 16 numbers of 32 bits in a register, AVX2 8. `Floats` are LANES numbers of float32, `Words` LANES
// integers of 32 bits, `Halves` LANES numbers of 16 bits. float32 is computed with + - * /, which compilers take for
// vectors. What differs lies in one of two headers; what is built from it, here. NEON would be a third.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif

// Repeated by hand in Python: DTYPE_NUMBERS in packed.py.
enum Type { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

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

namespace {

// --- numbers in and out -----------------------------------------------------------------------------------

inline Floats load(const void* from, int64_t at, Mask mask, int type) {
  if (type == FLOAT32) return masked_floats(static_cast<const float*>(from) + at, mask);
  const Halves halves = masked_halves(static_cast<const uint16_t*>(from) + at, mask);
  return type == BFLOAT16 ? widened(halves) : from_float16(halves);
}

inline void store(void* to, int64_t at, Mask mask, int type, Floats x) {
  if (type == FLOAT32) return store_floats(static_cast<float*>(to) + at, mask, x);
  store_halves(static_cast<uint16_t*>(to) + at, mask, type == BFLOAT16 ? narrowed(x) : to_float16(x));
}

inline Floats halves_at(const uint16_t* from) { return from_float16(masked_halves(from, first(LANES))); }

// x / (1 + exp(-x)). exp(-x) = 2^y with y = -x / ln 2; y = n + f with n an integer and |f| <= 1/2. 2^n goes into the
// exponent, 2^f is its Taylor series, (ln 2)^i / i! from i = 6 down to 0: off by 1e-7, less than float32 rounds. y is
// kept within what the exponent holds; beyond, silu(x) is x, or below 1e-34.
inline Floats silu(Floats x) {
  const Floats y = larger(smaller(x * all(-1.44269504f), all(126.0f)), all(-126.0f));
  const Floats n = whole(y), f = y - n;
  Floats power = all(1.54035304e-4f);
  for (float term : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    power = fma(power, f, all(term));
  return x / (all(1.0f) + times_power_of_two(power, n));
}

}  // namespace
