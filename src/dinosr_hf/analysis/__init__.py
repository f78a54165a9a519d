"""What the codes of a DinoSR mean: metrics against phones, alignments, baselines and pictures.

`quality` and `alignment` need numpy alone and are here at once; `baselines`, `plots` and `inspection` are imported by
name (`from dinosr_hf.analysis.plots import phone_codeword_figure`) and need `pip install "dinosr-hf[analysis]"`.
"""

from .alignment import Segment, align_labels, frame_centers, frame_labels, read_labels, step_labels
from .quality import (
    UnitQuality,
    cluster_purity,
    code_perplexity,
    contingency,
    joint_distribution,
    num_active_codes,
    phone_normalized_mutual_information,
    phone_purity,
    unit_quality,
)

__all__ = [
    "Segment",
    "UnitQuality",
    "align_labels",
    "cluster_purity",
    "code_perplexity",
    "contingency",
    "frame_centers",
    "frame_labels",
    "joint_distribution",
    "num_active_codes",
    "phone_normalized_mutual_information",
    "phone_purity",
    "read_labels",
    "step_labels",
    "unit_quality",
]
