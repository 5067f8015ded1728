"""Metrics: pure functions of pictures, features and counts."""
