"""How the kernels, or the reference, are called: eagerly, in graphs, in XLA."""
