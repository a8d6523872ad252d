"""Histories become recommended items."""
