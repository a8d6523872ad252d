"""Raw reviews and item metadata become clean interactions, item texts and embeddings."""
