"""Decoding of scores into lists of items, independent of the models."""
