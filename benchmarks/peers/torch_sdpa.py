"""PyTorch's scaled_dot_product_attention on contiguous [batch, heads, seqlen, head_dim], its own choice of backend."""

from __future__ import annotations

import numpy as np

from workloads import FORWARD, FORWARD_BACKWARD

from .base import Peer


class TorchSdpa(Peer):
    name = "torch_sdpa"
    modules = ("torch",)

    def supports(self, workload, mode):
        return mode in (FORWARD, FORWARD_BACKWARD)

    def prepare(self, workload, mode, inputs):
        import torch

        q, k, v, d_out = (
            torch.from_numpy(np.ascontiguousarray(inputs[name].transpose(0, 2, 1, 3)))
            for name in ("query", "key", "value", "d_out")
        )
        keywords = {"is_causal": workload.is_causal, "enable_gqa": workload.num_heads != workload.num_kv_heads}
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
        return [tensor.detach().numpy().transpose(0, 2, 1, 3) for tensor in tensors]


def peers():
    yield TorchSdpa()
