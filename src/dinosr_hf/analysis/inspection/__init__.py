"""Statistics of a codebook on a corpus, codeword by codeword, and the page that shows them."""

from .codewords import EDGE, CodewordInspector, Inspection, Moment
from .page import AUDIO_FORMATS, Page, render_page

__all__ = ["AUDIO_FORMATS", "EDGE", "CodewordInspector", "Inspection", "Moment", "Page", "render_page"]
