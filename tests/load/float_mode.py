"""The mode in which this thread rounds, on x86-64: MXCSR, by a library that is compiled on the spot."""

import contextlib
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

_SOURCE = """
#include <xmmintrin.h>
unsigned mode_get(void) { return _mm_getcsr(); }
void mode_set(unsigned mode) { _mm_setcsr(mode); }
"""
FLUSH = 0x8040  # to zero: results and operands that are not normal
MODES = {"flush to zero": FLUSH, "towards zero": 0x6000, "upwards": 0x4000, "upwards, flush to zero": 0x4000 | FLUSH}


class FloatMode:
    def __init__(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mode.so"
            command = [os.environ.get("CC", "cc"), "-O1", "-shared", "-fPIC", "-x", "c", "-", "-o", path]
            subprocess.run(command, input=_SOURCE, text=True, check=True)
            self._library = ctypes.CDLL(str(path))

    def get(self):
        return self._library.mode_get() & 0xFFFF

    @contextlib.contextmanager
    def set(self, bits):
        """So many bits on top of the mode that is usual; what ends finds the mode as it left it, or fails."""
        before = self.get()
        wanted = before & ~(0x6000 | FLUSH | 0x3F) | bits
        self._library.mode_set(wanted)
        try:
            yield
        finally:
            after = self.get()
            self._library.mode_set(before)
        assert after & ~0x3F == wanted & ~0x3F, f"the mode was {wanted:#x} and is {after:#x}"
