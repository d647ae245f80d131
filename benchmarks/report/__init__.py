"""The report command of the benchmark suite: `python -m attn_ops bench --report DIR`. See command.py."""
