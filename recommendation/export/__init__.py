"""Trained models in other forms: item embeddings, and a T5."""
