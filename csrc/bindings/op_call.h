// A node of AttnOps>Forward, AttnOps>Plain, AttnOps>Decode or AttnOps>Backward, whoever runs it: its attributes, read
// and checked once, and the order in which its arrays come. TensorFlow's kernel and XLA's custom call have the same
// attributes and the same order.
#pragma once

#include <locale.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "validate.h"

namespace attn_ops {

// What the elements of an array are for. Floats and bools carry their own dtype, which validate.h checks.
enum class Element { kValue, kInteger, kSeed };  // kInteger: int32; kSeed: 64 bits

// Decode is Forward with keys and values as caches keep them, in pages or in int8, and without a gradient. To
// TensorFlow it is another operator, since those in saved graphs have the inputs that they had; custom calls have the
// attributes that they announce, so that for XLA both are one. Plain is Forward of q, k and v alone, for eager calls: to
// them every list of inputs and every attribute costs time, used or not.
enum class Operator { kForward, kBackward, kDecode, kPlain };

class OpCall {
 public:
  // `attributes` has integer(name), string(name) and boolean(name), and each of them with what is said where there is
  // none: custom calls saved earlier lack what was added since. Throws std::invalid_argument.
  template <class Attributes>
  OpCall(const Attributes& attributes, Place place, Operator which) {
    const bool backward = which == Operator::kBackward;
    if (place == Place::kCpu && !cpu::isa_usable(cpu::default_isa())) {
      throw std::invalid_argument("the environment variable ATTN_OPS_ISA ('" + std::string(cpu::default_isa()) +
                                  "') must name an instruction set that is usable here");
    }
    options_.place = place;
    options_.backward = backward;
    if (which != Operator::kPlain) read_optional(attributes, which);
    const std::string scale = attributes.string("scale");
    options_.has_scale = !scale.empty();
    if (options_.has_scale) options_.scale = number("scale", scale);
    options_.mask.window_left = attributes.integer("window_left");
    options_.mask.window_right = attributes.integer("window_right");
    options_.mask.bottom_right = attributes.boolean("bottom_right");
    options_.allow_tf32 = attributes.boolean("allow_tf32", false);
    const std::string layout = attributes.string("layout");
    options_.layout = layout_named(layout);
    if (halves_ && (backward || options_.layout != Layout::kBSHD)) {
      throw std::invalid_argument("halves is for forward calls in layout BSHD");
    }
    for (const std::string& reason : {layout_reason(layout), options_reason(options_)}) {
      if (!reason.empty()) throw std::invalid_argument(reason);
    }
  }

  // One execution: `next(name, Element)` gives the arrays in their order. Throws std::invalid_argument.
  template <class Next>
  Call with_arrays(Next next) const {
    Call call = options_;
    call.q = next("q", Element::kValue);
    call.k = next("k", Element::kValue);
    call.v = next("v", Element::kValue);
    if (halves_) {
      take_half(&call.k, 0);
      take_half(&call.v, 1);
    }
    if (call.backward) {
      call.out = next("out", Element::kValue);
      call.statistics = next("statistics", Element::kValue);
      call.d_out = next("d_out", Element::kValue);
      if (num_d_lse_) call.d_lse = next("d_lse", Element::kValue);
    }
    if (num_bias_) call.bias = next("bias", Element::kValue);
    for (int i = 0; i < call.num_masks; ++i) call.masks[i] = next(kMaskNames[i], Element::kValue);
    if (num_query_lengths_) call.query_lengths = next("query_lengths", Element::kInteger);
    if (num_key_lengths_) call.key_lengths = next("key_lengths", Element::kInteger);
    if (num_seed_) read_seed(next("seed", Element::kSeed), &call);
    if (has_intervals_) {
      call.key_begin = next("key_begin", Element::kInteger);
      call.key_end = next("key_end", Element::kInteger);
    }
    if (num_query_offset_) call.query_offset = next("query_offset", Element::kInteger);
    if (has_segments_) {
      call.query_ids = next("query_ids", Element::kInteger);
      call.key_ids = next("key_ids", Element::kInteger);
    }
    if (num_blocks_) call.blocks = next("blocks", Element::kValue);
    if (num_slopes_) call.slopes = next("slopes", Element::kValue);
    if (num_relative_bias_) call.relative_bias = next("relative_bias", Element::kValue);
    if (num_sinks_) call.sinks = next("sinks", Element::kValue);
    if (num_block_table_) call.block_table = next("block_table", Element::kInteger);
    if (has_scales_) {
      call.k_scales = next("k_scales", Element::kValue);
      call.v_scales = next("v_scales", Element::kValue);
    }
    const std::string reason = invalid_reason(call);
    if (!reason.empty()) throw std::invalid_argument(reason);
    return call;
  }

 private:
  // What a plain call has none of: optional arrays, how many of each there are, and the options that came with them.
  template <class Attributes>
  void read_optional(const Attributes& attributes, Operator which) {
    options_.wants_lse = !options_.backward && count(attributes, "num_lse", 1) > 0;
    num_d_lse_ = options_.backward ? count(attributes, "num_d_lse", 1) : 0;
    num_bias_ = count(attributes, "num_bias", 1);
    options_.num_masks = count(attributes, "num_masks", kMaxMasks);
    num_query_lengths_ = count(attributes, "num_query_lengths", 1);
    num_key_lengths_ = count(attributes, "num_key_lengths", 1);
    num_seed_ = count(attributes, "num_seed", 1);
    has_intervals_ = pair(attributes, "num_intervals");
    num_query_offset_ = count(attributes, "num_query_offset", 1, 0);
    has_segments_ = pair(attributes, "num_segments");
    num_blocks_ = count(attributes, "num_blocks", 1, 0);
    num_slopes_ = count(attributes, "num_slopes", 1, 0);
    num_relative_bias_ = count(attributes, "num_relative_bias", 1, 0);
    num_sinks_ = count(attributes, "num_sinks", 1, 0);
    if (which == Operator::kDecode) {
      num_block_table_ = count(attributes, "num_block_table", 1, 0);
      has_scales_ = pair(attributes, "num_scales");
    }
    options_.block_q = attributes.integer("block_q", 0);
    options_.block_k = attributes.integer("block_k", 0);
    const std::string soft_cap = attributes.string("soft_cap", "");
    options_.has_soft_cap = !soft_cap.empty();
    if (options_.has_soft_cap) options_.soft_cap = number("soft_cap", soft_cap);
    options_.wants_d_bias = options_.backward && num_bias_ > 0 && attributes.boolean("d_bias");
    options_.dropout_rate = number("dropout_rate", attributes.string("dropout_rate"));
    halves_ = attributes.boolean("halves", false);
  }

  template <class Attributes, class... Absent>
  static int count(const Attributes& attributes, const char* name, int most, Absent... absent) {
    const int64_t value = attributes.integer(name, absent...);
    if (value < 0 || value > most) {
      throw std::invalid_argument(std::string(name) + " (" + text(value) + ") must be from 0 to " +
                                  text(int64_t{most}));
    }
    return static_cast<int>(value);
  }

  template <class Attributes>
  static bool pair(const Attributes& attributes, const char* name) {
    const int value = count(attributes, name, 2, 0);
    if (value == 1) throw std::invalid_argument(std::string(name) + " (1) must be 0 or 2");
    return value == 2;
  }

  // Numbers travel as text: TensorFlow's float attributes have single precision.
  static double number(const char* name, const std::string& value) {
    static const locale_t c_locale = newlocale(LC_ALL_MASK, "C", nullptr);
    char* end = nullptr;
    const double result = strtod_l(value.c_str(), &end, c_locale);
    if (value.empty() || end != value.c_str() + value.size()) {
      throw std::invalid_argument(std::string(name) + " ('" + value + "') must be a decimal number");
    }
    return result;
  }

  // A cache with keys and values in one array [batch, 2, length, heads, dim] comes as [batch, 2 length, heads, dim].
  static void take_half(Array* a, int64_t half) {
    if (a->rank != 4 || a->shape[1] % 2 != 0) {
      throw std::invalid_argument(std::string(a->name) +
                                  " must be [batch, 2 length, heads, dim] where halves is true, got " + text(*a));
    }
    a->shape[1] /= 2;
    if (a->data != nullptr) {
      a->data = static_cast<char*>(a->data) + half * a->shape[1] * a->stride[1] * size_of(a->dtype);
    }
  }

  // Of a part of a larger call, where that stands comes behind seed and offset, in the order of DropoutOrigin.
  static void read_seed(const Array& seed, Call* call) {
    const bool is_part = seed.rank == 1 && seed.shape[0] == 4 && call->place == Place::kCpu;
    const int64_t words_wanted = is_part ? 4 : 2;
    const std::string reason = same_shape_reason(seed, 1, &words_wanted, "(seed, offset)");
    if (!reason.empty()) throw std::invalid_argument(reason);
    const uint64_t* words = static_cast<const uint64_t*>(seed.data);
    call->has_seed = true;
    if (call->place == Place::kGpu) {
      call->dropout_words = words;
    } else {
      call->dropout_seed = words[0];
      call->dropout_offset = words[1];
      call->has_origin = is_part;
      if (is_part) memcpy(&call->dropout_origin, words + 2, sizeof call->dropout_origin);
    }
  }

  Call options_;  // each execution adds the arrays
  int num_d_lse_ = 0, num_bias_ = 0, num_query_lengths_ = 0, num_key_lengths_ = 0, num_seed_ = 0;
  int num_query_offset_ = 0, num_blocks_ = 0, num_slopes_ = 0, num_relative_bias_ = 0, num_sinks_ = 0;
  int num_block_table_ = 0;
  bool has_intervals_ = false, has_segments_ = false, halves_ = false, has_scales_ = false;
};

}  // namespace attn_ops
