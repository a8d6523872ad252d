"""Reports on semantic IDs: what their prefixes mean, and how good they are."""
