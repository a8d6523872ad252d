"""Quantizers that turn item embeddings into semantic IDs."""
