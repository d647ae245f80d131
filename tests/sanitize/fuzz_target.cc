// Bytes as one node of AttnOps>Forward, Backward or Decode, the way TensorFlow and XLA hand them over: attributes, shapes and
// values as they come (OpCall), refused or run (run_call). A fuzzer looks for bytes at which that crashes; so does `fuzz.py`.
//
//   clang: -fsanitize=fuzzer,address,undefined     a program of libFuzzer
//   -DATTN_OPS_REPLAY: any compiler                a program that runs the files that it is given, each array between
//                                                  pages that cannot be touched
//
// Most bytes must make a call that is right but for one or two things, or nothing behind validation would ever run: sizes
// are few and small, and an array has the shape that it should have unless a byte says otherwise. What is checked beside
// crashes: every result is the same to the bit on one thread and on several, which take tasks in another order, whatever results
// and workspace held before.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings/cpu_kernels.h"
#include "bindings/op_call.h"
#include "bindings/run_call.h"

#ifdef ATTN_OPS_REPLAY
#include <sys/mman.h>
#endif

namespace {

using namespace attn_ops;

constexpr int kFilling = 0xA5;          // of memory that nobody has written yet
constexpr size_t kMostBytes = 1 << 20;  // of one array that is really there

// The input; past its end everything is 0.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  // One of `count`, the first for a byte of 0.
  int of(int count) { return byte() % count; }
  uint64_t word() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x = x << 8 | byte();
    return x;
  }
  // Any number, most often a small or a special one.
  int64_t number() {
    static const int64_t special[] = {0, 1, -1, 2, -2, 3, 7, 8, 31, 64, 127, 1 << 20, INT32_MAX, INT64_MAX, INT64_MIN};
    const int kind = byte();
    if (kind < 200) return special[kind % 15];
    return kind < 240 ? int8_t(byte()) : int64_t(word());
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

// Memory that is exactly so long; the sanitizer, or a page behind it, sees who goes on.
class Block {
 public:
#ifdef ATTN_OPS_REPLAY
  Block(size_t bytes, int filling) : bytes_(bytes) {
    constexpr size_t page = 4096;
    const size_t inside = (bytes + page - 1) / page * page;
    span_ = inside + 2 * page;
    map_ = mmap(nullptr, span_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED) throw std::bad_alloc();
    char* const first = static_cast<char*>(map_) + page;
    if (inside) mprotect(first, inside, PROT_READ | PROT_WRITE);
    data_ = first + (inside - bytes);
    memset(data_, filling, bytes);
  }
  ~Block() { munmap(map_, span_); }
#else
  Block(size_t bytes, int filling) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<char*>(memory);
    memset(data_, filling, bytes);
  }
  ~Block() { std::free(data_); }
#endif
  Block(const Block&) = delete;
  char* data() { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
#ifdef ATTN_OPS_REPLAY
  void* map_;
  size_t span_;
#endif
  char* data_;
};

// What the node should look like; arrays and attributes stray from it where a byte says so.
struct Plan {
  Operator which;
  DType dtype, kept, bias_dtype;
  bool halves, bhsd;
  int64_t batch, seqlen_q, seqlen_k, heads, kv_heads, dim, value_dim, pages, page_size, block_q, block_k, reach;
  int num[16] = {};  // of optional inputs, in the order of kCounts

  explicit Plan(Bytes& in) {
    static const DType floats[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64};
    static const int64_t lengths[] = {1, 3, 8, 17, 0, 33, 40, 65, 130, 260, 700};
    static const int64_t dims[] = {8, 1, 3, 5, 16, 17, 33, 64, 65, 0};
    which = static_cast<Operator>(in.of(3));
    dtype = floats[in.of(4)];
    static const DType keeps[] = {DType::kInt8, DType::kFloat32, DType::kFloat16, DType::kBFloat16};
    kept = which == Operator::kDecode && in.of(2) ? keeps[in.of(4)] : dtype;
    bias_dtype = in.of(2) ? DType::kFloat32 : dtype;
    halves = which != Operator::kBackward && in.of(8) == 1;
    bhsd = !halves && in.of(3) == 1;
    batch = in.of(16) ? 1 + in.of(3) : 0;
    seqlen_q = lengths[in.of(11)], seqlen_k = lengths[in.of(11)];
    kv_heads = 1 + in.of(3), heads = kv_heads * (1 + in.of(4));
    dim = dims[in.of(9)], value_dim = in.of(3) ? dims[in.of(10)] : dim;
    block_q = 1 + in.of(40), block_k = 1 + in.of(40), reach = in.of(50);
    page_size = 16 * (1 + in.of(3)), pages = (seqlen_k + page_size - 1) / page_size;
    static const int most[] = {1, 1, 4, 1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1};
    for (int i = 0; i < 16; ++i) num[i] = in.of(4) == 1 ? most[i] == 4 ? in.of(5) : most[i] : 0;
    if (kept == DType::kInt8) num[14] = 2;
    if (in.of(32) != 1) num[5] = 1;  // a seed hurts nobody
    if (which != Operator::kDecode) num[13] = num[14] = 0;
    if (num[13]) bhsd = halves = false, seqlen_k = pages * page_size;
  }
};

constexpr const char* kCounts[] = {"num_lse",    "num_d_lse",    "num_masks",    "num_query_lengths", "num_key_lengths",
                                   "num_seed",   "num_intervals", "num_query_offset", "num_segments", "num_blocks",
                                   "num_slopes", "num_relative_bias", "num_sinks", "num_block_table", "num_scales",
                                   "num_bias"};

class Attributes {
 public:
  Attributes(const Plan& plan, Bytes& in) : plan_(plan), in_(in) {}

  int64_t integer(const char* name) const {
    if (in_.byte() == 0xF1) return in_.number();
    for (int i = 0; i < 16; ++i)
      if (!strcmp(name, kCounts[i])) return plan_.num[i];
    if (!strcmp(name, "block_q")) return plan_.block_q;
    if (!strcmp(name, "block_k")) return plan_.block_k;
    const int kind = in_.of(4);  // windows
    return kind == 0 ? -1 : kind == 1 ? 0 : in_.byte();
  }
  int64_t integer(const char* name, int64_t) const { return integer(name); }
  bool boolean(const char* name) const {
    if (!strcmp(name, "halves")) return plan_.halves != (in_.byte() == 0xF1);
    return in_.of(2);
  }
  bool boolean(const char* name, bool) const { return boolean(name); }
  std::string string(const char* name) const {
    if (in_.byte() == 0xF1) {
      std::string text(in_.of(20), ' ');
      for (char& c : text) c = static_cast<char>(in_.byte());
      return text;
    }
    if (!strcmp(name, "layout")) return plan_.bhsd ? "BHSD" : "BSHD";
    static const char* const scales[] = {"", "0.125", "-0.4", "1e30", "0.0", "1e-320"};
    static const char* const rates[] = {"0.0", "0.25", "0.9", "0.999999"};
    static const char* const caps[] = {"", "30.0", "1e-30", "1e30"};
    if (!strcmp(name, "scale")) return scales[in_.of(6)];
    return !strcmp(name, "dropout_rate") ? rates[plan_.num[5] ? in_.of(4) : 0] : caps[in_.of(4)];
  }
  std::string string(const char* name, const char*) const { return string(name); }

 private:
  const Plan& plan_;
  Bytes& in_;
};

// Raised for arrays that are too large to be there.
struct NotThere {};

class Inputs {
 public:
  Inputs(const Plan& plan, Bytes& in) : p_(plan), in_(in), values_(in.word() | 1) {}

  Array next(const char* name, Element element) {
    std::vector<int64_t> shape = right_shape(name);
    DType dtype = right_dtype(name);
    switch (in_.byte()) {  // what may be wrong
      case 0xF1: dtype = static_cast<DType>(in_.of(6)); break;
      case 0xF2:
        if (!shape.empty()) shape[in_.of(static_cast<int>(shape.size()))] = in_.number();
        break;
      case 0xF3: shape.push_back(1 + in_.of(3)); break;
      case 0xF4:
        if (!shape.empty()) shape.pop_back();
        break;
      case 0xF5: shape.assign(in_.of(7), in_.of(5)); break;
      default: break;
    }
    for (int64_t& extent : shape)
      if (extent < 0) extent = 0;  // no framework has others
    const int64_t width = element == Element::kInteger ? 4 : element == Element::kSeed ? 8 : size_of(dtype);
    int64_t bytes = width;
    bool there = true;
    for (int64_t extent : shape) there = there && !__builtin_mul_overflow(bytes, extent, &bytes);
    for (int64_t extent : shape)
      if (extent == 0) bytes = 0, there = true;
    if (!there || bytes > static_cast<int64_t>(kMostBytes)) {
      // Values that validation reads must be there; others are looked at no sooner than it has passed.
      if (element != Element::kValue || !strcmp(name, "slopes")) throw NotThere();
      huge = true, bytes = 0;
    }
    blocks_.push_back(std::make_unique<Block>(bytes, kFilling));
    char* const data = blocks_.back()->data();
    if (element == Element::kValue) fill(data, bytes, dtype);
    else if (element == Element::kInteger) integers(name, reinterpret_cast<int32_t*>(data), bytes / 4);
    else memset(data, in_.byte(), bytes);
    const int rank = static_cast<int>(shape.size());
    return contiguous_array(name, data, dtype, rank, [&](int i) { return shape[i]; });
  }

  bool huge = false;

 private:
  std::vector<int64_t> tensor(int64_t batch, int64_t length, int64_t heads, int64_t dim) const {
    if (p_.bhsd) return {batch, heads, length, dim};
    return {batch, length, heads, dim};
  }

  std::vector<int64_t> scores() {
    std::vector<int64_t> shape = {p_.batch, p_.heads, p_.seqlen_q, p_.seqlen_k};
    const int ones = in_.byte();
    for (int i = 0; i < 4; ++i)
      if (ones >> i & 1) shape[i] = 1;
    return shape;
  }

  std::vector<int64_t> right_shape(const std::string& name) {
    const int64_t any = in_.of(2) ? p_.batch : 1;
    const bool paged = p_.num[13] > 0;
    const auto cache = [&](int64_t dim) {
      auto shape = tensor(paged ? p_.pages * p_.batch + 1 : p_.batch, paged ? p_.page_size : p_.seqlen_k, p_.kv_heads, dim);
      if (p_.halves) shape[1] *= 2;
      return shape;
    };
    if (name == "q") return tensor(p_.batch, p_.seqlen_q, p_.heads, p_.dim);
    if (name == "k") return cache(p_.dim);
    if (name == "v") return cache(p_.value_dim);
    if (name == "out" || name == "d_out") return tensor(p_.batch, p_.seqlen_q, p_.heads, p_.value_dim);
    if (name == "statistics") return {p_.batch, p_.heads, p_.seqlen_q, 2};
    if (name == "d_lse") return {p_.batch, p_.heads, p_.seqlen_q};
    if (name == "bias" || name.rfind("masks", 0) == 0) return scores();
    if (name == "query_lengths" || name == "key_lengths") return {p_.batch};
    if (name == "seed") return {2};
    if (name == "key_begin" || name == "key_end") return {p_.batch, p_.seqlen_q};
    if (name == "query_offset") return {any};
    if (name == "query_ids") return {any, p_.seqlen_q};
    if (name == "key_ids") return {any, p_.seqlen_k};
    if (name == "blocks") {
      return {any, in_.of(2) ? p_.heads : 1, (p_.seqlen_q + p_.block_q - 1) / p_.block_q,
              (p_.seqlen_k + p_.block_k - 1) / p_.block_k};
    }
    if (name == "slopes") return {any, p_.heads};
    if (name == "relative_bias") return {p_.heads, 2 * p_.reach + 1};
    if (name == "sinks") return {p_.heads};
    if (name == "block_table") return {p_.batch, p_.pages};
    auto shape = cache(1);  // of scales
    shape.pop_back();
    return shape;
  }

  DType right_dtype(const std::string& name) const {
    if (name == "k" || name == "v") return p_.kept;
    if (name == "bias") return p_.bias_dtype;
    if (name == "blocks" || name.rfind("masks", 0) == 0) return DType::kBool;
    if (name == "q" || name == "out" || name == "d_out") return p_.dtype;
    return name == "k_scales" || name == "v_scales" ? DType::kFloat32 : accumulator_of(p_.dtype);
  }

  uint64_t draw() {  // xorshift
    values_ ^= values_ << 13, values_ ^= values_ >> 7, values_ ^= values_ << 17;
    return values_;
  }

  // Any bits, or numbers of a usual size: those of float32, of which others are the upper or lower half.
  void fill(char* data, int64_t bytes, DType dtype) {
    const bool usual = in_.of(4) != 1;
    for (int64_t i = 0; i < bytes; ++i) {
      const uint8_t any = static_cast<uint8_t>(draw() >> 32);
      if (dtype == DType::kBool) data[i] = any % 3 != 0;
      else if (!usual || dtype == DType::kInt8) data[i] = static_cast<char>(any);
      else data[i] = 0;
    }
    if (!usual || dtype == DType::kBool || dtype == DType::kInt8) return;
    for (int64_t i = 0; i < bytes / size_of(dtype); ++i) {
      const double x = static_cast<double>(draw() >> 40) / (1 << 23) - 1.0;
      const float y = static_cast<float>(x);
      uint32_t bits;
      memcpy(&bits, &y, 4);
      if (dtype == DType::kFloat64) memcpy(data + 8 * i, &x, 8);
      else if (dtype == DType::kFloat32) memcpy(data + 4 * i, &y, 4);
      else {  // bfloat16; as float16 these are other numbers from -2 to 2
        const uint16_t half = static_cast<uint16_t>(bits >> 16);
        memcpy(data + 2 * i, &half, 2);
      }
    }
  }

  void integers(const std::string& name, int32_t* data, int64_t count) {
    const int wrong = in_.byte();
    int64_t most = p_.seqlen_k;
    if (name == "query_lengths") most = p_.seqlen_q;
    if (name == "query_offset" && in_.of(3) == 1) most = int64_t{1} << 30;
    if (name == "query_ids" || name == "key_ids") most = 3;
    if (name == "block_table") most = p_.pages * p_.batch;
    const bool rising = name == "key_begin" || name == "key_end";
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (rising && p_.seqlen_q > 0 && i % p_.seqlen_q == 0) last = 0;
      if (rising) last = std::min<int64_t>(most, last + static_cast<int64_t>(draw() % 4));
      data[i] = static_cast<int32_t>(rising ? last : static_cast<int64_t>(draw() % static_cast<uint64_t>(most + 1)));
    }
    if (wrong == 0xF1 && count > 0) data[draw() % static_cast<uint64_t>(count)] = static_cast<int32_t>(in_.number());
  }

  const Plan& p_;
  Bytes& in_;
  uint64_t values_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

class Outputs {
 public:
  explicit Outputs(int filling) : filling_(filling) {}
  void* next(const char* name, DType dtype, const int64_t* shape, int rank) {
    int64_t bytes = size_of(dtype);
    for (int i = 0; i < rank; ++i)
      if (shape[i] == 0) bytes = 0;
    for (int i = 0; i < rank; ++i)
      if (__builtin_mul_overflow(bytes, shape[i], &bytes)) fail("a result overflows", name);
    if (bytes > static_cast<int64_t>(kMostBytes)) throw NotThere();
    blocks_.push_back(std::make_unique<Block>(bytes, filling_));
    return blocks_.back()->data();
  }
  void skip(const char*, DType) {}
  void finish() {}

  void compare(Outputs& other) {
    if (blocks_.size() != other.blocks_.size()) fail("other results", "");
    for (size_t i = 0; i < blocks_.size(); ++i) {
      if (memcmp(blocks_[i]->data(), other.blocks_[i]->data(), blocks_[i]->size()) != 0) fail("other bits", "threads");
    }
  }

  [[noreturn]] static void fail(const char* what, const char* name) {
    std::fprintf(stderr, "fuzz_target: %s: %s\n", what, name);
    std::abort();
  }

 private:
  int filling_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

// One thread, or as many slots one after the other, the last first.
class Device {
 public:
  Device(int threads, const char* isa, int filling) : threads_(threads), isa_(isa), filling_(filling) {}
  CpuKernels kernels() const { return CpuKernels({threads_, nullptr, backwards}, isa_); }

  class Lent {
   public:
    Lent(size_t bytes, int filling) : block_(bytes, filling) {}
    Workspace lend() const { return {block_.data(), block_.size()}; }

   private:
    mutable Block block_;
  };
  Lent workspace(size_t bytes) const {
    if (bytes > 256 * kMostBytes) throw NotThere();
    return Lent((bytes + 63) / 64 * 64, filling_);
  }

 private:
  static void backwards(void*, int slots, void (*body)(void*, int), void* arg) {
    while (slots-- > 0) body(arg, slots);
  }
  int threads_;
  const char* isa_;
  int filling_;
};

enum class End { kRefused, kNotThere, kRan };

End one(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const char* names[16];
  const int isas = cpu::isas(names, 16);
  const char* const isa = names[in.of(isas)];
  const int threads = 2 + in.of(3);
  const Plan plan(in);
  Inputs inputs(plan, in);
  try {
    const OpCall node(Attributes(plan, in), Place::kCpu, plan.which);
    const Call call = node.with_arrays([&](const char* name, Element element) { return inputs.next(name, element); });
    if (inputs.huge) {  // sums of sizes must not wrap around; nothing runs
      if (call.backward) cpu::backward_workspace_bytes(to_backward_params(call), threads, isa);
      else cpu::forward_workspace_bytes(to_params(call), threads, isa);
      return End::kNotThere;
    }
    Outputs alone(kFilling), together(~kFilling & 0xFF);
    Device one_thread(1, isa, kFilling), more(threads, isa, ~kFilling & 0xFF);
    run_call(call, alone, one_thread);
    run_call(call, together, more);
    alone.compare(together);
    return End::kRan;
  } catch (const std::invalid_argument&) {
    return End::kRefused;
  } catch (const NotThere&) {
    return End::kNotThere;
  }
}

}  // namespace

#ifdef ATTN_OPS_REPLAY
int main(int count, char** names) {
  int ends[3] = {};
  for (int i = 1; i < count; ++i) {
    std::vector<uint8_t> bytes;
    FILE* const file = std::fopen(names[i], "rb");
    if (file == nullptr) return std::perror(names[i]), 1;
    for (int c; (c = std::fgetc(file)) != EOF;) bytes.push_back(static_cast<uint8_t>(c));
    std::fclose(file);
    std::fprintf(stderr, "%s\n", names[i]);  // the last one tells who crashed
    ++ends[static_cast<int>(one(bytes.data(), bytes.size()))];
  }
  std::printf("%d ran, %d refused, %d too large\n", ends[2], ends[0], ends[1]);
  return 0;
}
#else
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  one(data, size);
  return 0;
}
#endif
