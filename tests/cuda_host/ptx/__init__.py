"""The PTX that nvcc makes of the kernels, run on a CPU: see README.md."""
