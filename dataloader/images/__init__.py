"""Pictures, and the table of which item has one."""
