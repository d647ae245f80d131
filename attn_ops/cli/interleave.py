"""Times several peers in one process, in turns, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

# Seconds of a peer's turn, first untimed, then timed, at least one call each. Untimed calls first: worker threads of
# the peer before may still be spinning, and the scheduler takes a while to spread threads that have slept over the
# processors again.
TURN = 0.05


@dataclasses.dataclass
class Samples:
    """Seconds of every timed call of one peer: by the clock, and of the processor in all threads."""

    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def median(self, clock: str) -> float:
        return statistics.median(getattr(self, clock))

    def minimum(self, clock: str) -> float:
        return min(getattr(self, clock))


def run(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
    probes: dict[str, Callable[[], float]] | None = None,
    turn: float = TURN,
    seed: int = 0,
    take_turn: Callable[[Callable[[], object], Samples, float], None] | None = None,
) -> tuple[dict[str, Samples], dict[str, float], int]:
    """Every round gives each step a turn, in a new random order, and each probe a call.

    Args:
        steps: what to time, by name.
        rounds: how many rounds at most; at least 3 are run.
        seconds: no new round is begun after this time.
        progress: called with (rounds done, rounds) before each round and at the end.
        probes: what measures the machine, by name; each returns a rate.
        turn: seconds of each step's turn, first untimed, then timed.
        seed: of the orders.
        take_turn: what times a turn of a step, where the clock of this process cannot.

    Returns:
        The samples of each step, the best rate of each probe, and the number of rounds run.
    """
    for step in steps.values():  # twice: the first compiles or allocates, the second finds all of it warm
        step()
        step()
    samples = {name: Samples() for name in steps}
    rates = {name: [] for name in probes or {}}
    order = [*steps, *rates]
    shuffle = random.Random(seed).shuffle
    deadline = time.monotonic() + seconds
    done = 0
    while done < rounds and (done < 3 or time.monotonic() < deadline):
        progress(done, rounds)
        shuffle(order)
        for name in order:
            if name in rates:
                rates[name].append(probes[name]())
            else:
                (take_turn or _turn)(steps[name], samples[name], turn)
        done += 1
    progress(done, done)
    return samples, {name: max(values) for name, values in rates.items()}, done


def _turn(step: Callable[[], object], samples: Samples, turn: float) -> None:
    begin = time.perf_counter()
    step()
    while time.perf_counter() - begin < turn:
        step()
    begin = time.perf_counter()
    while True:
        cpu, wall = time.process_time(), time.perf_counter()
        result = step()
        end = time.perf_counter()
        samples.cpu.append(time.process_time() - cpu)
        samples.wall.append(end - wall)
        del result
        if end - begin >= turn:
            return
