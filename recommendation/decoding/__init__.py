"""From scores to lists of items; knows no model."""
