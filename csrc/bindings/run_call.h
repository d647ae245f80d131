// A valid call from its results to its end, the same for every binding.
//
//   results.next(name, dtype, shape, rank)   the memory of the next result, as the framework makes or finds it
//   results.skip(name, dtype)                the next one is not wanted
//   results.finish()                         there are no more
//   device.kernels(), device.workspace(n)    where it runs: cpu_kernels.h or cuda_kernels.h, and n bytes to lend() them
#pragma once

#include "call.h"

namespace attn_ops {

template <class Results, class Device>
void run_call(const Call& call, Results& results, Device& device) {
  const auto tensor = [&](const char* name, const Shape4& shape) {
    return output_view(results.next(name, call.q.dtype, shape.data(), 4), call.q.dtype, shape, call.layout);
  };
  const auto run = [&](const auto& params) {
    results.finish();
    const auto kernels = device.kernels();
    const auto workspace = device.workspace(kernels.workspace_bytes(params));
    kernels.run(params, workspace.lend());
  };
  if (call.backward) {
    BackwardParams params = to_backward_params(call);
    params.dq = tensor("dq", call.q.shape);
    params.dk = tensor("dk", call.k.shape);
    params.dv = tensor("dv", call.v.shape);
    if (call.wants_d_bias) params.d_bias = results.next("d_bias", call.bias.dtype, call.bias.shape.data(), 4);
    else if (call.bias.present) results.skip("d_bias", call.bias.dtype);
    const auto like = [&](const char* name, const Array& a) -> void* {
      return a.present ? results.next(name, a.dtype, a.shape.data(), a.rank) : nullptr;
    };
    params.d_relative_bias = like("d_relative_bias", call.relative_bias);
    params.d_sinks = like("d_sinks", call.sinks);
    run(params);
  } else {
    const Sizes n = sizes_of(call);
    const DType statistic = accumulator_of(call.q.dtype);
    AttentionParams params = to_params(call);
    params.out = tensor("out", n.output(call.layout));
    params.statistics = results.next("statistics", statistic, n.statistics().data(), 4);
    if (call.wants_lse) params.lse = results.next("lse", statistic, n.lse().data(), 3);
    run(params);
  }
}

}  // namespace attn_ops
