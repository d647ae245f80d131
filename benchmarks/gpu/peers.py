"""Every implementation that is measured on a GPU. Tensors are [batch, seqlen, heads, head_dim] for all of them."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib

from workloads import FORWARD

from .workloads import BACKWARD

TRITON_PATH = "ATTN_OPS_BENCH_TRITON"  # the file of Triton's fused attention tutorial


class Peer(abc.ABC):
    name: str
    module: str  # what must be importable, and whose version is told
    distribution: str | None = None  # where it has another name than the module
    dtypes: tuple[str, ...] = ("bfloat16",)
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    decodes = True
    groups = True  # whether key/value heads may be fewer
    starts_slowly = False  # whether each shape costs it seconds: it is measured at one length alone

    def missing(self, device) -> str | None:
        """Why it cannot run here, or None."""
        try:
            found = importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the parent package
            found = False
        return None if found else f"{self.module} is not installed"

    def can(self, workload, mode: str) -> bool:
        grouped = workload.num_heads != workload.num_kv_heads
        return (
            workload.dtype in self.dtypes
            and mode in self.modes
            and (self.decodes or not workload.is_decode)
            and (self.groups or not grouped)
        )

    def version(self) -> str:
        name = self.distribution or self.module.partition(".")[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
        return ""

    @abc.abstractmethod
    def prepare(self, device, workload, mode: str, inputs: dict):
        """The step to time: a function without arguments that returns [out], or [dq, dk, dv] for BACKWARD."""

    def close(self) -> None:
        """Ends what `prepare` started."""


class Ours(Peer):
    name, module = "attn_ops_cuda", "attn_ops"
    dtypes = ("bfloat16", "float16", "float32")

    def missing(self, device):
        from attn_ops.kernels import cuda

        if device.kind != "cuda":
            return "there is no CUDA device"
        return cuda.unavailable_reason(device.ordinal)

    def prepare(self, device, workload, mode, inputs):
        import torch
        from attn_ops.kernels import cuda

        q, k, v, d_out = (inputs[name] for name in ("query", "key", "value", "d_out"))
        out = torch.empty_like(q)
        statistics = torch.empty(q.shape[0], q.shape[2], q.shape[1], 2, device=q.device, dtype=torch.float32)
        options = {"window_right": 0 if workload.is_causal else -1}
        forward = cuda.Forward(q, k, v, out, statistics, **options)
        stream = device.stream()
        workspace = _workspace(q, forward)

        def attend(kept=(q, k, v, statistics)):  # which the call knows by their addresses alone
            forward(workspace, stream)
            return [out]

        if mode == FORWARD:
            return attend
        attend()
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        backward = cuda.Backward(q, k, v, out, statistics, d_out, *gradients, **options)
        space = _workspace(q, backward)

        def differentiate(kept=(attend, d_out)):
            backward(space, stream)
            return gradients

        return differentiate


def _workspace(like, call):
    import torch

    return torch.empty(max(call.workspace_bytes(), 16), dtype=torch.uint8, device=like.device)


class Differentiable(Peer):
    """A function of PyTorch tensors that autograd differentiates."""

    heads_first = False  # whether `attend` takes and returns [batch, heads, seqlen, head_dim]

    @abc.abstractmethod
    def attend(self, workload, q, k, v):
        """The output."""

    def prepare(self, device, workload, mode, inputs):
        import torch

        q, k, v, d_out = (inputs[name] for name in ("query", "key", "value", "d_out"))
        if self.heads_first:  # only other strides: nothing is copied
            q, k, v, d_out = (x.transpose(1, 2) for x in (q, k, v, d_out))

        def restored(tensors):
            return [x.transpose(1, 2) if self.heads_first else x for x in tensors]

        if mode == FORWARD:

            def step():
                with torch.no_grad():
                    return restored([self.attend(workload, q, k, v)])

            return step
        q, k, v = (x.detach().requires_grad_(True) for x in (q, k, v))
        out = self.attend(workload, q, k, v)
        return lambda: restored(torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True))


class TorchSdpa(Differentiable):
    """PyTorch's scaled_dot_product_attention with one backend, or its own choice."""

    module, heads_first = "torch", True

    def __init__(self, name, backend, dtypes):
        self.name, self._backend, self.dtypes = name, backend, dtypes

    def attend(self, workload, q, k, v):
        import torch
        from torch.nn import attention

        grouped = workload.num_heads != workload.num_kv_heads
        with attention.sdpa_kernel(getattr(attention.SDPBackend, self._backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=workload.is_causal, enable_gqa=grouped
            )


class Flex(Differentiable):
    name, module, heads_first = "torch_flex", "torch", True
    dtypes, starts_slowly = ("bfloat16", "float16", "float32"), True

    def missing(self, device):
        return super().missing(device) or (None if device.kind == "cuda" else "it is compiled for CUDA devices")

    def attend(self, workload, q, k, v):
        compiled, mask = _flex(q.shape[2], k.shape[2], workload.is_causal)
        return compiled(q, k, v, block_mask=mask, enable_gqa=workload.num_heads != workload.num_kv_heads)


@functools.cache
def _flex(rows, keys, is_causal):
    import torch
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.reset()  # or after eight shapes it would no longer compile
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    mask = None
    if is_causal:
        mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, rows, keys, device="cuda")
    return compiled, mask


class FlashAttention(Differentiable):
    """flash_attn 2, 3 or 4: the same function in three modules."""

    dtypes = ("bfloat16", "float16")

    def __init__(self, name, module, distribution):
        self.name, self.module, self.distribution = name, module, distribution

    def attend(self, workload, q, k, v):
        out = importlib.import_module(self.module).flash_attn_func(q, k, v, causal=workload.is_causal)
        return out[0] if isinstance(out, tuple) else out


class TritonTutorial(Differentiable):
    """The kernel of Triton's tutorial 06, from the file that --triton-tutorial names."""

    name, module, heads_first = "triton_tutorial", "triton", True
    dtypes, decodes, groups = ("bfloat16", "float16"), False, False

    def missing(self, device):
        if TRITON_PATH not in os.environ:
            return "--triton-tutorial FILE was not given"
        return super().missing(device)

    def can(self, workload, mode):
        # Its backward has no other head dimensions, and is causal only in part of its versions.
        return super().can(workload, mode) and workload.head_dim in (64, 128)

    def attend(self, workload, q, k, v):
        scale = workload.head_dim**-0.5
        return _tutorial().attention(*(x.contiguous() for x in (q, k, v)), workload.is_causal, scale)


@functools.cache
def _tutorial():
    path = pathlib.Path(os.environ[TRITON_PATH])
    spec = importlib.util.spec_from_file_location("triton_tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_peers() -> dict[str, Peer]:
    from .jax_peer import JaxCudnn

    half, every = ("bfloat16", "float16"), ("bfloat16", "float16", "float32")
    peers = (
        Ours(),
        TorchSdpa("torch_cudnn", "CUDNN_ATTENTION", half),
        TorchSdpa("torch_flash", "FLASH_ATTENTION", half),
        TorchSdpa("torch_efficient", "EFFICIENT_ATTENTION", every),
        TorchSdpa("torch_math", "MATH", ("float32",)),
        Flex(),
        JaxCudnn(),
        TritonTutorial(),
        FlashAttention("flash_attn_2", "flash_attn", "flash_attn"),
        FlashAttention("flash_attn_3", "flash_attn_interface", "flash_attn_3"),
        FlashAttention("flash_attn_4", "flash_attn.cute", "flash-attn-4"),
    )
    return {peer.name: peer for peer in peers}
