"""One search of folders for all: hidden files, links, kinds of audio that cannot be read, characters of patterns."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import tarfile

import pytest

from audio_files import dataset_of, datasets, flac, noise, sf, write
from dinosr_hf.analysis import read_alignments
from dinosr_hf.data import (
    AudioFileError,
    DatasetSource,
    FolderSource,
    TarSource,
    load_audio,
    open_labelled,
    open_recordings,
    open_source,
    open_stream,
    scan_folder,
)
from dinosr_hf.data.finding import Found, find_files, is_hidden, literal_paths, unsupported_kind
from dinosr_hf.data.parquet_folders import parquet_splits
from dinosr_hf.pretraining.anchor_arguments import anchor_kind
from dinosr_hf.units import load_units
from scripts import load_command

M4A = b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(500)

# What people keep speech in beside wav and flac, and libsndfile reads.
READABLE = {
    ".aiff": "AIFF", ".AIF": "AIFF", ".aifc": "AIFF", ".au": "AU", ".snd": "AU", ".caf": "CAF", ".w64": "W64",
    ".rf64": "RF64", ".sph": "NIST", ".voc": "VOC", ".WAVE": "WAV",
}  # fmt: skip

# First bytes of kinds that it does not read.
UNREADABLE = {
    ".m4a": M4A, ".MP4": M4A, ".3gp": M4A, ".aac": b"\xff\xf1\x50\x80\x02\x1f\xfc", ".amr": b"#!AMR\n",
    ".webm": b"\x1aE\xdf\xa3", ".wma": b"0&\xb2u\x8ef\xcf\x11", ".ape": b"MAC ", ".dss": b"\x02dss", ".raw": b"",
    ".wav.gz": b"\x1f\x8b\x08",
}  # fmt: skip

BRACKETS = ["corpus [v2]", "a*b", "what?"]


def touch(path, content: bytes | str = b"left by another system"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def textgrid(label: str) -> str:
    """Return a TextGrid in the short form, with one interval."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", "1", "<exists>", "1"]
    return "\n".join([*lines, '"IntervalTier"', '"phones"', "0", "1", "1", "0", "1", f'"{label}"', ""])


def test_search_is_in_a_fixed_order(tmp_path):
    for name in ("b.tar", "a/z.TAR", "a.tar", "a/b/c.tar", "a/x.txt", "a.tar.gz"):
        touch(tmp_path / name)
    assert find_files(tmp_path, ".tar") == Found(["a.tar", "a/b/c.tar", "a/z.TAR", "b.tar"], [], [])
    assert find_files(tmp_path, ".tar", ".txt").names[:4] == ["a.tar", "a/b/c.tar", "a/x.txt", "a/z.TAR"]


def test_hidden_files_are_kept_apart(tmp_path):
    for name in ("a.wav", "._a.wav", ".trash/x.wav", "b/.c/d/y.wav", "b/.z.txt"):
        touch(tmp_path / name)
    assert find_files(tmp_path, ".wav") == Found(["a.wav"], ["._a.wav", ".trash/x.wav", "b/.c/d/y.wav"], [])
    assert [is_hidden(name) for name in ("./a", "../a", "/a/b", "a/.b", ".a/b")] == [False, False, False, True, True]


def test_links_are_followed_once(tmp_path):
    for name in ("real/x.wav", "far/y.wav"):
        write(tmp_path / name, 1_000)
    root = tmp_path / "real"
    (root / "far").symlink_to(tmp_path / "far")
    (root / "linked.wav").symlink_to(tmp_path / "far" / "y.wav")
    (root / "far" / "back").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    (root / "circle").symlink_to(root / "circle")
    # A hidden folder that leads to a visible one does not hide that.
    (root / ".cache").mkdir()
    (root / ".cache" / "again").symlink_to(tmp_path / "far")
    assert find_files(root, ".wav") == Found(["far/y.wav", "linked.wav", "x.wav"], [], ["circle", "gone"])
    assert [name for name, _ in FolderSource(root).utterances] == ["far/y.wav", "linked.wav", "x.wav"]


def test_folder_that_cannot_be_listed_is_counted(tmp_path, monkeypatch):
    write(tmp_path / "a.wav", 1_000)
    write(tmp_path / "closed" / "b.wav", 1_000)
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert FolderSource(tmp_path).skipped == {"not listed": ["closed"]}
    (left_out,) = scan_folder(tmp_path, min_seconds=0).left_out
    assert left_out.message.endswith("closed cannot be listed: Permission denied. Check its permissions.")
    for opened in (FolderSource, open_source):
        with pytest.raises(ValueError, match=r"closed cannot be listed\. Check its permissions\."):
            opened(tmp_path / "closed")


def test_links_to_nothing_are_counted(tmp_path, caplog):
    write(tmp_path / "a.wav", 1_000)
    (tmp_path / "speaker").symlink_to(tmp_path / "gone")
    (tmp_path / "b.wav").symlink_to(tmp_path / "gone.wav")
    (tmp_path / "old.Smith").symlink_to(tmp_path / "gone")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")  # no recording, wherever it led
    assert open_source(tmp_path).skipped == {"missing": ["b.wav", "old.Smith", "speaker"]}
    assert "3 of 4 recordings left out (3 missing)" in caplog.text
    left_out = scan_folder(tmp_path, min_seconds=0).left_out
    assert [(file.name, file.reason) for file in left_out] == [
        (name, "missing") for name in ("b.wav", "old.Smith", "speaker")
    ]


def hide_copies(root):
    """Put a copy as macOS leaves it beside every file."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        touch(path.with_name(f"._{path.name}"), b"\0\5\x16\7\xff\xfe")


@pytest.fixture
def linked_corpus(tmp_path):
    """Make a folder whose only speaker is a link, with a transcript, and hidden copies of all files."""
    write(tmp_path / "far" / "84" / "84-1.wav", 1_600)
    touch(tmp_path / "far" / "84" / "84.trans.txt", "84-1 HELLO\n")
    hide_copies(tmp_path / "far")
    root = tmp_path / "corpus"
    root.mkdir()
    (root / "84").symlink_to(tmp_path / "far" / "84")
    (root / "84" / "loop").symlink_to(root)
    return root


def test_labels_follow_links_as_audio_does_and_skip_hidden_copies(linked_corpus):
    source = open_labelled(linked_corpus)
    assert (source.ids, source.labels) == (["84/84-1.wav"], ["HELLO"])
    assert source.skipped == {"hidden": ["84/._84-1.wav"]}
    (linked_corpus / "metadata.csv").write_text("file_name,text\n84/84-1.wav,hello\n")
    touch(linked_corpus / "._metadata.csv")
    assert open_labelled(linked_corpus).labels == ["hello"]


def test_textgrids_follow_links_and_skip_hidden_copies(tmp_path):
    touch(tmp_path / "far" / "a.textgrid", textgrid("AA"))
    hide_copies(tmp_path / "far")
    root = tmp_path / "labels"
    root.mkdir()
    (root / "84").symlink_to(tmp_path / "far")
    (root / "84" / "loop").symlink_to(root)
    (labels,) = read_alignments(root).values()
    assert [segment.label for segment in labels] == ["AA"]
    assert anchor_kind(str(root)) == "labels"


def test_manifest_lists_hidden_files_and_what_is_behind_links(linked_corpus):
    scan = scan_folder(linked_corpus)
    assert scan.folder == linked_corpus
    assert [file.name for file in scan.left_out if file.reason == "hidden"] == ["84/._84-1.wav"]
    assert [file.name for file in scan_folder(linked_corpus, min_seconds=0).usable] == ["84/84-1.wav"]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def make_archive(path, *names: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            add(archive, name, flac(1_600))
    return path


def read_stream(*arguments, **options):
    stream = open_stream(*arguments, **options)
    return [utterance for window in stream.windows(0) for utterance in window.source.utterances]


def test_hidden_archives_and_members_are_skipped(tmp_path, caplog):
    make_archive(tmp_path / "far" / "0.TAR", "./a.flac", "./.trash/b.flac", "._a.flac")
    root = tmp_path / "tars"
    (root / "a").mkdir(parents=True)
    (root / "a" / "linked").symlink_to(tmp_path / "far")
    (root / "a" / "loop").symlink_to(root)
    touch(root / "a" / "._0.tar")
    touch(root / "1.tar.gz")
    (root / "2.tar").symlink_to(root / "gone")
    os.mkfifo(root / "3.tar")
    source = open_source(root)
    assert source.utterances == [("0.TAR/./a.flac", 1_600)]
    hidden = ["0.TAR/./.trash/b.flac", "0.TAR/._a.flac", "a/._0.tar"]
    assert source.skipped == {"hidden": hidden, "compressed": ["1.tar.gz"], "missing": ["2.tar", "3.tar"]}
    assert "left out: 1 (compressed), such as 1.tar.gz" in caplog.text
    assert open_source(f"{root}/**/*.TAR").utterances == source.utterances


def test_hidden_audio_beside_archives_does_not_hide_them(tmp_path):
    make_archive(tmp_path / "0.tar", "a.flac")
    touch(tmp_path / "._a.wav")
    touch(tmp_path / "notes.m4a", M4A)
    assert isinstance(open_source(tmp_path), TarSource)


def test_a_stream_says_what_it_leaves_out(tmp_path, caplog):
    make_archive(tmp_path / "0.tar", *(f"{number}.flac" for number in range(5)), ".trash/x.flac", "y.flac")
    (tmp_path / "1.tar.gz").write_bytes(b"")
    write(tmp_path / "a.wav", 1_600)
    (window,) = open_stream(tmp_path, audio_column="flac").windows(0)
    assert [name for name, _ in window.source.utterances] == ["0", "1", "2", "3", "4", "y"]
    assert window.source.skipped == {"hidden": [".trash/x"]}
    assert f"{tmp_path} has audio files too, which are ignored because it has .tar archives." in caplog.messages
    assert f"{tmp_path}: left out: 1 (compressed), such as 1.tar.gz." in caplog.messages
    (tmp_path / "b").mkdir()
    dataset_of("bytes", tmp_path / "b").to_parquet(tmp_path / "b" / "train.parquet")
    assert len(read_stream(tmp_path / "b")) == 3
    assert f"{tmp_path / 'b'} has audio files too, which are ignored because it has .parquet files." in caplog.messages


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["a.flac", "b.wav"],
            r"a\.tar cannot be read by datasets: The TAR archives .* Leave streaming out, to read",
        ),
        (["a.flac", "a.flac"], r"a\.tar cannot be read by datasets: Duplicate field .* Leave streaming out, to read"),
        (["a.flac", "caf\udce9.flac"], r"a\.tar cannot .*: the name caf\\xe9\.flac in it is not UTF-8, which"),
    ],
    ids=["kinds", "repeated", "Latin-1"],
)
def test_archives_that_cannot_be_streamed_are_named(tmp_path, members, message):
    archive = make_archive(tmp_path / "a.tar", *members)
    assert len(open_source(archive)) == 2
    with pytest.raises(ValueError, match=message):
        open_stream(archive, audio_column="flac")


def test_folder_of_hidden_or_compressed_files_only(tmp_path):
    touch(tmp_path / "._a.wav")
    touch(tmp_path / "._a.parquet")
    with pytest.raises(ValueError, match=r"has no audio in it, only hidden files such as \._a\.wav\. Accepted are"):
        open_source(tmp_path)
    touch(tmp_path / "all.zip", b"PK\x03\x04" + bytes(1_000))
    for name in (tmp_path, tmp_path / "all.zip"):
        with pytest.raises(ValueError, match=r"all\.zip is compressed \(.*zip.*|as its name says.*unpack it"):
            open_source(name)


@pytest.mark.parametrize("name", BRACKETS)
def test_parquet_in_a_folder_with_characters_of_patterns(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = dataset_of("audio bytes", tmp_path)
    root = tmp_path / name
    for number, file in enumerate(("partial-train/0000.parquet", "test/0000.parquet"), start=1):
        (root / "default" / file).parent.mkdir(parents=True)
        rows.select(range(number)).to_parquet(root / "default" / file)
    (tmp_path / "far").mkdir()
    rows.select([2]).to_parquet(tmp_path / "far" / "0001.PARQUET")
    (root / "default" / "partial-train" / "linked").symlink_to(tmp_path / "far")
    (root / "default" / "loop").symlink_to(root)
    hide_copies(root)
    train, test = [("0", 1_600), ("1", 3_000)], [("0", 1_600), ("1", 2_400)]

    assert open_source(root, split="train").utterances == train
    assert open_source(root, split="test").utterances == test
    assert read_stream(root, split="train") == train
    assert read_stream(root, split="test") == test
    assert open_source(root / "default" / "test").utterances == test
    assert open_source(root / "default" / "test" / "0000.parquet").utterances == test
    assert read_stream(root / "default" / "test" / "0000.parquet") == test
    with pytest.raises(ValueError, match=r"split=None: .* has the splits train, test"):
        open_source(root)


@pytest.mark.parametrize("name", BRACKETS)
def test_archives_in_a_folder_with_characters_of_patterns(tmp_path, name):
    root = tmp_path / name
    make_archive(root / "train" / "0.tar", "a.flac")
    make_archive(root / "test" / "0.tar", "b.flac")
    touch(root / "train" / "._0.tar")
    both = [("test/0.tar/b.flac", 1_600), ("train/0.tar/a.flac", 1_600)]
    assert open_source(root).utterances == open_source(f"{root}/t*/*.tar").utterances == both
    for names in (root, f"{root}/t*/*.tar"):
        assert read_stream(names, audio_column="flac") == [("b", 1_600), ("a", 1_600)]
    for split, key in (("train", "a"), ("test", "b")):
        assert read_stream(root, split=split, audio_column="flac") == [(key, 1_600)]
        assert read_stream(root / split / "0.tar", audio_column="flac") == [(key, 1_600)]
    with pytest.raises(ValueError, match=r"split='dev' is not a folder in .*, which has test, train"):
        open_stream(root, split="dev", audio_column="flac")


def test_other_folders_that_fit_a_name_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = dataset_of("audio bytes", tmp_path)
    for name, number in (("a*b", 1), ("axb", 3)):
        (tmp_path / name).mkdir()
        rows.select(range(number)).to_parquet(tmp_path / name / "0.parquet")
    assert len(open_source(tmp_path / "a*b")) == 1


@pytest.mark.parametrize("name", BRACKETS)
def test_units_and_saved_datasets_in_a_folder_with_characters_of_patterns(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    touch(tmp_path / name / "units-000-000000.jsonl", '{"id": "a", "units": [1]}\n')
    touch(tmp_path / name / "._units-000-000000.jsonl")
    touch(tmp_path / name / "units-000-000000 2.jsonl", '{"id": "a", "units": [1]}\n')
    assert load_units(tmp_path / name).to_list() == [{"id": "a", "units": [1]}]
    dataset_of("arrays", tmp_path).save_to_disk(tmp_path / name / "saved")
    assert len(open_source(tmp_path / name / "saved")) == len(read_stream(tmp_path / name / "saved")) == 3


def test_splits_of_parquet_by_name(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = dataset_of("audio bytes", tmp_path)

    def lengths(*names):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for number, name in enumerate(names, start=1):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            rows.select(range(number)).to_parquet(root / name)
        return {split: datasets_length(paths) for split, paths in parquet_splits(root).items()}

    def datasets_length(paths):
        return len(datasets.Dataset.from_parquet(paths))

    assert lengths("x.parquet", "y/z.parquet") == {"train": 3}
    assert lengths("my.test.parquet", "Train-0.parquet", "a/dev_0.parquet") == {"train": 2, "validation": 3, "test": 1}
    assert lengths("training/0.parquet", "dev-clean/0.parquet") == {"train": 1, "validation": 2}
    assert lengths("train/test/0.parquet", "train/dev/0.parquet") == {"validation": 2, "test": 1}
    shards = ("data/train-00000-of-00001.parquet", "data/other-00000-of-00001.parquet")
    assert lengths(*shards) == {"train": 1, "other": 2}
    assert lengths("train/0.parquet", "strange/0.parquet") == {"train": 1}
    assert "1 parquet files belong to no split and are left out, such as strange/0.parquet" in caplog.text


def test_links_to_nothing_beside_parquet_are_said(tmp_path, caplog):
    touch(tmp_path / "a" / "0.parquet")
    (tmp_path / "b").symlink_to(tmp_path / "gone")
    assert list(parquet_splits(tmp_path)) == ["train"]
    assert "1 links lead nowhere, or to folders that cannot be listed, such as b." in caplog.text


def test_configurations_of_the_same_recordings_are_refused(tmp_path):
    for name in ("all", "clean"):
        touch(tmp_path / name / "train" / "0000.parquet", b"PAR1" + bytes(8) + b"PAR1")
    with pytest.raises(ValueError, match=r"has train in all and train in clean, .*Give one of them, such as \S+all;"):
        open_source(tmp_path, split="train")
    for name, file in (("de", "train-00000-of-00002.parquet"), ("en", "train-00001-of-00003.parquet")):
        touch(tmp_path / "languages" / name / file, b"PAR1" + bytes(8) + b"PAR1")
    with pytest.raises(ValueError, match=r"has train-0\S+2\.parquet in de and train-0\S+3\.parquet in en, .*\S+de;"):
        open_source(tmp_path / "languages", split="train")


def test_a_configuration_of_a_downloaded_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, root = dataset_of("audio bytes", tmp_path), tmp_path / "downloaded"
    for number, name in enumerate(("de", "en"), start=1):
        (root / name).mkdir(parents=True)
        rows.select(range(number)).to_parquet(root / name / "train-00000-of-00001.parquet")
    lines = [f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("de", "en")]
    touch(root / "README.md", f"---\nconfigs:\n{''.join(lines)}---\n")
    assert len(open_source(root, config_name="en")) == 2
    touch(root / "README.md", f"---\nconfigs:\n{''.join(lines)}  default: true\n---\n")
    assert len(open_source(root)) == 2
    touch(root / "README.md", f"---\nconfigs:\n{''.join(lines)}---\n")
    for wrong, problem in ((None, "none is the default"), ("fr", "none is 'fr'")):
        with pytest.raises(ValueError, match=rf"README\.md of .* lists .* de, en, and {problem}\. Choose .*data_c"):
            open_source(root, config_name=wrong)
    write(root / "de" / "a.wav", 900)
    with pytest.raises(ValueError, match=r"chooses Parquet files by README\.md, but .* has audio files and \.parquet"):
        open_source(root, config_name="de")


def test_readme_with_splits_in_a_folder_with_characters_of_patterns(tmp_path):
    touch(tmp_path / "c [v2]" / "0.parquet", b"PAR1" + bytes(8) + b"PAR1")
    head = "---\nconfigs:\n- config_name: default\n  data_files: 0.parquet\n---\n"
    touch(tmp_path / "c [v2]" / "README.md", head)
    with pytest.raises(ValueError, match=r"has a README\.md that lists the files of its splits, .*Rename the folder"):
        open_source(tmp_path / "c [v2]")


def test_readme_whose_head_is_no_yaml(tmp_path):
    touch(tmp_path / "0.parquet", b"PAR1" + bytes(8) + b"PAR1")
    touch(tmp_path / "README.md", "---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md does not begin with valid YAML of a dataset: while p"):
        open_source(tmp_path)
    touch(tmp_path / "README.md", "---\nlicense: na\xefve\n---\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README\.md does not begin with valid YAML of a dataset: .*decode byte"):
        open_source(tmp_path)


def test_path_that_datasets_takes_for_a_nested_archive(tmp_path):
    with pytest.raises(ValueError, match=r"a::b.*datasets takes :: in a path for a nested archive\. Rename"):
        literal_paths([tmp_path / "a::b" / "0.parquet"])


@pytest.fixture
def mixed(tmp_path):
    """Make a folder of readable files of all kinds, and of unreadable ones."""
    for number, (suffix, kind) in enumerate(READABLE.items()):
        sf.write(touch(tmp_path / "mixed" / f"{number}{suffix}"), noise(8_000), 16_000, format=kind)
    for suffix, head in UNREADABLE.items():
        touch(tmp_path / "mixed" / f"x{suffix}", head + bytes(1_000))
    return tmp_path / "mixed"


REASONS = {f"unsupported {suffix.lower()}": [f"x{suffix}"] for suffix in UNREADABLE}
NUM_UNREADABLE, NUM_READABLE = len(UNREADABLE), len(READABLE)
HOW = r"Convert it, for example: ffmpeg -i x\.\S+ x\.flac"


def test_what_libsndfile_reads_is_taken_and_the_rest_is_counted(mixed, caplog):
    with caplog.at_level(logging.WARNING):
        source = open_source(mixed)
    assert [num_samples for _, num_samples in source.utterances] == [8_000] * NUM_READABLE
    assert source.load(0).shape == (8_000,)
    assert source.skipped == REASONS
    assert (
        f"{NUM_UNREADABLE} of {NUM_UNREADABLE + NUM_READABLE} recordings left out (1 unsupported .3gp" in caplog.text
    )
    assert "ffmpeg -i x.3gp x.flac" in caplog.text
    scan = scan_folder(mixed)
    assert len(scan.usable) == NUM_READABLE
    assert {file.reason: [file.name] for file in scan.left_out} == REASONS
    assert "1 unsupported .amr, such as x.amr (libsndfile cannot read .amr. Convert it, for example:" in str(scan)


@pytest.mark.parametrize("suffix", UNREADABLE)
def test_unreadable_kind_alone(mixed, suffix):
    name = mixed / f"x{suffix}"
    for opened in (open_source, lambda name: open_recordings([name]), lambda name: open_recordings([name, name])):
        with pytest.raises(ValueError, match=rf"none of 1 recordings can be read \(1 unsupported {suffix.lower()}\)"):
            opened(name)
    with pytest.raises(AudioFileError, match=r"Convert it|Decompress it") as caught:
        load_audio(name)
    assert caught.value.reason == f"unsupported {suffix.lower()}"


def test_unreadable_kinds_in_tables_manifests_and_datasets(tmp_path):
    touch(tmp_path / "x.m4a", M4A)
    write(tmp_path / "a.wav", 1_600)
    (tmp_path / "t.csv").write_text("path,text\nx.m4a,hi\na.wav,ho\n")
    (tmp_path / "t.jsonl").write_text('{"path": "x.m4a"}\n{"path": "a.wav"}\n')
    for name in ("t.csv", "t.jsonl"):
        assert open_source(tmp_path / name).skipped == {"unsupported .m4a": ["x.m4a"]}
    (tmp_path / "t.tsv").write_text(f"{tmp_path}\nx.m4a\t1600\n")
    with pytest.raises(ValueError, match=rf"x\.m4a cannot be read: libsndfile cannot read \.m4a\. {HOW}"):
        open_source(tmp_path / "t.tsv")
    paths = datasets.Dataset.from_dict({"audio": [str(tmp_path / name) for name in ("x.m4a", "a.wav")]})
    assert DatasetSource(paths).skipped == {"unsupported .m4a": ["0"]}
    stored = datasets.Dataset.from_dict({"audio": [b"#!AMR\n" + bytes(90), flac(900)]})
    assert DatasetSource(stored).skipped == {"unsupported .amr": ["0"]}


def test_unreadable_kinds_in_archives(tmp_path, caplog):
    sf.write(tmp_path / "a.aiff", noise(900), 16_000)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.aiff", "a.aiff")
        for suffix, head in UNREADABLE.items():
            add(archive, f"x{suffix}", head + bytes(1_000))
    source = open_source(tmp_path / "x.tar")
    assert source.utterances == [("x.tar/a.aiff", 900)]
    assert source.skipped == {reason: [f"x.tar/{name}" for name in names] for reason, names in REASONS.items()}
    assert "x.tar/x.m4a: It cannot be read: libsndfile cannot read .m4a." in caplog.text


def test_content_decides_where_the_suffix_is_wrong(tmp_path):
    sf.write(tmp_path / "really_wav.m4a", noise(900), 16_000, format="WAV")
    touch(tmp_path / "really_mp4.wav", M4A)
    source = open_source(tmp_path)
    assert source.utterances == [("really_wav.m4a", 900)]
    assert source.skipped == {"unsupported .mp4": ["really_mp4.wav"]}
    assert unsupported_kind("a.wav", b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\n") == ".shn"
    assert unsupported_kind("a.wav", b"RIFF") is None


def test_folders_among_several_names(tmp_path):
    write(tmp_path / "a.wav", 900)
    write(tmp_path / "b" / "c.wav", 900)
    touch(tmp_path / "b" / "x.m4a", M4A)
    touch(tmp_path / "b" / "._c.wav")
    source = open_recordings([tmp_path / "a.wav", tmp_path / "b"])
    assert [name for name, _ in source.utterances] == ["a.wav", "b/c.wav"]
    assert source.skipped == {"unsupported .m4a": ["b/x.m4a"], "hidden": [str(tmp_path / "b" / "._c.wav")]}
    assert source.left_out == {"b/x.m4a": "unsupported .m4a"}
    make_archive(tmp_path / "tars" / "0.tar", "a.flac")
    with pytest.raises(ValueError, match=r"tars has no audio files in it or below it\. Looked for \.wav, \.flac"):
        open_recordings([tmp_path / "a.wav", tmp_path / "tars"])


def test_manifest_script_says_what_is_left_out(mixed, tmp_path, capsys):
    main = load_command("make_manifest").main
    main([str(mixed), str(tmp_path / "all.jsonl")])
    printed = capsys.readouterr().out
    assert f"left out: {NUM_UNREADABLE} files" in printed
    assert "1 unsupported .webm, such as x.webm (libsndfile cannot read .webm. Convert it, for example: " in printed
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == NUM_READABLE
    listed = (tmp_path / "all.left_out.csv").read_text()
    assert "x.wma,unsupported .wma," in listed
    assert json.loads((tmp_path / "all.jsonl").read_text().splitlines()[0])["id"] == "0.aiff"
