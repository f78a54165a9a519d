"""What the codes of a DinoSR mean: metrics against phones, alignments, baselines and pictures.

`quality`, `segmentation`, `evaluation` and alignments need numpy alone and are here at once; `baselines`, `plots` and
`inspection` are imported by name (`from dinosr_hf.analysis.plots import phone_codeword_figure`) and need
`pip install "dinosr-hf[analysis]"`.
"""

from .alignment import (
    Labels,
    Segment,
    align_labels,
    frame_centers,
    frame_labels,
    label_segments,
    match_labels,
    read_labels,
    step_labels,
)
from .alignment_files import read_alignments
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
from .segmentation import (
    SegmentCounts,
    bitrate,
    label_boundaries,
    match_boundaries,
    run_counts,
    unit_boundaries,
)
from .unit_evaluation import (
    EvaluatedUnits,
    Reference,
    UnitCounts,
    bootstrap_intervals,
    count_units,
    units_csv,
    units_table,
)

__all__ = [
    "EvaluatedUnits",
    "Labels",
    "Reference",
    "Segment",
    "SegmentCounts",
    "UnitCounts",
    "UnitQuality",
    "align_labels",
    "bitrate",
    "bootstrap_intervals",
    "cluster_purity",
    "code_perplexity",
    "contingency",
    "count_units",
    "frame_centers",
    "frame_labels",
    "joint_distribution",
    "label_boundaries",
    "label_segments",
    "match_boundaries",
    "match_labels",
    "num_active_codes",
    "phone_normalized_mutual_information",
    "phone_purity",
    "read_alignments",
    "read_labels",
    "run_counts",
    "step_labels",
    "unit_boundaries",
    "unit_quality",
    "units_csv",
    "units_table",
]
