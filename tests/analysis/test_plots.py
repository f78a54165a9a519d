"""The figure of phones and codewords, and classes of phones."""

import itertools
import sys

import numpy as np
import pytest

from dinosr_hf.analysis.plots import PHONE_CLASSES, phone_class, phone_codeword_figure
from dinosr_hf.analysis.plots.phones import fold_phone

IPA = [*"iɪɛæaɑɒɔuʊʌəɜwɹljmnŋpbtdkɡfvθðszʃʒh", "eɪ", "aɪ", "oʊ", "əl", "pf", "ts", "tʃ", "dʒ", "SIL"]


def parts(figure):
    """The axes of the image, those of the colour bar, and the axis that names classes."""
    axes, colors = figure.axes
    return axes, colors, axes.child_axes[0]


def shown(axis) -> list:
    """The texts at the ticks of an axis, without those beyond its ends."""
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [
        label for tick in ticks for label in (tick.label1, tick.label2) if label.get_visible() and label.get_text()
    ]


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("ˈɑː", "vowels"),
        ("aɪ", "vowels"),
        ("ã", "vowels"),
        ("əl", "vowels"),
        ("y", "vowels"),
        ("AH0", "vowels"),
        ("axr", "vowels"),
        ("ER", "vowels"),
        ("ɹ", "approximants"),
        ("r", "approximants"),
        ("Y", "approximants"),
        ("el", "approximants"),
        ("n̩", "nasals"),
        ("NG", "nasals"),
        ("ng", "nasals"),
        ("tʰ", "plosives"),
        ("ʔ", "plosives"),
        ("B", "plosives"),
        ("tʃ", "affricates"),
        ("t͡s", "affricates"),
        ("JH", "affricates"),
        ("ç", "fricatives"),
        ("HH", "fricatives"),
        ("sh", "fricatives"),
        ("SIL", "silence"),
        ("sp", "silence"),
        ("h#", "silence"),
        ("", "silence"),
        ("sil_S", "silence"),
        ("AH0_B", "vowels"),
        ("T_E", "plosives"),
        ("spn", "other"),
        ("SPN_S", "other"),
        ("nsn", "other"),
        ("X9", "other"),
        ("42", "other"),
    ],
)
def test_phone_class(label, expected):
    assert phone_class(label) == expected
    assert expected in PHONE_CLASSES


@pytest.mark.parametrize(
    ("phone", "labels"),
    [
        ("AH", ["AH", "AH0", "AH1", "AH2", "AH_B", "AH0_I", "AH1_E", "AH2_S"]),
        ("ah", ["ah0"]),
        ("T", ["T", "T_B"]),
        ("SIL", ["SIL", "sil", "SIL_S", "sp", "pau", "h#", ""]),
        ("spn", ["spn"]),  # speech that is no phone
        ("SPN", ["SPN_S"]),
    ],
)
def test_labels_are_folded_to_their_phone(phone, labels):
    assert {fold_phone(label) for label in labels} == {phone}


@pytest.mark.parametrize("label", ["AH3", "AH01x", "a1", "y2", "ˈɑː", "ma2", "E1x", "B_h", "_B_h"])
def test_digits_and_marks_of_other_labels_stay(label):
    assert fold_phone(label) == label


def test_phones_are_grouped_and_codewords_ordered():
    # Columns: mostly S, only SIL, mostly AA, unused, all S.
    names = ["S", "SIL", "IY", "AA", "T"]
    table = np.array(
        [
            [3, 0, 0, 0, 5],
            [1, 2, 0, 0, 0],
            [0, 0, 1, 0, 0],
            [0, 0, 7, 0, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    axes, _, classes = parts(phone_codeword_figure(table, names, title="a title"))
    # T has no frame and is left out; vowels come first, the front one before the open one.
    assert texts(axes.get_yticklabels()) == ["IY", "AA", "S", "SIL"]
    assert texts(classes.get_yticklabels()) == ["vowels", "fricatives", "silence"]
    np.testing.assert_allclose(classes.get_yticks(), [0.5, 2, 3])
    # Codeword 2 (AA), then 4 and 0 (S, the surer one first), then 1 (SIL).
    expected = [
        [1 / 8, 0, 0, 0],
        [7 / 8, 0, 0, 0],
        [0, 1, 3 / 4, 0],
        [0, 0, 1 / 4, 1],
    ]
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert axes.images[0].get_clim() == (0, 1)
    assert "4 of 5 in use" in axes.get_xlabel()
    assert axes.get_title() == "a title"


def test_every_column_is_a_distribution():
    table = np.random.default_rng(0).integers(0, 9, size=(len(IPA), 64))
    axes, _, _ = parts(phone_codeword_figure(table, IPA))
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()).sum(axis=0), 1)


def test_colors_decrease_in_lightness():
    axes, _, _ = parts(phone_codeword_figure(np.eye(2), ["a", "b"]))
    red, green, blue = axes.images[0].get_cmap()(np.linspace(0, 1, 64))[:, :3].T
    grey = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert (np.diff(grey) < 0).all()


@pytest.mark.parametrize("width", [3.5, 7.2], ids=["one-column", "two-columns"])
@pytest.mark.parametrize("num_phones", [2, 40, 60])
def test_nothing_overlaps_or_is_cut(num_phones, width):
    names = [*IPA, *(f"{label}ʲ" for label in IPA)][:num_phones]
    table = np.random.default_rng(0).dirichlet(np.full(num_phones, 0.05), size=256).T
    figure = phone_codeword_figure(table, names, title="a title", width=width)
    figure.draw_without_rendering()

    axes, colors, classes = parts(figure)
    titles = [axes.xaxis.label, axes.yaxis.label, axes.title, colors.yaxis.label]
    labels = [*titles, *shown(axes.xaxis), *shown(axes.yaxis), *shown(classes.yaxis), *shown(colors.yaxis)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in labels]
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, f"{text!r} is cut"
        assert page.y0 <= box.y0 < box.y1 <= page.y1, f"{text!r} is cut"
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} and {other!r} overlap"


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_figures_are_saved_without_pyplot(tmp_path, suffix):
    phone_codeword_figure(np.eye(3), ["a", "t", "SIL"]).savefig(tmp_path / f"figure.{suffix}")
    assert (tmp_path / f"figure.{suffix}").stat().st_size > 1_000
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("table", "names", "options", "message"),
    [
        (np.eye(3), ["a", "b"], {}, "2 phone_names for 3 rows"),
        (np.zeros((2, 2)), ["a", "b"], {}, "counts no frame"),
        (np.ones(2), ["a", "b"], {}, r"must be \(P, V\)"),
        (np.eye(2), ["a", "b"], {"width": 0}, "width=0 is out of range"),
    ],
    ids=["names", "empty", "shape", "width"],
)
def test_invalid_arguments_are_refused(table, names, options, message):
    with pytest.raises(ValueError, match=message):
        phone_codeword_figure(table, names, **options)


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[analysis\]"'):
        phone_codeword_figure(np.eye(2), ["a", "b"])
