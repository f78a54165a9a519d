"""TextGrid, CTM and JSONL give the same labels."""

import gzip
import json
import os
import re

import pytest

from dinosr_hf.analysis import Segment, match_labels
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


def with_first(label):
    return [SEGMENTS[0]._replace(label=label), *SEGMENTS[1:]]


@pytest.mark.parametrize("form", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize(
    ("written", "changed", "expected"),
    [
        ("0.25", "2.5e-1", SEGMENTS),
        ("0.25", "2.5E-1", SEGMENTS),
        ('"SIL"', '"item [1]:"', with_first("item [1]:")),
        (
            '"SIL"',
            '"xmin = 7 ""IntervalTier"""',
            with_first('xmin = 7 "IntervalTier"'),
        ),
        ('"SIL"', '"SIL" ! a comment with 1 "text"', SEGMENTS),
        ('"phones"', '"phones "', SEGMENTS),
        (" = ", "=", SEGMENTS),
    ],
    ids=["exponent", "EXPONENT", "keyword", "quotes", "comment", "space", "no spaces"],
)
def test_what_praat_writes_and_reads(tmp_path, form, written, changed, expected):
    assert read_textgrid(write(tmp_path / "a.TextGrid", form.replace(written, changed))) == expected


@pytest.mark.parametrize("form", [LONG, SHORT], ids=["long", "short"])
def test_times_before_zero(tmp_path, form):
    text = re.sub(r"^( *xmin = |)0 *$", r"\g<1>-1", form, flags=re.MULTILINE)
    assert read_textgrid(write(tmp_path / "a.TextGrid", text))[0].start == -1


@pytest.mark.parametrize(
    ("written", "changed", "message"),
    [
        ('"SIL"', "SIL", r"line \d+ has 0\.25 where a text is expected"),
        ('"SIL"', '"SIL', "(line|it is cut short)"),
        ("0.25", "nan", 'line [0-9]+ has "SIL" where a number is expected'),
        ("0.25", "0,25", "could not convert string to float: '0,25'"),
        ("ooTextFile", "ooBinaryFile", "it does not begin as one"),
    ],
    ids=["no quotes", "open quote", "nan", "comma", "binary"],
)
def test_textgrids_that_cannot_be_read(tmp_path, written, changed, message):
    for form in (LONG, SHORT):
        with pytest.raises(ValueError, match=rf"a\.TextGrid cannot be read as a TextGrid: {message}"):
            read_textgrid(write(tmp_path / "a.TextGrid", form.replace(written, changed)))


def test_a_folder_of_textgrids(tmp_path):
    write(tmp_path / "84" / "a.TextGrid", LONG)
    write(tmp_path / "85" / "b.TextGrid", SHORT)
    assert read_alignments(tmp_path) == {"84/a": SEGMENTS, "85/b": SEGMENTS}
    assert read_alignments(tmp_path / "84", tier="words") == {"a": [Segment("art", 0.0, 1.0)]}
    write(tmp_path / "84" / "a.textgrid", LONG)
    with pytest.raises(ValueError, match=r"has 84/a\.TextGrid and 84/a\.textgrid, but each recording has one"):
        read_alignments(tmp_path)


def test_textgrids_of_speakers_with_the_same_numbers(tmp_path):
    for number, speaker in enumerate(("84", "86"), 1):
        write(tmp_path / speaker / "a.TextGrid", LONG.replace("ˈɑː", f"ɑ{number}"))
    labels = read_alignments(tmp_path)
    assert match_labels(["84/a.wav", "86/a.wav", "87/a.wav"], labels) == {"84/a.wav": "84/a", "86/a.wav": "86/a"}
    with pytest.raises(ValueError, match=r"labels of '84/a' and of '86/a' fit one recording, 'a\.wav'"):
        match_labels(["a.wav"], labels)


@pytest.mark.parametrize("name", ["a.TextGrid", "all.ctm", "all.jsonl", "steps.jsonl"])
def test_phones_that_look_alike_are_one(tmp_path, name):
    phones = [{"label": label, "start": 0, "end": 1} for label in ("\ufeffa\u0303\u200e", "ã")]
    texts = {
        "a.TextGrid": LONG.replace("SIL", "ã").replace("ˈɑː", "\u200ea\u0303\ufe0f").replace('"t"', '"\u200b"'),
        "all.ctm": "a 1 0 1 a\u0303\u200b\na 1 1 1 \u2060\na 1 2 1 ã\n",
        "all.jsonl": json.dumps({"name": "a", "phones": phones}),
        "steps.jsonl": json.dumps({"name": "a", "phones": ["a\u0303", "ã\u200d"]}),
    }
    (labels,) = read_alignments(write(tmp_path / name, texts[name])).values()
    assert [label if isinstance(label, str) else label.label for label in labels] == ["ã", "ã"]


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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.TextGrid", LONG),
        ("short.TextGrid", SHORT),
        ("all.ctm", CTM.partition("\n")[2]),
        ("all.jsonl", json.dumps({"name": "a", "phones": [segment._asdict() for segment in SEGMENTS]})),
    ],
    ids=["long", "short", "ctm", "jsonl"],
)
def test_byte_order_marks_line_ends_and_other_encodings(tmp_path, name, text):
    file = tmp_path / name
    expected = read_alignments(write(file, text))
    for changed in (f"\ufeff{text}", text.replace("\n", "\r\n"), text.replace("\n", "\r")):
        file.write_bytes(changed.encode())
        assert read_alignments(file) == expected
    file.write_bytes(text.replace("ˈɑː", "é").encode("utf-16"))
    if name.endswith("Grid"):  # as Praat writes it
        assert read_textgrid(file)[1].label == "é"
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match=r"TextGrid (is not UTF-16, as it begins|cannot be read as a TextGrid)"):
            read_alignments(file)
    else:
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8, but UTF-16"):
            read_alignments(file)
    file.write_bytes(f"é {text}".encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=rf"{name}, line 1: it is not UTF-8"):
        read_alignments(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{name} is a named pipe"):
        read_alignments(file)


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
def test_a_textgrid_that_is_cut_short_never_has_fewer_labels(tmp_path, text):
    whole = read_textgrid(write(tmp_path / "a.TextGrid", text))
    lines = text.splitlines(keepends=True)
    for number in range(len(lines)):
        file = write(tmp_path / "a.TextGrid", "".join(lines[:number]))
        try:
            assert read_textgrid(file) == whole
        except ValueError as error:
            assert "a.TextGrid" in str(error)  # noqa: PT017
        else:
            pytest.fail(f"{number} of {len(lines)} lines were taken for all")


def test_two_tiers_of_one_name_are_refused(tmp_path):
    file = write(tmp_path / "a.TextGrid", LONG.replace('"words"', '"phones"'))
    with pytest.raises(ValueError, match=r"a\.TextGrid has several tiers 'phones'"):
        read_alignments(file)


@pytest.mark.parametrize("label", [None, True, ["a"], {"a": 1}, float("nan"), float("inf")], ids=repr)
def test_phones_that_are_no_text_are_refused(tmp_path, label):
    row = {"name": "a", "phones": [{"label": label, "start": 0, "end": 1}]}
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1, has an invalid segment: .*(label|too large)"):
        read_alignments(write(tmp_path / "a.jsonl", json.dumps(row)))


def test_numbers_are_phones(tmp_path):
    phones = [{"label": label, "start": 0, "end": 1} for label in (7, 7.0)]
    file = write(tmp_path / "a.jsonl", json.dumps({"name": "a", "phones": phones}))
    assert read_alignments(file) == {"a": [Segment("7", 0.0, 1.0)] * 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 1 0 1 two words", "is not `recording channel start duration label`, or that and a number"),
        ("a 1 inf 1 t", "must be at least 0 seconds"),
        ("a 1 nan 1 t", "must be at least 0 seconds"),
        ("a 1 0 1e999 t", "must be at least 0 seconds"),
    ],
)
def test_lines_of_a_ctm_that_do_not_fit(tmp_path, line, message):
    with pytest.raises(ValueError, match=rf"a\.ctm, line 2: .*{message}"):
        read_alignments(write(tmp_path / "a.ctm", f"b 1 0 1 t\n{line}\n"))


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: data * 40_000], ids=["cut", "gigabytes"])
def test_damaged_and_huge_gzip_files_are_refused(tmp_path, change):
    line = json.dumps({"name": "a", "phones": ["t"] * 9_000}).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(change(gzip.compress(line + b"\n")))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz(, line 1: the gzip file is damaged| unpacks to)"):
        read_alignments(tmp_path / "a.jsonl.gz")
