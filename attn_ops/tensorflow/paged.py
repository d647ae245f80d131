"""paged_attention for TensorFlow: rows attend to keys in pages, and become some of them."""

from __future__ import annotations

import tensorflow as tf

from attn_ops.call import options, public
from attn_ops.generation import paging
from attn_ops.tensorflow import append, attention, choice, xp
from attn_ops.tensorflow.as_written import as_written
from attn_ops.tensorflow.forms import graph


@as_written
@public.function(without=paging.NOT_TAKEN, is_causal=True, rotary=None, in_place=False, implementation=None)
def paged_attention(q, k_pages, v_pages, block_table, lengths, k_new=None, v_new=None, **given):
    """Attention of the last rows of sequences to keys and values that lie in pages.

    For servers, whose many sequences come and go and share beginnings: memory is pages of a few keys, and each sequence
    has a row of a table that names its own (Kwon et al. 2023, arXiv:2309.06180). `attn_ops.PagedKVCache` keeps such a
    table. Any number of rows: a token, a few (speculative decoding), a part of a prompt. Only keys that exist are read, where
    they lie. Works eagerly, in `tf.function`, `tf.while_loop` and XLA. Forward only.

    ``query_seq_lengths`` tells how many of the rows each sequence has, where they are padded at their ends. The axis of
    keys, of a ``bias`` or ``mask``, is the table's: `[..., pages * page_size]`.

    Args:
        q: floating [batch, rows, num_heads, head_dim]. The output has its dtype, and so has the attention, whatever that
            of the pages is: 16-bit pages are read as they are by float32 queries.
        k_pages: floating [pages in all, page_size, num_kv_heads, head_dim], page_size a multiple of 16.
        v_pages: [pages in all, page_size, num_kv_heads, value_dim]. In int8 both are pairs (pages, scales), with scales in
            float32 [pages in all, page_size, num_kv_heads] (see `attn_ops.KVCache`).
        block_table: integers [batch, pages]: the keys of sequence b from n page_size on are page block_table[b, n].
            Sequences may share pages. Entries that the length does not reach may be anything.
        lengths: integers [batch]: how many keys each sequence has, those of its rows of q, which are its last ones, among
            them. 0: none, and the output is 0. Of a sequence shorter than q only its first ``lengths`` rows count.
        k_new, v_new: [batch, rows, num_kv_heads, head_dim] and [..., value_dim], cast to the dtype of the pages: written
            into them first, at the last ``rows`` positions of each sequence, whose pages must be its own. None: the pages
            hold them already.
        is_causal: whether a row sees no key behind its own. With False all keys of its sequence (cross-attention).
        rotary: None, True, or a dict of the options of `attn_ops.rotary_embedding`: turns q and k_new by their
            positions. The pages hold turned keys.
        in_place: True: new rows are written into the memory of ``k_pages`` and ``v_pages`` on CPUs, also where these are
            used elsewhere, as the arguments of a function are, and a token costs a token. False: there only where nothing
            else uses them, as in loops, and else into copies.
        {options}
        implementation: as in `attn_ops.scaled_dot_product_attention`.

    Returns:
        out [batch, rows, num_heads, value_dim], or (out, lse) with return_lse. With k_new also the pages: (out, k_pages,
        v_pages), or (out, lse, k_pages, v_pages).

    Raises:
        TypeError: tensors of another kind or dtype.
        ValueError: shapes that do not fit each other, lengths beyond the table, and entries of the table that are no page,
            as far as a length reaches them; the pages stay as they were.
        tf.errors.InvalidArgumentError: the same, where only the running op can know.
    """
    name = "paged_attention"
    implementation, in_place = given.pop("implementation", None), given.pop("in_place", False)
    in_place = options.flag(name, "in_place", in_place)
    q = xp.as_tensor(name, "q", q)
    paged = paging.prepared(xp, name, q, k_pages, v_pages, block_table, lengths, k_new, v_new, **given)
    chosen = choice.choose(name, paged.call, implementation)
    choice.calls[chosen] += 1

    def run():  # only what nothing speaks against changes the pages
        call, memory = paged.grown(append.append_to_pages, in_place)
        out, lse = attention.RUN[chosen](call)
        out = out if out.dtype == q.dtype else tf.cast(out, q.dtype)
        return out, *([lse] if call.return_lse else []), *memory

    if not paged.new or chosen != "fused" or tf.executing_eagerly() or append.only_scatters():
        results = run()
    else:
        results = graph.by_device(run, run, run)  # one choice for the append and the attention
    return paging.results(results, 1 + paged.call.return_lse)
