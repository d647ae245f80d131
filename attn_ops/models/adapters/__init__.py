"""What stands in for attention in the classes of Keras and KerasHub: an adapter per kind, and the table of them all."""
