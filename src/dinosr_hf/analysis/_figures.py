"""Common parts of the figures: made without pyplot, with colours that differ in greyscale and texts that fit."""

from __future__ import annotations

import base64
import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import check_ranges
from ..utils.extras import import_extra
from ..utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_SIZE, TICK_SIZE = 8, 7  # points

# On Linux, macOS and Windows.
_OTHER_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Thonburi", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Leelawadee UI", "Noto Sans Thai", "Loma"),
)

_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = "osD^vPX*"


def new_figure(width: float, height: float) -> Any:
    """Create a figure of so many inches whose parts do not overlap. Raises `ValueError` for a width of 0 or less."""
    check_ranges([(width > 0, "width", width, "more than 0 inches")])
    return import_extra("matplotlib.figure", "analysis").Figure(figsize=(width, height), layout="constrained")


@cache
def font_families() -> list[str]:
    """Return fonts for words: matplotlib's, without Chinese, Japanese, Korean, Thai, then those that have them."""
    matplotlib = import_extra("matplotlib", "analysis")
    installed = set(import_extra("matplotlib.font_manager", "analysis").get_font_names())
    return [*matplotlib.rcParams["font.family"], *(name for name in _OTHER_FONTS if name in installed)]


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> Path:
    """Write a figure atomically, in the format of the path's suffix, and return the path; create its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=dpi)
    return path


def data_uri(content: bytes, kind: str) -> str:
    """Encode bytes of a media type, such as "image/png", as a data: URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png_uri(figure: Figure, dpi: float) -> str:
    """Draw a figure as a PNG in a data: URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return data_uri(stream.getvalue(), "image/png")


def add_panels(figure: Any, num_panels: int, num_columns: int) -> list[Axes]:
    """Add so many panels to a figure, row by row."""
    panels = figure.subplots(-(-num_panels // num_columns), num_columns, squeeze=False).ravel().tolist()
    for axes in panels[num_panels:]:
        axes.remove()
    return panels[:num_panels]


def line_colors(count: int) -> list[Any]:
    """Colours evenly spaced from dark to light, also in greyscale, without those too light for a white page."""
    colormap = import_extra("matplotlib", "analysis").colormaps["plasma"]
    return [colormap(0.78 * number / max(count - 1, 1)) for number in range(count)]


def line_styles(count: int) -> list[dict[str, Any]]:
    """Arguments of `plot` for so many series; colour, dashes and marker each distinguish the first four to eight."""
    return [
        {"color": color, "linestyle": dashes, "marker": marker, "markersize": 3.5}
        for color, dashes, marker in zip(line_colors(count), cycle(_DASHES), cycle(_MARKERS), strict=False)
    ]


def text_color(background: Any) -> str:
    """Black or white, whichever has more contrast to a background."""
    red, green, blue = import_extra("matplotlib.colors", "analysis").to_rgb(background)
    # Approximate luminance of sRGB; black and white have the same contrast a little below the middle.
    return "black" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "white"


def label_axes(axes: Axes, x: str = "", y: str = "", title: str | None = None, *, grid: bool = False) -> None:
    """Label axes in sizes for print, and draw a thin grid behind the curves."""
    axes.tick_params(labelsize=TICK_SIZE, length=2)
    axes.set_xlabel(x, fontsize=TEXT_SIZE)
    axes.set_ylabel(y, fontsize=TEXT_SIZE)
    if title is not None:
        axes.set_title(title, fontsize=TEXT_SIZE + 1, parse_math=False)
    if grid:
        axes.grid(color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)


def span_a_decade(axes: Axes, name: str) -> None:
    """Extend a logarithmic axis, "x" or "y", to at least a decade, which is what has a label."""
    axis = getattr(axes, f"{name}axis")
    axis.set_minor_formatter(import_extra("matplotlib.ticker", "analysis").NullFormatter())
    low, high = axis.get_view_interval()
    axes.set(**{f"{name}lim": (min(low, high / 10), high)})


def legend_above(figure: Any, lines: Sequence[Mapping[str, Any]], width: float, title: str | None) -> None:
    """Add a legend of lines (label and style) above all panels, in as many columns as the longest label lets fit."""
    # A letter of this size is about 0.055 inches wide; the line and the gaps take the rest.
    columns = int(width / (0.055 * max(len(line["label"]) for line in lines) + 0.6))
    create = import_extra("matplotlib.lines", "analysis").Line2D
    legend = figure.legend(
        handles=[create([], [], **line) for line in lines],
        loc="outside upper center",
        ncols=max(1, min(len(lines), columns)),
        fontsize=TICK_SIZE,
        title=title,
        title_fontsize=TEXT_SIZE + 1,
        frameon=False,
        handlelength=3.2,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # names of files and folders may have dollars


def shorten(text: str, max_letters: int) -> str:
    """Replace the middle of a text by an ellipsis if it is longer than allowed."""
    if len(text) <= max_letters:
        return text
    kept = max_letters - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def shorten_apart(texts: Sequence[str], max_letters: int) -> list[str]:
    """Shorten texts as `shorten` does, but break those into lines that would look alike."""
    short = [shorten(text, max_letters) for text in texts]
    wholes = {name: {text for text, other in zip(texts, short, strict=True) if other == name} for name in short}
    return [
        name if len(wholes[name]) == 1 else textwrap.fill(text, max_letters)
        for text, name in zip(texts, short, strict=True)
    ]


def fit_texts(figure: Figure, fitted: Sequence[tuple[Any, float]]) -> None:
    """
    Rotate texts that are wider than their box, and hide those that do not fit rotated either.

    `fitted` has texts with the width of their box in data units of x; its height is that of the axes.
    """
    figure.draw_without_rendering()
    for text, units in fitted:
        transform = text.axes.transData
        width = transform.transform((units, 0))[0] - transform.transform((0, 0))[0]
        box = text.get_window_extent()
        margin = text.figure.dpi / 72  # half a point on each side
        if box.width + margin > width:
            fits_rotated = box.height + margin <= width and box.width + margin <= text.axes.bbox.height
            text.set(rotation=90, visible=fits_rotated)
