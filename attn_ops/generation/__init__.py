"""Generation: caches of keys and values, and the attention of new rows to them, for any framework.

``cache`` is what a cache is; ``growth`` how it grows, with rules and errors; ``decode`` how a call with one becomes a
call of the attention. The frameworks' parts are tensorflow/decode.py and tensorflow/append.py, and the same in jax/.
"""
