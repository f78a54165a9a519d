"""
A codebook on a corpus, codeword by codeword, and the page that shows it.

    inspector = CodewordInspector(num_codes=256, labels=read_labels("phones.jsonl"))
    for recording, codes, scores in ...:
        inspector.add(recording, codes, scores)
    page = render_page(inspector.result(), recordings, title=..., name=..., facts={})
"""

from .clips import AUDIO_FORMATS, Clip
from .codewords import EDGE, CodewordInspector, CodewordSummary, Inspection, Moment, Share
from .page import Page, render_page

__all__ = [
    "AUDIO_FORMATS",
    "EDGE",
    "Clip",
    "CodewordInspector",
    "CodewordSummary",
    "Inspection",
    "Moment",
    "Page",
    "Share",
    "render_page",
]
