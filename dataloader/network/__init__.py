"""HTTP and archives: bytes from elsewhere, checked before they get a name."""
