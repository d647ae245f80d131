// Divisors for args.h, on the host.
#pragma once

#include "args.h"

namespace attn_ops {
namespace cuda {

// With 2^shift < divisor <= 2^(shift + 1), multiplier = ceil(2^(32 + shift) / divisor) has 32 bits and is too large by e / divisor
// with e < 2^(shift + 1): x < 2^31 times that stays below what would carry the quotient to the next integer.
constexpr Divisor make_divisor(uint32_t divisor) {
  Divisor d;
  d.divisor = divisor;
  if (divisor <= 1) return d;
  while ((uint64_t{2} << d.shift) < divisor) ++d.shift;
  d.multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + d.shift)) + divisor - 1) / divisor);
  return d;
}

}  // namespace cuda
}  // namespace attn_ops
