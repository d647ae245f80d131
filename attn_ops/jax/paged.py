"""paged_attention on JAX arrays: rows attend to keys in pages, and become some of them."""

from __future__ import annotations

from attn_ops.call import options, public
from attn_ops.generation import paging
from attn_ops.jax import append, choice, place, run, xp


@public.function(without=paging.NOT_TAKEN, is_causal=True, rotary=None, in_place=False, implementation=None)
@place.any_ranks
def paged_attention(q, k_pages, v_pages, block_table, lengths, k_new=None, v_new=None, **given):
    """Attention of the last rows of sequences to keys and values that lie in pages.

    The function of `attn_ops.paged_attention` on JAX arrays: the same arguments, results and errors. Works under
    `jax.jit`, `jax.lax.scan` and `jax.lax.while_loop`. Forward only. New rows cost as much as they are in loops, and in
    functions whose arguments the pages are, donated: ``jax.jit(step, donate_argnums=…)``.

    Args:
        q: floating [batch, rows, num_heads, head_dim].
        k_pages, v_pages: floating [pages in all, page_size, num_kv_heads, dim], page_size a multiple of 16; or pairs
            (int8 pages, float32 scales).
        block_table: integers [batch, pages]: the keys of sequence b from n page_size on are page block_table[b, n].
        lengths: integers [batch]: how many keys each sequence has, those of its rows of q among them.
        k_new, v_new: [batch, rows, num_kv_heads, dim] or None: written into the pages first.
        is_causal: whether a row sees no key behind its own.
        rotary: None, True, or a dict of the options of `attn_ops.rotary_embedding`: turns q and k_new by their
            positions.
        in_place: True: outside of functions the arrays of the pages are taken over, and deleted.
        {options}
        implementation: as in `attn_ops.jax.scaled_dot_product_attention`.

    Returns:
        out, or (out, lse) with return_lse; with k_new also the pages: (out, k_pages, v_pages), or (out, lse, k_pages,
        v_pages).

    Raises:
        TypeError, ValueError: as in `attn_ops.paged_attention`.
        jax.errors.JaxRuntimeError: lengths beyond the table, or entries that are no page, where only the running kernel
            can know. Of the composite such a sequence gets NaN; kernels of GPUs take the nearest that there is.
    """
    name = "paged_attention"
    implementation, in_place = given.pop("implementation", None), given.pop("in_place", False)
    in_place = options.flag(name, "in_place", in_place)
    q = xp.as_tensor(name, "q", q)
    paged = paging.prepared(xp, name, q, k_pages, v_pages, block_table, lengths, k_new, v_new, **given)
    chosen = choice.choose(name, implementation)
    call, memory = paged.grown(append.append_to_pages, in_place)  # only what nothing speaks against changes the pages
    out, lse = run.attention(name, call, chosen, forced=implementation is not None)
    out = out if out.dtype == q.dtype else out.astype(q.dtype)
    return paging.results([out, *([lse] if call.return_lse else []), *memory], 1 + call.return_lse)
