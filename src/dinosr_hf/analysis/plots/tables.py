"""
Pictures of a table that counts frames, phones by codewords.

`P` phones, `V` codewords, `K` classes of phones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._figures import TEXT_SIZE, TICK_SIZE, check_width, new_figure, shorten, small_axes, text_color
from ..quality import joint_distribution
from .phones import PHONE_CLASSES, phone_class, phone_position

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Pale for nothing, dark for certain; evenly so in grey as well.
_COLORS = "magma_r"
_MAX_LETTERS = 12


def _joint(table: ArrayLike, phone_names: Sequence[str], width: float) -> NDArray[np.float64]:
    joint = joint_distribution(table)
    if len(phone_names) != len(joint):
        raise ValueError(f"There are {len(phone_names)} phone_names for {len(joint)} rows, but each row needs one.")
    check_width(width)
    return joint


def _mark_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Name runs of equal classes at the right of the rows, and draw a line between runs."""
    starts = [row for row in range(len(classes)) if row == 0 or classes[row] != classes[row - 1]]
    ends = [*starts[1:], len(classes)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], [classes[row] for row in starts]
    )
    right.tick_params(length=0, labelsize=TICK_SIZE)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="0.5", linewidth=0.5)


def _order_codewords(conditional: NDArray[np.float64]) -> NDArray[np.int64]:
    """Codewords by the row of their most probable phone, then by how probable it is."""
    return np.lexsort((-conditional.max(axis=0), conditional.argmax(axis=0)))


def phone_codeword_figure(
    table: ArrayLike, phone_names: Sequence[str], *, title: str | None = None, width: float = 7.2
) -> Figure:
    """
    Draw P(phone | codeword) as an image, phones by codewords: the codebook figure of the DinoSR paper.

    Phones stand in classes (`PHONE_CLASSES`), codewords in the order of their most probable phone and, within one
    phone, from the most to the least certain. Phones and codewords without a frame are left out, and the axis says how
    many codewords are in use. The colours span 0 to 1 in every picture, so that pictures compare.

    Args:
        table: Counts (P, V), as `quality.contingency` gives them.
        phone_names: The P phones.
        title: Text above the picture.
        width: Inches; 7.2 are the two columns of a paper. The height follows from the number of phones.

    Returns:
        The figure.

    Raises:
        ValueError: If the table is no table of counts, counts no frame, or there is not one name a row.
        ImportError: If matplotlib is not installed.
    """
    joint = _joint(table, phone_names, width)
    heard = np.flatnonzero(joint.sum(axis=1))
    rows = np.array(sorted(heard.tolist(), key=lambda row: phone_position(phone_names[row])))
    used = np.flatnonzero(joint.sum(axis=0))
    conditional = joint[np.ix_(rows, used)]
    conditional /= conditional.sum(axis=0)
    order = _order_codewords(conditional)

    figure = new_figure(width, max(0.115 * len(rows) + 0.9, 2.2))
    axes = figure.add_subplot()
    image = axes.imshow(conditional[:, order], cmap=_COLORS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [shorten(phone_names[row], _MAX_LETTERS) for row in rows], parse_math=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    small_axes(axes)
    _mark_classes(axes, [phone_class(phone_names[row]) for row in rows])
    axes.set_ylabel("phone", fontsize=TEXT_SIZE)
    axes.set_xlabel(f"codewords ({len(used)} of {joint.shape[1]} in use)", fontsize=TEXT_SIZE)
    colors = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    colors.set_label("P(phone | codeword)", fontsize=TEXT_SIZE)
    small_axes(colors.ax)
    if title is not None:
        axes.set_title(title, fontsize=TEXT_SIZE + 1)
    return figure


def class_confusion(table: ArrayLike, phone_names: Sequence[str]) -> tuple[NDArray[np.float64], list[str]]:
    """
    Count frames by the class of their phone and by the class of the phone that their codeword stands for.

    A codeword stands for its most frequent phone, as in `quality.phone_purity`; of several as frequent, for the first.

    Args:
        table: Counts (P, V).
        phone_names: The P phones.

    Returns:
        Counts float64 (K, K), the class of the phone first, and the K classes with a frame, in the order of
        `PHONE_CLASSES`.

    Raises:
        ValueError: If the table is no table of counts, counts no frame, or there is not one name a row.
    """
    _joint(table, phone_names, width=1)
    counts = np.asarray(table, dtype=np.float64)
    of_phone = np.array([phone_position(name)[0] for name in phone_names])
    of_codeword = of_phone[counts.argmax(axis=0)]
    full = np.zeros((len(PHONE_CLASSES), len(PHONE_CLASSES)))
    np.add.at(full, (of_phone[:, None], of_codeword[None, :]), counts)
    # A codeword's class is that of one of its frames: what is heard is all that there is.
    heard = np.flatnonzero(full.sum(axis=1))
    return full[np.ix_(heard, heard)], [PHONE_CLASSES[row] for row in heard]


def class_confusion_figure(
    table: ArrayLike, phone_names: Sequence[str], *, title: str | None = None, width: float = 5.0
) -> Figure:
    """
    Draw which classes of phones the codewords mix up, as shares of each class's frames.

    Each codeword stands for its most frequent phone (`class_confusion`). A row has the frames of the phones of a class
    and sums to 100 %; the diagonal has those whose codeword stands for a phone of the same class.

    Args:
        table: Counts (P, V), as `quality.contingency` gives them.
        phone_names: The P phones.
        title: Text above the picture.
        width: Inches.

    Returns:
        The figure.

    Raises:
        ValueError: If the table is no table of counts, counts no frame, or there is not one name a row.
        ImportError: If matplotlib is not installed.
    """
    _joint(table, phone_names, width)
    counts, classes = class_confusion(table, phone_names)
    shares = counts / counts.sum(axis=1, keepdims=True)
    of_all = counts.sum(axis=1) / counts.sum()

    figure = new_figure(width, max(width * 0.09 * len(classes) + 1.2, 2.9))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap=_COLORS, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{100 * share:.0f}" if share >= 0.005 or share == 0 else "<1",
            ha="center",
            va="center",
            fontsize=TICK_SIZE,
            color=text_color(image.cmap(share)),
        )
    names = [f"{name} ({100 * share:.1f} %)" for name, share in zip(classes, of_all, strict=True)]
    axes.set_yticks(range(len(classes)), names)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    small_axes(axes)
    axes.set_ylabel("phone's class (share of frames)", fontsize=TEXT_SIZE)
    axes.set_xlabel("class of the codeword's main phone", fontsize=TEXT_SIZE)
    colors = figure.colorbar(image, ax=axes, aspect=25, pad=0.02)
    colors.set_label("share of the row", fontsize=TEXT_SIZE)
    small_axes(colors.ax)
    if title is not None:
        axes.set_title(title, fontsize=TEXT_SIZE + 1)
    return figure
