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
  kAllGradients,
  kBiasGradient,
  kSinkGradient,
  kDistanceGradient,
  kTableSum,
  kDecodeF16Keys,  // of float32 queries
  kDecodeBF16Keys
};
constexpr int kNumRoles = 12;
constexpr const char* kRoleNames[kNumRoles] = {"forward", "decode", "delta",  "dq",     "dkdv",       "dqkv",
                                               "dbias",   "dsinks", "dtable", "dtable_sum", "decode_of_f16",
                                               "decode_of_bf16"};
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
constexpr KernelName kernel_name(int index) {
  return {static_cast<Role>(index / (4 * kNumDims * kNumMaths)), static_cast<Math>(index / (4 * kNumDims) % kNumMaths),
          kDims[index / 4 % kNumDims], index / 2 % 2 != 0, index % 2 != 0};
}
static_assert(kernel_name(kNumKernelNames - 1).index() == kNumKernelNames - 1 && kernel_name(37).index() == 37, "");

// Of a block of a kernel of kernels.cu.
struct BlockShape {
  int threads, shared_bytes;
};
constexpr BlockShape block_shape(const KernelName& k) {
  switch (k.role) {
    case Role::kForward:
      return {forward_tile(k.math, k.dim, k.plain).threads(), forward_shared_bytes(k.math, k.dim, k.plain)};
    case Role::kDecode: return {32 * kDecodeWarps, decode_shared_bytes(k.math, k.dim, false)};
    case Role::kDecodeF16Keys:
    case Role::kDecodeBF16Keys: return {32 * kDecodeWarps, decode_shared_bytes(Math::kFloat32, k.dim, true)};
    case Role::kDelta: return {32 * kDeltaWarps, 0};
    case Role::kSinkGradient: return {kSinkThreads, kSinkSharedBytes};
    case Role::kTableSum: return {kTableThreads, 0};
    default: {
      const bool queries_stay = k.role != Role::kKeyGradients && k.role != Role::kAllGradients;
      const int own = backward_shared_bytes(k.math, k.dim, k.plain, queries_stay);
      const int of_dq = k.role == Role::kAllGradients ? backward_shared_bytes(k.math, k.dim, k.plain, true) : 0;
      return {backward_tile(k.math, k.dim, k.plain, queries_stay).threads(), own > of_dq ? own : of_dq};
    }
  }
}

// The most shared memory that one of them asks for.
constexpr int most_shared_bytes() {
  int most = 0;
  for (int role = 0; role < kNumRoles; ++role)
    for (int math = 0; math < kNumMaths; ++math)
      for (int dim : kDims)
        for (int plain = 0; plain < 2; ++plain) {
          const int own = block_shape({static_cast<Role>(role), static_cast<Math>(math), dim, plain != 0}).shared_bytes;
          most = own > most ? own : most;
        }
  return most;
}
static_assert(most_shared_bytes() <= kLargestSharedBytes, "a kernel that some cards have no shared memory for");

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
