// The kernels of kernels.cu, by number and by name.
#pragma once

#include <cstdio>

#include "config.h"

namespace attn_ops::cuda {

enum class Role : int32_t {
  kForward,
  kDecode,
  kDelta,
  kQueryGradient,
  kKeyGradients,
  kBiasGradient,
  kSinkGradient,
  kDistanceGradient,
  kTableSum
};
constexpr int kNumRoles = 9;
constexpr const char* kRoleNames[kNumRoles] = {"forward", "decode", "delta",  "dq",       "dkdv",
                                               "dbias",   "dsinks", "dtable", "dtable_sum"};
constexpr bool is_without_products(Role r) {
  return r == Role::kDelta || r == Role::kSinkGradient || r == Role::kTableSum;
}

struct KernelName {
  Role role;
  Math math;
  int dim;             // one of kDims, of no meaning to those without products
  bool plain = false;  // for calls that are: is_plain() of plan.h
  bool hopper = false;  // hopper/kernels.cu

  constexpr int index() const {
    int bucket = 0;
    while (bucket < kNumDims - 1 && kDims[bucket] < dim) ++bucket;
    return (((static_cast<int>(role) * kNumMaths + static_cast<int>(math)) * kNumDims + bucket) * 2 + plain) * 2 +
           hopper;
  }
};
constexpr int kNumKernelNames = kNumRoles * kNumMaths * kNumDims * 4;

struct KernelText {
  char data[64];

  explicit KernelText(const KernelName& k) {
    const char *role = kRoleNames[static_cast<int>(k.role)], *math = kMathNames[static_cast<int>(k.math)];
    if (is_without_products(k.role))
      snprintf(data, sizeof data, "attn_ops_%s_%s", role, math);
    else if (k.hopper) snprintf(data, sizeof data, "attn_ops_hopper_%s_%s_%d", role, math, k.dim);
    else snprintf(data, sizeof data, "attn_ops_%s_%s_%d%s", role, math, k.dim, k.plain ? "_plain" : "");
  }
};

}  // namespace attn_ops::cuda
