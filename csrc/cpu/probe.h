// What this machine can do at most, measured with the same vectors as the kernels: slices of work so short that a
// caller can look at the clock between them. See ProbeSlice in attention.h.
#pragma once

#include "math.h"
#include "simd.h"

namespace attn_ops::cpu {
namespace {

// Multiply-adds that wait for nothing: as many chains as there are registers beside the two factors.
template <class T>
double probe_fma(double* sink) {
  using S = Simd<T>;
  constexpr int kChains = kVectorRegisters - 2;
  constexpr int64_t kRounds = 1 << 14;
  const volatile T half = T{0.5};  // volatile: the compiler must not know the factors
  const Vec<T> factor = S::set1(half), term = S::set1(half);
  Vec<T> chain[kChains];
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = S::set1(static_cast<T>(i));
  // The chain is a factor, not the sum: a product of two constants could be taken out of the loop.
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 32  // the chains are registers only where every index is known
    for (int i = 0; i < kChains; ++i) chain[i] = S::fma(chain[i], factor, term);
  Vec<T> sum = chain[0];
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) sum += chain[i];
  *sink = sum[0];
  return 2.0 * kRounds * kChains * S::width;
}

// e^x of values in the L1 cache, and their sum: the part of the softmax that is not a product.
template <class T>
double probe_exp(double* sink) {
  using S = Simd<T>;
  constexpr int64_t kBytes = 8 << 10, kRounds = 16;
  constexpr int kVectors = kBytes / sizeof(Vec<T>), kSums = 4;
  alignas(64) T scores[kBytes / sizeof(T)];
  for (int i = 0; i < kVectors * S::width; ++i) scores[i] = static_cast<T>(i % 64) / -8;
  Vec<T> sums[kSums] = {};
  for (int64_t round = 0; round < kRounds; ++round) {
    // The compiler must believe that the scores are new ones.
    __asm__ volatile("" : : "r"(scores) : "memory");
    for (int i = 0; i < kVectors; i += kSums)
      for (int s = 0; s < kSums; ++s) sums[s] += exp<T>(S::load(scores + (i + s) * S::width));
  }
  *sink = (sums[0] + sums[1] + sums[2] + sums[3])[0];
  return static_cast<double>(kRounds) * kVectors * S::width;
}

// Reads kStreams equal parts of the data side by side, asking for what is kAhead bytes further on (0: not at all).
template <int kStreams, int64_t kAhead>
void probe_read_streams(const char* data, int64_t bytes, double* sink) {
  using S = Simd<float>;
  constexpr int64_t kLine = 64, kVector = sizeof(Vec<float>);
  const int64_t part = bytes / kStreams / kLine * kLine;
  Vec<float> sums[kStreams] = {};
  for (int64_t at = 0; at < part; at += kLine)
    for (int s = 0; s < kStreams; ++s) {
      const char* const line = data + s * part + at;
      if (kAhead > 0) __builtin_prefetch(line + kAhead);  // past the end this is a hint without effect
      for (int64_t i = 0; i < kLine; i += kVector) sums[s] += S::load(reinterpret_cast<const float*>(line + i));
    }
  for (int s = 1; s < kStreams; ++s) sums[0] += sums[s];
  *sink = sums[0][0];
}

double probe_read(const ProbeSlice& slice, double* sink) {
  using Read = void (*)(const char*, int64_t, double*);
  static constexpr Read kVariants[kReadVariants] = {
      probe_read_streams<1, 0>,   probe_read_streams<1, 512>,  probe_read_streams<1, 2048>, probe_read_streams<2, 0>,
      probe_read_streams<2, 512>, probe_read_streams<4, 0>,    probe_read_streams<4, 512>,  probe_read_streams<4, 2048>,
  };
  kVariants[slice.variant](static_cast<const char*>(slice.data), slice.bytes, sink);
  return static_cast<double>(slice.bytes);
}

double probe_slice(const ProbeSlice& slice, double* sink) {
  switch (slice.what) {
    case Probe::kFmaFloat32: return probe_fma<float>(sink);
    case Probe::kFmaFloat64: return probe_fma<double>(sink);
    case Probe::kExpFloat32: return probe_exp<float>(sink);
    case Probe::kExpFloat64: return probe_exp<double>(sink);
    case Probe::kRead: return probe_read(slice, sink);
  }
  return 0.0;
}

}  // namespace
}  // namespace attn_ops::cpu
