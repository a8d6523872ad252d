"""Readers of raw files: load a file into DuckDB, and report bad rows with file and line."""
