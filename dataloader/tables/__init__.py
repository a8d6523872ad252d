"""Tables of events and items in DuckDB, from the raw files to the published tables."""
