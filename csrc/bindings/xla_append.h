// The custom call attn_ops.append: new rows in the memory of an array [pages, ...] that XLA lends as operand and result.
//
//   result = operand, but  result[page[b][i], ..., row[b][i], ...] = rows[b, ..., i, ...]   where there is such a place
//
// XLA does the same by a scatter, but on CPUs it makes float32 of a whole array of bfloat16 for that, and back.
#pragma once

#include <cstring>

#include "xla_frame.h"

namespace attn_ops::xla {

inline void append_rows(const Attributes& attributes, const XLA_FFI_Args& args, const XLA_FFI_Rets& rets) {
  Operands operands(args);
  const Array cache = operands.next("cache", Element::kValue), rows = operands.next("rows", Element::kValue);
  const Array page = operands.next("page", Element::kInteger), row = operands.next("row", Element::kInteger);
  operands.finish();
  const int64_t axis = attributes.integer("axis");  // of the rows
  if (axis != 1 && axis != 2) throw std::invalid_argument("axis must be 1 or 2, got " + text(axis));
  if (cache.dtype == DType::kBool) throw std::invalid_argument("cache must not be bool");
  if (cache.rank <= axis || rows.rank != cache.rank || rows.dtype != cache.dtype) {
    throw std::invalid_argument("cache and rows must have the same rank, beyond axis " + text(axis) + ", and dtype");
  }
  int64_t bytes = size_of(cache.dtype);  // of a row
  const int64_t* const extents = operands.buffer(0).dims;
  for (int i = 1; i < cache.rank; ++i) {
    if (i != axis && operands.buffer(1).dims[i] != extents[i]) throw std::invalid_argument("rows must be rows of the cache");
    if (i > axis) bytes *= extents[i];
  }
  const int64_t batch = rows.shape[0], count = rows.shape[axis];
  for (const Array* at : {&page, &row}) {
    if (at->rank != 2 || at->shape[0] != batch || at->shape[1] != count) {
      throw std::invalid_argument("page and row must have the shape [" + text(batch) + ", " + text(count) + "]");
    }
  }

  const int64_t pages = cache.shape[0], length = cache.shape[axis], outer = axis == 2 ? cache.shape[1] : 1;
  Results results(rets, Memory::kAsked);
  char* const to = static_cast<char*>(results.next("cache", cache.dtype, extents, cache.rank));
  results.finish();
  if (pages * outer * length * bytes == 0) return;
  if (to != cache.data) std::memcpy(to, cache.data, static_cast<size_t>(pages * outer * length * bytes));
  const auto* const from = static_cast<const char*>(rows.data);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = static_cast<const int32_t*>(page.data)[b * count + i];
      const int64_t j = static_cast<const int32_t*>(row.data)[b * count + i];
      if (n < 0 || n >= pages || j < 0 || j >= length) continue;
      for (int64_t o = 0; o < outer; ++o) {
        std::memcpy(to + ((n * outer + o) * length + j) * bytes, from + ((b * outer + o) * count + i) * bytes,
                    static_cast<size_t>(bytes));
      }
    }
  }
}

}  // namespace attn_ops::xla
