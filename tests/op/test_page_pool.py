"""attn_ops.PagedKVCache: sequences that come, share pages and go, against lists of rows in Python."""

import copy
import importlib
import pickle

import int8_rows
import numpy as np
import pytest
from attn_ops import reference
from attn_ops.generation.page_pool import PagedKVCache

SIZE, HEADS, DIM, VALUE_DIM = 16, 2, 4, 3
each_framework = pytest.mark.parametrize("framework", ["tensorflow", "jax"])


def new_cache(framework, num_pages=12, **named):
    return PagedKVCache.create(num_pages, SIZE, HEADS, DIM, "float32", value_dim=VALUE_DIM, framework=framework, **named)


def rows(rng, *shape):
    """Keys and values of so many rows."""
    return [rng.standard_normal((*shape, HEADS, dim)).astype("float32") for dim in (DIM, VALUE_DIM)]


def held(cache, sequence, layer=0):
    """The keys and values of a sequence, gathered by hand."""
    table, length = np.asarray(cache.block_table([sequence]))[0], int(np.asarray(cache.lengths([sequence]))[0])
    pages = [np.asarray(x) if cache.layout == "BSHD" else np.swapaxes(x, 1, 2) for x in cache.pages[layer]]
    return [np.array([x[table[j // SIZE], j % SIZE] for j in range(length)]).reshape(length, *x.shape[2:]) for x in pages]


def attention(framework):
    return importlib.import_module(f"attn_ops.{framework}.paged").paged_attention


def check(cache, right):
    """Every sequence holds these rows, and each page belongs to somebody or is free."""
    used = set()
    for sequence, given in right.items():
        for found, wanted in zip(held(cache, sequence), given):
            np.testing.assert_array_equal(found, wanted)
        pages = -(-len(given[0]) // SIZE)
        used.update(np.asarray(cache.block_table([sequence]))[0][:pages].tolist())
    assert set(cache.sequences) == set(right)
    assert cache.num_free_pages == cache.num_pages - len(used)


@pytest.mark.wide(4)
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@each_framework
def test_any_history(framework, layout, rng):
    cache, right = new_cache(framework, 14, layout=layout), {}
    done = set()
    for _ in range(60 if framework == "tensorflow" else 25):
        what = rng.choice(["allocate", "append", "append", "append", "fork", "free", "truncate"])
        known = list(right)
        most = int(rng.integers(1, 4)) if framework == "tensorflow" else 1  # JAX compiles for each number
        some = [int(s) for s in rng.permutation(known)[:most]] if known else []
        try:
            if what == "allocate":
                right[cache.allocate()] = rows(rng, 0)
            elif not some:
                continue
            elif what == "append":
                new, counts = rows(rng, len(some), 9), rng.integers(0, 10, len(some))
                laid = new if layout == "BSHD" else [x.swapaxes(1, 2) for x in new]
                cache.append(some, *laid, lengths=counts)
                for i, sequence in enumerate(some):
                    right[sequence] = [np.concatenate([old, x[i, : counts[i]]]) for old, x in zip(right[sequence], new)]
            elif what == "fork":
                right[cache.fork(some[0])] = right[some[0]]
            elif what == "free":
                cache.free(some[0])
                del right[some[0]]
            else:
                length = int(rng.integers(0, len(right[some[0]][0]) + 1))
                cache.truncate(some[0], length)
                right[some[0]] = [x[:length] for x in right[some[0]]]
        except PagedKVCache.OutOfPages:
            what = "refused"
        done.add(what)
        check(cache, right)
    assert {"append", "fork", "free", "truncate"} <= done


@pytest.mark.wide(2)
@each_framework
def test_a_fork_copies_only_the_last_page_and_only_when_it_is_written(framework, rng):
    cache = new_cache(framework)
    first = cache.allocate()
    old, new = rows(rng, 40), rows(rng, 2)
    cache.append(first, *old)
    branch, other = cache.fork(first), cache.fork(first)
    assert cache.num_free_pages == 12 - 3
    shared = np.asarray(cache.block_table([first]))[0, :3].tolist()
    both = [np.stack([x, x + 1]) for x in new]
    cache.append([branch, first], *both)  # the page still is the third one's too
    assert cache.num_free_pages == 12 - 3 - 2
    assert [np.asarray(cache.block_table([s]))[0, :2].tolist() for s in (first, branch)] == [shared[:2]] * 2
    cache.append(other, *[x + 2 for x in new])  # its own by now
    assert cache.num_free_pages == 12 - 3 - 2 and np.asarray(cache.block_table([other]))[0, 2] == shared[2]
    check(cache, {s: [np.concatenate([x, y + i]) for x, y in zip(old, new)] for i, s in enumerate((branch, first, other))})


@pytest.mark.wide(2)
@each_framework
def test_a_step_of_a_server(framework, rng):
    """Two layers; sequences of which one is a fork grow by a row, and attend."""
    cache = new_cache(framework, num_layers=2)
    first = cache.allocate()
    prompt = [rows(rng, 20) for _ in range(2)]
    cache.append(first, *zip(*prompt))
    sequences = [first, cache.fork(first), cache.allocate()]
    table, lengths = cache.reserve(sequences, 1)
    assert np.asarray(lengths).tolist() == [21, 21, 1]
    for layer in range(2):
        q = rng.standard_normal((3, 1, 2 * HEADS, DIM)).astype("float32")
        new = rows(rng, 3, 1)
        out, *cache.pages[layer] = attention(framework)(q, *cache.pages[layer], table, lengths, *new, in_place=True)
        for b, sequence in enumerate(sequences):
            k, v = (np.concatenate([old, x[b]]) for old, x in zip(prompt[layer] if b < 2 else rows(rng, 0), new))
            for found, wanted in zip(held(cache, sequence, layer), (k, v)):
                np.testing.assert_array_equal(found, wanted)
            np.testing.assert_allclose(out[b], reference.attention(q[b : b + 1], k[None], v[None])[0][0], atol=2e-6)


@pytest.mark.wide(2)
@each_framework
def test_int8(framework, rng):
    """Rounded once: a page that is copied has the integers and scales of the other."""
    cache = PagedKVCache.create(8, SIZE, HEADS, DIM, "int8", value_dim=VALUE_DIM, framework=framework)
    first = cache.allocate()
    prompt, more = rows(rng, 20), rows(rng, 20)
    cache.append(first, *prompt)
    branch = cache.fork(first)
    cache.append(branch, *more)
    right = {first: prompt, branch: [np.concatenate(x) for x in zip(prompt, more)]}
    for sequence, given in right.items():
        table = np.asarray(cache.block_table([sequence]))[0]
        for pair, x in zip(cache.pages[0], given):
            for found, wanted in zip(pair, int8_rows.quantized(x)):
                found = np.concatenate(np.asarray(found)[table])[: len(x)]
                np.testing.assert_array_equal(found, wanted)
    q = rng.standard_normal((1, 1, HEADS, DIM)).astype("float32")
    out = attention(framework)(q, *cache.pages[0], cache.block_table([branch]), cache.lengths([branch]))
    k, v = (int8_rows.meant(*int8_rows.quantized(x))[None] for x in right[branch])
    np.testing.assert_allclose(out, reference.attention(q, k, v)[0], atol=2e-6)


def test_block_tables_have_few_widths():
    cache = new_cache("tensorflow", 9)
    sequence = cache.allocate()
    widths = []
    for _ in range(9):
        widths.append(cache.block_table([sequence]).shape[1])
        cache.reserve([sequence], SIZE)
    assert widths == [1, 1, 2, 4, 4, 8, 8, 8, 8]
    assert cache.block_table([sequence], pages=11).shape == (1, 11)


def freed(cache):
    sequence = cache.allocate()
    cache.free(sequence)
    return sequence


_K, _V = np.zeros((1, 2, HEADS, DIM)), np.zeros((1, 2, HEADS, VALUE_DIM))
BAD = {
    "freed": (lambda c, s: c.append(freed(c), _K, _V), ValueError, "append: sequence 2 was freed"),
    "freed twice": (lambda c, s: c.free(freed(c)), ValueError, "free: sequence 2 was freed"),
    "unknown": (lambda c, s: c.fork(99), ValueError, "fork: sequence 99 is unknown"),
    "no integer": (lambda c, s: c.lengths(["a"]), TypeError, "sequences are integers"),
    "an array without axes": (lambda c, s: c.lengths(np.array(s)), TypeError, "lengths: sequences must be one or several"),
    "twice in a batch": (lambda c, s: c.reserve([s, s], 1), ValueError, "may occur once"),
    "out of pages": (lambda c, s: c.reserve([s], 12 * SIZE), PagedKVCache.OutOfPages, "12 more pages are needed, and 10 of 12"),
    "negative rows": (lambda c, s: c.reserve([s], -1), ValueError, "from 0 on"),
    "rows of another number": (lambda c, s: c.reserve([s], [1, 2]), ValueError, "one for each of 1"),
    "floats": (lambda c, s: c.reserve([s], 1.5), TypeError, "must be integers"),
    "other heads": (lambda c, s: c.append(s, _K[:, :, :1], _V), ValueError, r"k must have shape \(1, 2, any number, 4\)|k must have"),
    "other numbers of rows": (lambda c, s: c.append(s, _K, _V[:, :1]), ValueError, "as many rows of keys as of values"),
    "integers": (lambda c, s: c.append(s, _K.astype(int), _V), TypeError, "k must be floating"),
    "layers": (lambda c, s: c.append(s, [_K, _K], [_V, _V]), ValueError, "rows of 1 layers, got 2"),
    "too many lengths": (lambda c, s: c.append(s, _K, _V, lengths=[3]), ValueError, "lengths must be from 0 to 2"),
    "longer": (lambda c, s: c.truncate(s, 31), ValueError, "from 0 to 30"),
    "a narrow table": (lambda c, s: c.block_table([s], pages=1), ValueError, "pages must be at least 2"),
    "pages of 24": (lambda c, s: PagedKVCache.create(4, 24, 1, 8), ValueError, "page_size must be a multiple of 16, got 24"),
    "no pages": (lambda c, s: PagedKVCache.create(0, 16, 1, 8), ValueError, "num_pages must be at least 1"),
    "a dtype": (lambda c, s: PagedKVCache.create(4, 16, 1, 8, "int32", framework="tensorflow"), ValueError, "dtype must be"),
    "a layout": (lambda c, s: PagedKVCache.create(4, 16, 1, 8, layout="HND"), ValueError, "layout must be"),
}  # fmt: skip


@pytest.mark.wide(3)
@pytest.mark.parametrize("what", BAD)
def test_bad_input_leaves_all_as_it_was(what, rng):
    cache = new_cache("tensorflow")
    sequence, given = cache.allocate(), rows(rng, 30)
    cache.append(sequence, *given)
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call(cache, sequence)
    check(cache, {sequence: given})


@pytest.mark.wide(2)
@each_framework
def test_not_while_a_function_is_traced(framework):
    compiled = importlib.import_module(framework)
    compiled = compiled.function if framework == "tensorflow" else compiled.jit
    cache = new_cache(framework)
    sequence = cache.allocate()
    calls = {
        "allocate": (), "fork": (sequence,), "free": (sequence,), "truncate": (sequence, 0), "reserve": ([sequence], 1),
        "block_table": ([sequence],), "lengths": ([sequence],),
    }  # fmt: skip
    for name, given in calls.items():  # the last two would be what they were, ever after
        with pytest.raises(ValueError, match=f"{name}: .*outside of compiled functions"):
            compiled(lambda name=name, given=given: getattr(cache, name)(*given))()
    check(cache, {sequence: rows(np.random.default_rng(0), 0)})


def test_one_sequence_or_several(rng):
    cache = new_cache("tensorflow")
    sequence, given = cache.allocate(), rows(rng, 20)
    cache.append(sequence, *given)
    for some in (sequence, np.int64(sequence), (x for x in [sequence])):
        table, lengths = cache.reserve(some, 0)
        assert table.shape == (1, 2) and lengths.numpy().tolist() == [20]
    assert cache.block_table(sequence).shape == (1, 2) and cache.lengths(sequence).shape == (1,)
    with pytest.raises(TypeError, match="lengths: sequences must be one or several, got float"):
        cache.lengths(1.0)


def test_pages_that_were_donated_and_not_put_back(rng):
    """Nothing has changed: no positions without rows."""
    cache = new_cache("jax", num_layers=2)
    sequence, given = cache.allocate(), rows(rng, 20)
    cache.append(sequence, *([x, x] for x in given))
    pages = cache.pages[1]
    cache.pages[1] = [x.copy() for x in pages]
    cache.pages[1][0].delete()
    for call in (lambda: cache.append(sequence, *([x, x] for x in given)), lambda: cache.reserve(sequence, 1)):
        with pytest.raises(ValueError, match=r"the pages of layer 1 were donated: .*cache.pages\[1\] = "):
            call()
    cache.pages[1] = pages
    check(cache, {sequence: given})


def test_without_a_copy_in_tensorflow(rng):
    cache = new_cache("tensorflow")
    sequence = cache.allocate()
    before = [np.asarray(memoryview(x)).ctypes.data for x in cache.pages[0]]
    for _ in range(3):
        cache.append(sequence, *rows(rng, 20))
    assert [np.asarray(memoryview(x)).ctypes.data for x in cache.pages[0]] == before


@each_framework
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_has_pages_and_books_of_its_own(framework, copied):
    rng = np.random.default_rng(4)
    cache = new_cache(framework)
    one, more, others = rows(rng, 3), rows(rng, 2), rows(rng, 2)
    sequence = cache.allocate()
    cache.append(sequence, *one)
    again = copied(cache)
    again.append(again.fork(sequence), *others)
    again.append(sequence, *more)
    check(cache, {sequence: one})
    cache.append(sequence, *others)
    check(cache, {sequence: [np.concatenate(x) for x in zip(one, others)]})
    both = {sequence: more, again.sequences[-1]: others}
    check(again, {s: [np.concatenate(x) for x in zip(one, rest)] for s, rest in both.items()})
