// A thread of a block is a fibre: a stack, and a place to go on at. The lanes of a warp run one after the other from
// one meeting to the next; the last to arrive does the work of all and goes on first. The warps of a block run one
// after the other from one barrier to the next.
//
// Every host thread has fibres of its own, made once.
#include "fibres.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <vector>

#include "switch.h"
#include "warp_math.h"

namespace attn_ops {
namespace cuda {
namespace host_layer {

__thread Place place __attribute__((tls_model("initial-exec")));
std::string (*describe_address)(const void*) = nullptr;

namespace {

constexpr size_t kPage = 65536;  // a multiple of any machine's
constexpr size_t kStackBytes = 512 * 1024;
constexpr size_t kSharedSlack = 128;  // the end of shared memory is that near to the page behind it, which traps

const char* name_of(Meeting m) {
  switch (m) {
    case Meeting::kSyncBlock: return "is at sync_block";
    case Meeting::kSyncBlockOr: return "is at sync_block_or";
    case Meeting::kSyncWarp: return "is at sync_warp";
    case Meeting::kShuffle: return "is at shuffle";
    case Meeting::kShuffleXor: return "is at shuffle_xor";
    case Meeting::kAnyInWarp: return "is at any_in_warp";
    case Meeting::kLoadMatrices: return "is at load_matrices";
    case Meeting::kLoadMatricesTransposed: return "is at load_matrices_transposed";
    case Meeting::kMmaF16: return "is at mma_f16";
    case Meeting::kMmaBf16: return "is at mma_bf16";
    case Meeting::kMmaTf32: return "is at mma_tf32";
    case Meeting::kReturn: return "has left the kernel";
  }
  return "";
}

struct Copy {
  char* to;
  const char* from;
  int bytes;
  bool exists;
  int64_t group;
};

struct Warp {
  int first_thread = 0;
  Meeting meeting = Meeting::kReturn;  // the one that lanes are gathering at, or the warp waits at
  int arrived = 0;
  int lane = 0;  // which runs
  int step = 1;  // from a lane to the one that runs next, odd
  Operands operands[kWarpLanes];
  char rows[kWarpLanes][16];  // of load_matrices
  void* fibres[kWarpLanes];  // where they go on
  std::deque<Copy> copies[kWarpLanes];
  int64_t groups[kWarpLanes] = {};  // of copies, closed
};

// SplitMix64.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  uint64_t below(uint64_t n) { return next() % n; }
};

// Address space that traps, until something is opened in it.
struct Pages {
  char* data = nullptr;
  size_t bytes = 0;
  explicit Pages(size_t n) : bytes(n) {
    void* p = mmap(nullptr, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) perror("host layer: mmap"), abort();
    data = static_cast<char*>(p);
  }
  ~Pages() { munmap(data, bytes); }
  Pages(const Pages&) = delete;
  bool has(const void* p) const { return p >= data && p < data + bytes; }
  void open(char* begin, char* end) { set(begin, end, PROT_READ | PROT_WRITE); }
  void close() { set(data, data + bytes, PROT_NONE); }

 private:
  void set(char* begin, char* end, int protection) {
    if (begin < end && mprotect(begin, end - begin, protection)) perror("host layer: mprotect"), abort();
  }
};

// One host thread's fibres and what they run.
class Runner {
 public:
  Runner() : stacks_(kMostThreads * kStackBytes), shared_((kMostSharedBytes / kPage + 2) * kPage) {}

  std::string run(const Kernel& kernel, const void* args, int64_t blocks, size_t shared_bytes);
  void run_kernel() { kernel_->run(args_); }
  void back_to_scheduler(void** from) { attn_ops_switch_fibre(from, scheduler_); }
  [[noreturn]] void stop(std::string error);
  std::string where(const void* address) const;

  const char* kernel_name() const { return kernel_->name; }
  bool in_shared(const void* p, size_t n) const {
    return p >= place.shared && static_cast<const char*>(p) + n <= place.shared + shared_bytes_;
  }
  size_t shared_bytes() const { return shared_bytes_; }

 private:
  void make_warps(int count);
  void run_block(int64_t block);
  void run_warps();
  void pass_barrier();
  void open_shared(size_t bytes);

  const Kernel* kernel_ = nullptr;
  const void* args_ = nullptr;
  std::vector<std::unique_ptr<Warp>> warps_;
  int used_ = 0;  // how many of them this kernel has
  std::vector<int> order_;
  Random random_{0};
  bool shuffled_ = false;
  Pages stacks_, shared_;
  size_t shared_bytes_ = ~size_t{0};
  std::string error_;
  void* scheduler_ = nullptr;
};

thread_local std::unique_ptr<Runner> own_runner;
__thread Runner* runner __attribute__((tls_model("initial-exec"))) = nullptr;
__thread Warp* running __attribute__((tls_model("initial-exec"))) = nullptr;  // null: no fibre runs

void fibre() {
  for (;;) {
    runner->run_kernel();
    meet(Meeting::kReturn, nullptr);
  }
}

void Runner::make_warps(int count) {
  for (int n = static_cast<int>(warps_.size()); n < count; ++n) {
    warps_.push_back(std::make_unique<Warp>());
    Warp& w = *warps_.back();
    w.first_thread = n * kWarpLanes;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      const int thread = w.first_thread + lane;
      char* stack = stacks_.data + thread * kStackBytes;
      stacks_.open(stack + kPage, stack + kStackBytes);
      // Not at the same distance from the end of a page: the frames of 32 lanes would compete for the same cache sets.
      w.fibres[lane] = new_fibre(stack + kStackBytes - thread % 64 * 320, fibre);
    }
  }
  used_ = count;
}

// The end of shared memory lies before a page that traps.
void Runner::open_shared(size_t bytes) {
  if (bytes == shared_bytes_) return;
  shared_.close();
  char* end = shared_.data + shared_.bytes - kPage;
  place.shared = end - (bytes + kSharedSlack - 1) / kSharedSlack * kSharedSlack;
  const size_t page = sysconf(_SC_PAGESIZE);
  shared_.open(shared_.data + (place.shared - shared_.data) / page * page, end);
  shared_bytes_ = bytes;
}

std::string Runner::run(const Kernel& kernel, const void* args, int64_t blocks, size_t shared_bytes) {
  const char* text = getenv("ATTN_OPS_HOST_LAYER_SEED");
  const uint64_t seed = text ? strtoull(text, nullptr, 10) : 1;
  shuffled_ = seed != 0;
  random_.state = seed;
  kernel_ = &kernel;
  args_ = args;
  error_.clear();
  make_warps(kernel.threads / kWarpLanes);
  open_shared(shared_bytes);
  order_.resize(used_);
  std::iota(order_.begin(), order_.end(), 0);

  int64_t first = 0, step = 1;
  if (shuffled_ && blocks > 1) {
    first = random_.below(blocks);
    do step = 1 + random_.below(blocks - 1);
    while (std::gcd(step, blocks) != 1);
  }
  for (int64_t n = 0; n < blocks && error_.empty(); ++n) run_block((first + n * step) % blocks);
  // What the fibres were doing is lost: new ones the next time.
  if (!error_.empty()) warps_.clear();
  return error_;
}

void Runner::run_block(int64_t block) {
  place.block = static_cast<int>(block);
  place.thread = 0;
  char* end = shared_.data + shared_.bytes - kPage;
  memset(place.shared, 0xff, end - place.shared);  // NaN in every format
  for (int n = 0; n < used_; ++n) {
    Warp& w = *warps_[n];
    w.lane = 0;
    for (auto& copies : w.copies) copies.clear();
    for (int64_t& groups : w.groups) groups = 0;
  }
  run_warps();
  for (char* p = place.shared + shared_bytes_; p < end && error_.empty(); ++p) {
    if (*p != '\xff') {
      error_ = std::string("kernel ") + kernel_->name + ", block " + std::to_string(block) + ": wrote behind its " +
               std::to_string(shared_bytes_) + " bytes of shared memory";
    }
  }
}

// From barrier to barrier, until all warps are back from the kernel.
void Runner::run_warps() {
  do {
    if (shuffled_) {
      for (int n = used_ - 1; n > 0; --n) std::swap(order_[n], order_[random_.below(n + 1)]);
    }
    for (int n : order_) {
      Warp& w = *warps_[n];
      if (shuffled_) w.step = random_.next() % kWarpLanes | 1;
      place.thread = w.first_thread + w.lane;
      running = &w;
      attn_ops_switch_fibre(&scheduler_, w.fibres[w.lane]);
      running = nullptr;
      if (!error_.empty()) return;
    }
    pass_barrier();
  } while (error_.empty() && warps_[0]->meeting != Meeting::kReturn);
}

void Runner::pass_barrier() {
  bool any = false;
  const Meeting meeting = warps_[0]->meeting;
  for (int n = 0; n < used_; ++n) {
    Warp& w = *warps_[n];
    if (w.meeting != meeting) {
      char text[200];
      snprintf(text, sizeof text, "kernel %s, block %d: warp 0 %s, while warp %d %s", kernel_->name, place.block,
               name_of(meeting), n, name_of(w.meeting));
      error_ = text;
      return;
    }
    if (meeting == Meeting::kSyncBlockOr) any = any || is_any(w.operands);
  }
  if (meeting != Meeting::kSyncBlockOr) return;
  for (int n = 0; n < used_; ++n) set_all(warps_[n]->operands, any);
}

void Runner::stop(std::string error) {
  error_ = std::move(error);
  void* nowhere;
  attn_ops_switch_fibre(&nowhere, scheduler_);
  __builtin_unreachable();
}

std::string Runner::where(const void* address) const {
  if (stacks_.has(address)) return "the end of a thread's stack";
  if (shared_.has(address)) {
    return std::to_string(static_cast<const char*>(address) - place.shared) + " bytes into shared memory, which has " +
           std::to_string(shared_bytes_);
  }
  return describe_address ? describe_address(address) : "";
}

[[noreturn]] void diverged(const Warp& w, Meeting meeting) {
  // The lane before this one has been at the other meeting.
  fail("%s, while thread %d of its warp %s", name_of(meeting), w.first_thread + ((w.lane - w.step) & (kWarpLanes - 1)),
       name_of(w.meeting));
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
struct sigaction previous_handlers[4];

void on_bad_address(int signal, siginfo_t* info, void*) {
  if (!running) {  // none of ours
    for (int i = 0; i < 4; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous_handlers[i], nullptr);
    }
    return;
  }
  // What the compiler was asked to do at such an address (build.py).
  if (signal == SIGILL || signal == SIGTRAP) fail("an address that is not aligned");
  const std::string what = runner->where(info->si_addr);
  if (!info->si_addr) fail("a null pointer, or an address that is not aligned");
  fail("no access to address %p%s%s", info->si_addr, what.empty() ? "" : ": ", what.c_str());
}

// Everyone's (Python's faulthandler, too) signal stack: the one of a fibre may be what has ended.
class SignalStack {
 public:
  SignalStack() : pages_(kPage) {
    pages_.open(pages_.data, pages_.data + kPage);
    stack_t s{};
    s.ss_sp = pages_.data;
    s.ss_size = kPage;
    sigaltstack(&s, &previous_);
  }
  ~SignalStack() { sigaltstack(&previous_, nullptr); }

 private:
  Pages pages_;
  stack_t previous_{};
};

void watch_addresses() {
  thread_local SignalStack stack;
  struct sigaction ours = {}, before;
  ours.sa_sigaction = on_bad_address;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // NODEFER: fail() does not return
  for (int i = 0; i < 4; ++i) {
    sigaction(kSignals[i], &ours, &before);
    if (!(before.sa_flags & SA_SIGINFO) || before.sa_sigaction != on_bad_address) previous_handlers[i] = before;
  }
}

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

}  // namespace

Registration::Registration(const char* name, int threads, size_t args_bytes, void (*run)(const void*)) {
  kernels().push_back({name, threads, args_bytes, run});
}

const Kernel* find_kernel(const char* name) {
  for (const Kernel& k : kernels()) {
    if (!strcmp(k.name, name)) return &k;
  }
  return nullptr;
}

std::string run_grid(const Kernel& kernel, const void* args, int64_t blocks, size_t shared_bytes) {
  if (!own_runner) own_runner = std::make_unique<Runner>();
  runner = own_runner.get();
  watch_addresses();
  return runner->run(kernel, args, blocks, shared_bytes);
}

void fail(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  runner->stop(std::string("kernel ") + runner->kernel_name() + ", block " + std::to_string(place.block) + ", thread " +
               std::to_string(place.thread) + ": " + text);
}

// Apart from meet(), most calls of which only switch, and so need no frame of its size.
__attribute__((noinline)) static void complete(Warp& w) {
  w.arrived = 0;
  switch (w.meeting) {
    case Meeting::kSyncBlock:
    case Meeting::kSyncBlockOr:
    case Meeting::kReturn: return runner->back_to_scheduler(&w.fibres[w.lane]);
    case Meeting::kSyncWarp: return;
    case Meeting::kShuffle: return exchange(w.operands, false);
    case Meeting::kShuffleXor: return exchange(w.operands, true);
    case Meeting::kAnyInWarp: return set_all(w.operands, is_any(w.operands));
    case Meeting::kLoadMatrices: return read_matrices(w.operands, false);
    case Meeting::kLoadMatricesTransposed: return read_matrices(w.operands, true);
    case Meeting::kMmaF16: return multiply_16_bits<float_of_half>(w.operands);
    case Meeting::kMmaBf16: return multiply_16_bits<float_of_bfloat16>(w.operands);
    case Meeting::kMmaTf32: return multiply_tf32(w.operands);
  }
}

void meet(Meeting meeting, void* in_out, const void* operand, const void* operand2) {
  Warp& w = *running;
  const int lane = w.lane;
  w.operands[lane] = {in_out, operand, operand2};
  if (w.arrived == 0) w.meeting = meeting;
  if (w.meeting != meeting) diverged(w, meeting);
  if (++w.arrived == kWarpLanes) return complete(w);
  const int next = (lane + w.step) & (kWarpLanes - 1);
  w.lane = next;
  place.thread = w.first_thread + next;
  attn_ops_switch_fibre(&w.fibres[lane], w.fibres[next]);
}

const void* read_row(const void* shared) {
  if (!runner->in_shared(shared, 16)) fail("load_matrices of an address outside shared memory");
  if (reinterpret_cast<uintptr_t>(shared) % 16) fail("load_matrices of an address that is not aligned");
  return memcpy(running->rows[running->lane], shared, 16);
}

void start_copy(void* shared, const void* global, int bytes, bool exists) {
  if (!runner->in_shared(shared, bytes)) {
    fail("copy_async to %s", runner->where(shared).c_str());
  }
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("copy_async to an address that is not aligned");
  if (exists && reinterpret_cast<uintptr_t>(global) % bytes) fail("copy_async from an address that is not aligned");
  // It may arrive at any time from now on: who still needs what is there has waited too little.
  memset(shared, 0xff, bytes);
  running->copies[running->lane].push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, exists, running->groups[running->lane]});
}

void commit_copies() { ++running->groups[running->lane]; }

// As late as possible: who waits too little does not find it.
void wait_for_copies(int pending) {
  std::deque<Copy>& copies = running->copies[running->lane];
  const int64_t groups = running->groups[running->lane] - pending;
  while (!copies.empty() && copies.front().group < groups) {
    const Copy c = copies.front();
    copies.pop_front();
    if (c.exists) {
      memcpy(c.to, c.from, c.bytes);
    } else {
      memset(c.to, 0, c.bytes);
    }
  }
}

}  // namespace host_layer
}  // namespace cuda
}  // namespace attn_ops
