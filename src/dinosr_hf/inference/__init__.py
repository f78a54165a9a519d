"""Run recordings of any length through a model."""
