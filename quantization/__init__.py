"""Quantizers that turn item embeddings into semantic IDs.

    from quantization import SemanticIDs
"""

__all__ = ["SemanticIDs"]


def __getattr__(name: str):
    if name == "SemanticIDs":  # imported on first use, so that commands start fast
        from quantization.semantic_ids import SemanticIDs

        return SemanticIDs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
