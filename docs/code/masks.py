"""docs/guides/masks.md"""

# [combine]
import numpy as np

from attn_ops import masks

mask = masks.causal() & masks.window(left=3)
print(mask.show(12))
# [/combine]

# [packed]
documents = masks.packed(np.array([0, 3, 8, 12])) & masks.causal()  # three documents in one sequence
print(documents.show(12))
# [/packed]

# [function]
recognised = masks.from_function(lambda b, h, q, k: (q >= k) & (q - k <= 3))
print(recognised.show(12))
# [/function]

# [materialize]
visible = mask.materialize(12, 12)  # bool [batch or 1, num_heads or 1, seqlen_q, seqlen_k], for tests and pictures
# [/materialize]

assert visible.shape == (1, 1, 12, 12) and visible.sum() == 42
assert (recognised.materialize(12, 12) == visible).all()
assert (documents.materialize(12, 12)[0, 0, 3:8, :3] == False).all()  # noqa: E712

_BLOCKS = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], bool)
SMALL = (4, 4)  # what kernels skip is 64 x 128; the pictures show blocks of this instead
PICTURES = {  # name: mask, tokens, block
    "causal": (masks.causal(), 16, SMALL),
    "window": (masks.causal() & masks.window(left=3), 16, SMALL),
    "padding": (masks.padding(key_lengths=np.array([11])), 16, SMALL),
    "packed": (masks.packed(np.array([0, 5, 12, 16])), 16, SMALL),
    "prefix": (masks.prefix(6), 16, SMALL),
    "chunked": (masks.chunked(4) & masks.causal(), 16, SMALL),
    "block_sparse": (masks.block_sparse(_BLOCKS, 4, 4), 16, SMALL),
    "from_function": (masks.from_function(lambda b, h, q, k: (q - k) % 3 == 0), 16, SMALL),
}
