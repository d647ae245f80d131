"""What JAX is told of classes whose objects go in and out of compiled functions: which arrays they hold, and for `jax.export`,
by which name a file says that an argument or a result was one.

A file is read where its classes are registered: `import attn_ops.jax` does that, but for caches with a window, of which there
is a class for each window: a process has the class once it has made such a cache.
"""

from __future__ import annotations

import contextlib
import json

import jax
from jax import export

from attn_ops.call.position_bias import T5RelativeBias
from attn_ops.generation import cache

# Whose gradient may be asked for, and which may be handed to functions that JAX compiles.
jax.tree_util.register_pytree_node(
    T5RelativeBias,
    lambda bias: ((bias.table,), (bias.bidirectional, bias.max_distance)),
    lambda options, tables: T5RelativeBias(*tables, *options),
)


def _register(register, kind, **how):
    with contextlib.suppress(ValueError):  # a user registered it before, as `jax.export` asks for
        register(kind, serialized_name=f"attn_ops.{kind.__name__}", **how)


_register(
    export.register_pytree_node_serialization,
    T5RelativeBias,
    serialize_auxdata=lambda options: json.dumps(options).encode(),
    deserialize_auxdata=lambda written: tuple(json.loads(written)),
)
cache.for_each_kind(lambda kind: _register(export.register_namedtuple_serialization, kind))
