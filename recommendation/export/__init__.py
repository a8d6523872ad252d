"""Export of trained models, as item embeddings or as a T5 model."""
