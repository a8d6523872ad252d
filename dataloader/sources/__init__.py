"""One module a raw format; each offers `read(raw, connection, options)`."""
