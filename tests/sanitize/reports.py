"""What sanitizers reported, and whose it is.

TensorFlow, XLA, JAX, NumPy and Python are not compiled with a sanitizer, so what is said of them is partly noise. Of memory and of
undefined behaviour a report is ours when any frame of its stacks is, since kernels are called through all the others. Of a race, when
both of its accesses are ours: without TensorFlow's locks, ThreadSanitizer cannot see that the memory of a tensor is made before a
kernel gets it and given back after. Nor does it see that TensorFlow makes a kernel before it runs it, perhaps in another thread, and
destroys it after: a race of a run with one of these is not ours, one of two of them is.
"""

import re
from pathlib import Path

OURS = re.compile(r"csrc/(?:cpu|bindings)/|attn_ops::|/attn_ops/_core\.|/libattn_ops\.so")
_STARTS = re.compile(r"^=+\d*=*\s*(?:ERROR|WARNING): \w+Sanitizer|^WARNING: ThreadSanitizer|: runtime error: ", re.MULTILINE)
_MADE_OR_DESTROYED = re.compile(r"attn_ops::tf::(?:create|destroy)<")
# What a frame of a stack looks like.
_FRAME = re.compile(r"^\s+#\d+ .*$", re.MULTILINE)


def split(text):
    """The reports in a log."""
    starts = [match.start() for match in _STARTS.finditer(text)]
    starts = [text.rfind("\n", 0, start) + 1 for start in starts]
    starts = sorted(set(starts))
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]


def is_ours(report):
    if "ThreadSanitizer: data race" in report:
        ours = [stack for stack in _accesses(report) if OURS.search(stack)]
        return len(ours) == 2 and sum(bool(_MADE_OR_DESTROYED.search(stack)) for stack in ours) != 1
    if "runtime error" in report.splitlines()[0]:
        return bool(OURS.search(report))
    return bool(OURS.search("\n".join(_FRAME.findall(report))) or OURS.search(report.splitlines()[0]))


def _accesses(report):
    """The stacks of the two accesses of a race."""
    parts = re.split(r"\n\s*\n", report)
    return [part for part in parts if re.search(r"\b(?:[Rr]ead|[Ww]rite|[Aa]tomic \w+) of size", part)]


def found(folder):
    """(ours, others): the reports in a folder of logs, each once by its first frame of ours."""
    ours, others = {}, 0
    for path in sorted(Path(folder).iterdir()):
        for report in split(path.read_text(errors="replace")):
            if is_ours(report):
                key = next((line for line in report.splitlines() if OURS.search(line)), report[:200])
                ours.setdefault(re.sub(r"0x[0-9a-f]+|\bpid=\d+|^\s+#\d+", "", key).strip(), report)
            else:
                others += 1
    return list(ours.values()), others
