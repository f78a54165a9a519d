"""Checks of figures: the texts they show, and that none overlaps another or is cut."""

import itertools

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.text import Text


def _hidden_ticks(figure):
    """Labels of ticks beyond the limits of their axis, which exist but are not drawn."""
    hidden = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high:
                hidden |= {tick.label1, tick.label2}
    return hidden


def shown_texts(figure) -> list[Text]:
    """Return all texts that are drawn."""
    figure.draw_without_rendering()
    hidden = _hidden_ticks(figure)
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def assert_nothing_overlaps(figure):
    """Check that no text is cut by the page or touches another, and no legend reaches into a panel."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    assert boxes
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, f"{text!r} is cut"
        assert page.y0 <= box.y0 < box.y1 <= page.y1, f"{text!r} is cut"
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        # Boxes are larger than their letters: less than half a pixel in common is no contact.
        assert not first.padded(-0.5).overlaps(second), f"{one!r} and {other!r} overlap"
    for legend in figure.legends:
        for axes in figure.findobj(Axes):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "a panel under the legend"


def assert_big_enough(figure, smallest: float = 0.4):
    """Check that no panel is squeezed by its labels to less than so many inches."""
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert min(box.width, box.height) / figure.dpi >= smallest or axes.get_label() == "<colorbar>"
