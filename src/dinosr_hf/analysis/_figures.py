"""What the figures of this package share: no pyplot, colours that are told apart in grey, texts that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points.
TEXT_SIZE = 8
TICK_SIZE = 7


class LineStyle(NamedTuple):
    """How a series of several is drawn; each part alone tells the first eight apart."""

    color: Any
    dashes: Any
    marker: str


_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = "osD^vPX*"


def check_width(width: float) -> None:
    """Raises `ValueError` for a width of a figure that is not positive."""
    if not width > 0:
        raise ValueError(f"width={width} is out of range: it must be more than 0 inches.")


def new_figure(width: float, height: float) -> Any:
    """A figure whose parts keep clear of each other; needs no display, and nothing closes it."""
    return import_extra("matplotlib.figure", "analysis").Figure(figsize=(width, height), layout="constrained")


def line_colors(count: int) -> list[Any]:
    """From dark to light evenly, also in grey; the lightest are left out, which do not show on white."""
    colormap = import_extra("matplotlib", "analysis").colormaps["plasma"]
    return [colormap(0.78 * number / max(count - 1, 1)) for number in range(count)]


def line_styles(count: int) -> list[LineStyle]:
    """A style for each series."""
    return [
        LineStyle(color, _DASHES[number % len(_DASHES)], _MARKERS[number % len(_MARKERS)])
        for number, color in enumerate(line_colors(count))
    ]


def text_color(background: Any) -> str:
    """Black or white, whichever is read better on a colour."""
    red, green, blue = import_extra("matplotlib.colors", "analysis").to_rgb(background)
    # Luminance of sRGB, near enough; both colours have the same contrast a little below the middle.
    return "black" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "white"


def small_axes(axes: Axes, *, grid: bool = False) -> None:
    """Sizes of a printed picture, and thin lines behind the curves."""
    axes.tick_params(labelsize=TICK_SIZE, length=2)
    if grid:
        axes.grid(color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)


def legend_above(figure: Any, handles: Sequence[Any], width: float, title: str | None) -> None:
    """A legend above all panels, in as many columns as its longest name leaves room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    # A letter of this size is about 0.055 inches wide; the line and the gaps take the rest.
    columns = max(1, min(len(handles), int(width / (0.055 * longest + 0.6))))
    legend = figure.legend(
        handles=list(handles),
        loc="outside upper center",
        ncols=columns,
        fontsize=TICK_SIZE,
        title=title,
        title_fontsize=TEXT_SIZE + 1,
        frameon=False,
        handlelength=3.2,
    )
    for text in legend.get_texts():
        # Names of files and folders may have dollars.
        text.set_parse_math(False)


def shorten(text: str, max_letters: int) -> str:
    """The text, with its middle left out where it is longer."""
    if len(text) <= max_letters:
        return text
    kept = max_letters - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def fit_texts(figure: Figure, fitted: Sequence[tuple[Any, float]]) -> None:
    """
    Turn texts upright that are wider than their place, and hide those that do not fit so either.

    Args:
        figure: With all that has to do with its layout in it.
        fitted: Texts with the width of their place, in units of their axes' x; its height is that of the axes.
    """
    figure.draw_without_rendering()
    for text, units in fitted:
        transform = text.axes.transData
        width = transform.transform((units, 0))[0] - transform.transform((0, 0))[0]
        box = text.get_window_extent()
        # Half a point on each side.
        margin = text.figure.dpi / 72
        if box.width + margin <= width:
            continue
        if box.height + margin <= width and box.width + margin <= text.axes.bbox.height:
            text.set_rotation(90)
        else:
            text.set_visible(False)
