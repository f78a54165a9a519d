"""Prepare a run's model for the Hub, a folder with weights, code and card, and upload it."""

from .card import build_card
from .folder import prepare, push
from .provenance import Dataset, Provenance, read_provenance

__all__ = ["Dataset", "Provenance", "build_card", "prepare", "push", "read_provenance"]
