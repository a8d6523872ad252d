"""Raw files of any format as rows of DuckDB, and the rows that cannot be read, by file and line."""
