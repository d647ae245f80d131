"""Makes a case that fails smaller, for as long as it fails in the same way."""

import time

import numpy as np

from fuzz import reductions

MOST_SHOWN = 32  # numbers of an array


def shrunk(case, failure, seconds=60.0):
    """(the smallest case found, the reductions that led to it, how it fails).

    Args:
        case: one that fails.
        failure: a function of a case that says what is wrong with it, a list of texts, empty where nothing is.
        seconds: after which what was found until then is the answer.
    """
    end, taken, found = time.monotonic() + seconds, [], failure(case)
    kinds, rejected, progress = _kinds(found), set(), False
    while time.monotonic() < end:
        text = next((text for text in reductions.candidates(case) if text not in rejected), None)
        if text is None and not progress:
            break
        if text is None:  # of a smaller case, what was refused before may be possible
            rejected, progress = set(), False
            continue
        smaller = reductions.reduced(case, text)
        found_there = failure(smaller)
        if kinds & _kinds(found_there):
            case, found, progress = smaller, found_there, True
            taken.append(text)
        else:
            rejected.add(text)
    return case, taken, found


def _kinds(found):
    """What findings are of, whatever places and numbers they tell: another fault must not take the place of this one."""
    words = [text.splitlines()[-1].split() for text in found]  # of a traceback the line that names the exception
    return {" ".join(line[:1] if line[0].endswith(":") else line[:3]) for line in words}


def described(case):
    """The arrays of a case that are small, a line for each."""
    arrays = {name: getattr(case, name) for name in (*reductions.INPUTS, "d_lse")}
    arrays |= {name: x for name, x in case.options.items() if isinstance(x, np.ndarray)}
    small = {name: x for name, x in arrays.items() if x is not None and 0 < x.size <= MOST_SHOWN}
    return [f"{name} = {x.astype(x.dtype if x.dtype.kind in 'ib' else np.float64).tolist()}" for name, x in small.items()]
