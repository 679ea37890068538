// RMSNorm and rotary embedding, each in one call: what a decoded token goes through between its products.
//
// PyTorch takes 7 and some 30 operations for them, a few microseconds each whatever their size, 57 and 28 times a token
// with 28 layers: a seventh of the token's time. Numbers are rounded where PyTorch's operations round them. Plain loops
// that the compiler turns into vectors of whatever the processor has.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float number(float x) { return x; }
inline float number(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// To nearest even, as PyTorch rounds; NaN stays NaN.
template <class T>
T rounded(float x);
template <>
inline float rounded<float>(float x) { return x; }
template <>
inline BFloat16 rounded<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return {static_cast<uint16_t>(x == x ? nearest : 0x7FC0)};
}

template <class T>
void rms_norm(const T* x, const T* weight, int64_t rows, int64_t width, float epsilon, T* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * width;
    T* to = out + row * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += number(from[i]) * number(from[i]);
    const float factor = 1 / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      to[i] = rounded<T>(number(weight[i]) * number(rounded<T>(number(from[i]) * factor)));
  }
}

// Where the states of a layer lie: heads of a token behind one another.
struct States {
  int64_t batch, tokens, heads, width;
  int64_t batch_stride, token_stride;
};

// Neighbours 2i and 2i + 1 of the first `turned` numbers of a head are turned by the angle of pair i; the others pass.
template <class T>
void rotate(const States& in, const T* states, const T* cosine, const T* sine, int64_t angle_batch_stride,
            int64_t angle_token_stride, int64_t turned, T* out, int threads) {
  auto product = [](float a, float b) __attribute__((always_inline)) { return number(rounded<T>(a * b)); };
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < in.batch * in.tokens; ++row) {
    const int64_t b = row / in.tokens, token = row % in.tokens;
    const T* c = cosine + b * angle_batch_stride + token * angle_token_stride;
    const T* s = sine + b * angle_batch_stride + token * angle_token_stride;
    const T* from = states + b * in.batch_stride + token * in.token_stride;
    T* to = out + row * in.heads * in.width;
    for (int64_t head = 0; head < in.heads; ++head, from += in.width, to += in.width) {
#pragma omp simd
      for (int64_t i = 0; i < turned / 2; ++i) {
        const float even = number(from[2 * i]), odd = number(from[2 * i + 1]), cos = number(c[i]), sin = number(s[i]);
        to[2 * i] = rounded<T>(product(even, cos) - product(odd, sin));
        to[2 * i + 1] = rounded<T>(product(odd, cos) + product(even, sin));
      }
      std::memcpy(to + turned, from + turned, (in.width - turned) * sizeof(T));
    }
  }
}

}  // namespace

extern "C" {

// out [rows, width] = weight * (x / sqrt(mean(x²) + epsilon)), bfloat16 or float32, contiguous.
void glmtune_rms_norm(const void* x, const void* weight, int64_t rows, int64_t width, float epsilon, int is_bfloat16,
                      void* out, int threads) {
  if (is_bfloat16)
    rms_norm(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(weight), rows, width, epsilon,
             static_cast<BFloat16*>(out), threads);
  else
    rms_norm(static_cast<const float*>(x), static_cast<const float*>(weight), rows, width, epsilon,
             static_cast<float*>(out), threads);
}

// out [batch, tokens, heads, width], contiguous: states turned by angles [batch or 1, tokens, turned / 2]. All of one type,
// bfloat16 or float32.
void glmtune_rotate(const void* states, const States* shape, const void* cosine, const void* sine,
                    int64_t angle_batch_stride, int64_t angle_token_stride, int64_t turned, int is_bfloat16, void* out,
                    int threads) {
  auto all = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    rotate(*shape, static_cast<const T*>(states), static_cast<const T*>(cosine), static_cast<const T*>(sine),
           angle_batch_stride, angle_token_stride, turned, to, threads);
  };
  is_bfloat16 ? all(static_cast<BFloat16*>(out)) : all(static_cast<float*>(out));
}

}  // extern "C"
