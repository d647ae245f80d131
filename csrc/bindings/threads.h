// Threads for the kernels, out of any scheduler that runs a function some time later on some other thread.
//
// The calling thread takes part and can finish all the work alone, so a busy scheduler, or one whose threads are
// waiting for this very call, only makes a call slower and never blocks it: helpers take the slots that are left when
// they start, and the caller waits only for slots that were taken. A helper that starts after the call has returned
// finds nothing to do; the job lives on the heap until the last helper has seen it.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <new>

#include "../attention.h"

namespace attn_ops {

struct Scheduler {
  using Task = void (*)(void* arg);
  void* self = nullptr;
  // Asynchronous; every task runs some day. Where it throws, it has not taken the task.
  void (*schedule)(void* self, Task task, void* arg) = nullptr;
};

constexpr int64_t kMaxThreads = 1024;

// How long a caller that has nothing left to do stays awake for those who help it (Zen 5, 2026-11-27).
constexpr std::chrono::microseconds kAwake{50};

// A number of threads from outside: workspaces are sized by it.
inline int thread_count(int64_t told) { return static_cast<int>(std::clamp<int64_t>(told, 1, kMaxThreads)); }

// A condition variable. That of the standard library would ask for a newer libstdc++ than wheels may.
class Signal {
 public:
  ~Signal() { pthread_cond_destroy(&condition_); }
  void notify_one() { pthread_cond_signal(&condition_); }
  template <class Ready>
  void wait(std::unique_lock<std::mutex>& lock, Ready ready) {
    while (!ready()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
  }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Job {
 public:
  static void run(void* scheduler, int slots, void (*body)(void*, int), void* arg) {
    Job* job = slots > 1 ? new (std::nothrow) Job(slots, body, arg) : nullptr;
    if (job == nullptr) {
      for (int slot = 0; slot < slots; ++slot) body(arg, slot);
      return;
    }
    const int helpers = job->call_helpers(*static_cast<Scheduler*>(scheduler));
    job->work();
    job->wait();
    job->release(slots - helpers);  // the caller's, and those of helpers that will never come
  }

 private:
  Job(int slots, void (*body)(void*, int), void* arg)
      : body_(body), arg_(arg), slots_(slots), unfinished_(slots), references_(slots) {}

  // Returns how many will come, where memory runs out fewer than there are slots for: nothing may leave run() before
  // those that came are done with what lies on the caller's stack.
  int call_helpers(const Scheduler& scheduler) {
    int called = 0;
    try {
      for (; called + 1 < slots_; ++called) scheduler.schedule(scheduler.self, help, this);
    } catch (...) {
    }
    return called;
  }

  static void help(void* self) {
    static_cast<Job*>(self)->work();
    static_cast<Job*>(self)->release(1);
  }

  void work() {
    for (int slot; (slot = next_slot_.fetch_add(1)) < slots_;) {
      body_(arg_, slot);
      if (unfinished_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  // Falling asleep and being woken takes 20 to 40 us, and the system likes to put a thread that is woken on the CPU of the
  // one that wakes it. So the caller stays awake a while, and leaves its CPU to whoever else wants it.
  void wait() {
    const auto late = std::chrono::steady_clock::now() + kAwake;
    do {
      if (unfinished_.load() == 0) return;
      sched_yield();
    } while (std::chrono::steady_clock::now() < late);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_.load() == 0; });
  }

  void release(int references) {
    if (references_.fetch_sub(references) == references) delete this;
  }

  void (*const body_)(void*, int);
  void* const arg_;
  const int slots_;
  std::atomic<int> next_slot_{0}, unfinished_, references_;  // the caller and each helper hold one reference
  std::mutex mutex_;
  Signal done_;
};

// `count` threads counting the caller. The scheduler must outlive the call the threads are lent to.
inline Threads lend(Scheduler* scheduler, int count) { return {count, scheduler, Job::run}; }

}  // namespace attn_ops
