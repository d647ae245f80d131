// attn_ops._core: the kernels on NumPy arrays, without TensorFlow. For tests, for measuring, and for whoever has
// arrays and no framework.
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/cpu_features.h"
#include "cpu_kernels.h"
#include "cuda_library.h"
#include "heap_workspace.h"
#include "numpy_call.h"
#include "probe.h"
#include "run_call.h"
#include "worker_pool.h"
#include "xla.h"

namespace attn_ops::numpy {
namespace {

std::vector<std::string> isas() {
  const char* names[16];
  const int count = cpu::isas(names, 16);
  return {names, names + count};
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#define NEEDS(feature) features[#feature] = ATTN_OPS_CPU_HAS(feature);
#define ASKS NEEDS
#define SLOW_ON(maker)
#define ISA(name, processor, needs, ...) ATTN_OPS_ON_##processor(needs)
#include "../cpu/isas.inc"
#undef ISA
#undef SLOW_ON
#undef ASKS
#undef NEEDS
  return features;
}

void require(const char* function, const std::string& reason) {
  if (!reason.empty()) fail<py::value_error>(function, reason);
}

// Two arrays that belong together.
void read_pair(const char* function, const char* name, const std::vector<py::object>& pair, const char* first,
               const char* second, Arrays* arrays, Array* a, Array* b) {
  if (pair.empty()) return;
  if (pair.size() != 2) fail<py::value_error>(function, std::string(name) + " must be two arrays");
  *a = arrays->integers(first, pair[0]);
  *b = arrays->integers(second, pair[1]);
}

void read_origin(const char* function, Keywords* keywords, Arrays* arrays, Call* call) {
  const py::object given = keywords->take("dropout_origin");
  if (given.is_none()) return;
  const Array origin = arrays->integers("dropout_origin", given);
  const int64_t four = 4;
  require(function, same_shape_reason(origin, 1, &four, "(first_head, heads_of_entry, first_row, first_key)"));
  call->has_origin = true;
  memcpy(&call->dropout_origin, origin.data, sizeof call->dropout_origin);
}

// What is no plain mask or bias.
void read_structure(const char* function, Keywords* keywords, Arrays* arrays, Call* call) {
  read_pair(function, "intervals", keywords->sequence("intervals"), "key_begin", "key_end", arrays, &call->key_begin,
            &call->key_end);
  read_pair(function, "segments", keywords->sequence("segments"), "query_ids", "key_ids", arrays, &call->query_ids,
            &call->key_ids);
  if (const py::object offset = keywords->take("query_offset"); !offset.is_none()) {
    call->query_offset = arrays->integers("query_offset", offset);
  }
  if (const py::object blocks = keywords->take("blocks"); !blocks.is_none()) {
    call->blocks = arrays->contiguous("blocks", blocks);
  }
  call->block_q = keywords->integer("block_q", 0);
  call->block_k = keywords->integer("block_k", 0);
  if (const py::object cap = keywords->take("soft_cap"); !cap.is_none()) {
    call->has_soft_cap = true;
    call->soft_cap = keywords->real("soft_cap", cap);
  }
  const auto numbers = [&](const char* name, Array* to) {
    if (const py::object given = keywords->take(name); !given.is_none()) *to = arrays->contiguous(name, given);
  };
  numbers("slopes", &call->slopes);
  numbers("relative_bias", &call->relative_bias);
  numbers("sinks", &call->sinks);
}

// The arrays and options that forward and backward share, checked.
Call read(const char* function, const py::object& q, const py::object& k, const py::object& v, Keywords* keywords,
          Arrays* arrays) {
  Call call;
  const std::string layout = keywords->string("layout", "BSHD");
  require(function, layout_reason(layout));
  call.layout = layout_named(layout);
  call.q = arrays->array("q", q);
  call.k = arrays->array("k", k);
  call.v = arrays->array("v", v);
  if (const py::object bias = keywords->take("bias"); !bias.is_none()) call.bias = arrays->array("bias", bias);
  for (const py::object& mask : keywords->sequence("masks")) {
    if (call.num_masks == kMaxMasks) fail<py::value_error>(function, "masks must be at most 4 arrays");
    call.masks[call.num_masks] = arrays->array(kMaskNames[call.num_masks], mask);
    ++call.num_masks;
  }
  call.mask.window_left = keywords->integer("window_left", -1);
  call.mask.window_right = keywords->integer("window_right", -1);
  call.mask.bottom_right = keywords->boolean("bottom_right");
  if (const py::object scale = keywords->take("scale"); !scale.is_none()) {
    call.has_scale = true;
    call.scale = keywords->real("scale", scale);
  }
  if (const py::object rate = keywords->take("dropout_rate"); !rate.is_none()) {
    call.dropout_rate = keywords->real("dropout_rate", rate);
  }
  call.has_seed = true;
  call.dropout_seed = keywords->word("dropout_seed");
  call.dropout_offset = keywords->word("dropout_offset");
  read_origin(function, keywords, arrays, &call);
  if (const py::object table = keywords->take("block_table"); !table.is_none()) {
    call.block_table = arrays->integers("block_table", table);
  }
  if (const py::object scales = keywords->take("k_scales"); !scales.is_none()) {
    call.k_scales = arrays->contiguous("k_scales", scales);
  }
  if (const py::object scales = keywords->take("v_scales"); !scales.is_none()) {
    call.v_scales = arrays->contiguous("v_scales", scales);
  }
  require(function, sizes_reason(call));  // before lengths are measured against them

  const Sizes n = sizes_of(call);
  if (const py::object lengths = keywords->take("query_lengths"); !lengths.is_none()) {
    call.query_lengths = arrays->lengths("query_lengths", lengths, "seqlen_q", n.seqlen_q);
  }
  if (const py::object lengths = keywords->take("key_lengths"); !lengths.is_none()) {
    call.key_lengths = arrays->lengths("key_lengths", lengths, "seqlen_k", n.seqlen_k);
  }
  read_structure(function, keywords, arrays, &call);
  require(function, invalid_reason(call));
  return call;
}

// A MemoryError that says who asked for how much.
class NoMemory : public std::bad_alloc {
 public:
  NoMemory(const char* function, size_t bytes)
      : told_(std::string("attn_ops._core.") + function + ": no memory for a workspace of " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return told_.c_str(); }

 private:
  std::string told_;
};

// Where and on how many threads a call runs.
class CpuDevice {
 public:
  CpuDevice(const char* function, Keywords* keywords)
      : function_(function), isa_(keywords->string("isa", cpu::default_isa())) {
    if (!cpu::isa_usable(isa_.c_str())) {
      std::string usable;
      for (const std::string& name : isas()) usable += (usable.empty() ? "" : ", ") + name;
      fail<py::value_error>(function, "isa ('" + isa_ + "') must be one of those usable here: " + usable);
    }
    const int64_t threads = keywords->integer("num_threads", 0);
    if (threads < 0 || threads > kMaxThreads) {
      fail<py::value_error>(function,
                            "num_threads (" + text(threads) + ") must be from 0 (all CPUs) to " + text(kMaxThreads));
    }
    count_ = threads > 0 ? static_cast<int>(threads) : available_cpus();
  }

  const std::string& isa() const { return isa_; }
  Threads threads() {
    scheduler_ = WorkerPool::with(count_ - 1).scheduler();
    return lend(&scheduler_, count_);
  }
  CpuKernels kernels() { return CpuKernels(threads(), isa_.c_str()); }
  HeapWorkspace workspace(size_t bytes) const try {
    return HeapWorkspace(bytes);
  } catch (const std::bad_alloc&) {
    throw NoMemory(function_, bytes);
  }

 private:
  const char* function_;
  std::string isa_;
  int count_;
  Scheduler scheduler_;
};

// New arrays. From finish() on the GIL is somebody else's, until they are asked for.
class Results {
 public:
  Results(const Call& call, const py::dtype& dtype) : call_(call), dtype_(dtype) {}

  void* next(const char*, DType dtype, const int64_t* shape, int rank) {
    const py::dtype type = dtype == call_.q.dtype     ? dtype_
                           : dtype == DType::kFloat64 ? py::dtype::of<double>()
                                                      : py::dtype::of<float>();
    arrays_.emplace_back(type, std::vector<py::ssize_t>(shape, shape + rank));
    return arrays_.back().mutable_data();
  }
  void skip(const char*, DType) {}
  void finish() { without_gil_.emplace(); }

  std::vector<py::array> arrays() {
    without_gil_.reset();
    return arrays_;
  }

 private:
  const Call& call_;
  const py::dtype dtype_;
  std::vector<py::array> arrays_;
  std::optional<py::gil_scoped_release> without_gil_;  // goes first: arrays are released with the GIL
};

py::tuple forward(const py::object& q, const py::object& k, const py::object& v, const py::kwargs& given) {
  Keywords keywords("forward", given);
  Arrays arrays("forward");
  Call call = read("forward", q, k, v, &keywords, &arrays);
  call.wants_lse = true;
  CpuDevice device("forward", &keywords);
  keywords.finish();

  Results results(call, arrays.result_dtype());
  run_call(call, results, device);
  const std::vector<py::array> made = results.arrays();
  return py::make_tuple(made[0], made[2], made[1]);
}

py::tuple backward(const py::object& q, const py::object& k, const py::object& v, const py::object& out,
                   const py::object& statistics, const py::object& d_out, const py::kwargs& given) {
  Keywords keywords("backward", given);
  Arrays arrays("backward");
  Call call = read("backward", q, k, v, &keywords, &arrays);
  call.backward = true;
  call.wants_d_bias = call.bias.present && !keywords.boolean("no_d_bias");
  call.out = arrays.array("out", out);
  call.statistics = arrays.contiguous("statistics", statistics);
  call.d_out = arrays.array("d_out", d_out);
  if (const py::object d_lse = keywords.take("d_lse"); !d_lse.is_none()) call.d_lse = arrays.contiguous("d_lse", d_lse);
  require("backward", invalid_reason(call));
  CpuDevice device("backward", &keywords);
  keywords.finish();

  Results results(call, arrays.result_dtype());
  run_call(call, results, device);
  const std::vector<py::array> made = results.arrays();
  size_t next = 3;
  const auto made_if = [&](bool wanted) { return wanted ? py::object(made[next++]) : py::none(); };
  const py::object d_bias = made_if(call.wants_d_bias), d_relative_bias = made_if(call.relative_bias.present),
                   d_sinks = made_if(call.sinks.present);
  return py::make_tuple(made[0], made[1], made[2], d_bias, d_relative_bias, d_sinks);
}

py::tuple quantize(const py::object& rows, const py::kwargs& given) {
  Keywords keywords("quantize", given);
  Arrays arrays("quantize");
  const Array x = arrays.contiguous("rows", rows);
  if (accumulator_of(x.dtype) == DType::kFloat64 || x.dtype == DType::kBool || x.dtype == DType::kInt8) {
    fail<py::value_error>("quantize", "rows must be float32, float16 or bfloat16, got " + text(x.dtype));
  }
  if (x.rank < 1 || x.rank > 4) fail<py::value_error>("quantize", "rows must have rank 1 to 4, got " + text(int64_t{x.rank}));
  CpuDevice device("quantize", &keywords);
  keywords.finish();
  const std::vector<py::ssize_t> shape(x.shape.begin(), x.shape.begin() + x.rank);
  py::array_t<int8_t> integers(shape);
  py::array_t<float> scales(std::vector<py::ssize_t>(shape.begin(), shape.end() - 1));
  cpu::quantize(x.dtype, x.data, scales.size(), shape.back(), integers.mutable_data(), scales.mutable_data(),
                device.isa().c_str());
  return py::make_tuple(integers, scales);
}

double probe(const py::object& what, const py::kwargs& given) {
  const std::map<std::string, cpu::Probe> kinds = {{"fma_float32", cpu::Probe::kFmaFloat32},
                                                   {"fma_float64", cpu::Probe::kFmaFloat64},
                                                   {"exp_float32", cpu::Probe::kExpFloat32},
                                                   {"exp_float64", cpu::Probe::kExpFloat64},
                                                   {"read", cpu::Probe::kRead}};
  const auto kind = py::isinstance<py::str>(what) ? kinds.find(py::cast<std::string>(what)) : kinds.end();
  if (kind == kinds.end()) {
    std::string known;
    for (const auto& [name, unused] : kinds) known += (known.empty() ? "" : ", ") + name;
    fail<py::value_error>("probe", "what (" + to_string(py::repr(what)) + ") must be one of " + known);
  }
  Keywords keywords("probe", given);
  CpuDevice device("probe", &keywords);
  double seconds = 0.02;
  if (const py::object value = keywords.take("seconds"); !value.is_none()) seconds = keywords.real("seconds", value);
  if (!(seconds > 0.0 && seconds <= kMaxProbeSeconds)) {
    fail<py::value_error>("probe", "seconds (" + std::to_string(seconds) + ") must be above 0 and at most " +
                                       std::to_string(kMaxProbeSeconds));
  }
  const int64_t bytes = keywords.integer("bytes", 0);
  if (bytes != 0 && bytes < kReadChunk) {
    fail<py::value_error>(
        "probe", "bytes (" + text(bytes) + ") must be 0 (more than the caches hold) or at least " + text(kReadChunk));
  }
  const bool huge_pages = keywords.boolean("huge_pages");
  keywords.finish();

  const py::gil_scoped_release release;
  const MachineProbe machine(device.threads(), device.isa(), seconds);
  if (kind->second == cpu::Probe::kRead) return machine.read_rate(bytes, huge_pages);
  return machine.compute_rate(kind->second);
}

std::string cuda_unsupported_reason(const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t value_dim) {
  AttentionParams p;
  p.dtype = dtype_named("cuda_unsupported_reason", "dtype", dtype);
  p.batch = batch, p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k;
  p.num_heads = num_heads, p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim, p.value_dim = value_dim;
  return cuda_library().unsupported_reason(&p);
}

// Without arrays: whether there are pages or a gradient of relative_bias (of this reach, where that is not negative) is all
// that counts beside the extents.
size_t cuda_workspace_bytes(bool backward, const std::string& dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                            int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t value_dim, bool pages,
                            int64_t reach) {
  static int32_t some_page = 0;
  BackwardParams p;
  p.forward.dtype = dtype_named("cuda_workspace_bytes", "dtype", dtype);
  p.forward.batch = batch, p.forward.seqlen_q = seqlen_q, p.forward.seqlen_k = seqlen_k;
  p.forward.num_heads = num_heads, p.forward.num_kv_heads = num_kv_heads;
  p.forward.head_dim = head_dim, p.forward.value_dim = value_dim;
  if (pages) p.forward.block_table = &some_page;
  if (reach >= 0) p.forward.relative_reach = reach, p.d_relative_bias = &some_page;
  const CudaLibrary& library = cuda_library();
  return backward ? library.backward_workspace_bytes(&p) : library.forward_workspace_bytes(&p.forward);
}

std::map<std::string, std::map<std::string, py::capsule>> xla_handlers() {
  std::map<std::string, std::map<std::string, py::capsule>> handlers;
  for (const xla::Handler& handler : xla::kHandlers) {
    handlers[handler.platform][handler.name] = py::capsule(reinterpret_cast<void*>(handler.run));
  }
  return handlers;
}

constexpr const char* kForward = R"(
forward(q, k, v, *, bias=None, masks=(), scale=None, window_left=-1, window_right=-1, bottom_right=False,
        query_lengths=None, key_lengths=None, dropout_rate=0.0, dropout_seed=0, dropout_offset=0, dropout_origin=None,
        layout='BSHD', block_table=None, k_scales=None, v_scales=None, isa=None, num_threads=0)
    -> (out, lse, statistics)

softmax(scale * q k^T + bias, masked) v, the log-sum-exp of the scores, and what backward needs of them.

q: [batch, seqlen_q, num_heads, head_dim]; k: [batch, seqlen_k, num_kv_heads, head_dim]; v: [batch, seqlen_k,
num_kv_heads, value_dim]; with layout='BHSD' the two middle axes change places. All of one dtype: float32, float64,
float16 or ml_dtypes' bfloat16. Any strides, read in place.
bias (their dtype or float32) and up to four bool masks (True: may be seen): [batch, num_heads, seqlen_q, seqlen_k], where any
extent may be 1. window_left, window_right: keys seen before and after a query's own position, -1 for all; that
position is the query's, or with bottom_right counted from the last key. query_lengths, key_lengths: [batch] integers.
dropout_origin: four integers, of a call that is a part of a larger one: what number its first head of its first batch entry
has there, how many heads an entry has there, and where its rows and keys begin.
block_table: [batch, pages] integers, for forward alone: k and v are then pages [num_pages, page_size, num_kv_heads, dim],
page_size a multiple of 16, of which each sequence has those that its row of the table names, as far as its length reaches.
Beside a q that is not float64, forward takes k and v of another dtype than q's, both of float32, float16, bfloat16 or int8. int8
ones need k_scales and v_scales, float32 like k without its last axis: what a row of them is to be multiplied with.
scale: None is 1/sqrt(head_dim). isa: one of isas(). num_threads: 0 is all CPUs of this process.

out is like q with value_dim for head_dim; lse: [batch, num_heads, seqlen_q] and statistics: [batch, num_heads, seqlen_q,
2], float64 when q is, else float32. The two statistics of a query are the maximum m of its scores and the sum of
exp(score - m), so that lse = m + log(sum). A query that sees no key gets 0, -inf, and 0 twice.

Raises ValueError or TypeError which names the rule and the values.)";

constexpr const char* kBackward = R"(
backward(q, k, v, out, statistics, d_out, *, d_lse=None, no_d_bias=False, <keywords of forward>)
    -> (dq, dk, dv, d_bias, d_relative_bias, d_sinks)

The gradients for d_out (like out) and d_lse (like lse; None is zero), given what forward returned for the same
arguments. d_bias has the shape and dtype of bias, and is None without one or with no_d_bias; the last two are like
relative_bias and sinks, or None.

Raises ValueError or TypeError which names the rule and the values.)";

constexpr const char* kQuantize = R"(
quantize(rows, *, isa=None) -> (integers, scales)

Rows as an int8 cache keeps them: float32, float16 or bfloat16 [..., dim] as int8 [..., dim] and what those are to be
multiplied with, float32 [...]: the largest magnitude of a row, divided by 127. A row with a NaN or an infinity becomes
zeros with a scale of NaN; one whose scale would be below 2^-100, zeros with a scale of 0.

Raises ValueError or TypeError which names the rule and the values.)";

constexpr const char* kProbe = R"(
probe(what, *, isa=None, num_threads=0, seconds=0.02, bytes=0, huge_pages=False) -> float

A limit of this machine, by the clock, of all threads together: what the kernels' speed is measured against.

what: 'fma_float32', 'fma_float64' (floating-point operations per second of independent multiply-adds in registers),
'exp_float32', 'exp_float64' (the kernels' e^x per second, from the L1 cache), or 'read' (bytes per second from
memory: the best of several ways, with one to four streams and prefetches). isa, num_threads: as in forward. seconds: how
long, for each of the ways. For 'read', bytes is the size of the memory read round and round, 0 being four times the
last-level cache and at least 256 MiB; huge_pages asks the system for huge pages, else it is asked for normal ones.

Raises ValueError or TypeError which names the rule and the values.)";

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The kernels of attn_ops on NumPy arrays.";
  m.attr("__version__") = ATTN_OPS_VERSION;
  m.def("isas", isas, "Instruction sets that are built in and usable on this machine, best first.");
  m.def(
      "default_isa", [] { return std::string(cpu::default_isa()); },
      "The instruction set used where none is named: the best, or that of the environment variable ATTN_OPS_ISA.");
  m.def("cpu_features", cpu_features, "Which of the features that kernels look for this machine has.");
  m.def("forward", forward, py::arg("q"), py::arg("k"), py::arg("v"), kForward);
  m.def("backward", backward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("statistics"),
        py::arg("d_out"), kBackward);
  m.def("quantize", quantize, py::arg("rows"), kQuantize);
  m.def("xla_handlers", xla_handlers,
        "The custom calls for XLA by platform (\"Host\", \"CUDA\") and name, as capsules for "
        "jax.ffi.register_ffi_target.");
  m.def("cuda_unavailable_reason", cuda_unavailable_reason, py::arg("device"),
        "Why the CUDA kernels cannot run on the device of this number; \"\" when they can.");
  m.def("cuda_unsupported_reason", cuda_unsupported_reason, py::arg("dtype"), py::arg("batch"), py::arg("seqlen_q"),
        py::arg("seqlen_k"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("value_dim"),
        "Why the CUDA kernels do not take calls of these sizes; \"\" when they do. RuntimeError without the library.");
  m.def("cuda_workspace_bytes", cuda_workspace_bytes, py::arg("backward"), py::arg("dtype"), py::arg("batch"),
        py::arg("seqlen_q"), py::arg("seqlen_k"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"),
        py::arg("value_dim"), py::arg("pages"), py::arg("reach"),
        "The most bytes of workspace that the CUDA kernels need for calls of these sizes. RuntimeError without the library.");
  m.def("cuda_library_exists", cuda_library_exists, "Whether libattn_ops_cuda.so is there. Loads nothing.");
  m.def("probe", probe, py::arg("what"), kProbe);
}

}  // namespace attn_ops::numpy
