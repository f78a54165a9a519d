"""Plots of a table of counts: `P` phones by `V` codewords, `K` classes of phones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._figures import TICK_SIZE, label_axes, new_figure, shorten, text_color
from ..quality import joint_distribution
from .phones import PHONE_CLASSES, phone_class, phone_position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light for 0, dark for 1; evenly so in greyscale as well.
_COLORS = "magma_r"
_MAX_LETTERS = 12


def _joint(table: ArrayLike, phone_names: Sequence[str]) -> NDArray[np.float64]:
    joint = joint_distribution(table)
    if len(phone_names) != len(joint):
        raise ValueError(f"There are {len(phone_names)} phone_names for {len(joint)} rows, but each row needs one.")
    return joint


def _mark_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Name runs of equal classes at the right of the rows, and draw a line between runs."""
    starts = [row for row in range(len(classes)) if row == 0 or classes[row] != classes[row - 1]]
    centers = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(classes)], strict=True)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(centers, [classes[row] for row in starts])
    right.tick_params(length=0, labelsize=TICK_SIZE)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="0.5", linewidth=0.5)


def _add_colors(axes: Axes, image: Any, label: str, **options: Any) -> None:
    colorbar: Any = axes.figure.colorbar(image, ax=axes, pad=0.02, **options)
    label_axes(colorbar.ax, y=label)


def phone_codeword_figure(
    table: ArrayLike, phone_names: Sequence[str], *, title: str | None = None, width: float = 7.2
) -> Figure:
    """
    Plot P(phone | codeword) as an image, phones by codewords: the codebook figure of the DinoSR paper.

    `table` and `phone_names` are the counts (P, V) and P phones of `quality.contingency`. Phones are grouped by class
    (`PHONE_CLASSES`), codewords ordered by their most probable phone and, within one phone, by descending probability;
    those without a frame are left out. Colours always span 0 to 1, so figures can be compared. The height depends on
    the number of phones. Raises `ValueError` if the table does not hold counts, counts no frame, or has not one row
    per name.
    """
    joint = _joint(table, phone_names)
    heard = np.flatnonzero(joint.sum(axis=1)).tolist()
    rows = np.array(sorted(heard, key=lambda row: phone_position(phone_names[row])))
    used = np.flatnonzero(joint.sum(axis=0))
    conditional = joint[np.ix_(rows, used)]
    conditional /= conditional.sum(axis=0)
    order = np.lexsort((-conditional.max(axis=0), conditional.argmax(axis=0)))

    figure = new_figure(width, max(0.115 * len(rows) + 0.9, 2.2))
    axes = figure.add_subplot()
    image = axes.imshow(conditional[:, order], cmap=_COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [shorten(phone_names[row], _MAX_LETTERS) for row in rows], parse_math=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _mark_classes(axes, [phone_class(phone_names[row]) for row in rows])
    label_axes(axes, f"codewords ({len(used)} of {joint.shape[1]} in use)", "phone", title)
    _add_colors(axes, image, "P(phone | codeword)", shrink=0.8, aspect=30)
    return figure


def class_confusion(table: ArrayLike, phone_names: Sequence[str]) -> tuple[NDArray[np.float64], list[str]]:
    """
    Count frames by the class of their phone and by the class of the phone that their codeword stands for.

    A codeword stands for its most frequent phone, as in `quality.phone_purity`; the first of several. Arguments and
    errors are those of `phone_codeword_figure`. Returns counts float64 (K, K), the class of the phone first, and the K
    classes with a frame, in the order of `PHONE_CLASSES`.
    """
    _joint(table, phone_names)
    counts = np.asarray(table, dtype=np.float64)
    of_phone = np.array([phone_position(name)[0] for name in phone_names])
    of_codeword = of_phone[counts.argmax(axis=0)]
    full = np.zeros((len(PHONE_CLASSES), len(PHONE_CLASSES)))
    np.add.at(full, (of_phone[:, None], of_codeword[None, :]), counts)
    # The class of a codeword is that of one of its frames, so no class has a column and no row.
    heard = np.flatnonzero(full.sum(axis=1))
    return full[np.ix_(heard, heard)], [PHONE_CLASSES[row] for row in heard]


def class_confusion_figure(
    table: ArrayLike, phone_names: Sequence[str], *, title: str | None = None, width: float = 5.0
) -> Figure:
    """
    Plot which classes of phones the codewords confuse, as shares of each class's frames (`class_confusion`).

    A row has the frames of the phones of a class and sums to 100 %; the diagonal has those whose codeword stands for a
    phone of the same class. Arguments and errors are those of `phone_codeword_figure`.
    """
    counts, classes = class_confusion(table, phone_names)
    shares = counts / counts.sum(axis=1, keepdims=True)
    of_all = counts.sum(axis=1) / counts.sum()

    figure = new_figure(width, max(width * 0.09 * len(classes) + 1.2, 2.9))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_COLORS, vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = f"{100 * share:.0f}" if share >= 0.005 or share == 0 else "<1"
        color = text_color(image.cmap(share))
        axes.text(column, row, text, ha="center", va="center", fontsize=TICK_SIZE, color=color)
    names = [f"{name} ({100 * share:.1f} %)" for name, share in zip(classes, of_all, strict=True)]
    axes.set_yticks(range(len(classes)), names)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    label_axes(axes, "class of the codeword's main phone", "phone's class (share of frames)", title)
    _add_colors(axes, image, "share of the row", aspect=25)
    return figure
