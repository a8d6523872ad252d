"""Text and image encoders, the vector cache, transforms, and the collaborative and aligned embeddings of step 5."""
