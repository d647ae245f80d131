"""On PYTHONPATH, makes of a development environment the machine that is lent for an hour: PyTorch (torch.py beside
this), NumPy, pytest and ml_dtypes, and nothing else of what this package knows. Child processes inherit it."""

import sys

_HIDDEN = {"elftools", "jax", "jaxlib", "keras", "matplotlib", "pytest_benchmark", "rich", "sklearn"}
_HIDDEN |= {"scipy", "tensorflow"}


class _Hiding:
    """A finder of modules that does not find those."""

    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _HIDDEN or name == "attn_ops._core":
            return None
        return self._finder.find_spec(name, path, target)


sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path]
