// What is wrong with a call, in words: every binding asks here, so every front end gives the same answer.
// Each rule returns "" when it holds, else a text which names the rule and the values; the caller puts the name of
// its operator in front.
#pragma once

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <string>

#include "call.h"

namespace attn_ops {

inline std::string text(int64_t value) { return std::to_string(value); }
inline std::string text(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.17g", value);
  return buffer;
}
inline std::string text(DType type) {
  switch (type) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kBool: return "bool";
    case DType::kInt8: return "int8";
  }
  return "unknown";
}
inline std::string text(const int64_t* extents, int rank) {
  std::string s = "[";
  for (int i = 0; i < std::min(rank, 4); ++i) {
    s += (i ? "," : "") + (extents[i] == kUnknown ? std::string("?") : text(extents[i]));
  }
  return s + (rank > 4 ? ",...]" : "]");
}
inline std::string text(const Array& a) { return std::string(a.name) + " " + text(a.shape.data(), a.rank); }

inline std::string rank_reason(const char* name, int64_t rank, int64_t wanted, const char* meaning) {
  if (rank == wanted) return "";
  return std::string(name) + " must have rank " + text(wanted) + " " + meaning + ", got rank " + text(rank);
}

// Two extents which must be equal; an unknown one is taken for equal.
inline std::string equal_reason(const char* what, const Array& a, int axis_a, const Array& b, int axis_b) {
  const int64_t x = a.shape[axis_a], y = b.shape[axis_b];
  if (x == y || x == kUnknown || y == kUnknown) return "";
  return std::string(b.name) + " must have the " + what + " of " + a.name + " (" + text(x) + "), got " + text(y) +
         ": " + text(a) + ", " + text(b);
}

inline std::string dtype_reason(const Array& a, DType wanted, const char* rule) {
  if (a.dtype == wanted) return "";
  return std::string(a.name) + " must be " + text(wanted) + ", " + rule + ", got " + text(a.dtype);
}

template <class Int>
inline std::string lengths_reason(const char* name, const Int* lengths, int64_t count, const char* limit_name,
                                  int64_t limit) {
  for (int64_t b = 0; b < count; ++b) {
    if (lengths[b] < 0 || lengths[b] > limit) {
      return std::string(name) + "[" + text(b) + "] (" + text(int64_t{lengths[b]}) + ") must be from 0 to " +
             limit_name + " (" + text(limit) + ")";
    }
  }
  return "";
}

// Extents must multiply to something addressable. Empty arrays are judged by their other extents: kernels and
// frameworks multiply in any order, and a partial product may overflow where the whole is zero.
inline std::string size_reason(const char* name, std::initializer_list<int64_t> extents, size_t element_size) {
  int64_t bytes = static_cast<int64_t>(element_size);
  for (int64_t extent : extents) {
    if (__builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes)) {
      return std::string("the size of ") + name + " " + text(extents.begin(), static_cast<int>(extents.size())) +
             " overflows 64 bits";
    }
  }
  return "";
}

// What kernels have room for: positions, heads and lengths have 32 bits, and scratch memory is many times a dimension.
// The extents of a call without a row are free: nothing is computed.
inline std::string limits_reason(const Call& c, const Sizes& n) {
  if (n.batch == 0 || n.seqlen_q == 0 || n.num_heads == 0) return "";
  const struct {
    const char* name;
    int64_t value, most;
  } limits[] = {{"seqlen_q", n.seqlen_q, kMaxExtent}, {"seqlen_k", n.seqlen_k, kMaxExtent},
                {"num_heads", n.num_heads, kMaxExtent}, {"head_dim", n.head_dim, kMaxDim},
                {"value_dim", n.value_dim, kMaxDim}};
  for (const auto& limit : limits) {
    if (limit.value > limit.most) {
      return std::string(limit.name) + " (" + text(limit.value) + ") must be at most " + text(limit.most);
    }
  }
  if (c.dropout_rate > 0 && n.batch > kMaxStreams / n.num_heads) {
    return "batch (" + text(n.batch) + ") times num_heads (" + text(n.num_heads) + ") must be at most " +
           text(kMaxStreams) + " with dropout";
  }
  return "";
}

inline std::string score_shaped_reason(const Array& a, const Sizes& n) {
  std::string reason = rank_reason(a.name, a.rank, 4, "[batch, num_heads, seqlen_q, seqlen_k]");
  for (int i = 0; i < 4 && reason.empty(); ++i) {
    if (a.shape[i] == 1 || a.shape[i] == n.scores(i)) continue;
    const int64_t scores[4] = {n.batch, n.num_heads, n.seqlen_q, n.seqlen_k};
    reason = text(a) + " must broadcast to [batch, num_heads, seqlen_q, seqlen_k] " + text(scores, 4);
  }
  return reason;
}

inline std::string same_shape_reason(const Array& a, int rank, const int64_t* wanted, const char* meaning) {
  if (a.rank == rank && std::equal(wanted, wanted + rank, a.shape.begin())) return "";
  return std::string(a.name) + " must have the shape " + text(wanted, rank) + " of " + meaning + ", got " +
         text(a.shape.data(), a.rank);
}

// The rules about the shapes of q, k and v that hold whatever the layout, which a shape function cannot read: it has
// only one name for the two middle axes. Extents may be unknown.
inline std::string tensors_reason(const Array& q, const Array& k, const Array& v, const char* axis1,
                                  const char* axis2) {
  std::string reason = equal_reason("head_dim", q, 3, k, 3);
  if (reason.empty()) reason = equal_reason(axis1, k, 1, v, 1);
  if (reason.empty()) reason = equal_reason(axis2, k, 2, v, 2);
  if (reason.empty() && q.shape[3] == 0) reason = "head_dim must be at least 1, got 0: " + text(q);
  return reason;
}

// That of k and v, unless they are pages.
inline std::string batch_reason(const Array& q, const Array& k, const Array& v) {
  const std::string reason = equal_reason("batch", q, 0, k, 0);
  return reason.empty() ? equal_reason("batch", q, 0, v, 0) : reason;
}

inline std::string heads_reason(const Sizes& n) {
  if (n.num_kv_heads > 0 && n.num_heads % n.num_kv_heads == 0) return "";
  return "num_heads (" + text(n.num_heads) + ") must be a multiple of num_kv_heads (" + text(n.num_kv_heads) + ")";
}

inline std::string layout_reason(const std::string& layout) {
  if (layout == "BSHD" || layout == "BHSD") return "";
  return "layout ('" + layout + "') must be 'BSHD' or 'BHSD'";
}

inline std::string options_reason(const Call& c) {
  if (c.has_scale && !std::isfinite(c.scale)) return "scale (" + text(c.scale) + ") must be finite";
  if (!(c.dropout_rate >= 0 && c.dropout_rate < 1)) {
    return "dropout_rate (" + text(c.dropout_rate) + ") must be at least 0 and less than 1";
  }
  if (c.mask.window_left < -1 || c.mask.window_right < -1) {
    return "window_left (" + text(c.mask.window_left) + ") and window_right (" + text(c.mask.window_right) +
           ") must be -1 (unbounded) or more";
  }
  if (c.has_soft_cap && !(c.soft_cap > 0 && std::isfinite(c.soft_cap))) {
    return "soft_cap (" + text(c.soft_cap) + ") must be more than 0 and finite";
  }
  return "";
}

// Lengths that cannot be read here are clamped by the kernels.
inline std::string lengths_array_reason(Place place, const Array& a, const Sizes& n, const char* limit_name,
                                        int64_t limit) {
  if (!a.present) return "";
  std::string reason = same_shape_reason(a, 1, &n.batch, "[batch]");
  if (reason.empty() && place == Place::kCpu) {
    reason = lengths_reason(a.name, static_cast<const int32_t*>(a.data), n.batch, limit_name, limit);
  }
  return reason;
}

// [batch or 1, extent]
inline std::string by_batch_reason(const Array& a, const Sizes& n, const char* what, int64_t extent) {
  if (a.rank == 2 && (a.shape[0] == 1 || a.shape[0] == n.batch) && a.shape[1] == extent) return "";
  return text(a) + " must be [batch or 1, " + what + "] ([" + text(n.batch) + " or 1," + text(extent) + "])";
}

// Of one array of ends, whose values can be read here.
inline std::string ends_reason(const Array& a, const Sizes& n) {
  const int32_t* const ends = static_cast<const int32_t*>(a.data);
  for (int64_t b = 0; b < a.shape[0]; ++b)
    for (int64_t i = 0; i < n.seqlen_q; ++i) {
      const int64_t at = b * n.seqlen_q + i, end = ends[at];
      const bool inside = end >= 0 && end <= n.seqlen_k, moves_back = i > 0 && end < ends[at - 1];
      if (inside && !moves_back) continue;
      const std::string where = std::string(a.name) + "[" + text(b) + "," + text(i) + "] (" + text(end) + ")";
      if (!inside) return where + " must be from 0 to seqlen_k (" + text(n.seqlen_k) + ")";
      return where + " must not be less than that of the row before (" + text(int64_t{ends[at - 1]}) +
             "): intervals never move back, nor the ids of segments with contiguous=True";
    }
  return "";
}

inline std::string intervals_reason(const Call& c, const Sizes& n) {
  for (const Array* a : {&c.key_begin, &c.key_end}) {
    std::string reason = by_batch_reason(*a, n, "seqlen_q", n.seqlen_q);
    if (reason.empty() && c.place == Place::kCpu) reason = ends_reason(*a, n);
    if (!reason.empty()) return reason;
  }
  return c.key_begin.shape[0] == c.key_end.shape[0]
             ? ""
             : "key_begin and key_end must have one shape, got " + text(c.key_begin) + ", " + text(c.key_end);
}

inline std::string offset_reason(const Call& c, const Sizes& n) {
  const Array& a = c.query_offset;
  if (a.rank != 1 || (a.shape[0] != 1 && a.shape[0] != n.batch)) {
    return text(a) + " must have the shape [batch or 1] ([" + text(n.batch) + " or 1])";
  }
  if (c.mask.bottom_right) return "query_offset and bottom_right both say where the first query stands: give one";
  if (c.place == Place::kGpu) return "";
  return lengths_reason(a.name, static_cast<const int32_t*>(a.data), a.shape[0], "2^30", kMaxOffset);
}

inline std::string segments_reason(const Call& c, const Sizes& n) {
  const std::string reason = by_batch_reason(c.query_ids, n, "seqlen_q", n.seqlen_q);
  return reason.empty() ? by_batch_reason(c.key_ids, n, "seqlen_k", n.seqlen_k) : reason;
}

inline std::string blocks_reason(const Call& c, const Sizes& n) {
  if (c.block_q < 1 || c.block_k < 1) {
    return "block_q (" + text(c.block_q) + ") and block_k (" + text(c.block_k) + ") must be at least 1";
  }
  const Array& a = c.blocks;
  const auto blocks = [](int64_t extent, int64_t size) { return extent / size + (extent % size != 0); };
  const int64_t wanted[4] = {n.batch, n.num_heads, blocks(n.seqlen_q, c.block_q), blocks(n.seqlen_k, c.block_k)};
  bool fits = a.rank == 4 && a.dtype == DType::kBool && a.shape[2] == wanted[2] && a.shape[3] == wanted[3];
  for (int i = 0; i < 2; ++i) fits = fits && (a.shape[i] == 1 || a.shape[i] == wanted[i]);
  if (fits) return "";
  return text(a) + " must be bool [batch or 1, num_heads or 1, seqlen_q / block_q, seqlen_k / block_k], rounded up: " +
         text(wanted, 4);
}

// The first of these numbers, which can be read here, of which holds(x) is false; -1 where there is none.
template <class Holds>
int64_t first_wrong(const Array& a, int64_t count, const Holds& holds) {
  for (int64_t i = 0; i < count; ++i) {
    const double x = a.dtype == DType::kFloat64 ? static_cast<const double*>(a.data)[i]
                                                : static_cast<double>(static_cast<const float*>(a.data)[i]);
    if (!holds(x)) return i;
  }
  return -1;
}

inline std::string slopes_reason(const Call& c, const Sizes& n) {
  const Array& a = c.slopes;
  std::string reason = by_batch_reason(a, n, "num_heads", n.num_heads);
  if (reason.empty() && c.place == Place::kCpu) {
    const int64_t at =
        first_wrong(a, a.shape[0] * n.num_heads, [](double x) { return x >= -kMaxSlope && x <= kMaxSlope; });
    if (at >= 0) reason = "slopes[" + text(at) + "] must be a number from -2^64 to 2^64";
  }
  return reason;
}

inline std::string relative_bias_reason(const Call& c, const Sizes& n) {
  const Array& a = c.relative_bias;
  if (a.rank == 2 && a.shape[0] == n.num_heads && a.shape[1] % 2 == 1 && a.shape[1] <= kMaxExtent) return "";
  return text(a) + " must be [num_heads, 2 R + 1] (num_heads is " + text(n.num_heads) + "), of distances from -R to R";
}

// Pages and their table, whose shapes the sizes of a call follow from.
inline std::string pages_reason(const Call& c) {
  const Array& table = c.block_table;
  std::string reason = equal_reason("number of pages", c.k, 0, c.v, 0);
  if (!reason.empty()) return reason;
  if (page_size(c) == 0 || page_size(c) % kPageRows != 0) {
    return "the size of a page (" + text(page_size(c)) + ") must be a multiple of " + text(kPageRows) + ": " + text(c.k);
  }
  if (table.rank != 2 || table.shape[0] != c.q.shape[0]) {
    return text(table) + " must be [batch, pages] ([" + text(c.q.shape[0]) + ",...])";
  }
  int64_t keys;
  if (__builtin_mul_overflow(table.shape[1], page_size(c), &keys)) {
    return "seqlen_k, pages of " + text(page_size(c)) + " keys in " + text(table) + ", overflows 64 bits";
  }
  return "";
}

// Every entry of the table that a length reaches; lengths are in their range.
inline std::string entries_reason(const Call& c, const Sizes& n) {
  if (c.place == Place::kGpu) return "";
  const int32_t* const lengths = c.key_lengths.present ? integers(c.key_lengths) : nullptr;
  for (int64_t b = 0; b < n.batch; ++b) {
    const int64_t keys = lengths ? lengths[b] : n.seqlen_k, pages = (keys + page_size(c) - 1) / page_size(c);
    const int32_t* const row = integers(c.block_table) + b * c.block_table.shape[1];
    for (int64_t i = 0; i < pages; ++i) {
      if (row[i] >= 0 && row[i] < c.k.shape[0]) continue;
      return "block_table[" + text(b) + "," + text(i) + "] (" + text(int64_t{row[i]}) +
             ") must be from 0 to " + text(c.k.shape[0] - 1) + ": there are " + text(c.k.shape[0]) +
             " pages, and the sequence has " + text(keys) + " keys in pages of " + text(page_size(c));
    }
  }
  return "";
}

inline std::string backward_reason(const Call& c, const Sizes& n) {
  const Shape4 output = n.output(c.layout);
  std::string reason = same_shape_reason(c.out, 4, output.data(), "the forward output");
  if (reason.empty()) reason = same_shape_reason(c.d_out, 4, output.data(), "the forward output");
  if (reason.empty()) {
    reason = same_shape_reason(c.statistics, 4, n.statistics().data(), "[batch, num_heads, seqlen_q, 2]");
  }
  if (reason.empty() && c.d_lse.present) {
    reason = same_shape_reason(c.d_lse, 3, n.lse().data(), "[batch, num_heads, seqlen_q]");
  }
  return reason;
}

// Keys and values of a cache may be narrower than the queries, or wider: forward reads what it computes float32 from.
inline std::string keys_dtype_reason(const Call& c) {
  const bool int8 = c.k.dtype == DType::kInt8;
  if (c.k.dtype != c.q.dtype) {
    const bool as_float32 = c.k.dtype != DType::kBool && accumulator_of(c.k.dtype) == accumulator_of(c.q.dtype);
    if (!as_float32 || (int8 && c.q.dtype == DType::kFloat64) || c.backward) {
      return dtype_reason(c.k, c.q.dtype, "the dtype of q");
    }
  }
  std::string reason = dtype_reason(c.v, c.k.dtype, c.k.dtype == c.q.dtype ? "the dtype of q" : "the dtype of k");
  for (const Array* a : {&c.k_scales, &c.v_scales}) {
    if (!reason.empty()) break;
    if (a->present != int8) {
      reason = int8 ? std::string("keys and values in int8 need scales") : "scales are for keys and values in int8";
    } else if (int8) {
      reason = dtype_reason(*a, DType::kFloat32, "of which int8 keys and values are multiples");
    }
  }
  return reason;
}

inline std::string dtypes_reason(const Call& c) {
  if (c.q.dtype == DType::kBool || c.q.dtype == DType::kInt8) {
    return "q must be float32, float64, float16 or bfloat16, got " + text(c.q.dtype);
  }
  std::string reason = keys_dtype_reason(c);
  for (const Array* a : {&c.out, &c.d_out}) {
    if (a->present && reason.empty()) reason = dtype_reason(*a, c.q.dtype, "the dtype of q");
  }
  const bool wide_bias = size_of(c.q.dtype) == 2;
  if (reason.empty() && c.bias.present && !(wide_bias && c.bias.dtype == DType::kFloat32)) {
    reason = dtype_reason(c.bias, c.q.dtype, wide_bias ? "the dtype of q, or float32" : "the dtype of q");
  }
  for (const Array* a : {&c.statistics, &c.d_lse, &c.slopes, &c.relative_bias, &c.sinks}) {
    if (a->present && reason.empty()) {
      reason = dtype_reason(*a, accumulator_of(c.q.dtype), "float64 when q is float64, else float32");
    }
  }
  for (int i = 0; i < c.num_masks && reason.empty(); ++i) {
    reason = dtype_reason(c.masks[i], DType::kBool, "true where a key may be seen (additive terms are the bias)");
  }
  return reason;
}

// The first rule that q, k and v break, with their table of pages, or "".
inline std::string sizes_reason(const Call& c) {
  const bool bshd = c.layout == Layout::kBSHD;
  const char* meaning = bshd ? "[batch, seqlen, heads, dim]" : "[batch, heads, seqlen, dim]";
  std::string reason = dtypes_reason(c);
  for (const Array* a : {&c.q, &c.k, &c.v}) {
    if (reason.empty()) reason = rank_reason(a->name, a->rank, 4, meaning);
  }
  if (reason.empty()) {
    reason = tensors_reason(c.q, c.k, c.v, bshd ? "seqlen_k" : "num_kv_heads", bshd ? "num_kv_heads" : "seqlen_k");
  }
  if (reason.empty()) reason = c.block_table.present ? pages_reason(c) : batch_reason(c.q, c.k, c.v);
  for (const Array* a : {&c.k_scales, &c.v_scales}) {
    if (reason.empty() && a->present) reason = same_shape_reason(*a, 3, c.k.shape.data(), "k without its last axis");
  }
  if (!reason.empty()) return reason;

  const Sizes n = sizes_of(c);
  const size_t element = size_of(c.q.dtype), kept = size_of(c.k.dtype), statistic = size_of(accumulator_of(c.q.dtype));
  const auto check = [&reason](auto rule) {
    if (reason.empty()) reason = rule();
  };
  check([&] { return heads_reason(n); });
  check([&] { return size_reason("q", {n.batch, n.seqlen_q, n.num_heads, n.head_dim}, element); });
  const int64_t entries = c.k.shape[0], length = c.k.shape[sequence_axis(c.layout)];  // a batch, or pages
  check([&] { return size_reason("k", {entries, length, n.num_kv_heads, n.head_dim}, kept); });
  check([&] { return size_reason("v", {entries, length, n.num_kv_heads, n.value_dim}, kept); });
  check([&] { return size_reason("out", {n.batch, n.seqlen_q, n.num_heads, n.value_dim}, element); });
  check([&] { return size_reason("statistics", {n.batch, n.num_heads, n.seqlen_q, 2}, statistic); });
  check([&] { return size_reason("scores", {n.batch, n.num_heads, n.seqlen_q, n.seqlen_k}, 1); });
  check([&] { return limits_reason(c, n); });
  return reason;
}

// The first rule that the call breaks, or "".
inline std::string invalid_reason(const Call& c) {
  std::string reason = sizes_reason(c);
  if (!reason.empty()) return reason;
  const Sizes n = sizes_of(c);
  const auto check = [&reason](auto rule) {
    if (reason.empty()) reason = rule();
  };
  if (c.bias.present) check([&] { return score_shaped_reason(c.bias, n); });
  for (int i = 0; i < c.num_masks; ++i) check([&] { return score_shaped_reason(c.masks[i], n); });
  check([&] { return lengths_array_reason(c.place, c.query_lengths, n, "seqlen_q", n.seqlen_q); });
  check([&] { return lengths_array_reason(c.place, c.key_lengths, n, "seqlen_k", n.seqlen_k); });
  if (c.block_table.present) check([&] { return entries_reason(c, n); });
  if (c.key_begin.present) check([&] { return intervals_reason(c, n); });
  if (c.query_offset.present) check([&] { return offset_reason(c, n); });
  if (c.query_ids.present) check([&] { return segments_reason(c, n); });
  if (c.blocks.present) check([&] { return blocks_reason(c, n); });
  if (c.slopes.present) check([&] { return slopes_reason(c, n); });
  if (c.relative_bias.present) check([&] { return relative_bias_reason(c, n); });
  if (c.sinks.present) check([&] { return same_shape_reason(c.sinks, 1, &n.num_heads, "[num_heads]"); });
  check([&] { return options_reason(c); });
  if (c.dropout_rate > 0 && !c.has_seed) check([] { return std::string("dropout_rate > 0 needs a seed"); });
  if (c.backward) check([&] { return backward_reason(c, n); });
  if (c.backward && c.block_table.present) check([] { return std::string("pages of keys are for forward alone"); });
  return reason;
}

}  // namespace attn_ops
