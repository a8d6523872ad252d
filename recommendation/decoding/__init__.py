"""Decoding: turn the scores or logits of any model into lists of the best items."""
