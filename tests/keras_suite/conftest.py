def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: set by Keras's tests, always true on TensorFlow")
