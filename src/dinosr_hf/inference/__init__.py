"""Recordings of any length through a model."""
