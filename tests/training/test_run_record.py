"""`run.json`: complete or refused, and the record that pre-training writes."""

import dataclasses
import json
import re

import pytest
import torch

from dinosr_hf.finetuning import (
    ClassificationArguments,
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    RecognitionArguments,
)
from dinosr_hf.pretraining import CheckpointError, run
from dinosr_hf.pretraining.pretraining_arguments import GROUPS
from dinosr_hf.training.run_record import (
    RunRecord,
    describe_hardware,
    library_versions,
    public_values,
    read_record,
    time_now,
    write_record,
)
from pretraining_runs import metrics_of, tiny_arguments
from recognisers import RECORD


def test_a_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "run.json").write_text("of an earlier run")
    assert write_record(tmp_path, RECORD) == tmp_path / "run.json"
    assert read_record(str(tmp_path)) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_versions_hardware_and_times_of_this_machine_are_valid(tmp_path):
    record = dataclasses.replace(
        RECORD,
        versions=library_versions(),
        hardware=describe_hardware(torch.device("cpu"), 2),
        started=time_now(),
        finished=time_now(),
    )
    assert record.hardware.startswith("CPU (") and record.hardware.endswith("2 process(es)")
    write_record(tmp_path, record)
    assert {"dinosr_hf", "torch", "transformers", "python"} <= set(read_record(tmp_path).versions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "translation"}, "task must be one of pretraining"),
        ({"arguments": []}, "arguments must map names to values"),
        ({"base_model": 3}, "base_model must be a name or null"),
        ({"data": [{"name": "corpus"}]}, "data must be a list, each with name, split, hours and utterances"),
        ({"steps": "many"}, "steps must be a number of updates"),
        ({"evaluation": [{"wer": 0.1}]}, "evaluation must be a list, each with dataset, split and num_utterances"),
        (
            {"evaluation": [{"dataset": "a", "split": None, "num_utterances": 2, "bleu": 3}]},
            "evaluation has bleu, which is not one of wer, cer, accuracy",
        ),
        ({"versions": "new ones"}, "versions must map libraries to versions"),
        ({"started": "yesterday"}, "started must be a time"),
        ({"started": "2026-11-25T09:00:00"}, "started must be a time"),  # no time zone
        ({"finished": None}, "finished is not a time: the run did not finish"),
        ({"hardware": ""}, "hardware must not be empty"),
        ({"mood": "good"}, "mood is not a known field"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_fields_are_refused(tmp_path, changes, message):
    (tmp_path / "run.json").write_text(json.dumps(dataclasses.asdict(RECORD) | changes))
    with pytest.raises(ValueError, match=message):
        read_record(tmp_path)


def test_all_missing_fields_are_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"task": "pretraining"}))
    with pytest.raises(ValueError, match=r"run\.json is not a complete record") as caught:
        read_record(tmp_path)
    missing = set(re.findall(r"- (\w+) is missing", str(caught.value)))
    assert missing == {field.name for field in dataclasses.fields(RunRecord)} - {"task"}


def test_a_missing_or_unreadable_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no run\.json, which every run writes"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object with the fields of a run, not a list"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "WANDB_API_KEY", "apiKey", "hubToken", "hub_token", "hf-token", "token", "tokens", "key"),
        *("aws_access_key_id", "aws_secret_access_key", "private_key_file", "password", "db_passwd", "PASSPHRASE"),
        *("client_secret", "credentials", "authorization", "token_value", "password_hash"),
    ],
)
def test_secrets_are_not_written(tmp_path, name):
    arguments = {"seed": 3, name: "hunter2", "nested": [{name: ["hunter2"], "kept": 1}]}
    write_record(tmp_path, dataclasses.replace(RECORD, arguments=arguments))
    assert "hunter2" not in (tmp_path / "run.json").read_text()
    assert read_record(tmp_path).arguments == {"seed": 3, "nested": [{"kept": 1}]}


def test_passwords_and_tokens_in_addresses_are_not_written(tmp_path):
    address = "https://jo:hunter2@example.org/a.tar?version=2&access_token=hunter2&sig=hunter2#top"
    public = "https://example.org/a.tar?version=2&access_token=&sig=#top"
    others = ["hf://datasets/organisation/name@main/a.tar", "git@example.org:a/b"]
    record = dataclasses.replace(
        RECORD,
        arguments={"data": [address, *others]},
        base_model=address,
        data=[{**RECORD.data[0], "name": address}],
        evaluation=[{**RECORD.evaluation[0], "dataset": address}],
    )
    write_record(tmp_path, record)
    assert "hunter2" not in (tmp_path / "run.json").read_text()
    found = read_record(tmp_path)
    assert found.arguments["data"] == [public, *others]
    assert (found.base_model, found.data[0]["name"], found.evaluation[0]["dataset"]) == (public, public, public)


def test_no_argument_of_this_package_is_taken_for_a_secret():
    groups = [*GROUPS, InitialModelArguments, LabelledDataArguments, RecognitionArguments, ClassificationArguments]
    names = {spec.name for group in [*groups, FinetuningArguments] for spec in dataclasses.fields(group)}
    assert len(names) > 150
    assert names - public_values(dict.fromkeys(names, "text")).keys() == {"hub_token"}
    numbers = {"num_tokens": 5, "max_tokens": 9, "key_dim": 64, "pad_token_id": 0, "tokenizer": "a", "keyword": "b"}
    assert public_values(numbers) == numbers


def test_an_invalid_record_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="This record is not a complete record of a run"):
        write_record(tmp_path, dataclasses.replace(RECORD, task="sleep"))
    assert list(tmp_path.iterdir()) == []


def test_pretraining_writes_a_record(tmp_path, recordings):
    arguments = tiny_arguments(tmp_path, recordings, max_steps=2, eval_steps=2, eval_data=str(recordings))
    run(arguments)
    record = read_record(tmp_path / "out")
    assert record.task == "pretraining" and record.base_model is None and record.steps == 2
    assert record.arguments == arguments.to_dict()
    (data,) = record.data
    assert data["name"] == str(recordings) and data["utterances"] == 15
    assert data["hours"] == pytest.approx(sum(0.8 + 0.15 * number for number in range(15)) / 3600, rel=1e-3)
    (figures,) = record.evaluation
    last = metrics_of(tmp_path / "out")[-1]
    assert figures["loss"] == last["eval_loss"] and figures["num_utterances"] == 15
    assert record.finished >= record.started


def test_a_stopped_run_is_unfinished_and_keeps_its_start_time(tmp_path, recordings, monkeypatch):
    arguments = tiny_arguments(tmp_path, recordings, max_steps=2, checkpoint_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr("dinosr_hf.pretraining.loop.save_folder", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match="could not be written"):
            run(arguments)
    with pytest.raises(ValueError, match="the run did not finish"):
        read_record(tmp_path / "out")
    path = tmp_path / "out" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2026-01-01T00:00:00+00:00"}))
    run(arguments)
    record = read_record(tmp_path / "out")
    assert record.started == "2026-01-01T00:00:00+00:00" and record.evaluation == []


def test_each_source_of_a_mixture_is_recorded(tmp_path, recordings):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(recordings.iterdir())[:5]:
        (other / path.name).symlink_to(path)
    run(tiny_arguments(tmp_path, recordings, max_steps=1, data=[str(recordings), str(other)]))
    data = read_record(tmp_path / "out").data
    assert [(entry["name"], entry["utterances"]) for entry in data] == [(str(recordings), 15), (str(other), 5)]
