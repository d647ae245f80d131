// How many vectors side by side, as a constant.
#pragma once

#include <type_traits>

#include "simd.h"

namespace attn_ops::cpu {
namespace {

// Widest tile, in vectors.
constexpr int kMaxVectors = 3;

template <int N>
using Vectors = std::integral_constant<int, N>;

// Calls f(Vectors<nv>{}) for the run-time number of vectors: the tile must be a constant.
template <class F>
ATTN_INLINE void with_vectors(int nv, const F& f) {
  if (nv == 3) f(Vectors<3>{});
  else if (nv == 2) f(Vectors<2>{});
  else f(Vectors<1>{});
}

// Calls f(Vectors<v>{}) for v = 0 .. nv - 1.
template <int NV, class F>
ATTN_INLINE void each_vector(const F& f) {
  if constexpr (NV > 1) each_vector<NV - 1>(f);
  f(Vectors<NV - 1>{});
}

}  // namespace
}  // namespace attn_ops::cpu
