"""Which share of the cases of `wide` tests and of slow implementations runs, unless `--whole` asks for all of them.

A plugin of pytest for processes without conftest.py (layers/test_jax.py), a function of conftest.py's in the others.
"""

import zlib


def pytest_collection_modifyitems(config, items):
    leave_out(config, items)


def leave_out(config, items, whole=()):
    """Leaves the share in ``items``, but all in the folders ``whole``."""
    left_out = _left_out([item for item in items if not any(folder in item.path.parents for folder in whole)])
    config.hook.pytest_deselected(items=left_out)
    left_out = set(left_out)
    items[:] = [item for item in items if item not in left_out]


def _left_out(items):
    """The cases of `wide` tests and of slow implementations that are not among the share that runs: always the same ones, and of each test some run."""
    wide = {}
    for item in items:
        marker = item.get_closest_marker("wide")
        implementation = getattr(item, "callspec", None) and item.callspec.params.get("implementation")
        if marker:
            of = item.originalname if hasattr(item, "callspec") else item.parent.name  # a test, or a class of them
            wide.setdefault((item.path, of, marker.args[0]), []).append(item)
        elif implementation is not None and implementation.is_slow:  # of each module an eighth, another one of each
            wide.setdefault((item.path, repr(implementation), 8), []).append(item)
    left_out = []
    for (_, _, n), cases in wide.items():
        cases.sort(key=lambda item: zlib.crc32(item.name.encode()))  # as if drawn: no parameter is always the one left out
        left_out += cases[-(-len(cases) // n) :]
    return left_out
