"""PyTorch's scaled_dot_product_attention on contiguous [batch, heads, seqlen, head_dim], its own choice of backend."""

from __future__ import annotations

import numpy as np

from workloads import BIAS, BOOLEAN, FORWARD, FORWARD_BACKWARD, PADDING, SEGMENTS, dense_mask

from .base import Peer


class TorchSdpa(Peer):
    name = "torch_sdpa"
    modules = ("torch",)
    dtypes = ("float32", "float64", "float16", "bfloat16")
    masks = (PADDING, SEGMENTS, BOOLEAN, BIAS)
    windows = True

    def supports(self, workload, mode):
        masked = bool(workload.mask or workload.window)
        return mode in (FORWARD, FORWARD_BACKWARD) and not (masked and workload.is_causal)

    def prepare(self, workload, mode, inputs):
        import torch

        q, k, v, d_out = (
            _tensor(np.ascontiguousarray(inputs[name].transpose(0, 2, 1, 3)))
            for name in ("query", "key", "value", "d_out")
        )
        keywords = {"is_causal": workload.is_causal, "enable_gqa": workload.num_heads != workload.num_kv_heads}
        mask = inputs["bias"] if workload.mask == BIAS else dense_mask(workload, inputs)
        if mask is not None:
            keywords["attn_mask"] = _tensor(mask)
        attend = torch.nn.functional.scaled_dot_product_attention
        if mode == FORWARD:

            def step():
                with torch.inference_mode():
                    return attend(q, k, v, **keywords)
        else:
            for tensor in (q, k, v):
                tensor.requires_grad_(True)

            def step():
                out = attend(q, k, v, **keywords)
                return out, *torch.autograd.grad(out, (q, k, v), d_out)

        return step

    def outputs(self, workload, mode, result):
        tensors = [result] if mode == FORWARD else result
        tensors = [tensor.detach().transpose(1, 2) for tensor in tensors]
        return [(tensor.float() if workload.dtype == "bfloat16" else tensor).numpy() for tensor in tensors]


def _tensor(array):
    """torch.from_numpy, which knows no bfloat16."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def peers():
    yield TorchSdpa()
