"""Whole Keras models: the attention as one of their operations, their files, and the conversion of existing ones."""
