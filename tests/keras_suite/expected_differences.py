"""Keras's tests that our layers are meant to fail, and why. One that passes is an error, so that the list cannot
outlive a difference. What Keras does not test differs in layers/test_differences.py."""

EXPECTED_DIFFERENCES = {
    f"{name}.test_flash_attention_with_errors": "flash_attention=True works with dropout and with attention scores"
    for name in ("MultiHeadAttentionTest", "GroupedQueryAttentionTest")
}
