"""Folders with files of transcripts: whose line is whose, separators, duplicates, invisible characters."""

import unicodedata

import pytest

from audio_files import write
from dinosr_hf.data import open_labelled


def corpus(root, recordings, transcripts):
    for name in recordings:
        write(root / name, 900)
    for name, text in transcripts.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def labels(source):
    return dict(zip(source.ids, source.labels, strict=True))


def test_a_file_without_a_line_never_gets_another_speakers(tmp_path, caplog):
    transcripts = {"ann/x.trans.txt": "1 ann one\n2 ann two\n", "bob/x.trans.txt": "2 bob two\n"}
    source = open_labelled(corpus(tmp_path, ["ann/1.wav", "ann/2.wav", "bob/1.wav", "bob/2.wav"], transcripts))
    assert labels(source) == {"ann/1.wav": "ann one", "ann/2.wav": "ann two", "bob/2.wav": "bob two"}
    assert source.skipped == {"no label": ["bob/1.wav"]}
    assert "1 of 4 recordings have no label and are left out, for example bob/1.wav" in caplog.text


@pytest.mark.parametrize("root", ["mls_german/train", "mls_german"])
def test_mls(tmp_path, root):
    recordings = [f"mls_german/train/audio/{name}.flac" for name in ("1/2/1_2_000", "3/4/3_4_001")]
    lines = "1_2_000\teins zwei\n3_4_001\tdrei\n"
    corpus(tmp_path, recordings, {"mls_german/train/transcripts.txt": lines})
    assert [*labels(open_labelled(tmp_path / root)).values()] == ["eins zwei", "drei"]


def test_a_line_of_a_lost_recording_is_not_anothers(tmp_path):
    transcripts = {"ann/x.trans.txt": "1 ann one\n", "bob/x.trans.txt": "1 bob one\n2 bob two\n"}
    source = open_labelled(corpus(tmp_path, ["ann/1.wav", "ann/2.wav", "bob/1.wav"], transcripts))
    assert labels(source) == {"ann/1.wav": "ann one", "bob/1.wav": "bob one"}


def test_the_line_of_an_unreadable_recording_is_not_anothers(tmp_path):
    corpus(tmp_path, ["ann/1.wav", "bob/2.wav"], {"text/x.trans.txt": "1 one\n2 two\n"})
    (tmp_path / "bob" / "1.wav").write_bytes(b"")
    assert labels(open_labelled(tmp_path)) == {"bob/2.wav": "two"}


def test_texts_in_a_folder_apart(tmp_path, caplog):
    transcripts = {"text/ann.trans.txt": "1 ann one\n3 three\n", "text/bob.trans.txt": "2 two\n"}
    source = open_labelled(corpus(tmp_path, ["ann/1.wav", "bob/1.wav", "bob/2.wav", "ann/3.wav"], transcripts))
    assert labels(source) == {"ann/3.wav": "three", "bob/2.wav": "two"}
    assert "2 of 4 recordings have no transcript, since lines fit them by a name that is not unique" in caplog.text
    assert "ann/1.wav: " in caplog.text and "ann.trans.txt, line 1" in caplog.text


def test_no_recording_has_a_line_of_its_own(tmp_path):
    corpus(tmp_path, ["ann/1.wav", "bob/1.wav"], {"text/all.trans.txt": "1 one\n"})
    with pytest.raises(ValueError, match=r"2 of 2 .* not unique.*/all\.trans\.txt, line 1\. Put .*`folder/name`"):
        open_labelled(tmp_path)
    for lines in ("ann/1 one\nbob/1 two\n", "../ann/1 one\n../bob/1 two\n"):
        (tmp_path / "text" / "all.trans.txt").write_text(lines)
        assert labels(open_labelled(tmp_path)) == {"ann/1.wav": "one", "bob/1.wav": "two"}


@pytest.mark.parametrize(
    "transcripts",
    [
        {"all.trans.txt": "audio/ann/1 one\naudio/bob/1 two\n"},
        {"text/ann/x.trans.txt": "1 one\n", "text/bob/x.trans.txt": "1 two\n"},
    ],
)
def test_paths_and_folders_of_the_same_name(tmp_path, transcripts):
    source = open_labelled(corpus(tmp_path, ["audio/ann/1.wav", "audio/bob/1.wav"], transcripts))
    assert labels(source) == {"audio/ann/1.wav": "one", "audio/bob/1.wav": "two"}


def test_speakers_of_a_mirrored_tree_keep_their_lines(tmp_path):
    transcripts = {"text/ann/x.trans.txt": "2 two\n", "text/bob/x.trans.txt": "1 bob one\n"}
    source = open_labelled(corpus(tmp_path, ["audio/ann/1.wav", "audio/ann/2.wav"], transcripts))
    assert labels(source) == {"audio/ann/2.wav": "two"}
    assert source.skipped == {"no label": ["audio/ann/1.wav"]}


@pytest.mark.parametrize(
    "line", ["1 one two", "1\tone two", "1 \t one two ", "1.wav one two", "\u200e1 one two", "1\u00a0one two"]
)
def test_separators(tmp_path, line):
    corpus(tmp_path, ["1.wav"], {"x.trans.txt": f"\n{line}\n"})
    assert open_labelled(tmp_path).labels == ["one two"]


def test_names_with_spaces_and_texts_with_tabs(tmp_path):
    corpus(tmp_path, ["my file.wav", "2.wav", "3.wav"], {"x.trans.txt": "my file\tone\n2 two\tthree\n3 four\n"})
    assert labels(open_labelled(tmp_path)) == {"2.wav": "two\tthree", "3.wav": "four", "my file.wav": "one"}


def test_a_tab_in_each_line_ends_the_name(tmp_path):
    corpus(tmp_path, ["my.wav", "b.wav"], {"x.trans.txt": "my lost file\tone\nb\ttwo\n"})
    assert labels(open_labelled(tmp_path)) == {"b.wav": "two"}


def test_names_with_spaces_before_a_space(tmp_path):
    corpus(tmp_path, ["my dir/my file.wav", "b.wav"], {"x.trans.txt": "my dir/my file one two\nb three\n"})
    assert labels(open_labelled(tmp_path)) == {"b.wav": "three", "my dir/my file.wav": "one two"}
    write(tmp_path / "my dir" / "my.wav", 900)
    (tmp_path / "my dir" / "x.trans.txt").write_text("my file one two\n")
    with pytest.raises(ValueError, match=r"x\.trans\.txt, line 1: it fits two recordings, 'my dir/my' and 'my dir/my"):
        open_labelled(tmp_path)


@pytest.mark.parametrize("line", ["1|one", "s\\1 one", "s/1.flac one", "01 one"])
def test_lines_that_name_no_recording(tmp_path, line):
    corpus(tmp_path, ["s/1.wav"], {"x.trans.txt": f"{line}\n"})
    with pytest.raises(ValueError, match=r"they are named like 's/1\.wav', but .*x\.trans\.txt, line 1 is about"):
        open_labelled(tmp_path)


def test_two_texts_with_and_without_suffix(tmp_path):
    corpus(tmp_path, ["1.wav"], {"x.trans.txt": "1 one\n1.wav two\n"})
    with pytest.raises(ValueError, match=r"line 2 and .*line 1 give '1\.wav' two texts\. Remove one of them\."):
        open_labelled(tmp_path)


@pytest.mark.parametrize(
    "transcripts",
    [
        {"ann/x.trans.txt": "1 one\n1 two\n"},
        {"ann/x.trans.txt": "1 one\n", "ann/y.trans.txt": "1 two\n"},
        {"ann/x.trans.txt": "1 two\n", "all.trans.txt": "ann/1 one\n"},
    ],
    ids=["one file", "two files", "two folders"],
)
def test_two_texts_of_a_recording_are_refused(tmp_path, transcripts):
    corpus(tmp_path, ["ann/1.wav"], transcripts)
    problem = (
        r"trans\.txt, line \d: 'ann/1' has another text in .*trans\.txt, line 1: 'two' here, 'one' there\. Remove"
    )
    with pytest.raises(ValueError, match=problem):
        open_labelled(tmp_path)


def test_the_same_line_twice_is_no_conflict(tmp_path):
    corpus(tmp_path, ["1.wav"], {"x.trans.txt": "1 one\n1  one \n"})
    assert open_labelled(tmp_path).labels == ["one"]


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_names_in_either_unicode_form(tmp_path, on_disk, written):
    file, text = (unicodedata.normalize(form, "é") for form in (on_disk, written))
    corpus(tmp_path, [f"{file}/{file}.wav"], {f"{file}/x.trans.txt": f"{text} one\n"})
    assert open_labelled(tmp_path).labels == ["one"]
    write(tmp_path / "table" / f"{file}.wav", 900)
    table = tmp_path / "table" / "metadata.csv"
    table.write_text(f"file_name,text\n{text}.wav,two\n", encoding="utf-8")
    source = open_labelled(table.parent)
    assert source.labels == ["two"] and len(source.load(0)) == 900
    assert source.skipped == {}


def test_invisible_labels_are_no_labels(tmp_path):
    corpus(tmp_path, ["1.wav", "2.wav"], {"x.trans.txt": "1 \u200e\ufeff\n2 two\n"})
    source = open_labelled(tmp_path)
    assert source.labels == ["two"] and source.skipped == {"no label": ["1.wav"]}
