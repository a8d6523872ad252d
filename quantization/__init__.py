"""Embeddings become semantic IDs."""
