"""Decoding: find the best items from the scores or logits of a model."""
