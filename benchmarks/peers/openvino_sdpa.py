"""OpenVINO's ScaledDotProductAttention (opset 13) on contiguous [batch, heads, seqlen, head_dim], forward only.

float16 tensors are computed in float32, as OpenVINO's CPU plugin does anyway without native half arithmetic; bfloat16 ones
natively where the processor can.
"""

from __future__ import annotations

import numpy as np

from workloads import BIAS, BOOLEAN, FORWARD, PADDING, SEGMENTS, dense_mask, numpy_dtype

from .base import Peer, threads


class OpenVinoSdpa(Peer):
    name = "openvino_sdpa"
    modules = ("openvino",)
    dtypes = ("float32", "float16", "bfloat16")
    masks = (PADDING, SEGMENTS, BOOLEAN, BIAS)
    windows = True

    def supports(self, workload, mode):
        masked = bool(workload.mask or workload.window)
        return mode == FORWARD and workload.num_heads == workload.num_kv_heads and not (masked and workload.is_causal)

    def prepare(self, workload, mode, inputs):
        import openvino
        from openvino import opset13

        arrays = [np.ascontiguousarray(inputs[name].transpose(0, 2, 1, 3)) for name in ("query", "key", "value")]
        mask = inputs["bias"] if workload.mask == BIAS else dense_mask(workload, inputs)
        if mask is not None:
            rows_and_keys = (workload.seqlen_q, workload.seqlen_k)
            arrays.append(np.broadcast_to(mask, (*mask.shape[:2], *rows_and_keys)).copy())
        of_bfloat16 = workload.dtype == "bfloat16"
        types = [openvino.Type.bf16 if x.dtype.name == "bfloat16" else openvino.Type(x.dtype) for x in arrays]
        parameters = [opset13.parameter(x.shape, of_x) for x, of_x in zip(arrays, types)]
        node = opset13.scaled_dot_product_attention(*parameters, causal=workload.is_causal)
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if of_bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        compiled = openvino.Core().compile_model(openvino.Model([node], parameters, "attention"), "CPU", options)
        request = compiled.create_infer_request()
        for index, (array, of_x) in enumerate(zip(arrays, types)):
            if of_x == openvino.Type.bf16:  # which NumPy has not: as 16 bits
                tensor = openvino.Tensor(array.view(np.uint16), array.shape, of_x)
            else:
                tensor = openvino.Tensor(array, shared_memory=True)
            request.set_input_tensor(index, tensor)

        def step():
            request.infer()
            return request, arrays  # the tensors share the memory of the arrays

        return step

    def outputs(self, workload, mode, result):
        request, _ = result
        out = request.get_output_tensor().data
        if workload.dtype == "bfloat16":
            out = out.view(numpy_dtype("bfloat16"))
        return [out.transpose(0, 2, 1, 3).copy()]


def peers():
    yield OpenVinoSdpa()
