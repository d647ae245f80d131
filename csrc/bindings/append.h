// New rows of keys and values at the end of a cache: what is right, and the writing. Which memory is written is the
// binding's affair (tf_append.h).
//
// A cache is keys [batch, max_length, heads, dim] and values likewise (BSHD, or BHSD with heads before positions), or
// both in one array [batch, 2, max_length, heads, dim] (KerasHub's). One in int8 has scales besides, float32 like keys and
// values without their last axis, and new rows become integers where they are written (cpu/quantize.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "validate.h"

namespace attn_ops {

enum class CacheLayout { kBSHD, kBHSD, kStacked };

inline CacheLayout cache_layout_named(const std::string& name) {
  return name == "BHSD" ? CacheLayout::kBHSD : name == "B2SHD" ? CacheLayout::kStacked : CacheLayout::kBSHD;
}

using Extents = std::vector<int64_t>;

// An array of rows by position: [batch, planes, length, row_bytes], contiguous but for the first axis.
struct PositionRows {
  int64_t batch, planes, length, row_bytes, batch_bytes;

  char* at(void* data, int64_t b, int64_t plane, int64_t position) const {
    return static_cast<char*>(data) + b * batch_bytes + (plane * length + position) * row_bytes;
  }
};

// That of one half, keys or values, of a cache or of the new rows.
inline PositionRows position_rows(const Extents& shape, CacheLayout layout, int64_t element_bytes) {
  const bool stacked = layout == CacheLayout::kStacked && shape.size() == 5, heads_first = layout == CacheLayout::kBHSD;
  const size_t first = stacked ? 2 : 1;
  PositionRows rows;
  rows.batch = shape[0];
  rows.planes = heads_first ? shape[1] : 1;
  rows.length = heads_first ? shape[2] : shape[first];
  rows.row_bytes = (heads_first ? shape[3] : shape[first + 1] * shape[first + 2]) * element_bytes;
  rows.batch_bytes = (stacked ? 2 : 1) * rows.planes * rows.length * rows.row_bytes;
  return rows;
}

// One append: shapes of a half of the cache and of its new rows, and where each sequence's rows go.
struct Append {
  CacheLayout layout;
  PositionRows cache[2], added[2];  // keys, values
  // Of int8 caches: their scales, and what their new rows are.
  bool int8 = false;
  PositionRows scales[2];
  DType added_dtype = DType::kFloat32;
  int64_t dim[2] = {0, 0};
  const int32_t* positions;         // [batch] or [1] (stride 0): of the first new row
  int64_t position_stride;
  const int32_t* counts = nullptr;   // [batch] or null: how many of the new rows are there
  const int32_t* dropped = nullptr;  // [batch] or null: so many of the oldest rows make way, and the others move up

  int64_t position(int64_t b) const { return positions[b * position_stride]; }
  int64_t count(int64_t b) const { return counts ? counts[b] : added[0].length; }
  int64_t drop(int64_t b) const { return dropped ? dropped[b] : 0; }
  bool moves() const {
    for (int64_t b = 0; b < cache[0].batch; ++b)
      if (drop(b) > 0) return true;
    return false;
  }
};

inline std::string extents_text(const Extents& shape) { return text(shape.data(), static_cast<int>(shape.size())); }

// Throws std::invalid_argument unless the new rows fit the cache. `half` is "k" or "v".
inline void check_append_shapes(const char* half, const Extents& cache, const Extents& added, CacheLayout layout) {
  const bool stacked = layout == CacheLayout::kStacked;
  const std::string name = std::string(half) + "_new";
  const size_t rank = stacked ? 5 : 4;
  if (cache.size() != rank || (stacked && cache[1] != 2)) {
    throw std::invalid_argument("the cache must have the shape " +
                                std::string(stacked ? "[batch, 2, max_length, heads, dim]"
                                                    : layout == CacheLayout::kBHSD ? "[batch, heads, max_length, dim]"
                                                                                   : "[batch, max_length, heads, dim]") +
                                ", got " + extents_text(cache));
  }
  Extents wanted = cache;
  if (stacked) wanted.erase(wanted.begin() + 1);
  const size_t sequence = layout == CacheLayout::kBHSD ? 2 : 1;
  if (added.size() == 4) wanted[sequence] = added[sequence];
  if (added != wanted) {
    throw std::invalid_argument(name + " must have the shape of the cache " + extents_text(cache) +
                                " but for the length, got " + extents_text(added));
  }
}

// Throws std::invalid_argument unless the scales of an int8 cache have its shape but for the last axis.
inline void check_append_scales(const char* half, const Extents& cache, const Extents& scales) {
  if (scales == Extents(cache.begin(), cache.end() - 1)) return;
  throw std::invalid_argument(std::string(half) + "_scale must have the shape of the cache " + extents_text(cache) +
                              " without its last axis, got " + extents_text(scales));
}

// Throws std::invalid_argument where a row would be written outside the cache; nothing has been written then.
inline void check_append_positions(const Append& a) {
  const int64_t room = a.cache[0].length, most = a.added[0].length;
  for (int64_t b = 0; b < a.cache[0].batch; ++b) {
    const int64_t position = a.position(b), count = a.count(b), drop = a.drop(b);
    if (count < 0 || count > most) {
      throw std::invalid_argument("the number of new rows of sequence " + text(b) + " must be from 0 to " + text(most) +
                                  ", got " + text(count));
    }
    if (position < 0 || drop < 0 || drop > position || position - drop + count > room) {
      throw std::invalid_argument("sequence " + text(b) + " has " + text(position) + " rows, of a cache for " +
                                  text(room) + ", which has no room for " + text(count) + " more");
    }
  }
}

// Lets the oldest rows of `rows` make way; then write(b, plane, to) gets the place of the first new row.
template <class Write>
void grow_rows(const Append& a, const PositionRows& rows, char* start, const Write& write) {
  for (int64_t b = 0; b < rows.batch; ++b) {
    const int64_t kept = a.position(b) - a.drop(b);
    for (int64_t plane = 0; plane < rows.planes; ++plane) {
      char* const row = rows.at(start, b, plane, 0);
      if (a.drop(b) > 0 && kept > 0) std::memmove(row, row + a.drop(b) * rows.row_bytes, kept * rows.row_bytes);
      if (a.count(b) > 0) write(b, plane, row + kept * rows.row_bytes);
    }
  }
}

// Rows before the first new one stay as they are in `data`, keys' or values' by `half`, unless some are dropped. `scales`
// are those of int8 caches.
inline void write_rows(const Append& a, int half, void* data, void* scales, void* added_data) {
  const PositionRows &cache = a.cache[half], &added = a.added[half];
  char* const start = static_cast<char*>(data) +
                      (a.layout == CacheLayout::kStacked ? half * cache.length * cache.row_bytes : 0);
  if (!a.int8) {
    grow_rows(a, cache, start, [&](int64_t b, int64_t plane, char* to) {
      std::memcpy(to, added.at(added_data, b, plane, 0), a.count(b) * cache.row_bytes);
    });
    return;
  }
  grow_rows(a, cache, start, [](int64_t, int64_t, char*) {});
  grow_rows(a, a.scales[half], static_cast<char*>(scales), [&](int64_t b, int64_t plane, char* to) {
    char* const rows = cache.at(start, b, plane, a.position(b) - a.drop(b));
    const int64_t vectors = a.dim[half] > 0 ? a.count(b) * cache.row_bytes / a.dim[half] : 0;
    cpu::quantize(a.added_dtype, added.at(added_data, b, plane, 0), vectors, a.dim[half],
                  reinterpret_cast<int8_t*>(rows), reinterpret_cast<float*>(to));
  });
}

}  // namespace attn_ops
