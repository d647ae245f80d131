// Moves rows between memory (any dtype, any stride) and the two layouts of the kernels:
//   transposed [column][row lanes]   one query row per vector lane (q, out and bias of a tile)
//   row major  [row][column]         contiguous copies of key/value blocks and of query rows
#pragma once

#include "storage.h"
#include "vectors.h"

namespace attn_ops::cpu {
namespace {

// A bump allocator over the scratch memory of one thread.
class Arena {
 public:
  explicit Arena(void* memory) : at_(static_cast<char*>(memory)) {}

  template <class E>
  E* take(int64_t count) {
    char* const p = at_;
    at_ += bytes<E>(count);
    return reinterpret_cast<E*>(p);
  }

  template <class E>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(E)) + 63) / 64 * 64;
  }

 private:
  char* at_;
};

template <class T>
ATTN_INLINE int64_t round_to_width(int64_t n) {
  return (n + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
}

// put(dst + c * ld + r, ld, vectors over rows r of elements c, c + 1 .., how many), for `lanes` rows of which those past
// `rows` are zero. `rows[r]` points to element 0 of row r; elements are `stride` bytes apart. All by value: what a closure
// refers to would be read again after each store.
template <class T, class Storage, class Put>
ATTN_INLINE void load_transposed_as(Storage storage, const char* const* row, int rows, int lanes, int64_t stride,
                                    int64_t columns, T* dst, int64_t ld, Put put) {
  using S = Simd<T>;
  constexpr int W = S::width;
  for (int r0 = 0; r0 < lanes; r0 += W)
    for (int64_t c0 = 0; c0 < columns; c0 += W) {
      const int64_t n = columns - c0 < W ? columns - c0 : W;
      T* const at = dst + c0 * ld + r0;
      Vec<T> block[W];
      if (r0 + W <= rows && n == W && stride == storage.size) {  // whole: the block never leaves the registers
        const char* const* of_block = row + r0;
        asm("" : "+r"(of_block));  // else kept from block to block, in vector registers
        for (int i = 0; i < W; ++i) block[i] = storage.load(of_block[i] + c0 * stride);
        S::transpose(block);
        put(at, ld, block, int64_t{W});
        continue;
      }
      for (int i = 0; i < W; ++i)
        block[i] = r0 + i < rows ? load_some<T>(storage, row[r0 + i] + c0 * stride, stride, n) : S::zero();
      S::transpose(block);
      put(at, ld, block, n);
    }
}

// A `put` that does the same with each vector.
template <class T, class Put>
ATTN_INLINE auto each_vector_of_block(Put put) {
  return [=](T* at, int64_t ld, const Vec<T>* block, int64_t n) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < n; ++j) put(at + j * ld, block[j]);
  };
}

template <class T, class Put>
ATTN_INLINE void load_transposed(DType dtype, const char* const* row, int rows, int lanes, int64_t stride,
                                 int64_t columns, T* dst, int64_t ld, const Put& put) {
  with_storage(T{}, dtype, [&](auto storage) {
    load_transposed_as<T>(storage, row, rows, lanes, stride, columns, dst, ld, put);
  });
}

// What pairs are made of where it is not bfloat16: meet(rows, c, n) for `rows` rows of n columns from c on, two vectors of them at
// most, rounded to that.
template <int kRows, class Meet>
ATTN_INLINE void in_rounded_parts(DType dtype, const char* const* row, int rows, int64_t stride, int64_t columns,
                                  const Meet& meet) {
  constexpr int W = Simd<float>::width;
  constexpr int64_t kPart = 2 * W;
  uint16_t rounded[kRows][kPart];
  const char* part[kRows];
  for (int i = 0; i < rows; ++i) part[i] = reinterpret_cast<const char*>(rounded[i]);
  for (int64_t c = 0; c < columns; c += kPart) {
    const int64_t n = columns - c < kPart ? columns - c : kPart;
    with_storage(float{}, dtype, [&](auto storage) {
      for (int i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; j += W)
          BFloat16::store(reinterpret_cast<char*>(rounded[i] + j),
                          load_some<float>(storage, row[i] + (c + j) * stride, stride, n - j));
    });
    meet(part, c, n);
  }
}

// dst[c * ld + r] = factor times row r, of `columns` numbers that lie `stride` bytes apart; of pairs that are neighbours, with
// rows of zeros behind them for a matrix unit, rounded to bfloat16 if they are not. The factor of pairs is a power of two.
template <class E>
ATTN_INLINE void load_factors(DType dtype, const char* const* row, int rows, int lanes, int64_t stride,
                              int64_t columns, Accumulator<E> factor, E* dst) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  const Vec<T> by = S::set1(factor);
  if constexpr (kOfPairs<E>) {  // as if they were floats: bits change places
    if (dtype != DType::kBFloat16)
      return in_rounded_parts<kMaxVectors * S::width>(
          dtype, row, rows, stride, columns, [&](const char* const* part, int64_t c, int64_t n) {
            load_factors<E>(DType::kBFloat16, part, rows, lanes, 2, n, factor, dst + elements<E>(c) * lanes);
          });
    load_transposed<T>(DType::kFloat32, row, rows, lanes, sizeof(E), elements<E>(columns), reinterpret_cast<T*>(dst),
                       lanes, each_vector_of_block<T>([=](T* at, Vec<T> x) {
                         const auto number = [=](int i) { return Product<E>::number(x, i) * by; };
                         S::store(at, Product<E>::pairs(number(0), number(1)));
                       }));
    const int64_t used = elements<E>(columns) * lanes;
    memset(dst + used, 0, sizeof(E) * (padded_elements<E>(columns) * lanes - used));
  } else {
    load_transposed<T>(dtype, row, rows, lanes, stride, columns, dst, lanes,
                       each_vector_of_block<T>([=](T* at, Vec<T> x) { S::store(at, x * by); }));
  }
}

// row[r][c] = get(src + c * ld + r, r0) for the first `rows` lanes; get returns a vector over rows.
template <class T, class Storage, class Get>
ATTN_INLINE void store_transposed_as(Storage storage, char* const* row, int rows, int lanes, int64_t stride,
                                     int64_t columns, const T* src, int64_t ld, Get get) {
  using S = Simd<T>;
  constexpr int W = S::width;
  for (int r0 = 0; r0 < lanes; r0 += W)
    for (int64_t c0 = 0; c0 < columns; c0 += W) {
      const int64_t n = columns - c0 < W ? columns - c0 : W;
      if (r0 + W <= rows && n == W && stride == storage.size) {
        Vec<T> block[W];
        for (int j = 0; j < W; ++j) block[j] = get(src + (c0 + j) * ld + r0, r0);
        S::transpose(block);
        char* to[W];
        for (int i = 0; i < W; ++i) to[i] = row[r0 + i] + c0 * stride;
        for (int i = 0; i < W; ++i) storage.store(to[i], block[i]);
        continue;
      }
      Vec<T> block[W];
      for (int64_t j = 0; j < W; ++j) block[j] = j < n ? get(src + (c0 + j) * ld + r0, r0) : S::zero();
      S::transpose(block);
      for (int i = 0; i < W && r0 + i < rows; ++i)
        store_some<T>(storage, row[r0 + i] + c0 * stride, stride, n, block[i]);
    }
}

template <class T, class Get>
ATTN_INLINE void store_transposed(DType dtype, char* const* row, int rows, int lanes, int64_t stride, int64_t columns,
                                  const T* src, int64_t ld, const Get& get) {
  with_storage(T{}, dtype, [&](auto storage) {
    store_transposed_as<T>(storage, row, rows, lanes, stride, columns, src, ld, get);
  });
}

// dst[c] = src[c] for c < columns, then zeros to the end of the last vector when `padded`.
template <class T, class Storage>
ATTN_INLINE void load_row(Storage storage, const char* src, int64_t stride, int64_t columns, bool padded, T* dst) {
  constexpr int W = Simd<T>::width;
  int64_t c = 0;
  for (; c + W <= columns && stride == storage.size; c += W) Simd<T>::store(dst + c, storage.load(src + c * storage.size));
  for (; c < columns; c += W) {
    const int64_t n = columns - c < W ? columns - c : W;
    const Vec<T> x = load_some<T>(storage, src + c * stride, stride, n);
    if (n == W || padded) Simd<T>::store(dst + c, x);
    else Simd<T>::store(dst + c, x, n);
  }
}

template <class T>
ATTN_INLINE void load_row(DType dtype, const char* src, int64_t stride, int64_t columns, bool padded, T* dst) {
  with_read_storage(T{}, dtype, [&](auto storage) { load_row<T>(storage, src, stride, columns, padded, dst); });
}

// `rows` of them that lie `next` bytes apart; dst[r * ld + c], with zeros to the end of the last vector where ld has room for it.
template <class T>
ATTN_INLINE void load_rows_apart(DType dtype, const char* src, int64_t next, int64_t rows, int64_t stride, int64_t columns,
                                 T* dst, int64_t ld) {
  with_read_storage(T{}, dtype, [&](auto storage) {
    for (int64_t r = 0; r < rows; ++r) load_row<T>(storage, src + r * next, stride, columns, ld > columns, dst + r * ld);
  });
}

// dst[c] = {first[c], second[c]} of two rows as bfloat16, then zeros to the end of the last vector when `padded`; a row
// that is null is zeros.
inline void load_row_pairs(DType dtype, const char* first, const char* second, int64_t stride, int64_t columns, bool padded,
                           Pair* dst) {
  constexpr int W = Simd<float>::width;
  if (dtype != DType::kBFloat16) {
    if (!first && !second) {
      memset(dst, 0, (padded ? round_to_width<float>(columns) : columns) * sizeof(Pair));
      return;
    }
    const char* const row[] = {first ? first : second, second ? second : first};
    return in_rounded_parts<2>(dtype, row, 2, stride, columns, [&](const char* const* part, int64_t c, int64_t n) {
      load_row_pairs(DType::kBFloat16, first ? part[0] : nullptr, second ? part[1] : nullptr, 2, n, padded, dst + c);
    });
  }
  using Words = BFloat16::Words;
  const auto words = [](const char* row, int64_t c, int64_t n) {
    return row ? (Words)load_some<float>(BFloat16{}, row + 2 * c, 2, n) : Words{};
  };
  for (int64_t c = 0; c < columns; c += W) {
    const int64_t n = columns - c < W ? columns - c : W;
    const Words both = words(first, c, n) >> 16 | words(second, c, n);
    memcpy(dst + c, &both, (padded ? W : n) * sizeof(Pair));
  }
}

// dst[c * ld + i] = {element c of row 2 i, of row 2 i + 1}, of `rows` rows, as many as a vector has lanes twice, as bfloat16, and
// zeros for those that are not there; `columns` of them, and zeros to the end of the last vector.
inline void load_row_pairs_transposed(DType dtype, const char* const* row, int rows, int64_t stride, int64_t columns,
                                      Pair* dst, int64_t ld) {
  constexpr int W = Simd<float>::width;
  if (dtype != DType::kBFloat16)
    return in_rounded_parts<2 * W>(dtype, row, rows, stride, columns, [&](const char* const* part, int64_t c, int64_t n) {
      load_row_pairs_transposed(DType::kBFloat16, part, rows, 2, n, dst + c * ld, ld);
    });
  const auto row_or_null = [=](int i) { return i < rows ? row[i] : nullptr; };
  for (int64_t c = 0; c < columns; c += W) {
    Pair pairs[W * W];
    for (int i = 0; i < W; ++i) {
      const char *const first = row_or_null(2 * i), *const second = row_or_null(2 * i + 1);
      load_row_pairs(dtype, first ? first + 2 * c : nullptr, second ? second + 2 * c : nullptr, 2,
                     columns - c < W ? columns - c : W, true, pairs + i * W);
    }
    Vec<float> block[W];
    for (int i = 0; i < W; ++i) block[i] = Simd<float>::load(reinterpret_cast<const float*>(pairs + i * W));
    Simd<float>::transpose(block);
    for (int i = 0; i < W; ++i) Simd<float>::store(reinterpret_cast<float*>(dst + (c + i) * ld), block[i]);
  }
}

// `rows` rows, and zeros for the other lanes, one after the other or in pairs, each padded to whole vectors.
template <class E>
ATTN_INLINE void load_rows(DType dtype, const char* const* row, int rows, int lanes, int64_t stride, int64_t columns,
                           E* dst) {
  const int64_t padded = round_to_width<Accumulator<E>>(columns);
  if (padded == 0) return;
  if constexpr (kOfPairs<E>) {
    for (int i = 0; i < lanes; i += 2, dst += padded)
      load_row_pairs(dtype, i < rows ? row[i] : nullptr, i + 1 < rows ? row[i + 1] : nullptr, stride, columns, true, dst);
  } else {
    for (int i = 0; i < rows; ++i) load_row<E>(dtype, row[i], stride, columns, true, dst + i * padded);
    memset(dst + rows * padded, 0, sizeof(E) * (lanes - rows) * padded);
  }
}

// dst[c] = src[c] * factor
template <class T>
ATTN_INLINE void store_row(DType dtype, char* dst, int64_t stride, int64_t columns, const T* src, T factor) {
  constexpr int W = Simd<T>::width;
  with_storage(T{}, dtype, [&](auto storage) {
    for (int64_t c = 0; c < columns; c += W) {
      const int64_t n = columns - c < W ? columns - c : W;
      const Vec<T> x = load_some<T>(Same<T>{}, reinterpret_cast<const char*>(src + c), sizeof(T), n);
      store_some<T>(storage, dst + c * stride, stride, n, x * Simd<T>::set1(factor));
    }
  });
}

// Neither Inf nor NaN anywhere in [rows][columns]: 0 * x is 0 for finite x only.
template <class E>
bool all_finite(const E* a, int64_t lda, int64_t rows, int64_t columns) {
  using T = Accumulator<E>;
  using S = Simd<T>;
  constexpr int kSums = 4;  // one chain of additions would wait for each
  Vec<T> sum[kSums] = {};
  const auto add = [&](const E* at, int64_t n, int i) {
    const Vec<T> x = load_some<T>(Same<T>{}, reinterpret_cast<const char*>(at), sizeof(T), n);
    for (int j = 0; j < Product<E>::numbers; ++j) sum[i] += S::zero() * Product<E>::number(x, j);
  };
  for (int64_t r = 0; r < rows; ++r) {
    const E* const row = a + r * lda;
    int64_t c = 0;
    for (; c + kSums * S::width <= columns; c += kSums * S::width)
      for (int i = 0; i < kSums; ++i) add(row + c + i * S::width, S::width, i);
    for (; c < columns; c += S::width) add(row + c, columns - c, 0);
  }
  return !S::any(((sum[0] + sum[1]) + (sum[2] + sum[3])) != S::zero());
}

}  // namespace
}  // namespace attn_ops::cpu
