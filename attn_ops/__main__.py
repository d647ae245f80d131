"""python -m attn_ops: see cli/app.py."""

import sys

from attn_ops.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
