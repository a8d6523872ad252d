"""Data stage: converts raw reviews and item metadata to clean interactions, item texts and embeddings."""
