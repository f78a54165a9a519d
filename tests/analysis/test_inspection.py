"""Statistics of codewords on a corpus, and the HTML of their page."""

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from audio_files import sf
from dinosr_hf.analysis import Segment
from dinosr_hf.analysis.inspection import EDGE, CodewordInspector, Moment, render_page
from dinosr_hf.data import open_recordings
from inspections import ATTACK, EVIL_PHONE, EVIL_TITLE, RUNS, inspect, make_page, unroll, write_recordings

VOID = {"meta", "img", "input", "link", "br"}


def of(inspection, code):
    return next(codeword for codeword in inspection.codewords if codeword.code == code)


def shares(items):
    return {item.name: pytest.approx(item.share) for item in items}


def test_codewords_by_hand():
    found = inspect()
    assert [codeword.code for codeword in found.codewords] == [0, 3, 5]
    np.testing.assert_array_equal(found.counts, [9, 0, 0, 35, 0, 37, 0, 0, 0])
    assert (found.num_recordings, found.num_labelled, found.bad_labels) == (3, 3, {})
    assert found.phones == sorted(["SIL", EVIL_PHONE, "AA", "B"])
    three, five = of(found, 3), of(found, 5)
    assert (three.num_frames, three.num_runs, three.share) == (35, 4, pytest.approx(35 / 81))
    assert three.mean_frames == 35 / 4
    assert shares(three.phones) == {EVIL_PHONE: 1}
    # Of 37 frames of code 5 the last 15 are B: 31 labels of 10 ms, of which frame i has label 2 i + 1.
    assert shares(five.phones) == {"AA": 22 / 37, "B": 15 / 37}
    assert shares(three.codes_before) == {EDGE: 0.5, "5": 0.5}
    assert shares(three.codes_after) == {"5": 0.5, "0": 0.5}
    assert shares(five.codes_before) == {"3": 2 / 3, EDGE: 1 / 3}
    assert shares(five.codes_after) == {"3": 2 / 3, EDGE: 1 / 3}
    assert shares(five.phones_after) == {EVIL_PHONE: 2 / 3, EDGE: 1 / 3}
    assert shares(of(found, 0).phones_before) == {EVIL_PHONE: 1}
    assert [share.name for share in five.phones] == ["AA", "B"]  # the most frequent first


def test_typical_moments_are_confident_and_from_different_recordings():
    found = inspect(num_moments=4)
    # The run of 2 frames is sure, but short: it comes last, as the second of its recording.
    assert of(found, 3).moments == [
        Moment(ATTACK, 0, 3, 1.0),
        Moment("a.wav", 0, 10, 0.5),
        Moment("b.wav", 3, 20, 0.25),
        Moment("a.wav", 14, 2, 0.75),
    ]
    assert of(inspect(num_moments=1), 3).moments == [Moment(ATTACK, 0, 3, 1.0)]
    assert of(inspect(num_moments=0), 3).moments == []


def test_without_scores_the_longest_runs_are_typical():
    moments = of(inspect(with_scores=False), 3).moments
    assert [moment[:3] for moment in moments] == [("b.wav", 3, 20), ("a.wav", 0, 10), (ATTACK, 0, 3), ("a.wav", 14, 2)]
    assert all(np.isnan(moment.score) for moment in moments)


def test_the_order_of_recordings_does_not_matter():
    def found(names):
        inspector = CodewordInspector(9, num_moments=2)
        for name in names:
            inspector.add(name, *unroll(RUNS[name]))
        return inspector.result()

    assert found(RUNS).codewords == found(reversed(RUNS)).codewords


def test_without_labels_there_are_no_phones():
    found = inspect(with_labels=False)
    assert found.phones == [] and found.table.shape == (0, 9)
    assert found.num_labelled == 0
    assert of(found, 3).phones == [] and of(found, 3).phones_before == []
    assert of(found, 3).codes_before == of(inspect(), 3).codes_before


def test_labels_that_do_not_fit_are_ignored():
    inspector = CodewordInspector(2, labels={"a": ["AA"] * 9, "deep/b": ["AA"] * 90, "c.flac": [Segment("AA", 0, 1)]})
    for name in ("x/a.wav", "deep/b", "c.flac", "d"):
        inspector.add(name, np.array([0, 1, 1, 0]))
    found = inspector.result()
    assert (found.num_recordings, found.num_labelled) == (4, 2)
    assert list(found.bad_labels) == ["deep/b"] and "90 labels of 0.01 s" in found.bad_labels["deep/b"]
    np.testing.assert_array_equal(found.table, [[4, 4]])
    assert found.counts.sum() == 16


def test_labels_are_not_those_of_another_speaker():
    labels = {"ann/1": ["AA"] * 9, "bob/2": ["B"] * 9}
    recordings = ["ann/1.wav", "ann/2.wav", "bob/1.wav", "bob/2.wav"]
    inspector = CodewordInspector(2, labels=labels, words=labels, recordings=recordings)
    for name in recordings:
        inspector.add(name, np.array([0, 1, 1, 0]))
    assert inspector.result().num_labelled == 2
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'ann/1\.wav' and 'bob/1\.wav'"):
        CodewordInspector(2, labels={"1": ["AA"]}, recordings=recordings)
    inspector = CodewordInspector(2, labels={"1": ["AA"] * 9})  # recordings are not known before they come
    inspector.add("ann/1.wav", np.array([0, 1, 1, 0]))
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'ann/1\.wav' and 'bob/1\.wav'"):
        inspector.add("bob/1.wav", np.array([0, 1, 1, 0]))


def test_words_belong_to_the_example():
    words = {"b": [Segment("no", 0, 0.4)], "a": ["one"] * 9 + ["", "two"], "c": [Segment("three", 0.2, 0.9)]}
    inspector = CodewordInspector(2, words=words)
    for name, num_frames in {"b.wav": 20, "a.wav": 99, "c.wav": 50}.items():
        inspector.add(name, np.zeros(num_frames, np.int64))
    example = inspector.result().example
    assert example.recording == "a.wav" and example.phones == []
    assert [word.label for word in example.words] == ["one", "two"]
    assert [time for word in example.words for time in word[1:]] == pytest.approx([0, 0.09, 0.1, 0.11])
    assert inspect().example.words == []


class Tree(HTMLParser):
    """Tags with their attributes; fails if one is not closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID and tag not in ("rect", "path", "line"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in ("rect", "path", "line"):
            assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag, **wanted):
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    write_recordings(path)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return make_page(folder)


@pytest.fixture(scope="module")
def tree(page):
    return Tree(page.html)


def test_page_structure(tree):
    assert tree.all("html") == [{"lang": "en"}]
    ids = [found["id"] for _, found in tree.tags if "id" in found]
    assert len(ids) == len(set(ids))
    links = [found["href"] for found in tree.all("a")]
    assert {"#codewords", "#codeword-3"} <= set(links)
    assert {link.removeprefix("#") for link in links} <= set(ids)
    refers = [part for _, found in tree.tags for part in found.get("aria-labelledby", "").split()]
    assert set(refers) <= set(ids)
    assert len(tree.all("article")) == 3 and len(tree.all("tr", class_="codeword")) == 3
    assert all(found["alt"] for found in tree.all("img")) and len(tree.all("img")) == 4
    assert all("scope" in found for found in tree.all("th"))
    assert all(found["aria-label"].startswith("Play codeword") for found in tree.all("button", class_="play"))
    assert len(tree.all("h1")) == 1


def test_page_loads_nothing_from_outside(tree, page):
    addresses = [value for _, found in tree.tags for name, value in found.items() if name in ("src", "data-src")]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert not tree.all("link") and not tree.all("iframe") and not re.search(r"url\(|@import|https?://", page.html)
    (policy,) = [found["content"] for found in tree.all("meta") if "http-equiv" in found]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_names_from_the_corpus_are_escaped(tree, page):
    assert len(tree.all("script")) == 1 and not any("onerror" in found for _, found in tree.tags)
    assert not tree.all("b") and not tree.all("teacher")
    assert tree.texts["title"] == [EVIL_TITLE]
    assert EVIL_TITLE in tree.texts["h1"]
    assert EVIL_PHONE in tree.texts["option"] and {"value": EVIL_PHONE} in tree.all("option")
    assert any(ATTACK in text for text in tree.texts["span"])
    assert "alert('1')" not in page.html and "onerror=alert(2)>" not in page.html.replace("&gt;", "")


def decode(uri):
    kind, content = re.fullmatch(r"data:(.*);base64,(.*)", uri).groups()
    return kind, base64.b64decode(content)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("audio", ["flac", "ogg"])
def test_sounds_equal_the_recording(folder, audio):
    page = Tree(make_page(folder, audio=audio, context_seconds=0.1).html)
    buttons = [
        found for found in page.all("button", class_="play") if found["aria-label"].startswith("Play codeword 3")
    ]
    assert [found["aria-label"] for found in buttons][1] == "Play codeword 3 in a.wav at 0.00 s"
    kind, content = decode(buttons[1]["data-src"])
    samples, rate = sf.read(io.BytesIO(content), dtype="float32")
    recorded, _ = sf.read(folder / "a.wav", dtype="float32")
    # 10 frames from sample 40 on, which is half a stride before the first centre, and 0.1 s behind; nothing before.
    expected = recorded[: 40 + 10 * 320 + 1_600]
    assert rate == 16_000 and kind == f"audio/{audio}"
    assert len(samples) == len(expected)
    # Vorbis keeps the waveform of noise roughly, FLAC exactly.
    assert np.corrcoef(samples, expected)[0, 1] > 0.9
    assert (audio == "flac") == np.array_equal(samples, expected)


def test_the_moment_is_marked(page, folder):
    article = re.search(r'<article[^>]*id="codeword-5".*?</article>', page.html, re.DOTALL)[0]
    marks = re.findall(r'<rect class="moment" x="([\d.]+)" width="([\d.]+)"', article)
    # The surest: 3 frames from sample 40 on, with nothing but 40 samples before and 4,800 behind.
    length = 40 + 960 + 4_800
    assert marks[0] == (f"{100 * 40 / length:.1f}", f"{100 * 960 / length:.1f}")


@pytest.mark.usefixtures("no_pictures")
def test_page_size_is_limited(folder):
    full = make_page(folder)
    assert (full.num_clips, full.num_left_out) == (9, 0)
    # Room for the best moments of the two most frequent codewords.
    sounds = [found["data-src"] for found in Tree(full.html).all("button", class_="play")]
    assert len(sounds) == 9
    small = make_page(folder, max_megabytes=0.05)
    assert 0 < small.num_clips < 9 and small.num_clips + small.num_left_out == 9
    kept = Tree(small.html).all("button", class_="play")
    assert sum(len(found["data-src"]) for found in kept) <= 50_000
    assert f"{small.num_left_out} moments were left out" in small.html
    none = make_page(folder, max_megabytes=0)
    assert (none.num_clips, none.num_left_out) == (0, 9)
    assert len(none.html) < len(small.html) < len(full.html)


@pytest.mark.usefixtures("no_pictures")
def test_a_page_without_labels_and_scores(folder):
    page = make_page(folder, inspect(with_labels=False, with_scores=False))
    tree = Tree(page.html)
    assert not [found for found in tree.all("select") if found["id"] == "phone"]
    assert len(tree.all("img")) == 2
    assert "phone purity" not in page.html and "nan" not in re.sub(r'(src)="[^"]*"', "", page.html)
    assert "the longest first" in page.html


@pytest.mark.usefixtures("no_pictures")
def test_recordings_that_became_unreadable_are_left_out(tmp_path, caplog):
    write_recordings(tmp_path)
    recordings = open_recordings([tmp_path])
    (tmp_path / "b.wav").write_bytes(b"gone")
    page = render_page(inspect(), recordings, title="a", name="b", facts={})
    assert "No moment of b.wav can be heard" in caplog.text
    assert 0 < page.num_clips < 9 and "Play codeword 3 in b.wav" not in page.html
    (tmp_path / ATTACK).write_bytes(b"gone")
    assert len(Tree(render_page(inspect(), recordings, title="a", name="b", facts={}).html).all("img")) == 3
    assert f"{ATTACK} is not drawn" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CodewordInspector(0), "num_codes=0 is out of range"),
        (lambda: CodewordInspector(2, num_moments=-1), "num_moments=-1 is out of range"),
        (lambda: CodewordInspector(2).add("a", [0.5]), "'a' has dtype float64"),
        (lambda: CodewordInspector(2).add("a", [[0]]), r"'a' has shape \(1, 1\)"),
        (lambda: CodewordInspector(2).add("a", [0, 2]), "'a' holds 2, but num_codes=2"),
        (lambda: CodewordInspector(2).add("a", [-1]), "'a' holds -1"),
        (lambda: CodewordInspector(2).add("a", [0, 1], [0.5]), r"2 units, but scores of shape \(1,\)"),
        (lambda: CodewordInspector(2).result(), "no unit to inspect"),
        (lambda: fed({"b": ["x"]}).result(), "None of 1 recordings has labels. The labels are named like 'b'"),
        (lambda: fed({"a": ["x"] * 99}).result(), "No labels fit their recording. Those of 'a': 99 labels"),
    ],
)
def test_invalid_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def fed(labels):
    inspector = CodewordInspector(2, labels=labels)
    inspector.add("a", [0, 1])
    inspector.add("empty", [])
    return inspector


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio": "mp3"}, "audio='mp3' is unknown. Choose one of flac, ogg"),
        ({"context_seconds": -1}, "context_seconds=-1 is out of range"),
        ({"max_megabytes": -1}, "max_megabytes=-1 is out of range"),
    ],
)
def test_render_page_refuses(folder, options, message):
    with pytest.raises(ValueError, match=message):
        make_page(folder, **options)


def test_a_missing_jinja_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'pip install "dinosr-hf\[analysis\]"'):
        make_page(folder)
