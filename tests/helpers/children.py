"""Python in a process of its own, from the checkout that this process imports."""

import os
import subprocess
import sys

import attn_ops

# To be put before code that finds no framework.
WITHOUT_TENSORFLOW = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import attn_ops
"""


def run(code, *arguments, **environment):
    """`python arguments -c code`, or without code; the variables of `environment` are added."""
    return subprocess.run(
        [sys.executable, *arguments, *(["-c", code] if code else [])],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(attn_ops.__file__)),
    )
