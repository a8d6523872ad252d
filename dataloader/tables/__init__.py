"""DuckDB tables of events and items: loading, filters, numbering, splits and item texts."""
