"""
Pictures a paper can print. Each function returns a `matplotlib.figure.Figure` and touches no global state.

The figures are made without pyplot, so they need no display, close themselves, and are saved with
`figure.savefig("name.png", dpi=300)` or `"name.pdf"`. Colours go from light to dark evenly, also in grey and for the
colour-blind.

`P` phones, `V` codewords.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._extra import import_extra
from .quality import joint_distribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PHONE_CLASSES = (
    "vowels",
    "approximants",
    "nasals",
    "plosives",
    "affricates",
    "fricatives",
    "silence",
    "other",
)

# Within a class phones stand in this order: vowels from the front of the mouth over its open ones to the back, and
# consonants from the lips backwards.
_ARPABET = {
    "vowels": "IY IX IH EY EH AE AY AA AO OY OW AW UH UX UW AH AX AXH AX-H ER AXR",
    "approximants": "W WH R L EL Y",
    "nasals": "M EM N EN NX NG ENG",
    "plosives": "P PCL B BCL T TCL D DCL DX K KCL G GCL Q",
    "affricates": "CH JH",
    "fricatives": "F V TH DH S Z SH ZH HH HV",
}
_IPA = {
    "vowels": "iyɪʏeøɛœæaɶɑɒɔoʊuʌɐəɘɵɚɜɞɝɤɯɨʉᵻᵿ",
    "approximants": "ʋwʍɥɹrɾɽʀlɫɭɺʎʟjɰ",
    "nasals": "mɱnɳɲŋɴ",
    "plosives": "pbtdʈɖcɟkɡgqɢʔ",
    "affricates": "",  # a plosive, then a fricative
    "fricatives": "ɸβfvθðszʃʒɕʑʂʐçʝxɣχʁħʕhɦɬɮ",
}
_SILENCES = ("SIL", "SP", "PAU", "EPI", "H#", "#", "_", "")


def _arpabet_name(label: str) -> str | None:
    """The label in capitals, if it is an ARPABET phone: in capitals ("AH0"), or in more than one letter ("ah")."""
    name = label.rstrip("012")
    is_arpabet = any(name.upper() in phones.split() for phones in _ARPABET.values())
    # Single small letters are IPA, where "y" and "r" are other phones.
    return name.upper() if is_arpabet and (name.isupper() or len(name) > 1) else None


def _ipa_letters(label: str) -> str:
    """The letters of an IPA label that decide its class: no marks of stress, length, tone, tie or accent."""
    letters = [letter for letter in unicodedata.normalize("NFD", label) if unicodedata.category(letter) != "Lm"]
    # The one letter of the alphabet that is made with an accent.
    text = "".join(letters).replace("c\N{COMBINING CEDILLA}", "ç")
    return "".join(letter for letter in text if unicodedata.category(letter) in ("Ll", "Lo"))


def _phone_position(label: str) -> tuple[int, int, str]:
    """Where a phone stands in a picture: index of its class, place within the class, and the label itself."""
    found, place = "other", 0
    arpabet, letters = _arpabet_name(label), _ipa_letters(label)
    if label.upper() in _SILENCES:
        found = "silence"
    elif arpabet is not None:
        found = next(name for name, phones in _ARPABET.items() if arpabet in phones.split())
        place = _ARPABET[found].split().index(arpabet)
    elif letters:
        for name, phones in _IPA.items():
            if letters[0] in phones:
                found, place = name, phones.index(letters[0])
        if found == "plosives" and letters[1:2] and letters[1] in _IPA["fricatives"]:
            found = "affricates"
    return PHONE_CLASSES.index(found), place, label


def phone_class(label: str) -> str:
    """
    Name the class of sounds that a phone belongs to.

    Args:
        label: A phone in IPA, with or without marks of stress and length ("ˈɑː", "tʃ"); in ARPABET, with or without
            stress ("AH0", TIMIT's "axr"); or a label of silence ("SIL", "sp", "pau", "h#").

    Returns:
        One of `PHONE_CLASSES`, "other" for what is none of these.
    """
    return PHONE_CLASSES[_phone_position(label)[0]]


def _mark_classes(axes: Axes, classes: Sequence[str]) -> None:
    """Name runs of equal classes at the right of the rows, and draw a line between runs."""
    starts = [row for row in range(len(classes)) if row == 0 or classes[row] != classes[row - 1]]
    ends = [*starts[1:], len(classes)]
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], [classes[row] for row in starts]
    )
    right.tick_params(length=0, labelsize=7)
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
    joint = joint_distribution(table)
    if len(phone_names) != len(joint):
        raise ValueError(f"There are {len(phone_names)} phone_names for {len(joint)} rows, but each row needs one.")
    if not width > 0:
        raise ValueError(f"width={width} is out of range: it must be more than 0 inches.")
    heard = np.flatnonzero(joint.sum(axis=1))
    rows = np.array(sorted(heard.tolist(), key=lambda row: _phone_position(phone_names[row])))
    used = np.flatnonzero(joint.sum(axis=0))
    conditional = joint[np.ix_(rows, used)]
    conditional /= conditional.sum(axis=0)
    order = _order_codewords(conditional)

    height = max(0.115 * len(rows) + 0.9, 2.2)
    figure: Any = import_extra("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(conditional[:, order], cmap="magma_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(rows)), [phone_names[row] for row in rows])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7, length=2)
    _mark_classes(axes, [phone_class(phone_names[row]) for row in rows])
    axes.set_ylabel("phone", fontsize=8)
    axes.set_xlabel(f"codewords ({len(used)} of {joint.shape[1]} in use)", fontsize=8)
    colors = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    colors.set_label("P(phone | codeword)", fontsize=8)
    colors.ax.tick_params(labelsize=7, length=2)
    if title is not None:
        axes.set_title(title, fontsize=9)
    return figure
