"""`python -m attn_ops`, and the console script `attn-ops`: see cli/app.py."""

from __future__ import annotations

import sys

from attn_ops import requirements


def main(argv=None) -> int:
    """Runs a command and returns its exit status; 2 too where click, of which only the command line is made, is missing.

    Raises:
        SystemExit: the command line itself is wrong (status 2).
    """
    try:
        from attn_ops.cli import app
    except ModuleNotFoundError as error:
        reason = requirements.missing("the command line", error.name or "")
        if reason is None:
            raise
        print(reason, file=sys.stderr)
        return 2
    return app.main(argv)


if __name__ == "__main__":
    sys.exit(main())
