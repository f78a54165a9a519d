"""The model is written before its evaluation and reports, and recordings may have any names."""

import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoModelForAudioClassification, AutoModelForCTC, AutoProcessor

from dinosr_hf.finetuning import (
    Classification,
    ClassificationArguments,
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    Recognition,
    finetune,
)
from dinosr_hf.training.run_record import read_record
from dinosr_hf.utils.command_line import ArgumentError
from finetuning_runs import recognise, run_settings, write_corpus, write_model
from tiny import waveforms

LATIN = "caf\udce9.wav"  # a name in Latin-1, as old zips have it
CHECKPOINTS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def corpus(tmp_path):
    """Folder with train and validation, one recording of each with a name in Latin-1."""
    for seed, split in enumerate(("train", "validation")):
        folder = write_corpus(tmp_path / "corpus" / split, 6, seed=seed)
        (folder / "00.wav").rename(folder / LATIN)
        table = folder / "metadata.csv"
        table.write_bytes(table.read_bytes().replace(b"00.wav", os.fsencode(LATIN)))
    return tmp_path / "corpus"


def classify(model, corpus, out, **run):
    return finetune(
        Classification(ClassificationArguments()),
        InitialModelArguments(model=str(model)),
        LabelledDataArguments(train_data=[str(corpus)], label_column="language", min_seconds=0.01),
        FinetuningArguments(output_dir=str(out), **run_settings(**run)),
    )


def ids_in(file):
    return sorted(json.loads(line)["id"] for line in file.read_text("utf-8").splitlines())


NAMES = [*(f"{number:02d}.wav" for number in range(1, 6)), r"caf\xe9.wav"]


@pytest.mark.parametrize("run", [recognise, classify])
def test_names_that_are_not_utf8_are_escaped_in_reports(model, corpus, tmp_path, run):
    record = run(model, corpus, tmp_path / "out", max_steps=1)
    assert ids_in(tmp_path / "out" / "predictions-eval.jsonl") == NAMES
    assert read_record(tmp_path / "out") == record


def test_an_output_folder_with_such_a_name_is_refused_at_once(model, corpus, tmp_path):
    with pytest.raises(ArgumentError, match=r"output_dir=\S+/caf\\xe9 is not UTF-8 text"):
        recognise(model, corpus, tmp_path / "caf\udce9")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize(("what", "lora_rank"), [("report", 0), ("metrics", 2)])
def test_a_failed_report_does_not_cost_the_recogniser(model, corpus, tmp_path, monkeypatch, what, lora_rank):
    def fail(*arguments, **options):
        raise DiskFullError

    options = {"start": {"lora_rank": lora_rank}, **CHECKPOINTS}
    plain = getattr(Recognition, what)
    monkeypatch.setattr(Recognition, what, fail)
    with pytest.raises(DiskFullError):
        recognise(model, corpus, tmp_path / "out", **options)
    monkeypatch.setattr(Recognition, what, plain)
    found = AutoModelForCTC.from_pretrained(tmp_path / "out").eval()
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.vocab_size == found.config.vocab_size
    (data,) = json.loads((tmp_path / "out" / "run.json").read_text())["data"]
    assert data["utterances"] == 6
    record = recognise(model, corpus, tmp_path / "out", **options)  # evaluates the checkpoint of the last step
    assert record.finished and record.evaluation[0]["num_utterances"] == 6
    again = AutoModelForCTC.from_pretrained(tmp_path / "out").eval()
    waves = waveforms(2, 700)
    with torch.no_grad():
        torch.testing.assert_close(found(waves).logits, again(waves).logits)
    assert ids_in(tmp_path / "out" / "predictions-eval.jsonl") == NAMES


def test_a_failed_report_does_not_cost_the_classifier(model, corpus, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise DiskFullError

    monkeypatch.setattr(Classification, "report", fail)
    with pytest.raises(DiskFullError):
        classify(model, corpus, tmp_path / "out", max_steps=1)
    assert AutoModelForAudioClassification.from_pretrained(tmp_path / "out").config.num_labels == 2


def test_the_recording_itself_is_read(corpus):
    assert soundfile.info(os.fsencode(corpus / "train" / LATIN)).samplerate == 16_000
    assert not Path(corpus, "train", r"caf\xe9.wav").exists()
