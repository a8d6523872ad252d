"""Events and items on their way from the raw files to the published tables, in DuckDB."""
