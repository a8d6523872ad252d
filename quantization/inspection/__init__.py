"""Reports on semantic IDs: the meaning of their prefixes, and diagnostics of their quality."""
