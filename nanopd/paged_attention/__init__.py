"""Attention over a KV cache that lives in blocks."""
