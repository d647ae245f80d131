"""What one attention call is, for any framework."""

from __future__ import annotations

import typing

MAX_MASKS = 4  # boolean masks the kernels AND on the fly (kMaxMasks in csrc/attention.h)

_TENSORS = ("query", "key", "value", "bias", "query_lengths", "key_lengths", "seed")  # and masks


def canonical(extents, layout):
    """(batch, heads, seqlen, dim) of the extents, or of the axes, of a query, key, value or output in ``layout``."""
    batch, second, third, dim = extents
    return (batch, third, second, dim) if layout == "BSHD" else (batch, second, third, dim)


def attributes(options) -> dict:
    """The options of a call as attributes of the kernels' operators and custom calls, in every framework."""
    return {
        # Numbers travel as text: a float attribute would cut a float64 to float32.
        "scale": "" if options.scale is None else repr(options.scale),
        "dropout_rate": repr(options.dropout_rate),
        "window_left": options.window_left,
        "window_right": options.window_right,
        "bottom_right": options.bottom_right,
        "layout": options.layout,
        "allow_tf32": options.allow_tf32,
    }


def optional_inputs(arrays) -> dict:
    """The inputs that a call may lack, in the order of the kernels: lists by the attribute that counts them."""
    return {
        "num_bias": [] if arrays.bias is None else [arrays.bias],
        "num_masks": list(arrays.masks),
        "num_query_lengths": [] if arrays.query_lengths is None else [arrays.query_lengths],
        "num_key_lengths": [] if arrays.key_lengths is None else [arrays.key_lengths],
        "num_seed": [] if arrays.seed is None else [arrays.seed],
    }


class AttentionCall(typing.NamedTuple):
    """One attention call in the form that every implementation takes.

    ``query``, ``key`` and ``value`` have rank 4 in ``layout`` and one floating dtype; ``bias`` has that dtype or is
    float32, beside inputs of 16 bits; ``bias`` and ``masks`` (bool, at most four) have rank 4 with extents that are 1
    or full. ``scale`` None is 1/sqrt(head_dim). A window of -1 is unbounded; causal is ``window_right`` 0. Lengths are int32 [batch], ``seed`` is
    int64 [2] in TensorFlow and uint32 [4] in JAX (words of seed and offset, low ones first), present only with dropout.
    ``squeeze`` tells how many axes the caller's tensors lacked: 1 for rank 3, 2 for rank 2. A named tuple because it is
    made at every eager call, and a frozen dataclass costs several times as much.
    """

    query: typing.Any
    key: typing.Any
    value: typing.Any
    bias: typing.Any = None
    masks: tuple = ()
    scale: float | None = None
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    query_lengths: typing.Any = None
    key_lengths: typing.Any = None
    dropout_rate: float = 0.0
    seed: typing.Any = None
    layout: str = "BSHD"
    squeeze: int = 0
    return_lse: bool = False
    lse_dtype: typing.Any = None
    allow_tf32: bool = False

    def result_shapes(self):
        """The static shapes of out and lse in rank 4 and 3."""
        return [*self.query.shape[:3], self.value.shape[3]], list(canonical(self.query.shape, self.layout)[:3])

    def differentiable(self):
        """The inputs that have a gradient."""
        return [self.query, self.key, self.value, *([] if self.bias is None else [self.bias])]

    def with_differentiable(self, inputs):
        """The call with these in their places."""
        query, key, value, *bias = inputs
        return self._replace(query=query, key=key, value=value, bias=bias[0] if bias else None)

    def map_tensors(self, function):
        """The call with the ``function`` of each of its tensors."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors = {name: function(x) for name, x in tensors.items() if x is not None}
        return self._replace(masks=tuple(map(function, self.masks)), **tensors)

    def set_result_shapes(self, out, lse, statistics):
        """Tells tensors of a TensorFlow graph what is known of their shapes; ``lse`` may be None."""
        out_shape, lse_shape = self.result_shapes()
        out.set_shape(out_shape)
        statistics.set_shape([*lse_shape, 2])
        if lse is not None:
            lse.set_shape(lse_shape)

    def added_axes(self, heads):
        """The axes that a result in the caller's rank lacks, where its heads are at ``heads``, in ascending order."""
        return (0, heads)[2 - self.squeeze :]

    def heads_axis(self):
        """Where query, key, value and out have their heads."""
        return 2 if self.layout == "BSHD" else 1
