"""What step 2 does between the raw tables and the published ones."""
