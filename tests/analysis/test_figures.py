"""Figures of layers, usage, confusion and time: their content, no overlaps, and greyscale."""

import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dinosr_hf.analysis import Segment, _figures
from dinosr_hf.analysis.plots import (
    LayerCurves,
    class_confusion,
    class_confusion_figure,
    code_usage_figure,
    layer_curves_figure,
    phone_codeword_figure,
    unit_strip_figure,
)
from figures import assert_big_enough, assert_nothing_overlaps, shown_texts

LONG = "runs/an-experiment-with-a-long-name-$5-and-more/checkpoint-400000"
METRICS = ("PNMI", "phone purity", "probe accuracy (linear, phones), %", "CCA with speaker identity", "R-value")


def texts(figure) -> list[str]:
    return [text.get_text() for text in shown_texts(figure)]


@pytest.mark.parametrize(("places", "message"), [([0.5, 0.5], "overlap"), ([0.5, -0.2], "is cut"), ([0.2, 0.8], None)])
def test_the_overlap_checker_detects_faults(places, message):
    figure = Figure()
    for place in places:
        figure.text(0.5, place, "text")
    if message is None:
        assert_nothing_overlaps(figure)
    else:
        with pytest.raises(AssertionError, match=message):
            assert_nothing_overlaps(figure)


def some_curves(num_checkpoints, num_layers, name="checkpoint"):
    generator = np.random.default_rng(0)
    layers = range(1, num_layers + 1)
    metrics = [{metric: generator.random(num_layers) for metric in METRICS} for _ in range(num_checkpoints)]
    intervals = {"PNMI": [(0.1, 0.9)] * num_layers}
    return [LayerCurves(f"{name}-{n}", layers, values, intervals) for n, values in enumerate(metrics)]


@pytest.mark.parametrize("width", [3.5, 7.2])
@pytest.mark.parametrize(("num_checkpoints", "num_layers", "name"), [(1, 1, "a"), (6, 12, LONG), (3, 24, "a")])
def test_layer_curves_do_not_overlap(num_checkpoints, num_layers, name, width):
    figure = layer_curves_figure(some_curves(num_checkpoints, num_layers, name), title="a title", width=width)
    assert_nothing_overlaps(figure)
    assert_big_enough(figure)


def test_long_names_stay_different_and_dollars_as_they_are():
    names = [f"runs/a-very-long-name-of-an-experiment/{part}/and-its-checkpoint-400000" for part in "ab"]
    curves = [LayerCurves(name, [1], {"PNMI": [0.5]}) for name in names]
    figure = layer_curves_figure(curves, title="$5 and $6")
    legend = figure.legends[0]
    assert ["".join(text.get_text().split()) for text in legend.get_texts()] == names
    assert not legend.get_title().get_parse_math()
    assert_nothing_overlaps(figure)
    usage = code_usage_figure({name: [1, 1] for name in names})
    assert len({text.get_text() for text in usage.legends[0].get_texts()}) == 3
    strip = unit_strip_figure(np.zeros(16_000, np.float32), {"all": np.zeros(49, int)}, title="$5 and $6")
    assert not strip.axes[0].title.get_parse_math()


def test_layer_curves_draw_their_values():
    one = LayerCurves(
        "one", (2, 3, 5), {"PNMI": (0.1, np.nan, 0.3)}, {"PNMI": [(0.0, 0.2), (np.nan, np.nan), (0.2, 0.4)]}
    )
    two = LayerCurves("two", (3,), {"purity": (0.5,)})
    figure = layer_curves_figure([one, two])
    pnmi, purity = figure.axes
    np.testing.assert_array_equal(pnmi.lines[0].get_xydata(), [[2, 0.1], [3, np.nan], [5, 0.3]])
    assert len(pnmi.lines) == 1 and len(pnmi.collections) == 2
    np.testing.assert_array_equal(purity.lines[0].get_xydata(), [[3, 0.5]])
    assert not purity.collections
    assert pnmi.get_xlim() == purity.get_xlim() and list(pnmi.get_xticks()) == [2, 3, 5]
    assert {"PNMI", "purity", "one", "two", "layer"} <= set(texts(figure))


def test_checkpoints_differ_in_greyscale():
    figure = layer_curves_figure(some_curves(8, 3))
    lines = figure.axes[0].lines
    grey = [np.dot(to_rgb(line.get_color()), (0.2126, 0.7152, 0.0722)) for line in lines]
    assert (np.diff(grey) > 0.02).all() and grey[-1] < 0.8
    assert len({line.get_marker() for line in lines}) == 8
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_usage_is_sorted():
    figure = code_usage_figure({"layer 2": [0, 1, 6, 3], "table": [[1, 0, 1], [1, 0, 5]]})
    (axes,) = figure.axes
    first, second = axes.lines[:2]
    np.testing.assert_allclose(first.get_xydata(), [[1, 0.6], [2, 0.3], [3, 0.1]])
    np.testing.assert_allclose(second.get_xydata(), [[1, 0.75], [2, 0.25]])
    assert axes.get_yscale() == "log"
    # By hand: 2 ** (0.6 log2(1 / 0.6) + 0.3 log2(1 / 0.3) + 0.1 log2(1 / 0.1)) is 2.454...
    assert "layer 2: 3 of 4 in use, perplexity 2.5" in texts(figure)
    alike = [list(line.get_ydata()) for line in axes.lines[2:]]
    np.testing.assert_allclose(alike, [[1 / 3] * 2, [1 / 4] * 2])


@pytest.mark.parametrize(("size", "width"), [(1, 3.5), (2, 7.2), (256, 3.5)])
def test_usage_does_not_overlap(size, width):
    counts = np.random.default_rng(0).dirichlet(np.full(size, 0.3), size=3) * 1e5
    figure = code_usage_figure(dict(zip(("layer 5", LONG, "z"), counts, strict=True)), title="a title", width=width)
    assert_nothing_overlaps(figure)
    assert_big_enough(figure)


def test_confusion_by_hand():
    # Codewords stand for AA, S, IY (a tie with T, of which the first counts) and nothing.
    names = ["AA", "IY", "T", "S"]
    table = [[5, 1, 0, 0], [2, 0, 3, 0], [1, 1, 3, 0], [0, 4, 0, 0]]
    counts, classes = class_confusion(table, names)
    assert classes == ["vowels", "plosives", "fricatives"]
    np.testing.assert_array_equal(counts, [[10, 0, 1], [4, 0, 1], [0, 0, 4]])
    figure = class_confusion_figure(table, names)
    shares = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_allclose(shares, [[10 / 11, 0, 1 / 11], [0.8, 0, 0.2], [0, 0, 1]])
    assert {"91", "9", "80", "20", "100", "vowels (55.0 %)", "fricatives (20.0 %)"} <= set(texts(figure))


PHONES = ["AA", "W", "M", "T", "CH", "S", "SIL", "42"]


@pytest.mark.parametrize(("num_phones", "width"), [(1, 3.5), (8, 3.5), (8, 5.0)])
def test_confusion_does_not_overlap(num_phones, width):
    table = np.random.default_rng(0).integers(1, 999, size=(num_phones, 256))
    figure = class_confusion_figure(table, PHONES[:num_phones], title="a title", width=width)
    assert_nothing_overlaps(figure)
    assert_big_enough(figure)


def test_texts_contrast_with_their_background():
    figure = class_confusion_figure(np.diag([1, 1]) * 98 + 1, ["AA", "S"])
    axes = figure.axes[0]
    for text in axes.texts:
        share = float(text.get_text()) / 100
        background = np.dot(to_rgb(axes.images[0].cmap(share)), (0.2126, 0.7152, 0.0722))
        assert (text.get_color() == "white") == (background < 0.5)


AUDIO = np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
SEGMENTS = [Segment("AA", 0.0, 0.5), Segment("$S$", 0.5, 0.52), Segment("incomprehensibilities", 0.52, 0.6)]


def strip_boxes(axes):
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]


def test_strip_draws_runs_at_their_time():
    codes = np.array([3, 3, 3, 7, 3])
    figure = unit_strip_figure(AUDIO[:1_760], {"layer 5": codes})
    spectrogram, strip = figure.axes
    # The first frame's centre is at 12.5 ms, and it reaches 10 ms to both sides.
    np.testing.assert_allclose(strip_boxes(strip), [(0.0025, 0.0625), (0.0625, 0.0825), (0.0825, 0.1025)])
    assert [text.get_text() for text in strip.texts] == ["3", "7", "3"]
    colors = [patch.get_facecolor() for patch in strip.patches]
    assert colors[0] == colors[2] != colors[1]
    assert spectrogram.get_xlim() == (0, 0.11)
    # Another model: frames of 30 ms, made from 50 ms.
    figure = unit_strip_figure(AUDIO[:4_000], {"layer 5": codes}, stride=480, field=800, start=0.05, end=0.1)
    np.testing.assert_allclose(strip_boxes(figure.axes[1]), [(0.05, 0.1)])


def test_strip_draws_phones_and_words():
    figure = unit_strip_figure(AUDIO, {"a": np.arange(99)}, phones=SEGMENTS, words=SEGMENTS[:1], start=0.1, end=1.0)
    spectrogram, words, phones, _ = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["kHz", "words", "phones", "a"]
    np.testing.assert_allclose(strip_boxes(words), [(0.1, 0.5)])
    np.testing.assert_allclose(strip_boxes(phones), [(0.1, 0.5), (0.5, 0.52), (0.52, 0.6)])
    edges = sorted({line.get_xdata()[0] for line in spectrogram.lines})
    np.testing.assert_allclose(edges, [0.1, 0.5, 0.52, 0.6])
    # Texts without room are left out, and dollars are no mathematics.
    assert [text.get_visible() for text in phones.texts] == [True, True, False]
    assert phones.texts[1].get_rotation() == 90 and not phones.texts[1].get_parse_math()


@pytest.mark.parametrize(("seconds", "width"), [(0.02, 3.5), (0.5, 7.2), (2.0, 3.5)])
def test_strip_does_not_overlap(seconds, width):
    units = {name: np.random.default_rng(0).integers(0, 256, 99) for name in ("layer 5", "layer 12", "k-means")}
    phones = [Segment(f"ʃ{n}", n / 20, (n + 1) / 20) for n in range(40)]
    options = {"phones": phones, "words": SEGMENTS, "end": seconds, "title": "speech.wav", "width": width}
    figure = unit_strip_figure(AUDIO, units, **options)
    assert_nothing_overlaps(figure)
    assert_big_enough(figure, 0.15)


def test_spectrogram_shows_a_tone():
    tone = np.sin(2 * np.pi * 2_000 * np.arange(8_000) / 16_000).astype(np.float32)
    figure = unit_strip_figure(tone, {"a": np.zeros(24, int)})
    image = figure.axes[0].images[0]
    picture, (_, _, low, high) = np.asarray(image.get_array()), image.get_extent()
    loudest = picture.mean(axis=1).argmax()
    assert low + (high - low) * loudest / (len(picture) - 1) == pytest.approx(2.0, abs=0.05)
    assert picture.max() == 0 and picture.min() == -70


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_figures_are_saved_without_pyplot(tmp_path, suffix):
    figures = [code_usage_figure({"a": [1, 2]}), unit_strip_figure(AUDIO, {"a": np.arange(99)})]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.{suffix}")
        assert (tmp_path / f"{number}.{suffix}").stat().st_size > 1_000
    assert "matplotlib.pyplot" not in sys.modules


def test_long_phone_names_leave_room():
    names = [f"a label beyond all measure {number}" for number in range(40)]
    table = np.random.default_rng(0).integers(0, 9, size=(40, 256))
    figure = phone_codeword_figure(table, names, width=3.5)
    assert_nothing_overlaps(figure)
    assert_big_enough(figure, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_curves_figure([]), "no checkpoint"),
        (lambda: layer_curves_figure([LayerCurves("a", (1,), {})]), "no metric"),
        (
            lambda: layer_curves_figure([LayerCurves("a", (1, 2), {"PNMI": (1,)})]),
            "a has 1 values of PNMI for 2 layers",
        ),
        (
            lambda: layer_curves_figure([LayerCurves("a", (1,), {"b": (1,)}, {"c": [(0, 1)]})]),
            "intervals of c, but no",
        ),
        (lambda: layer_curves_figure(some_curves(1, 2), width=-1), "width=-1 is out of range"),
        (lambda: code_usage_figure({}), "no codebook"),
        (lambda: code_usage_figure({"layer 5": [0, 0]}), "layer 5: The table counts no frame"),
        (lambda: code_usage_figure({"layer 5": 3}), r"layer 5: counts has shape \(\)"),
        (lambda: class_confusion(np.eye(2), ["a"]), "1 phone_names for 2 rows"),
        (lambda: unit_strip_figure(AUDIO[None], {"a": [1]}), r"must be \(S,\)"),
        (lambda: unit_strip_figure(AUDIO, {}), "nothing to draw: no units"),
        (lambda: unit_strip_figure(AUDIO, {"a": [0.5]}), r"units of a has dtype float64"),
        (
            lambda: unit_strip_figure(AUDIO, {"a": [1]}, start=3),
            "start=3 and end=None leave nothing to draw of 2.000 s",
        ),
        (lambda: unit_strip_figure(AUDIO, {"a": [1]}, start=1, end=1.001), "at least 0.02 s apart"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_words_fall_back_to_fonts_that_are_installed(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["Malgun Gothic", "DejaVu Sans", "Loma"])
    _figures.font_families.cache_clear()
    assert _figures.font_families() == ["sans-serif", "Malgun Gothic", "Loma"]
    _figures.font_families.cache_clear()
