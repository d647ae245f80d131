// Measures the limits of the machine: runs slices of cpu::probe on all threads until the time is up.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <string>

#include "../attention.h"

namespace attn_ops {

constexpr double kMaxProbeSeconds = 60.0;
constexpr int64_t kReadChunk = int64_t{1} << 20;  // what a thread reads in one slice

// Memory of its own pages, of the size asked for where the system has it, written once: pages that never were share one
// page of zeros, which would be read from the cache.
class ProbeMemory {
 public:
  ProbeMemory(int64_t bytes, bool huge_pages) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    madvise(data_, bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // only a wish
    memset(data_, 0, bytes_);
  }
  ~ProbeMemory() { munmap(data_, bytes_); }
  ProbeMemory(const ProbeMemory&) = delete;
  ProbeMemory& operator=(const ProbeMemory&) = delete;

  const char* data() const { return static_cast<const char*>(data_); }

 private:
  void* data_;
  const size_t bytes_;
};

class MachineProbe {
 public:
  MachineProbe(Threads threads, const std::string& isa, double seconds)
      : threads_(threads), isa_(isa), seconds_(seconds) {}

  double compute_rate(cpu::Probe what) const {
    cpu::ProbeSlice slice;
    slice.what = what;
    return rate([&](int64_t) { return slice; });
  }

  double read_rate(int64_t bytes, bool huge_pages) const {
    if (bytes == 0) bytes = default_bytes();
    const int64_t chunks = bytes / kReadChunk;
    const ProbeMemory memory(chunks * kReadChunk, huge_pages);
    double best = 0.0;
    for (int variant = 0; variant < cpu::kReadVariants; ++variant) {
      const auto chunk = [&](int64_t i) {
        return cpu::ProbeSlice{cpu::Probe::kRead, variant, memory.data() + i % chunks * kReadChunk, kReadChunk};
      };
      best = std::max(best, rate(chunk));
    }
    return best;
  }

 private:
  using Clock = std::chrono::steady_clock;

  static int64_t default_bytes() {
    const int64_t cache = std::max<int64_t>(0, sysconf(_SC_LEVEL3_CACHE_SIZE));
    return std::max<int64_t>(int64_t{256} << 20, 4 * cache);
  }

  // Work per second of slice(0), slice(1), ... taken in turns by all threads. A thread that starts late only misses
  // its share: the time counts from the call to the end of the last slice.
  template <class Slice>
  double rate(const Slice& slice) const {
    struct Shared {
      const MachineProbe& probe;
      const Slice& slice;
      const Clock::time_point begin = Clock::now();
      std::atomic<int64_t> next{0};
      std::atomic<int64_t> work{0};  // whole operations, elements or bytes
    } shared{*this, slice};
    const auto body = [](void* arg, int) {
      Shared& s = *static_cast<Shared*>(arg);
      double sink = 0.0, work = 0.0;
      // Every thread does one slice at least, so that no rate is zero.
      do work += cpu::probe(s.slice(s.next.fetch_add(1)), &sink, s.probe.isa_.c_str());
      while (since(s.begin) < s.probe.seconds_);
      s.work += static_cast<int64_t>(work);
    };
    if (threads_.count > 1) threads_.run(threads_.self, threads_.count, body, &shared);
    else body(&shared, 0);
    return static_cast<double>(shared.work) / since(shared.begin);
  }

  static double since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

  const Threads threads_;
  const std::string isa_;
  const double seconds_;
};

}  // namespace attn_ops
