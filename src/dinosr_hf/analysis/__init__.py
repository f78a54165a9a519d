"""
Evaluation of a DinoSR's units: metrics against phones, alignments, baselines and plots.

This package has what needs no extra. Its other modules are imported by name, such as
`from dinosr_hf.analysis.plots import phone_codeword_figure`; most of them need `pip install "dinosr-hf[analysis]"`.
"""

from .alignment import Labels, Segment, frame_centers, frame_labels, label_segments, match_labels
from .alignment_files import read_alignments, read_labels
from .quality import UnitQuality, contingency, unit_quality
from .segmentation import SegmentCounts
from .unit_evaluation import Reference, UnitCounts, bootstrap_intervals, count_units

__all__ = [
    "Labels",
    "Reference",
    "Segment",
    "SegmentCounts",
    "UnitCounts",
    "UnitQuality",
    "bootstrap_intervals",
    "contingency",
    "count_units",
    "frame_centers",
    "frame_labels",
    "label_segments",
    "match_labels",
    "read_alignments",
    "read_labels",
    "unit_quality",
]
