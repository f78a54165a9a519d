"""
Plots for papers. Each function returns a `matplotlib.figure.Figure` and changes no global state.

Figures are created without pyplot, so they need no display and need not be closed; save them with
`save_figure(figure, "name.png", dpi=300)` or `"name.pdf"`. Colours differ in lightness, so they work in greyscale and
for the colour-blind; curves differ by dashes and markers too. All take a `title` and a `width` in inches, and raise
`ImportError` if matplotlib is not installed.
"""

from .._figures import save_figure
from ..curves import read_run, read_runs, run_figure
from .lines import LayerCurves, code_usage_figure, layer_curves_figure
from .phones import PHONE_CLASSES, phone_class
from .strips import unit_strip_figure
from .tables import class_confusion, class_confusion_figure, phone_codeword_figure

__all__ = [
    "PHONE_CLASSES",
    "LayerCurves",
    "class_confusion",
    "class_confusion_figure",
    "code_usage_figure",
    "layer_curves_figure",
    "phone_class",
    "phone_codeword_figure",
    "read_run",
    "read_runs",
    "run_figure",
    "save_figure",
    "unit_strip_figure",
]
