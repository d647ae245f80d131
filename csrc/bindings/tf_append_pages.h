// The operator AttnOps>AppendToPages for TensorFlow: new rows of keys and values in the pages that a table names.
//
// Pages are [pages in all, page_size, heads, dim] (BSHD) or [pages in all, heads, page_size, dim] (BHSD). Row i of
// sequence b goes to position positions[b] + i: to that row, modulo page_size, of the page that the table has for it,
// block_table[b][position / page_size]. All is checked before the first write. The results are the pages; with
// `in_place` in the memory of the inputs, whoever else looks at it, which is for those who know that nobody counts on the
// rows written; else there only where this is the last use of that memory.
#pragma once

#include <cstring>

#include "tf_tensors.h"

namespace attn_ops::tf {

inline constexpr const char* kAppendToPages = "AttnOps>AppendToPages";

// Rows [first, heads, size, dim] by the strides of a layout, in bytes.
struct PageRows {
  int64_t entries, size, heads, row_bytes, entry_bytes, position_bytes, head_bytes;

  PageRows(const Extents& shape, bool heads_first, int64_t element)
      : entries(shape[0]), size(shape[heads_first ? 2 : 1]), heads(shape[heads_first ? 1 : 2]),
        row_bytes(shape[3] * element), entry_bytes(size * heads * row_bytes),
        position_bytes(heads_first ? row_bytes : heads * row_bytes),
        head_bytes(heads_first ? size * row_bytes : row_bytes) {}

  char* at(const Tensor& tensor, int64_t entry, int64_t position) const {
    return static_cast<char*>(TF_TensorData(tensor.get())) + entry * entry_bytes + position * position_bytes;
  }
};

class AppendToPagesKernel {
 public:
  explicit AppendToPagesKernel(const Attributes& attributes)
      : heads_first_(attributes.string("layout") == "BHSD"),
        in_place_(attributes.boolean("in_place")),
        num_counts_(attributes.integer("num_counts")),
        type_(attributes.type("T")) {
    if (num_counts_ > 1) throw std::invalid_argument("num_counts must be 0 or 1");
  }

  void compute(TF_OpKernelContext* context) const {
    const Execution execution(context);
    Tensor pages[2], added[2], counts;
    for (int i = 0; i < 2; ++i) pages[i] = execution.input(i), added[i] = execution.input(2 + i);
    const Tensor table = execution.input(4), positions = execution.input(5);
    if (num_counts_) counts = execution.input(6);
    check_shapes(pages, added, table, positions, counts);
    const int64_t element = static_cast<int64_t>(TF_DataTypeSize(type_));
    const PageRows k_pages(extents(pages[0]), heads_first_, element), k_new(extents(added[0]), heads_first_, element);
    const auto* const rows = static_cast<const int32_t*>(TF_TensorData(table.get()));
    const auto* const first = static_cast<const int32_t*>(TF_TensorData(positions.get()));
    const auto* const count = counts ? static_cast<const int32_t*>(TF_TensorData(counts.get())) : nullptr;
    const int64_t in_table = TF_Dim(table.get(), 1);
    const auto new_rows = [&](int64_t b) { return count ? int64_t{count[b]} : k_new.size; };
    for (int64_t b = 0; b < k_new.entries; ++b)
      check_positions(b, first[b], new_rows(b), k_new.size, rows + b * in_table, in_table, k_pages);

    const bool one_memory = TF_TensorData(pages[0].get()) == TF_TensorData(pages[1].get());
    for (int half = 0; half < 2; ++half) {
      if (in_place_ && !one_memory) execution.share(half, pages[half]);
      else own_input(execution, half, half, &pages[half]);
      const PageRows to(extents(pages[half]), heads_first_, element), from(extents(added[half]), heads_first_, element);
      for (int64_t b = 0; b < from.entries; ++b)
        for (int64_t i = 0; i < new_rows(b); ++i) {
          const int64_t position = first[b] + i, page = rows[b * in_table + position / to.size];
          char* const row = to.at(pages[half], page, position % to.size);
          const char* const source = from.at(added[half], b, i);
          if (!heads_first_) std::memcpy(row, source, static_cast<size_t>(to.position_bytes));
          else for (int64_t h = 0; h < to.heads; ++h)
            std::memcpy(row + h * to.head_bytes, source + h * from.head_bytes, static_cast<size_t>(to.row_bytes));
        }
    }
  }

 private:
  void check_shapes(const Tensor* pages, const Tensor* added, const Tensor& table, const Tensor& positions,
                    const Tensor& counts) const {
    const size_t sequence = heads_first_ ? 2 : 1;
    for (int half = 0; half < 2; ++half) {
      const Extents shape = extents(pages[half]), rows = extents(added[half]), k_rows = extents(added[0]);
      const std::string name = half == 0 ? "k" : "v";
      if (shape.size() != 4 || shape[sequence] < 1 || shape[0] != extents(pages[0])[0] ||
          shape[sequence] != extents(pages[0])[sequence]) {
        throw std::invalid_argument(name + "_pages must have rank 4, and both the same number and size of pages, got " +
                                    extents_text(shape) + " beside " + extents_text(extents(pages[0])));
      }
      Extents wanted = shape;
      if (k_rows.size() == 4) wanted[0] = k_rows[0], wanted[sequence] = k_rows[sequence];
      if (rows != wanted) {
        throw std::invalid_argument(name + "_new must have the shape of the pages " + extents_text(shape) +
                                    " but for batch and length, got " + extents_text(rows));
      }
    }
    const int64_t batch = extents(added[0])[0];
    if (TF_NumDims(table.get()) != 2 || TF_Dim(table.get(), 0) != batch) {
      throw std::invalid_argument("block_table must be [batch, pages] ([" + text(batch) + ",...]), got " +
                                  extents_text(extents(table)));
    }
    for (const Tensor* lengths : {&positions, &counts}) {
      if (*lengths && extents(*lengths) != Extents{batch}) {
        throw std::invalid_argument("positions and counts must have the shape [" + text(batch) + "], got " +
                                    extents_text(extents(*lengths)));
      }
    }
  }

  static void check_positions(int64_t b, int64_t position, int64_t count, int64_t most, const int32_t* table,
                              int64_t in_table, const PageRows& pages) {
    const std::string sequence = "sequence " + text(b);
    if (count < 0 || count > most) {
      throw std::invalid_argument("the number of new rows of " + sequence + " must be from 0 to " + text(most) +
                                  ", got " + text(count));
    }
    if (position < 0 || (count > 0 && position + count > in_table * pages.size)) {
      throw std::invalid_argument(sequence + " has " + text(position) + " rows, and its " + text(in_table) +
                                  " pages of " + text(pages.size) + " have no room for " + text(count) + " more");
    }
    for (int64_t n = position / pages.size; count > 0 && n <= (position + count - 1) / pages.size; ++n) {
      if (table[n] >= 0 && table[n] < pages.entries) continue;
      throw std::invalid_argument("block_table[" + text(b) + "," + text(n) + "] (" + text(int64_t{table[n]}) +
                                  ") must be from 0 to " + text(pages.entries - 1) + ": there are " +
                                  text(pages.entries) + " pages");
    }
  }

  bool heads_first_, in_place_;
  int64_t num_counts_;
  TF_DataType type_;
};

inline void register_append_to_pages() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(kAppendToPages);
  for (const char* attribute : {"T: {float, double, half, bfloat16, int8}", "layout: {'BSHD', 'BHSD'} = 'BSHD'",
                                "in_place: bool = false", "num_counts: int >= 0 = 0"}) {
    TF_OpDefinitionBuilderAddAttr(op, attribute);
  }
  for (const char* input : {"k_pages: T", "v_pages: T", "k_new: T", "v_new: T", "block_table: int32",
                            "positions: int32", "counts: num_counts * int32"}) {
    TF_OpDefinitionBuilderAddInput(op, input);
  }
  for (const char* output : {"grown_k: T", "grown_v: T"}) TF_OpDefinitionBuilderAddOutput(op, output);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, [](TF_ShapeInferenceContext* context, TF_Status*) {
    const Inference inference(context);
    for (int i = 0; i < 2; ++i) inference.set_output(i, inference.input(i));
  });
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
  register_cpu_kernel<AppendToPagesKernel, kAppendToPages>();
}

}  // namespace attn_ops::tf
