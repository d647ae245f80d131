"""Sizes: around the tiles of the kernels, head dimensions up to 512, and every dtype."""

import itertools

import numpy as np
import pytest

from cases import DTYPES, check

# Tiles are multiples of 8 in every kernel: 24, 48 and 64 among them.
LENGTHS = [1, 7, 8, 23, 24, 25, 47, 48, 49, 63, 64, 65, 127, 128, 129]
HEAD_DIMS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256, 257]
SMALL = dict(batch=1, num_heads=2, num_kv_heads=1)


def test_query_lengths_around_tiles(implementation):
    for n in implementation.thin(LENGTHS):
        check(implementation, seqlen_q=n, seqlen_k=40, is_causal=True, causal_alignment="bottom_right", **SMALL)


def test_key_lengths_around_tiles(implementation):
    for n in implementation.thin(LENGTHS):
        check(implementation, seqlen_q=30, seqlen_k=n, **SMALL)


def test_both_lengths_around_tiles(implementation):
    for n in implementation.thin(LENGTHS):
        check(implementation, seqlen_q=n, seqlen_k=n, is_causal=True, **SMALL)


def test_long_keys(implementation):
    check(implementation, seqlen_q=3, seqlen_k=2500, window=(700, None), causal_alignment="bottom_right", **SMALL)


def test_long_queries(implementation):
    check(implementation, seqlen_q=2500, seqlen_k=3, **SMALL)


def test_lengths_within_a_batch_around_tiles(implementation):
    lengths = np.array(LENGTHS, np.int32)
    check(
        implementation,
        batch=len(lengths),
        seqlen_q=30,
        seqlen_k=130,
        num_heads=1,
        num_kv_heads=1,
        key_value_seq_lengths=lengths,
    )


def test_head_dims(implementation):
    for n in implementation.thin(n for n in HEAD_DIMS if n <= implementation.largest_head_dim):
        check(implementation, seqlen_q=9, seqlen_k=26, head_dim=n, **SMALL)


def test_head_dims_of_512_and_more(implementation):
    check(implementation, seqlen_q=9, seqlen_k=26, head_dim=512, **SMALL)
    check(implementation, seqlen_q=5, seqlen_k=9, head_dim=600, value_dim=3, **SMALL)


def test_value_dims(implementation):
    value_dims = [n for n in (1, 2, 5, 8, 15, 16, 40, 65, 512) if n <= implementation.largest_head_dim]
    for head_dim, value_dim in implementation.thin(itertools.product([1, 8, 40], value_dims)):
        check(implementation, seqlen_q=9, seqlen_k=26, head_dim=head_dim, value_dim=value_dim, **SMALL)


def test_grouped_heads_and_few_queries(implementation):
    heads = [(1, 1), (3, 3), (8, 2), (7, 1), (12, 4)]
    for seqlen_q, (num_heads, num_kv_heads) in implementation.thin(itertools.product([1, 2, 33], heads)):
        check(
            implementation,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            seqlen_q=seqlen_q,
            seqlen_k=50,
            is_causal=True,
            causal_alignment="bottom_right",
        )


@pytest.mark.parametrize("narrow", ["float16", "bfloat16"])
def test_16_bit(implementation, narrow):
    bias = np.random.default_rng(0).standard_normal((1, 4, 1, 45)).astype(DTYPES[narrow])
    check(implementation, narrow, seqlen_q=35, seqlen_k=45, head_dim=20, is_causal=True, bias=bias)
    check(
        implementation,
        narrow,
        seqlen_q=1,
        seqlen_k=45,
        layout="BHSD",
        value_dim=7,
        key_value_seq_lengths=np.array([45, 20], np.int32),
    )


@pytest.mark.parametrize("of", ["float32", "bfloat16", "float64"])
def test_every_feature_over_many_tiles(implementation, of):
    rng = np.random.default_rng(0)
    check(
        implementation,
        of,
        num_heads=2,
        num_kv_heads=1,
        seqlen_q=150,
        seqlen_k=170,
        head_dim=33,
        value_dim=40,
        bias=rng.standard_normal((2, 1, 150, 170)).astype(DTYPES[of]),
        mask=rng.random((2, 1, 150, 170)) < 0.9,
        window=(90, 20),
        causal_alignment="bottom_right",
        query_seq_lengths=np.array([150, 101], np.int32),
        key_value_seq_lengths=np.array([129, 170], np.int32),
        dropout_rate=0.25,
        dropout_seed=np.array([3, 4], np.int64),
    )


def test_windows_that_skip_whole_tiles(implementation):
    cases = itertools.product(
        [(100, 300), (300, 100), (1, 700)], [(10, 0), (0, 10), (130, 5)], ["top_left", "bottom_right"]
    )
    for (seqlen_q, seqlen_k), window, alignment in implementation.thin(cases):
        check(implementation, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window=window, causal_alignment=alignment, **SMALL)


def test_rows_of_a_tile_that_see_nothing_until_later(implementation):
    # The first tiles of keys are all hidden, so the running maximum is still -inf when the first score comes.
    mask = np.ones((1, 1, 70, 200), bool)
    mask[..., ::3, :150] = False
    check(implementation, seqlen_q=70, seqlen_k=200, mask=mask, **SMALL)
