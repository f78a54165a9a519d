"""Recordings with labels: all forms of data, what is left out, and errors."""

import datetime
import json
import logging
import os

import pytest

from audio_files import datasets, flac, manifest, write
from dinosr_hf.data import DatasetSource, FolderSource, LabelledSource, open_labelled
from dinosr_hf.finetuning import LabelledDataArguments, open_splits
from dinosr_hf.utils.command_line import ArgumentError

TEXTS = ["one", "two", "three"]


def folder_with_table(root, texts=TEXTS, *, name="metadata.csv", column="transcription", first=1_600):
    for number, _ in enumerate(texts):
        write(root / f"{number}.wav", first + 100 * number)
    if name.endswith(".csv"):
        lines = [f"file_name,{column}", *(f"{number}.wav,{text}" for number, text in enumerate(texts))]
    else:
        lines = [
            json.dumps({"file_name": f"{number}.wav", **({} if text is None else {column: text})})
            for number, text in enumerate(texts)
        ]
    (root / name).write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


def rows_of(source):
    """Label -> number of samples that are read."""
    return {label: len(source.load(position)) for position, label in enumerate(source.labels)}


ROWS = {"one": 1_600, "two": 1_700, "three": 1_800}


# -- forms


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_with_metadata(tmp_path, name):
    source = open_labelled(folder_with_table(tmp_path, name=name))
    assert rows_of(source) == ROWS
    assert source.num_samples == list(ROWS.values())
    assert source.ids == ["0.wav", "1.wav", "2.wav"]
    assert source.skipped == {}


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_a_table(tmp_path, name):
    folder_with_table(tmp_path, name=name, column="sentence")
    assert rows_of(open_labelled(tmp_path / name)) == ROWS


@pytest.mark.parametrize("name", ["table.csv", "table.tsv", "table.jsonl", "speech/metadata.csv"])
def test_the_paths_may_be_in_another_column(tmp_path, name):
    for file, num_samples in (("raw.wav", 900), ("clean.wav", 1_200)):
        write(tmp_path / name.rpartition("/")[0] / file, num_samples)
    row, table = {"path": "raw.wav", "enhanced": "clean.wav", "text": "hello"}, tmp_path / name
    if name.endswith("jsonl"):
        table.write_text(json.dumps(row) + "\n")
    else:
        lines = [list(row), list(row.values())]
        table.write_text("".join(("\t" if name.endswith("tsv") else ",").join(line) + "\n" for line in lines))
    data = table.parent if name.endswith("metadata.csv") else table
    assert open_labelled(data).num_samples == [900]
    assert open_labelled(data, audio_column="enhanced").num_samples == [1_200]
    if name == "table.csv":
        with pytest.raises(ValueError, match=r"the paths must be in one of other\. Rename it"):
            open_labelled(data, audio_column="other")


def test_a_split_of_a_folder_is_a_folder_with_its_own_table(tmp_path):
    for split in ("train", "test"):
        folder_with_table(tmp_path / split, [f"{split} {text}" for text in TEXTS])
    source = open_labelled(tmp_path, split="test")
    assert source.labels == ["test one", "test two", "test three"]
    assert source.name.startswith(str(tmp_path))


def test_transcripts_of_librispeech(tmp_path):
    for reader, chapter, text in (("19", "198", "ONE"), ("20", "7", "TWO OF THEM")):
        folder = tmp_path / reader / chapter
        write(folder / f"{reader}-{chapter}-0000.flac", 1_600)
        (folder / f"{reader}-{chapter}.trans.txt").write_text(f"{reader}-{chapter}-0000 {text}\n")
    write(tmp_path / "20" / "7" / "20-7-0001.flac", 1_600)
    source = open_labelled(tmp_path)
    assert source.labels == ["ONE", "TWO OF THEM"]
    assert source.skipped == {"no label": ["20/7/20-7-0001.flac"]}
    assert open_labelled(tmp_path, split="20").labels == ["TWO OF THEM"]


def test_transcripts_beside_a_recording_take_precedence(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "1.wav", 1_600)
        (tmp_path / folder / "x.trans.txt").write_text(f"1 of {folder}\n")
    assert open_labelled(tmp_path).labels == ["of a", "of b"]


def test_one_file_of_transcripts_for_folders_below_it(tmp_path):
    write(tmp_path / "a" / "1.wav", 1_600)
    (tmp_path / "all.trans.txt").write_text("1 one\n")
    assert open_labelled(tmp_path).labels == ["one"]


def test_a_manifest_and_its_words(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.wav", 1_600 + 100 * number)
    path = manifest(tmp_path, ("0.wav", 1_600), ("1.wav", 0), ("2.wav", 1_800))
    path.with_suffix(".wrd").write_text("one\nlost\nthree\u2028too\n", encoding="utf-8")
    path.with_suffix(".ltr").write_text("o n e |\nl |\nt |\n")
    source = open_labelled(path)
    assert rows_of(source) == {"one": 1_600, "three\u2028too": 1_800}
    assert source.skipped == {"empty": ["1.wav"]}
    assert open_labelled(path, column="ltr").labels == ["o n e |", "t |"]


def dataset(labels, feature=None):
    columns = {"audio": [flac(1_600 + 100 * number) for number in range(len(labels))], "text": labels}
    made = datasets.Dataset.from_dict(columns)
    return made if feature is None else made.cast_column("text", feature)


@pytest.mark.parametrize("form", ["parquet", "save_to_disk", "splits"])
def test_a_dataset_on_disk(tmp_path, form):
    data, split = dataset(TEXTS), None
    path = tmp_path / "data"
    if form == "parquet":
        path = tmp_path / "data.parquet"
        data.to_parquet(path)
    elif form == "save_to_disk":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": data, "dev": dataset(["four"])}).save_to_disk(path)
        split = "train"
    assert rows_of(open_labelled(path, split=split)) == ROWS


@pytest.mark.parametrize(
    ("labels", "feature", "wanted"),
    [
        ([1, 0, None], datasets.ClassLabel(names=["no", "yes"]), ["yes", "no", None]),
        ([1, -1, 0], datasets.ClassLabel(names=["no", "yes"]), ["yes", None, "no"]),
        ([7, 8, None], None, ["7", "8", None]),
        ([1.0, None, float("nan"), 2.5], None, ["1", None, None, "2.5"]),
        (["1.0", "nan", "None"], None, ["1.0", "nan", "None"]),
        (["a", "", None], None, ["a", "", None]),
    ],
    ids=["class labels", "unlabelled class", "numbers", "numbers with a gap", "text of numbers", "text"],
)
def test_columns_of_a_dataset(labels, feature, wanted):
    source = DatasetSource(dataset(labels, feature))
    assert source.labels("text") == wanted
    assert LabelledSource(source, wanted).labels == [label for label in wanted if label]


NO_LABELS = [True, ["a", "b"], {"text": "a"}]


@pytest.mark.parametrize("value", [*NO_LABELS, b"a", datetime.date(2024, 1, 1), 1e300], ids=repr)
def test_a_column_of_a_dataset_that_is_no_text_is_refused_by_row(value):
    message = r"The dataset, row 1, column 'text': (a label must be text or a number, but this is |.* is too large)"
    with pytest.raises(ValueError, match=message):
        DatasetSource(dataset([None, value])).labels()


def test_parquet_of_pandas_with_gaps(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"audio": [flac(1_600), flac(1_700), flac(1_800)], "digit": [1, None, 3]})
    frame.to_parquet(tmp_path / "data.parquet")
    assert frame["digit"].dtype == float
    assert open_labelled(tmp_path / "data.parquet", column="digit").labels == ["1", "3"]


def test_numbers_of_a_table(tmp_path):
    folder = folder_with_table(tmp_path / "json", [7, 1.0, 2.5, float("nan"), None], name="metadata.jsonl")
    assert open_labelled(folder).labels == ["7", "1", "2.5"]
    folder = folder_with_table(tmp_path / "csv", ["7", "1.0", "nan"])
    assert open_labelled(folder).labels == ["7", "1.0", "nan"]  # in CSV all is text
    folder = folder_with_table(tmp_path / "pandas", ["7.0", "", "-1.0"])
    assert open_labelled(folder).labels == ["7", "-1"]  # but this is a column of integers with a gap


@pytest.mark.parametrize("value", [*NO_LABELS, float("inf"), 1e299, "\ud800"], ids=repr)
def test_a_label_of_a_table_that_is_no_text_is_refused_by_line(tmp_path, value):
    folder = folder_with_table(tmp_path, ["one", value], name="metadata.jsonl")
    message = r"metadata\.jsonl, line 2, transcription: (a label must be text|.* is too large|.* is not UTF-8)"
    with pytest.raises(ValueError, match=message):
        open_labelled(folder)


def test_labels_follow_the_rows_that_are_kept():
    data = datasets.Dataset.from_dict({"audio": [flac(1_600), b"no audio", flac(1_800)], "text": TEXTS})
    source = DatasetSource(data)
    assert (len(source), source.labels()) == (2, ["one", "three"])


def test_several_at_once(tmp_path):
    first = folder_with_table(tmp_path / "a", ["one", "", "three"])
    (tmp_path / "a" / "2.wav").write_bytes(b"no audio")
    second = folder_with_table(tmp_path / "b", ["four", "five"], name="metadata.jsonl", column="text", first=2_000)
    source = open_labelled([first, second])
    assert rows_of(source) == {"one": 1_600, "four": 2_000, "five": 2_100}
    assert source.ids == ["0:0.wav", "1:0.wav", "1:1.wav"]
    assert (source.names, source.datasets) == ([str(first), str(second)], [0, 1, 1])
    assert source.name == f"{first}, {second}"
    assert source.skipped == {"unreadable": ["0:2.wav"], "no label": ["0:1.wav"]}
    part = source.load(1, 100, 50)
    assert part.tolist() == source.load(1)[100:150].tolist()


# -- what is left out


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_missing_and_empty_labels_are_counted_and_reported(tmp_path, name, caplog):
    empty = "" if name.endswith(".csv") else None
    folder_with_table(tmp_path, [empty, "two", "   "], name=name)
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        source = open_labelled(tmp_path)
    assert (source.labels, source.ids) == (["two"], ["1.wav"])
    assert source.skipped == {"no label": ["0.wav", "2.wav"]}
    assert "2 of 3 recordings have no label and are left out, for example 0.wav." in caplog.text
    assert len(source.load(0)) == 1_700  # not the first recording


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_recordings_that_a_table_leaves_out_are_counted_and_reported(tmp_path, name, caplog):
    folder_with_table(tmp_path, name=name)
    write(tmp_path / "more" / "3.wav", 900)
    write(tmp_path / ".3.wav", 900)
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        source = open_labelled(tmp_path)
    assert source.skipped == {"no label": ["more/3.wav"]}
    assert "1 audio files beside it are not in the table and are left out, for example more/3.wav." in caplog.text


def test_a_table_of_something_else_is_not_used(tmp_path, caplog):
    write(tmp_path / "84-1.wav", 900)
    (tmp_path / "84.trans.txt").write_text("84-1 HELLO\n")
    (tmp_path / "metadata.csv").write_text("speaker,sex\n84,F\n")
    assert open_labelled(tmp_path).labels == ["HELLO"]
    assert "metadata.csv is not used: its first line names none of path, audio_filepath" in caplog.text


def test_no_warning_if_no_label_is_missing(tmp_path, caplog):
    open_labelled(folder_with_table(tmp_path))
    assert caplog.text == ""


# -- errors


def test_columns_that_exist_are_named(tmp_path):
    folder_with_table(tmp_path, column="words")
    with pytest.raises(
        ValueError, match=r"has no column of transcripts \(transcription, .*columns are file_name, words"
    ):
        open_labelled(tmp_path)
    with pytest.raises(ValueError, match=r"has no column 'speech'\. Its columns are file_name, words: name one"):
        open_labelled(tmp_path, column="speech")
    assert open_labelled(tmp_path, column="words").labels == TEXTS
    with pytest.raises(ValueError, match=r"The dataset has no column 'speech'\. Its columns are text"):
        DatasetSource(dataset(TEXTS)).labels("speech")


def test_a_text_with_a_comma_and_without_quotes_is_refused(tmp_path):
    folder_with_table(tmp_path, ["one", "two,three"], column="words")
    with pytest.raises(ValueError, match=r"line 3: the row has 3 instead of 2 fields \(file_name, words\)"):
        open_labelled(tmp_path)


@pytest.mark.parametrize(
    "rest", ["1.wav,two\n2.wav,three\n", '1.wav,two\n2.wav,"three"\n', '1.wav,two"\n2.wav,three\n']
)
def test_a_transcript_never_takes_in_the_next_row(tmp_path, rest):
    folder_with_table(tmp_path)
    (tmp_path / "metadata.csv").write_text(f'file_name,text\n0.wav,"one\n{rest}')
    with pytest.raises(ValueError, match=r"metadata\.csv, line 2: (a quote|text reaches to line 3)"):
        open_labelled(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "table.csv", "table.jsonl"])
def test_a_named_pipe_is_refused_at_once(tmp_path, name):
    write(tmp_path / "0.wav", 900)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} .*not a file"):
        open_labelled(tmp_path if "metadata" in name else tmp_path / name)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "x.trans.txt", "train.wrd"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_marks_and_other_encodings(tmp_path, name, encoding):
    write(tmp_path / "0.wav", 1_600)
    lines = {
        "metadata.csv": "file_name,text\n0.wav,naïf\n",
        "metadata.jsonl": '{"file_name": "0.wav", "text": "naïf"}\n',
        "x.trans.txt": "0 naïf\n",
        "train.wrd": "naïf\n",
    }
    (tmp_path / name).write_bytes(lines[name].encode(encoding))
    path = manifest(tmp_path, ("0.wav", 1_600)) if name == "train.wrd" else tmp_path
    if encoding == "utf-8-sig":
        assert open_labelled(path).labels == ["naïf"]
        return
    with pytest.raises(ValueError, match=rf"{name}.* is not UTF-8"):
        open_labelled(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (write(root / "0.wav", 900), root)[1], r"has no transcripts: no \.trans\.txt .*metadata.csv"),
        (lambda root: folder_with_table(root, ["", " "]), "none of its 2 recordings has a label"),
        (lambda root: [], "There is no data"),
        (lambda root: root / "nowhere", "nowhere does not exist"),
    ],
    ids=["no table", "no labels", "nothing", "nowhere"],
)
def test_data_without_labels(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_labelled(make(tmp_path))


def test_sources_without_transcripts(tmp_path):
    write(tmp_path / "0.wav", 900)
    (tmp_path / "1.trans.txt").write_text("0 zero\n")
    with pytest.raises(ValueError, match=r"has no column 'text': no metadata\.csv .* Write `file_name,text`"):
        FolderSource(tmp_path).labels("text")
    with pytest.raises(ValueError, match=r"^label_column=tone: \S+ has no column 'tone'"):
        open_labelled(tmp_path, column="tone", column_option="label_column")


def test_missing_or_wrong_words_of_a_manifest(tmp_path):
    write(tmp_path / "0.wav", 1_600)
    path = manifest(tmp_path, ("0.wav", 1_600))
    with pytest.raises(ValueError, match=r"train\.wrd does not exist\. It must have a line for each .* train\.tsv"):
        open_labelled(path)
    path.with_suffix(".wrd").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"train\.wrd has 2 lines for the 1 recordings of train\.tsv"):
        open_labelled(path)


def test_configuration_name_is_for_the_hub(tmp_path):
    with pytest.raises(ValueError, match="config_name='clean' is for a dataset with configurations"):
        open_labelled(folder_with_table(tmp_path), config_name="clean")


# -- splits of a run


def splits_of(**arguments):
    return open_splits(LabelledDataArguments(**arguments), seed=1)


def labels_of(splits):
    return [None if source is None else source.labels for source in splits]


def test_splits_of_a_folder_are_found(tmp_path):
    for split in ("train", "validation", "test"):
        folder_with_table(tmp_path / split, [split])
    data = [str(tmp_path)]
    assert labels_of(splits_of(train_data=data)) == [["train"], ["validation"], ["test"]]
    named = splits_of(train_data=data, eval_split="test", test_split="validation")
    assert labels_of(named) == [["train"], ["test"], ["validation"]]
    other = folder_with_table(tmp_path / "other", ["other"])
    assert labels_of(splits_of(train_data=data, eval_data=[str(other)])) == [["train"], ["other"], ["test"]]
    assert labels_of(splits_of(train_data=data, train_split="test")) == [["test"], None, None]


def test_evaluation_on_training_speech_is_said(tmp_path, caplog):
    folder = str(folder_with_table(tmp_path))
    splits_of(train_data=[folder], eval_data=[folder])
    assert f"eval_data={folder} is trained on, so its figures are too good." in caplog.text


def test_a_folder_with_one_table_is_training_speech(tmp_path):
    folder_with_table(tmp_path, ["one"])
    assert labels_of(splits_of(train_data=[str(tmp_path)])) == [["one"], None, None]


@pytest.mark.parametrize("train_split", ["validation", None], ids=["the same split", "all splits"])
def test_training_split_is_refused_for_evaluation(tmp_path, train_split):
    for split in ("a", "validation"):
        write(tmp_path / split / f"{split}.wav", 1_600)
        (tmp_path / split / "x.trans.txt").write_text(f"{split} {split}\n")
    data = [str(tmp_path)]
    with pytest.raises(ArgumentError, match=r"eval_split or test_split is validation, but the run trains on"):
        splits_of(train_data=data, train_split=train_split, eval_split="validation")
    assert labels_of(splits_of(train_data=data, train_split="a", eval_split="validation"))[0] == ["a"]


def test_synthetic_speech_and_recordings_go_together(tmp_path):
    pytest.importorskip("espeakng_loader")
    folder_with_table(tmp_path, ["one"])
    sizes = {"synthetic_utterances": 3, "synthetic_eval_utterances": 2}
    mixed = splits_of(eval_data=[str(tmp_path)], **sizes)
    assert [len(source) for source in mixed] == [3, 1, 2]
    assert mixed.eval.labels == ["one"]
    other = splits_of(train_data=[str(tmp_path)], test_data=["synthetic"], **sizes)
    assert (other.train.labels, other.eval, len(other.test)) == (["one"], None, 2)
    assert other.test.labels == mixed.test.labels
    assert not set(mixed.test.labels) & set(mixed.train.labels)
    with pytest.raises(ArgumentError, match="eval_split or test_split is train"):
        splits_of(eval_split="train", **sizes)
