"""TextGrid, CTM and JSONL give the same labels."""

import json

import pytest

from dinosr_hf.analysis import Segment
from dinosr_hf.analysis.alignment_files import read_alignments, read_ctm, read_textgrid

SEGMENTS = [Segment("SIL", 0.0, 0.25), Segment("ˈɑː", 0.25, 0.5), Segment("t", 0.625, 1.0)]

LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1
            text = "art"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1
        intervals: size = 4
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = "SIL"
        intervals [2]:
            xmin = 0.25
            xmax = 0.5
            text = "ˈɑː"
        intervals [3]:
            xmin = 0.5
            xmax = 0.625
            text = ""
        intervals [4]:
            xmin = 0.625
            xmax = 1
            text = "t"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

0
1
<exists>
1
"IntervalTier"
"phones"
0
1
4
0
0.25
"SIL"
0.25
0.5
"ˈɑː"
0.5
0.625
""
0.625
1
"t"
"""
CTM = ";; made by hand\na 1 0.625 0.375 t 0.9\na 1 0 0.25 SIL\na 1 0.25 0.25 ˈɑː\nb A 0.1 0.2 n\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
def test_textgrid(tmp_path, text):
    file = write(tmp_path / "a.TextGrid", text)
    assert read_textgrid(file) == SEGMENTS
    assert read_alignments(file) == {"a": SEGMENTS}


def test_a_folder_of_textgrids(tmp_path):
    write(tmp_path / "84" / "a.TextGrid", LONG)
    write(tmp_path / "85" / "b.TextGrid", SHORT)
    assert read_alignments(tmp_path) == {"a": SEGMENTS, "b": SEGMENTS}
    assert read_alignments(tmp_path / "84", tier="words") == {"a": [Segment("art", 0.0, 1.0)]}
    write(tmp_path / "86" / "a.TextGrid", LONG)
    with pytest.raises(ValueError, match=r"has two files a.TextGrid"):
        read_alignments(tmp_path)


def test_ctm(tmp_path):
    file = write(tmp_path / "all.ctm", CTM)
    assert read_alignments(file) == read_ctm(file)
    assert read_ctm(file)["a"] == SEGMENTS
    assert [segment.label for segment in read_ctm(file)["b"]] == ["n"]


def test_jsonl(tmp_path):
    phones = [segment._asdict() for segment in SEGMENTS]
    file = write(tmp_path / "all.jsonl", json.dumps({"name": "a", "phones": phones}))
    assert read_alignments(file) == {"a": SEGMENTS}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.ctm", "a 1 0.1 x t", r"line 1: 'a 1 0.1 x t' is not `recording channel start duration label`"),
        ("a.ctm", "a 1 0.1 0.2", r"line 1: 'a 1 0.1 0.2' is not"),
        ("a.ctm", "a 1 -0.1 0.2 t", r"start=-0.1 and duration=0.2 must be at least 0"),
        ("a.ctm", "a 1 0 1 t\na 2 0 1 t", r"line 2: 'a' has the channels 1 and 2"),
        ("a.TextGrid", "hello", r"a.TextGrid cannot be read as a TextGrid"),
        (
            "a.TextGrid",
            LONG.replace("phones", "phone"),
            r"no interval tier 'phones'; its interval tiers: words, phone",
        ),
        ("a.lab", "x", r"a.lab is not a JSONL file: give .jsonl or .jsonl.gz, or other labels: .ctm or"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_alignments(write(tmp_path / name, text))


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.ctm does not exist"):
        read_alignments(tmp_path / "nothing.ctm")
    with pytest.raises(ValueError, match=r"has no .TextGrid files in it"):
        read_alignments(tmp_path)
