"""PyTorch's attention and its derivatives in float64: a truth that nobody here wrote. It has no cap, no sinks and no dropout of
ours, and what is hidden must be numbers. Only where PyTorch is installed."""

import dataclasses
import importlib.util

import numpy as np

from fuzz import truth, ways

# What it has no words for; all else of the scores becomes its additive mask.
WITHOUT = ("logits_soft_cap", "sinks", "dropout_rate", "dropout_seed")


class PyTorch(ways.Way):
    name = "torch"
    share = 0.1
    rounds = False

    def precision(self, case):
        return np.dtype(np.float64)

    def suited(self, case):
        if 0 in case.scores_shape or case.value.shape[-1] == 0:  # of what is empty it has no gradients
            return None
        options = {name: x for name, x in case.options.items() if name not in WITHOUT}
        if options.get("bias") is not None:  # all terms come in one mask: a sum of a bias of any size is rounded twice
            options = {name: x for name, x in options.items() if name not in ("alibi_slopes", "relative_bias")}
        return dataclasses.replace(case, options=options, garbage=(), poison=(), d_lse=None, _seen=None)

    def __call__(self, case):
        """The case's results but lse, which `scaled_dot_product_attention` does not tell: that of the same scores in PyTorch."""
        import torch
        import torch.nn.attention

        def tensor(x):
            return torch.tensor(np.ascontiguousarray(x).astype(np.float64), requires_grad=True)

        options, seen = case.options, torch.tensor(case.seen)
        query, key, value = (tensor(truth.heads_first(case, getattr(case, name))) for name in ("query", "key", "value"))
        learned, added = {}, torch.zeros(case.scores_shape, dtype=torch.float64)
        if options.get("alibi_slopes") is not None:
            slopes = np.atleast_2d(options["alibi_slopes"]).astype(np.float64)[..., None, None]
            added = added + torch.tensor(slopes * truth.distances(case)[:, None])
        if options.get("relative_bias") is not None:
            table = truth.table_of(case)
            learned["d_relative_bias"] = tensor(np.where(table == -np.inf, 0, table))
            added = added + learned["d_relative_bias"][torch.tensor(truth.places(case))].movedim(-1, 1)
        if options.get("bias") is not None:
            learned["d_bias"] = tensor(np.where(options["bias"] == -np.inf, 0, options["bias"]))
            added = added + learned["d_bias"]
        mask = torch.where(seen, added, -torch.inf)
        scale = float(truth.scale_of(case))
        grouped = query.shape[1] != key.shape[1]
        # Its fused kernels recompute weights from an lse that has no digits left where scores are huge.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        inputs = [query, key, value, *learned.values()]
        d_out = torch.tensor(truth.heads_first(case, case.d_out).astype(np.float64))
        gradients = [x.numpy() for x in torch.autograd.grad(out, inputs, d_out)]
        repeated = key.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 1)
        lse = torch.logsumexp(scale * (query @ repeated.mT) + mask, -1)
        found = dict(zip(("out", "dq", "dk", "dv"), (out.detach().numpy(), *gradients)))
        found = {name: truth.heads_first(case, x) for name, x in found.items()}
        return found | {"lse": lse.detach().numpy()} | dict(zip(learned, gradients[3:]))


WAYS = {PyTorch.name: PyTorch()} if importlib.util.find_spec("torch") else {}
