// Threads of our own, for callers that have none to lend.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "threads.h"

namespace attn_ops {

inline int available_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return thread_count(CPU_COUNT(&set));
  return thread_count(std::thread::hardware_concurrency());  // more CPUs than the set has room for
}

// The threads sleep between calls and live as long as the process.
class WorkerPool {
 public:
  // The pool of this process, grown to `workers` threads where the system grants them.
  static WorkerPool& with(int workers) {
    // Threads do not survive a fork: a child starts afresh, and leaves the parent's pool alone, whatever state its
    // lock is in. Pools are never destroyed, for their threads may outlive main().
    static std::atomic<WorkerPool*> current{nullptr};
    WorkerPool* pool = current.load();
    if (pool == nullptr || pool->process_ != getpid()) {
      WorkerPool* fresh = new WorkerPool;
      if (current.compare_exchange_strong(pool, fresh)) {
        pool = fresh;
      } else {
        delete fresh;
      }
    }
    pool->grow(workers);
    return *pool;
  }

  Scheduler scheduler() {
    return {this,
            [](void* self, Scheduler::Task task, void* arg) { static_cast<WorkerPool*>(self)->schedule(task, arg); }};
  }

 private:
  struct Item {
    Scheduler::Task task;
    void* arg;
  };

  void grow(int workers) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (; workers_ < workers; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // Fewer threads than asked for only means that the caller does more itself.
    }
  }

  void schedule(Scheduler::Task task, void* arg) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (workers_ == 0) {  // the system granted none
      lock.unlock();
      return task(arg);
    }
    queue_.push_back({task, arg});
    ready_.notify_one();
  }

  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return !queue_.empty(); });
      const Item item = queue_.front();
      queue_.pop_front();
      lock.unlock();
      item.task(item.arg);
    }
  }

  const pid_t process_ = getpid();
  int workers_ = 0;
  std::mutex mutex_;
  Signal ready_;
  std::deque<Item> queue_;
};

}  // namespace attn_ops
