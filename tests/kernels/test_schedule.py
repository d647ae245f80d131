"""csrc/cpu/schedule.h: how calls are cut into tasks, without a kernel that would run them."""

import os
import subprocess
from collections import Counter, namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Shape = namedtuple("Shape", "batch seqlen_q seqlen_k num_heads num_kv_heads head_dim value_dim window")
THREADS = (1, 2, 7, 64, 1024)
# schedule_plans.cc's kernels: 24 rows in a tile, up to 8 rows of a key/value head are few.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 8, 8, -1),
    Shape(1, 8, 16, 64, 64, 64, 64, -1),
    Shape(2, 1, 8192, 32, 8, 128, 128, -1),
    Shape(1, 1, 4096, 40, 40, 64, 64, -1),
    Shape(3, 2, 100, 6, 3, 16, 24, -1),
    Shape(1, 100, 5000, 2, 2, 64, 64, -1),
    Shape(4, 512, 512, 12, 12, 64, 64, -1),
    Shape(1, 2048, 2048, 12, 4, 64, 32, -1),
    Shape(1, 16384, 300, 1, 1, 40, 40, 16),
    Shape(1, 700, 20000, 3, 1, 64, 64, 10),
    Shape(5, 9, 0, 3, 3, 8, 0, -1),
]


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    program = tmp_path_factory.mktemp("schedule") / "plans"
    source = Path(__file__).with_name("schedule_plans.cc")
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-Wall", f"-I{ROOT / 'csrc'}", source, "-o", program]
    subprocess.run(command, check=True)

    def plans(shapes, threads=THREADS):
        """For every shape and number of threads: the rows of numbers that the plan printed, by their first word."""
        asked = [(shape, count) for shape in shapes for count in threads]
        lines = "".join(" ".join(map(str, (*shape, count))) + "\n" for shape, count in asked)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
        blocks = [block.splitlines() for block in printed.split("end\n")[:-1]]
        assert len(blocks) == len(asked)
        for (shape, count), block in zip(asked, blocks):
            plan = {}
            for word, *numbers in map(str.split, block):
                plan.setdefault(word, []).append(tuple(int(n) for n in numbers if n.lstrip("-").isdigit()))
            yield shape, count, plan

    return plans


def test_every_score_is_computed_once(plans):
    for shape, threads, plan in plans(SHAPES):
        tiles = -(-shape.seqlen_q * (shape.num_heads // shape.num_kv_heads) // 24)
        seen = Counter()
        for batch, head, begin, end, _ in plan.get("head_lanes", ()):
            seen.update((batch, head, 0, key // 64) for key in range(begin, end, 64))
            assert begin % 128 == 0 and (end % 128 == 0 or end == shape.seqlen_k)
        for batch, head, first, last, begin, end, _ in plan.get("row_lanes", ()):
            seen.update((batch, head, tile, key // 64) for tile in range(first, last) for key in range(begin, end, 64))
            assert begin % 128 == 0 and (end % 128 == 0 or end == shape.seqlen_k)
        rows = 1 if "head_lanes" in plan else tiles
        assert len(seen) == shape.batch * shape.num_kv_heads * rows * -(-shape.seqlen_k // 64), (shape, threads)
        assert set(seen.values()) <= {1}

        chunks = [tile for (tile,) in plan["chunk"]]
        assert chunks[0] == 0 and chunks[-1] == tiles and all(a < b for a, b in zip(chunks, chunks[1:]))


def test_heads_that_share_a_bias_follow_one_another(plans):
    for shape, threads, plan in plans(SHAPES, (1, 64)):
        for form, chunks, copies, in_place, sums, units, total in plan.get("sums", ()):
            own_batch, own_head = not form & 1 or shape.batch == 1, not form >> 1 & 1 or shape.num_heads == 1
            run = [row[1:] for row in plan["unit"] if row[0] == form]
            heads = Counter((batch, head) for _, _, batch, head, _, _ in run)
            assert len(heads) == shape.batch * shape.num_kv_heads and set(heads.values()) == {1}
            biases = {}
            for part, unit, batch, head, place, starts in run:
                if place >= 0:
                    biases.setdefault((part, unit, place), set()).add((own_batch and batch, own_head and head))
            assert all(len(found) == 1 for found in biases.values())
            assert not in_place or copies == 1
            assert sums <= total


def test_what_changes_bits_goes_by_shape_alone(plans):
    cuts = {}
    for shape, threads, plan in plans(SHAPES):
        ((_, splits, split_keys, *_),) = plan["forward"]
        cuts.setdefault(shape, set()).add((splits, split_keys, tuple(plan["chunk"])))
    assert all(len(found) == 1 for found in cuts.values())
    assert any(splits > 1 for ((splits, _, _),) in cuts.values())
    assert any(len(chunks) > 2 for ((_, _, chunks),) in cuts.values())


def test_partial_results_lie_apart_inside_the_workspace(plans):
    for shape, _, plan in plans(SHAPES):
        ((threads, splits, _, size, scratch, _),) = plan["forward"]
        assert size >= threads * scratch
        if splits == 1:
            assert size == threads * scratch
            continue
        places = {task[-1] for task in plan.get("head_lanes", ())} | {task[-1] for task in plan.get("row_lanes", ())}
        assert len(places) == shape.batch * shape.num_kv_heads * splits
        group = shape.num_heads // shape.num_kv_heads
        needed = shape.seqlen_q * group * (shape.value_dim + 2) * 4
        ordered = sorted(places)
        assert ordered[0] == 0 and all(b - a >= needed for a, b in zip(ordered, ordered[1:]))
        assert ordered[-1] + needed <= size - threads * scratch


def test_threads_are_woken_for_work_only(plans):
    small, large = Shape(1, 16, 16, 8, 8, 64, 64, -1), Shape(4, 512, 512, 12, 12, 64, 64, -1)
    for shape, lent, plan in plans([small, large], (1, 2, 64)):
        assert plan["forward"][0][0] == plan["backward"][0][0] == (1 if shape == small else lent)
    # What a window leaves is less than the matrix.
    full, window = (Shape(1, 4096, 4096, 1, 1, 64, 64, w) for w in (-1, 8))
    counts = {shape: plan["forward"][0][0] for shape, _, plan in plans([full, window], (1024,))}
    assert counts[window] < counts[full] / 10


def test_partial_gradients_stay_in_their_memory(plans):
    for shape, _, plan in plans(SHAPES):
        ((threads, chunks, wave, chunk_bytes, size, scratch),) = plan["backward"]
        assert size == threads * scratch + chunk_bytes * (threads if chunks == 1 else wave * chunks)
        heads = shape.batch * shape.num_kv_heads
        assert 1 <= wave <= heads
        least = max(1, min(heads, -(-2 * threads // chunks)))  # two tasks for each thread, one head
        assert wave * chunks * chunk_bytes <= 8 << 20 or wave <= least


def test_sizes_that_no_memory_has_are_not_taken_for_small_ones(plans):
    most, dim = 2**31 - 1, 2**24
    for shape, _, plan in plans([Shape(1, most, most, 1, 1, dim, dim, -1), Shape(most, 1, most, 1, 1, 1, 1, -1)]):
        ((*_, forward_bytes, _, _),), ((*_, backward_bytes, _),) = plan["forward"], plan["backward"]
        assert 0 < forward_bytes <= 2**62 and 0 < backward_bytes <= 2**62
        assert backward_bytes == 2**62 or shape.head_dim < dim
