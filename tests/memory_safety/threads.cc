// Schedulers that throw, that are late, and that never had a thread; numbers of threads that cannot be. See
// test_memory_safety.py; built with AddressSanitizer, which sees a helper that uses what a call has left behind.
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "bindings/eigen_pool.h"
#include "bindings/heap_workspace.h"

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// Takes `most` tasks, and throws at the next one. They run `delay` later than they might.
struct Helpers {
  int most;
  std::chrono::milliseconds delay;
  std::vector<std::thread> threads;

  attn_ops::Scheduler scheduler() {
    return {this, [](void* self, attn_ops::Scheduler::Task task, void* arg) {
              Helpers& h = *static_cast<Helpers*>(self);
              if (static_cast<int>(h.threads.size()) == h.most) throw std::bad_alloc();
              h.threads.emplace_back([task, arg, delay = h.delay] {
                std::this_thread::sleep_for(delay);
                task(arg);
              });
            }};
  }
  ~Helpers() {
    for (std::thread& t : threads) t.join();
  }
};

// Every slot runs once, and whoever runs it finds the caller's data, which die with this frame.
void call(const attn_ops::Threads& threads, int slots) {
  std::vector<std::atomic<int>> times(slots);
  struct Argument {
    std::vector<std::atomic<int>>& times;
  } argument{times};
  threads.run(
      threads.self, slots,
      [](void* arg, int slot) {
        static_cast<Argument*>(arg)->times[slot].fetch_add(1);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      },
      &argument);
  for (const std::atomic<int>& n : times) check(n == 1, "a slot did not run once");
}

int told_by_tensorflow = 0;

}  // namespace

// In place of TensorFlow's, under its name.
namespace attn_ops {
const EigenDevice* attn_ops_eigen_device(const void*) {
  struct Pool : EigenPool {
    void Schedule(std::function<void()> task) override { task(); }
    void ScheduleWithHint(std::function<void()> task, int, int) override { task(); }
    void Cancel() override {}
    int NumThreads() const override { return 1; }
    int CurrentThreadId() const override { return 0; }
  };
  static Pool pool;
  static EigenDevice device;
  device = {&pool, told_by_tensorflow, nullptr};
  return &device;
}
}  // namespace attn_ops

int main() {
  for (int slots : {2, 3, 8})
    for (int most = 0; most <= slots; ++most)
      for (int delay : {0, 20}) {
        Helpers helpers{most, std::chrono::milliseconds(delay), {}};
        attn_ops::Scheduler scheduler = helpers.scheduler();
        call(attn_ops::lend(&scheduler, slots), slots);
      }

  for (int told : {0, -1, INT_MIN, 1, 7, 1024, 1025, INT_MAX}) {
    told_by_tensorflow = told;
    attn_ops::KernelThreads kernel(&told);
    const attn_ops::Threads threads = kernel.threads();
    check(threads.count >= 1 && threads.count <= 1024, "a number of threads that workspaces are not for");
    check(told < 1 || told > 1024 || threads.count == told, "another number of threads than TensorFlow has");
    call(threads, threads.count < 8 ? threads.count : 8);
  }
  check(attn_ops::available_cpus() >= 1, "no CPU");

  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 62, static_cast<size_t>(PTRDIFF_MAX) + 1}) {
    try {
      attn_ops::HeapWorkspace workspace(bytes);
      check(false, "memory that does not exist");
    } catch (const std::bad_alloc&) {
    }
  }
  std::puts("done");
}
