"""Attention in TensorFlow; jax/ has the same roles under the same names."""
