"""The benchmark suite on a GPU: `python -m attn_ops bench --device cuda [--report DIR]`. See command.py."""
