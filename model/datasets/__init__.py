"""Tracklets on disk and drawn ones: one module per layout."""
