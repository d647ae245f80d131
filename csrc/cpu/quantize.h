// A row of an int8 cache: x is about scale * x8, with -127 <= x8 <= 127.
//
//   scale = max |x| / 127        x8 = x / scale, to the nearest integer, ties to even
//
// Both divisions are products, so that every framework's arithmetic gives the same bits (generation/int8.py): max |x| times
// the float nearest to 1/127, and x times 1 / scale. A row whose scale would be below kLeastScale becomes zeros with a
// scale of 0. A row with a NaN or an infinity becomes zeros with a scale of NaN: whoever sees it gets NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "pack.h"

namespace attn_ops::cpu {
namespace {

constexpr float kLeastScale = 0x1p-100f;

// 1 / scale, or 0 where the row becomes zeros.
inline float inverse_scale(float scale) { return scale >= kLeastScale ? 1.0f / scale : 0.0f; }

template <class Storage>
float row_scale(Storage storage, const char* row, int64_t dim) {
  using S = Simd<float>;
  Vec<float> highest = S::zero(), finite = S::zero();  // the second stays 0
  for (int64_t d = 0; d < dim; d += S::width) {
    const Vec<float> x = load_some<float>(storage, row + d * Storage::size, Storage::size, dim - d);
    highest = S::max(highest, S::max(x, -x));
    finite += x * S::zero();
  }
  float most = 0;
  for (int lane = 0; lane < S::width; ++lane) most = highest[lane] > most ? highest[lane] : most;
  if (S::any(finite != S::zero())) return std::numeric_limits<float>::quiet_NaN();
  const float scale = most * (1.0f / 127.0f);
  return scale >= kLeastScale ? scale : 0.0f;
}

template <class Storage>
void round_row(Storage storage, const char* row, int64_t dim, float scale, int8_t* out) {
  using S = Simd<float>;
  typedef int8_t Bytes __attribute__((vector_size(S::width)));
  const Vec<float> inverse = S::set1(inverse_scale(scale)), integers = S::set1(0x1.8p23f);
  for (int64_t d = 0; d < dim; d += S::width) {
    const Vec<float> x = load_some<float>(storage, row + d * Storage::size, Storage::size, dim - d);
    // Kept: a product fused with the sum would not be rounded by itself. The sum has no digits behind the point.
    const Vec<float> rounded = (S::kept(x * inverse) + integers) - integers;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, S::I), Bytes);
    memcpy(out + d, &bytes, dim - d < S::width ? dim - d : S::width);
  }
}

// `count` rows of `dim` elements, one behind the other.
inline void quantize(DType dtype, const void* rows, int64_t count, int64_t dim, int8_t* out, float* scales) {
  with_storage(float{}, dtype, [&](auto storage) {
    const char* row = static_cast<const char*>(rows);
    for (int64_t i = 0; i < count; ++i, row += dim * storage.size, out += dim) {
      scales[i] = row_scale(storage, row, dim);
      if (scales[i] == scales[i]) round_row(storage, row, dim, scales[i], out);
      else memset(out, 0, dim);
    }
  });
}

}  // namespace
}  // namespace attn_ops::cpu
