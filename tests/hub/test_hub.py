"""Preparing a run's model for the Hub: card, folder and upload; and the cards in model_cards/."""

import copy
import dataclasses
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, eval_result_entries_to_yaml, parse_eval_result_entries
from transformers import pipeline

import forks
from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.hub import Dataset, build_card, prepare, push, read_provenance
from dinosr_hf.hub.card import METRIC_NAMES, build_results, code, redact_paths, render_card
from dinosr_hf.hub.folder import OF_AN_EARLIER_UPLOAD
from dinosr_hf.recognition import TextNormalization
from dinosr_hf.recognition.decoding import DecodingOptions, find_decoding
from dinosr_hf.training.run_record import METRICS, record_of, write_record
from dinosr_hf.utils.command_line import NetworkError
from dinosr_hf.utils.model_folder import save_folder
from disk import names
from hub_server import TOKEN, hub_server
from recognisers import RECORD, save_models, tiny_processor
from scripts import ROOT, load_command
from tiny import tiny_config

SCRIPT = ROOT / "examples" / "prepare_for_hub.py"
PROVENANCE = {
    "repo_id": "someone/tiny-asr",
    "license": "cc-by-4.0",
    "languages": ["en"],
    "base_model": "someone/tiny-base",
    "datasets": [
        {"name": "corpus/train", "id": "someone/corpus", "license": "cc0-1.0", "title": "Corpus, train"},
        {"name": "test", "id": "someone/corpus", "config": "clean", "license": "cc0-1.0"},
    ],
}
RUN_FILES = {
    "checkpoint-9": None,
    "optimizer.pt": "1",
    "metrics.jsonl": "{}",
    "training_args.bin": "2",
    "anchor.safetensors": "labels",
    "notes.txt": "mine",
}


def provenance_with(**changes):
    return copy.deepcopy(PROVENANCE) | changes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a fine-tuning run, with the files that are not for the Hub; and its models."""
    folder = tmp_path_factory.mktemp("runs")
    models = save_models(folder)
    for name, content in RUN_FILES.items():
        path = folder / "recogniser" / name
        path.mkdir() if content is None else path.write_text(content)
    write_record(folder / "recogniser", RECORD)
    return folder, models


@pytest.fixture
def provenance_and_record(saved, tmp_path):
    return read(saved, tmp_path, PROVENANCE)


def read(saved, tmp_path, provenance, name="recogniser"):
    path = tmp_path / "provenance.yaml"
    path.write_text(yaml.safe_dump(provenance))
    return read_provenance(saved[0] / name, path)


def test_every_metric_of_a_record_has_a_name():
    assert set(METRIC_NAMES) == set(METRICS)


def test_arguments_replace_fields_of_the_provenance_file(saved, tmp_path):
    provenance, record = read(saved, tmp_path, PROVENANCE)
    assert record == RECORD
    assert provenance.dataset("/home/jo/corpus/train") == Dataset(**PROVENANCE["datasets"][0])
    path = tmp_path / "provenance.yaml"
    given, _ = read_provenance(saved[0] / "recogniser", path, license="mit", repo_id=None)
    assert given == dataclasses.replace(provenance, license="mit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo_id": None}, r"repo_id: `organisation/name` of the model on the Hub \(--repo_id\)"),
        ({"license": None}, r"license: licence of the weights.*\(--license\)"),
        ({"languages": []}, r"languages: ISO 639 codes.*\(--languages\)"),
        ({"base_model": None}, r"base_model: the run started from /home/jo/runs/base; give.*or unpublished"),
        ({"datasets": None}, "datasets: a list of the run's datasets, each with name and license"),
        ({"datasets": 5}, "datasets: 5 is not a list of the run's datasets, each with name and license"),
        ({"datasets": [{"license": "mit"}]}, "datasets: entry 1 has no name"),
        (
            {"datasets": [{"name": "train", "license": "mit", "hours": "three"}]},
            "datasets: hours of train is 'three', which is no number",
        ),
        (
            {"datasets": [{"name": ["a"], "license": "mit"}]},
            r"datasets: name of an entry is \['a'\], which is no text",
        ),
        ({"datasets": [{"name": "train"}]}, "datasets: train has no license, the licence of the data"),
        (
            {"datasets": [{"name": "test", "license": "mit"}]},
            "no entry matches /home/jo/corpus/train, which.*trained on",
        ),
        ({"datasets": [{"name": "train", "license": "mit"}]}, "no entry matches /home/jo/corpus/test.*evaluated on"),
        ({"datasets": [{"name": "train", "license": "mit"}] * 2}, "2 entries match /home/jo/corpus/train"),
        (
            {"datasets": [{"name": "train", "license": "mit", "hours": -3}]},
            "hours of train is -3, which is no number",
        ),
        ({"intended_use": ["reading", "tests"]}, r"intended_use: \['reading', 'tests'\] is no text"),
        ({"repo_id": "tiny"}, "repo_id: tiny must be `organisation/name`"),
        ({"repo_id": "someone/a b"}, "repo_id: .*alphanumeric"),
        ({"languages": ["English"]}, r"languages: \['English'\] must be a list of ISO 639 codes"),
        ({"languages": "en"}, "languages: en must be a list"),
        ({"languages": [False]}, r'languages: \[False\] must.*quote Norwegian: "no"'),
        ({"license": "CC BY 4.0"}, "license: CC BY 4.0 must be an identifier of the Hub"),
        ({"license": "other"}, "license_name: required with `license: other`"),
        ({"license": "other", "license_name": "mine"}, "license_link: required with"),
        ({"base_model": "runs/of/mine"}, "base_model: .*runs/of/mine"),
        ({"licence": "mit"}, "licence is not a known field. The nearest is license"),
        ({"datasets": [{"name": "a", "licence": "mit"}]}, "licence is not a known field. The nearest is license"),
        ({"datasets": [{"name": "test", "license": "mit", "id": "a b"}]}, "datasets: id of test: .*alphanumeric"),
        (
            {"datasets": [{"name": "test", "license": "mit", "task_id": "clean"}]},
            "datasets: test has task_id, which must be text, beside the benchmark's id",
        ),
        (
            {"datasets": [{"name": "test", "license": "mit", "id": "a/b", "task_id": 3}]},
            "datasets: test has task_id, which must be text",
        ),
        (
            {"datasets": [{**PROVENANCE["datasets"][0], "task_id": "clean"}, PROVENANCE["datasets"][1]]},
            "datasets: corpus/train has task_id, but the run measured no wer, cer, accuracy on it",
        ),
        (
            {"datasets": [*PROVENANCE["datasets"], {"name": "corpus", "license": "mit"}]},
            "datasets: corpus is none of the run's, .*/test; .*/train; remove it or rename it",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_error_lists_missing_and_invalid_fields(saved, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read(saved, tmp_path, provenance_with(**changes))


def test_numbers_are_text_where_text_belongs(saved, tmp_path):
    run = dataclasses.asdict(RECORD) | {"data": [{**RECORD.data[0], "name": "data/2024"}]}
    entry = {"name": 2024, "id": "someone/other", "config": 2024, "license": "mit", "hours": 3}
    given = provenance_with(run=run, datasets=[entry, PROVENANCE["datasets"][1]], license_reason=5, limitations=5)
    provenance, record = read(saved, tmp_path, given, name="pretrained")
    assert (provenance.license_reason, provenance.limitations) == ("5", "5")
    assert provenance.datasets[0] == Dataset("2024", "mit", "someone/other", "2024", hours=3)
    assert "someone/other 2024" in build_card(record, provenance, saved[1]["recogniser"]).content


def test_the_error_lists_all_missing_fields_at_once(saved):
    with pytest.raises(ValueError, match="give a provenance file") as caught:
        read_provenance(saved[0] / "recogniser")
    fields = re.findall(r"^- (\w+): ", str(caught.value), re.MULTILINE)
    assert list(dict.fromkeys(fields)) == ["repo_id", "license", "languages", "datasets", "base_model"]


def test_a_result_on_several_datasets_has_an_entry_of_its_own(saved, tmp_path):
    both = "/home/jo/corpus/train, /home/jo/corpus/test"
    run = dataclasses.asdict(RECORD)
    run["evaluation"] = [{**RECORD.evaluation[0], "dataset": both}]
    run["data"] = [{**RECORD.data[0], "name": f"/home/jo/corpus/{name}"} for name in ("train", "test")]
    with pytest.raises(ValueError, match=r"no entry matches .*/train, .*/test, which.*evaluated on"):
        read(saved, tmp_path, provenance_with(run=run), name="pretrained")
    datasets = [*PROVENANCE["datasets"], {"name": "train, test", "license": "cc-by-4.0", "title": "Both"}]
    provenance, record = read(saved, tmp_path, provenance_with(run=run, datasets=datasets), name="pretrained")
    assert [provenance.dataset(entry["name"]).name for entry in record.data] == ["corpus/train", "test"]
    assert "| word error rate, % | Both |" in build_card(record, provenance, saved[1]["recogniser"]).content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": []}, "evaluation: the record of the run has no results"),
        ({"data": []}, "data: the record of the run has no training data"),
        ({"data": [{**RECORD.data[0], "hours": None}]}, "/home/jo/corpus/train needs hours"),
        ({"base_model": None}, "base_model: someone/tiny-base is given, but the run started from random"),
        ({"steps": None}, "`run` of .*provenance.yaml is not a complete record"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_record_in_the_provenance_file_must_be_complete(saved, tmp_path, changes, message):
    record = dataclasses.asdict(RECORD) | changes
    with pytest.raises(ValueError, match=message):
        read(saved, tmp_path, provenance_with(run=record), name="pretrained")


def test_times_in_the_provenance_file_need_no_quotes(saved, tmp_path):
    path = tmp_path / "provenance.yaml"
    text = yaml.safe_dump(provenance_with(run=dataclasses.asdict(RECORD)))
    unquoted = re.sub(r"'(2026-[^']+)'", r"\1", text)
    assert unquoted != text
    path.write_text(unquoted)
    assert read_provenance(saved[0] / "pretrained", path)[1] == RECORD


def test_a_run_without_a_record_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"has no run\.json.*under `run` in the provenance file"):
        read(saved, tmp_path, PROVENANCE, name="pretrained")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not valid YAML"), ("- a", "holds a list"), (None, "is not a file")],
    ids=["broken", "list", "not_there"],
)
def test_an_invalid_provenance_file_is_refused(saved, tmp_path, text, message):
    path = tmp_path / "provenance.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_provenance(saved[0] / "recogniser", path)


def test_the_card_has_the_metadata_of_the_hub(saved, provenance_and_record):
    provenance, record = provenance_and_record
    data = build_card(record, provenance, saved[1]["recogniser"]).data
    assert data.license == "cc-by-4.0" and data.language == ["en"] and data.base_model == "someone/tiny-base"
    assert data.datasets == ["someone/corpus"] and data.library_name == "transformers"
    assert data.pipeline_tag == "automatic-speech-recognition" and data.metrics == ["wer", "cer"]
    index = yaml.safe_load(data.to_yaml())["model-index"]
    assert index == [
        {
            "name": "tiny-asr",
            "results": [
                {
                    "task": {"type": "automatic-speech-recognition"},
                    "dataset": {"type": "someone/corpus", "name": "someone/corpus clean", "config": "clean"},
                    "metrics": [
                        {"type": "wer", "value": 8.23, "name": "word error rate, %"},
                        {"type": "cer", "value": 2.17, "name": "character error rate, %"},
                    ],
                }
            ],
        }
    ]


def test_the_card_describes_the_run_without_local_paths(saved, provenance_and_record):
    provenance, record = provenance_and_record
    text = str(build_card(record, provenance, saved[1]["recogniser"]))
    assert "fine-tuned with CTC from [someone/tiny-base](https://huggingface.co/someone/tiny-base)" in text
    assert "20,000 updates on 1 x NVIDIA H100" in text and "torch 2.13.0" in text
    assert "| Corpus, train | all | 9.8 | 2,763 | cc0-1.0 |" in text
    assert "| word error rate, % | someone/corpus clean | all | 410 | 8.23 | this run |" in text
    assert "learning_rate: 5.0e-05" in text and "output_dir: asr" in text
    assert "/home" not in text and "jo/" not in text
    assert "{{" not in text and "<" not in re.sub(r"</?(details|summary)>", "", text)


def test_the_card_with_an_unpublished_base_model_and_another_licence(saved, tmp_path):
    own = {"license": "other", "license_name": "lab licence", "license_link": "https://example.org/l"}
    own |= {
        "license_reason": "The speakers asked for it.",
        "limitations": "Only numbers.",
        "base_model": "unpublished",
    }
    provenance, record = read(saved, tmp_path, provenance_with(**own, intended_use="Counting."))
    card = build_card(record, provenance, saved[1]["recogniser"])
    assert card.data.base_model is None and card.data.license_name == "lab licence"
    assert "from base, which is not published, with" in card.text and "/home" not in card.text
    assert "The weights: [lab licence](https://example.org/l). The speakers asked for it." in card.text
    assert "Counting." in card.text and "Only numbers." in card.text


def test_a_dataset_with_two_names_needs_configurations(saved, tmp_path):
    two = [*RECORD.evaluation, {**RECORD.evaluation[0], "dataset": "/home/jo/corpus/other"}]
    record = dataclasses.asdict(RECORD) | {"evaluation": two}
    datasets = [*PROVENANCE["datasets"], {**PROVENANCE["datasets"][1], "name": "other"}]
    provenance, record = read(saved, tmp_path, provenance_with(run=record, datasets=datasets))
    with pytest.raises(ValueError, match=r"other and /home/jo/corpus/test are the same dataset to the Hub.*config"):
        build_card(record, provenance, saved[1]["recogniser"])


def with_benchmarks(saved, tmp_path, *evaluation, **changes):
    """Record and provenance of a run that was also evaluated on these datasets of a benchmark; a task for each."""
    record = dataclasses.asdict(RECORD)
    record["evaluation"] += [{**record["evaluation"][0], **entry} for entry in evaluation]
    own = {"license": "cc0-1.0", "id": "someone/benchmark"}
    datasets = [own | {"name": name, "config": name, "task_id": f"task of {name}"} | changes for name in ("a", "b")]
    return read(saved, tmp_path, provenance_with(run=record, datasets=[*PROVENANCE["datasets"], *datasets]))


def test_results_on_benchmarks_are_files_as_the_hub_reads_them(saved, tmp_path):
    entries = {"dataset": "a", "wer": 0.0}, {"dataset": "b", "wer": None, "cer": 0.5, "num_utterances": 1_200}
    out = prepare(saved[0] / "recogniser", tmp_path / "ready", *with_benchmarks(saved, tmp_path, *entries))
    (file,) = (out / ".eval_results").iterdir()
    assert file.name == "someone--benchmark.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    source = {"url": "https://huggingface.co/someone/tiny-asr", "name": "Model card"}
    assert content == [
        {
            "dataset": {"id": "someone/benchmark", "task_id": "task of a"},
            "value": 0.0,
            "date": "2026-11-25",
            "source": source,
            "notes": "word error rate, %; 410 utterances",
        },
        {
            "dataset": {"id": "someone/benchmark", "task_id": "task of b"},
            "value": 50.0,
            "date": "2026-11-25",
            "source": source,
            "notes": "character error rate, %; 1,200 utterances",
        },
    ]
    assert eval_result_entries_to_yaml(parse_eval_result_entries(content)) == content
    on_card = {result.metric_value for result in ModelCard.load(out / "README.md").data.eval_results}
    assert {entry["value"] for entry in content} <= on_card


def test_results_on_other_datasets_are_on_the_card_only(saved, provenance_and_record):
    provenance, record = provenance_and_record
    assert record.evaluation and build_results(record, provenance) == {}


def test_two_results_of_one_task_are_refused(saved, tmp_path):
    provenance, record = with_benchmarks(saved, tmp_path, {"dataset": "a"}, {"dataset": "b"}, task_id="clean")
    with pytest.raises(ValueError, match=r"two results for the task clean of .*\. Leave out the task_id"):
        build_results(record, provenance)


def facts(card):
    """The rows of the card's first table: name -> value."""
    return dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", card.text.split("\n## ")[0], re.MULTILINE))


def test_the_card_tells_front_end_objective_languages_and_hours(saved, provenance_and_record):
    provenance, record = provenance_and_record
    found = facts(build_card(record, provenance, saved[1]["recogniser"]))
    assert found["front end"] == "3 convolutions of the waveform" and found["objective"] == "CTC"
    assert "codebooks" not in found["encoder"]
    assert found["languages"] == "en" and found["training audio"] == "9.8 hours"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"objective": "DinoSR: predict the teacher's codewords at masked frames"}),
        (
            {"num_anchor_labels": 9, "feature_encoder": "log_mel"},
            {
                "objective": "DinoSR: predict the teacher's codewords at masked frames, and an anchor of 9 labels",
                "front end": "80 log-mel energies every 10 ms, two to a frame",
            },
        ),
        ({"head_input": "own_layer"}, {"objective": "SpidR: predict the teacher's codewords at masked frames"}),
    ],
    ids=["dinosr", "anchor_and_log_mel", "spidr"],
)
def test_the_card_of_a_pretrained_model_tells_its_objective(saved, tmp_path, changes, expected):
    run = dataclasses.asdict(RECORD) | {"task": "pretraining", "base_model": None, "evaluation": []}
    run["data"] = [{**RECORD.data[0], "hours": None}]
    datasets = [{**PROVENANCE["datasets"][0], "hours": 1234.5}]
    given = provenance_with(run=run, base_model=None, datasets=datasets, languages=["en", "de"])
    provenance, record = read(saved, tmp_path, given)
    card = build_card(record, provenance, DinoSRForPreTraining(tiny_config(**changes)))
    assert facts(card).items() >= ({"languages": "en, de", "training audio": "1,234.5 hours"} | expected).items()
    assert "model, pre-trained from random weights with dinosr-hf" in card.text


def test_the_card_tells_of_codebooks_only_where_there_are_some(saved, tmp_path):
    run = dataclasses.asdict(RECORD) | {"task": "pretraining", "base_model": None, "evaluation": []}
    given = provenance_with(run=run, base_model=None, datasets=PROVENANCE["datasets"][:1])
    provenance, record = read(saved, tmp_path, given)
    config = tiny_config()
    objective, size = "DinoSR: predict the teacher's codewords at masked frames", f"width {config.hidden_size}"
    for model_class, codebooks in ((DinoSRForPreTraining, ", 2 codebooks of 7 codewords"), (DinoSRModel, "")):
        found = facts(build_card(record, provenance, model_class(config)))
        assert found["objective"] == objective and found["encoder"].endswith(size + codebooks)


def test_the_card_of_a_converted_model_names_what_the_file_does_not_tell(saved):
    layout = SimpleNamespace(name="fairseq", license="none", notes=[], unused={})
    metadata = ModelCardData(pipeline_tag="feature-extraction")
    card = render_card(metadata, saved[1]["pretrained"], title="x.pt", layout=layout)
    assert card.text.count("neither the languages nor the hours of audio") == 1
    assert facts(card)["objective"].startswith("DinoSR") and "languages" not in facts(card)
    assert "codebooks" in facts(card)["encoder"]
    assert 'AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card.text
    metadata.pipeline_tag = "automatic-speech-recognition"
    card = render_card(metadata, saved[1]["recogniser"], title="x.pt", layout=layout)
    assert 'pipeline("automatic-speech-recognition", model="path/to/this/folder", trust' in card.text


@pytest.mark.parametrize(
    ("name", "value", "public"),
    [
        ("data", "/home/jo/corpus/train", "train"),
        ("data", ["~/corpus", "organisation/name", "synthetic"], ["corpus", "organisation/name", "synthetic"]),
        ("data", r"C:\Users\jo\corpus", "corpus"),
        ("data", "../corpus", "corpus"),
        ("data", "projects/jo/corpus", "corpus"),
        ("data", "hf://datasets/organisation/name", "hf://datasets/organisation/name"),
        ("output_dir", "runs/asr", "asr"),
        ("resume", "runs/checkpoint-3", "checkpoint-3"),
        ("pad_token", "<pad>", "<pad>"),
        ("all", {"hub_token": "hf_secret", "seed": 3}, {"seed": 3}),
    ],
)
def test_paths_and_keys_are_removed_from_arguments(name, value, public):
    assert redact_paths(value, name) == public


def test_a_prepared_folder_has_the_model_and_nothing_else(saved, provenance_and_record, tmp_path):
    folder, models = saved
    (tmp_path / "normalisation.json").write_text("{}")
    out = prepare(
        folder / "recogniser", tmp_path / "ready", *provenance_and_record, include=[tmp_path / "normalisation.json"]
    )
    code = {path.name for path in (folder / "recogniser").glob("*.py")}
    model = {"config.json", "model.safetensors", "processor_config.json", "tokenizer_config.json", "vocab.json"}
    assert set(names(out)) == code | model | {"README.md", "normalisation.json"}
    assert names(tmp_path) == ["normalisation.json", "provenance.yaml", "ready"]
    loaded = DinoSRForCTC.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in models["recogniser"].state_dict().items())
    assert str(folder) not in "".join(path.read_text() for path in out.iterdir() if path.suffix in (".json", ".md"))
    said = pipeline("automatic-speech-recognition", model=str(out))(torch.ones(4000).numpy())
    assert said == pipeline("automatic-speech-recognition", model=str(folder / "recogniser"))(torch.ones(4000).numpy())


def test_a_prepared_recogniser_has_the_files_of_its_decoding(saved, provenance_and_record, tmp_path):
    for folder, name in (("models", "lm.arpa"), ("words", "lexicon.txt"), ("tuned", "decoding.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(name)
    files = [str(tmp_path / "models" / "lm.arpa"), str(tmp_path / "words" / "lexicon.txt")]
    DecodingOptions(*files, lm_weight=0.5).save(tmp_path / "tuned" / "decoding.json")
    include = [tmp_path / "tuned" / "decoding.json", files[0]]
    out = prepare(saved[0] / "recogniser", tmp_path / "ready", *provenance_and_record, include=include)
    assert str(tmp_path) not in (out / "decoding.json").read_text()
    moved = out.rename(tmp_path / "moved")
    for file in files:
        Path(file).unlink()
    options = find_decoding(moved)
    assert options == DecodingOptions(str(moved / "lm.arpa"), str(moved / "lexicon.txt"), lm_weight=0.5)
    assert [Path(file).read_text() for file in (options.language_model, options.lexicon)] == ["lm.arpa", "lexicon.txt"]
    with pytest.raises(ValueError, match=r"lm\.arpa is to be included, but is not a file"):
        prepare(saved[0] / "recogniser", tmp_path / "again", *provenance_and_record, include=include[:1])


def test_a_prepared_recogniser_has_the_text_normalisation_of_its_run(saved, provenance_and_record, tmp_path):
    run = shutil.copytree(saved[0] / "recogniser", tmp_path / "run")
    TextNormalization(case="upper", keep="-").save(run)
    out = prepare(run, tmp_path / "ready", *provenance_and_record)
    assert TextNormalization.load(out) == TextNormalization(case="upper", keep="-")


def test_preparing_a_pretrained_model_and_a_classifier(saved, tmp_path):
    folder, _ = saved
    figures = {"dataset": "corpus/test", "split": "test", "num_utterances": 5}
    for name, task, own in (
        ("pretrained", "pretraining", {"loss": 1.5, "pnmi": 0.613}),
        ("classifier", "audio-classification", {"accuracy": 0.9}),
    ):
        record = dataclasses.asdict(RECORD) | {"task": task, "evaluation": [figures | own], "base_model": None}
        given = read(saved, tmp_path, provenance_with(run=record, base_model=None), name=name)
        out = prepare(folder / name, tmp_path / name, *given)
        card = ModelCard.load(out / "README.md")
        assert {result.metric_type for result in card.data.eval_results} == set(own)
        assert (out / "preprocessor_config.json").exists()
    assert "phone-normalised" in (tmp_path / "pretrained" / "README.md").read_text()


def test_a_failure_leaves_no_folder(saved, provenance_and_record, tmp_path, monkeypatch):
    monkeypatch.setattr("dinosr_hf.hub.folder._check_loads", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(saved[0] / "recogniser", tmp_path / "ready", *provenance_and_record)
    assert names(tmp_path) == ["provenance.yaml"]


def test_code_that_does_not_load_is_an_error(saved, provenance_and_record, tmp_path, monkeypatch):
    plain = DinoSRForCTC.save_pretrained

    def without_a_file(self, folder, **kwargs):
        plain(self, folder, **kwargs)
        (Path(folder) / "masking_dinosr.py").unlink()

    monkeypatch.setattr(DinoSRForCTC, "save_pretrained", without_a_file)
    with pytest.raises(OSError, match=r"masking_dinosr\.py"):
        prepare(saved[0] / "recogniser", tmp_path / "ready", *provenance_and_record)
    assert names(tmp_path) == ["provenance.yaml"]


def test_folders_that_cannot_be_prepared_are_refused(saved, provenance_and_record, tmp_path):
    folder, (provenance, record) = saved[0], provenance_and_record
    with pytest.raises(ValueError, match="has files already"):
        prepare(folder / "recogniser", tmp_path, provenance, record)
    with pytest.raises(ValueError, match="DinoSRForPreTraining, but the run's task is automatic-speech-recognition"):
        prepare(folder / "pretrained", tmp_path / "ready", provenance, record)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        prepare(folder, tmp_path / "ready", provenance, record)
    with pytest.raises(ValueError, match="is to be included, but is not a file"):
        prepare(folder / "recogniser", tmp_path / "ready", provenance, record, include=[tmp_path / "nothing"])
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocab\.json is in the folder already"):
        prepare(folder / "recogniser", tmp_path / "ready", provenance, record, include=[tmp_path / "vocab.json"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter.*merge_and_unload"):
        prepare(tmp_path / "adapter", tmp_path / "ready", provenance, record)
    assert not (tmp_path / "ready").exists()


def test_a_recogniser_needs_a_tokenizer_of_its_size(provenance_and_record, tmp_path):
    save_folder(DinoSRForCTC(tiny_config(vocab_size=4, pad_token_id=0)), tmp_path / "mute")
    with pytest.raises(ValueError, match=r"has no tokenizer.*processor\.save_pretrained"):
        prepare(tmp_path / "mute", tmp_path / "ready", *provenance_and_record)
    tiny_processor(tmp_path).save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="has 9 labels, but vocab_size=4"):
        prepare(tmp_path / "mute", tmp_path / "ready", *provenance_and_record)


def run_script(*flags, work, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    kept |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1"}
    return forks.run([SCRIPT, *flags], env=kept | environment, cwd=work)


@pytest.fixture(scope="module")
def script():
    return load_command("prepare_for_hub")


@pytest.mark.slow
def test_push_uploads_the_folder(saved, tmp_path):
    train, test = PROVENANCE["datasets"]
    own = provenance_with(datasets=[train, {**test, "task_id": "clean"}])
    (tmp_path / "provenance.yaml").write_text(yaml.safe_dump(own))
    uploaded = tmp_path / "hub" / "someone" / "tiny-asr"
    for name in ("decoding.json", "model-00001-of-00002.safetensors", ".eval_results/other.yaml", "notes.txt"):
        (uploaded / name).parent.mkdir(parents=True, exist_ok=True)
        (uploaded / name).write_text("of an earlier upload")
    with hub_server(tmp_path / "hub") as hub:
        flags = (saved[0] / "recogniser", "ready", "--provenance", "provenance.yaml", "--push")
        done = run_script(*flags, work=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"Uploaded to {hub.url}/someone/tiny-asr" in done.stdout
        (created,) = hub.created
        assert created["name"] == "tiny-asr" and created["organization"] == "someone"
        assert created.get("private") or created.get("visibility") == "private"  # of hub clients, old and new
        assert [commit["summary"] for commit in hub.commits] == ["Add model"]
        assert len([line for line in hub.requests if line.startswith("PUT /large/")]) == 1
    (uploaded / "notes.txt").unlink()  # which stayed
    files = {file.relative_to(uploaded): file.read_bytes() for file in uploaded.rglob("*") if file.is_file()}
    assert Path(".eval_results", "someone--corpus.yaml") in files
    ready = tmp_path / "ready"
    assert files == {file.relative_to(ready): file.read_bytes() for file in ready.rglob("*") if file.is_file()}


def test_the_script_lists_what_is_missing(saved, tmp_path, script):
    with pytest.raises(SystemExit, match=r"prepare_for_hub\.py: The card of .* cannot be written") as caught:
        script.main([str(saved[0] / "recogniser"), str(tmp_path / "ready"), "--license", "mit"])
    assert "- languages:" in str(caught.value) and "- license:" not in str(caught.value)
    assert not (tmp_path / "ready").exists()


def test_the_script_uploads_only_with_push(saved, provenance_and_record, tmp_path, script, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(script, "push", lambda folder, repo_id, private: pushed.append((folder, repo_id, private)))
    command = [str(saved[0] / "recogniser"), "--provenance", str(tmp_path / "provenance.yaml")]
    script.main([*command, str(tmp_path / "ready")])
    assert pushed == [] and "Nothing was uploaded" in capsys.readouterr().out
    script.main([*command, str(tmp_path / "other"), "--push", "--public", "--repo_id", "someone/other"])
    assert pushed == [(tmp_path / "other", "someone/other", False)]


@pytest.mark.parametrize("private", [True, False])
def test_push_creates_the_repository_and_uploads_the_folder(
    saved, provenance_and_record, tmp_path, monkeypatch, private
):
    asked = []
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{name}",
            lambda self, *args, _name=name, **kwargs: asked.append((_name, self.token, args, kwargs)),
        )
    out = prepare(saved[0] / "recogniser", tmp_path / "ready", *provenance_and_record)
    push(out, "someone/tiny", private=private, token=TOKEN, message="First")
    folder = {"folder_path": out, "repo_id": "someone/tiny", "commit_message": "First"}
    folder["delete_patterns"] = list(OF_AN_EARLIER_UPLOAD)
    assert asked == [
        ("create_repo", TOKEN, ("someone/tiny",), {"private": private, "exist_ok": True}),
        ("upload_folder", TOKEN, (), folder),
    ]


@pytest.mark.parametrize("private", [True, False])
def test_a_push_without_a_network_says_what_to_do(saved, provenance_and_record, tmp_path, monkeypatch, private):
    def fail(self, *args, **kwargs):
        raise NetworkError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    out = prepare(saved[0] / "recogniser", tmp_path / "ready", *provenance_and_record)
    command = "hf upload --private someone/tiny" if private else "hf upload someone/tiny"
    with pytest.raises(OSError, match=rf"ready could not be uploaded: no route to host.* `{command} \S+` uploads it"):
        push(out, "someone/tiny", private=private)


def test_only_a_prepared_folder_is_uploaded(saved, tmp_path):
    with pytest.raises(ValueError, match=r"has no README\.md. Give a folder that `prepare` wrote"):
        push(saved[0] / "recogniser", "someone/tiny")
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path)
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n\n# A card")
    with pytest.raises(ValueError, match="has no license"):
        push(tmp_path, "someone/tiny")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "run.json").touch()
    with pytest.raises(ValueError, match=r"has files of a run \(checkpoint-3, run\.json\)"):
        push(tmp_path, "someone/tiny")


PAPER_CARDS = sorted(path for path in (ROOT / "model_cards").glob("*.md") if path.name != "README.md")


def figures_of_unknown_origin(text):
    """Return the rows of the section of figures that have a number but are not marked as the paper's."""
    section = text.split("\n## Figures of the paper\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [row for row in rows[2:] if re.search(r"\d", row) and not row.rstrip("| ").endswith("the paper's")]


@pytest.mark.parametrize("path", PAPER_CARDS, ids=lambda path: path.stem)
def test_cards_of_the_paper_s_models(path):
    card = ModelCard.load(path)
    assert card.data.license == "unknown" and card.data.language == ["en"]
    assert card.data.datasets == ["openslr/librispeech_asr"] and card.data.library_name == "transformers"
    assert card.data.eval_results is None  # no weights of ours were measured
    assert "No weights are hosted" in card.text
    assert "no licence" in card.text.split("\n## Licence")[1]
    assert figures_of_unknown_origin(card.text) == []


def test_there_are_two_cards_of_the_paper_s_models():
    assert {path.stem for path in PAPER_CARDS} == {"dinosr-base", "dinosr-base-100h"}


def test_figures_of_unknown_origin_are_noticed():
    text = PAPER_CARDS[0].read_text(encoding="utf-8")
    marked = text.replace("| the paper's |", "| ours |", 1)
    assert len(figures_of_unknown_origin(marked)) == 1
    assert figures_of_unknown_origin(text) == []


HOSTILE = (
    "# Heading",
    "a\n\n# Heading\n\n<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "```\n# Heading\n```",
    "`````",
    "~~~\nx",
    "</details>",
    "a | b\n|---|---|",
    "---\nlicense: mit\n---",
    "- x\n===",
    "[click](javascript:alert(1)) ![i](http://x.org/i.png)",
    "{{ config }} {% for %}",
    "**bold** _thin_ __init__ `code` ~~gone~~ \\",
    "&lt;b&gt; &#35;",
    "x: y # z",
    "    indented",
    "1. one",
    "\u2028# Heading\x85# Heading",
)
TOKENS = ("heading_open", "html_block", "html_inline", "fence", "code_block", "code_inline", "image", "link_open")


def structure(card):
    """Number of headings, HTML, code blocks and so on, cells of each row of the tables, and the metadata's fields."""
    markdown = pytest.importorskip("markdown_it")
    tokens = markdown.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(card.text)
    tokens += [child for token in tokens for child in token.children or ()]
    kinds = Counter(token.type for token in tokens)
    names = (*TOKENS, "tr_open", "td_open", "th_open", "strong_open", "em_open", "s_open", "bullet_list_open")
    return [kinds[name] for name in names], sorted(card.data.to_dict())


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_a_record_is_only_text_on_the_card(saved, tmp_path, text):
    def card_with(text):
        record = dataclasses.asdict(RECORD)
        record["arguments"] |= {"note": text, text: [text, {"x": text}]}
        record["hardware"] = record["versions"]["torch"] = record["versions"][text] = text
        record["versions"]["dinosr_hf"] = text
        record["data"][0]["split"] = record["evaluation"][0]["split"] = text
        own = {"datasets": [{**entry, "license": text, "title": text} for entry in PROVENANCE["datasets"]]}
        own |= {"license": "other", "license_name": text, "license_link": "https://example.org/l"}
        provenance, _ = read(saved, tmp_path, provenance_with(**own))
        return build_card(record_of(record, "here"), provenance, saved[1]["recogniser"])

    card, plain_card = card_with(text), card_with("plain")
    assert structure(card) == structure(plain_card)
    assert structure(ModelCard(plain_card.content + f"\n{HOSTILE[1]}\n")) != structure(plain_card)  # the control
    data = ModelCard(str(card)).data
    assert data.license == "other"
    fence = re.search("^(`{3,})yaml\n(.*?)^\\1$", card.text, re.MULTILINE | re.DOTALL)
    note = yaml.safe_load(fence[2])["note"]
    for found in (note, data.license_name, *(result.dataset_split for result in data.eval_results)):
        assert found.split() == text.split()  # YAML turns one line break into another


@pytest.mark.parametrize("text", HOSTILE)
def test_names_in_a_foreign_checkpoint_are_only_text_on_its_card(saved, text):
    def card_with(text):
        layout = SimpleNamespace(name=text, license=text, notes=[text], unused={text: text})
        return render_card(ModelCardData(license="mit"), saved[1]["recogniser"], title=text, layout=layout)

    harmless = "plain" if code(text).startswith("`") else "plain!"
    assert structure(card_with(text)) == structure(card_with(harmless))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"torch": ["2"]}}, "versions must map libraries to versions"),
        ({"hardware": {"<b>": 1}}, "hardware must not be empty"),
        ({"data": [{**RECORD.data[0], "split": 3}]}, "data must be a list, each with name, split"),
        ({"evaluation": [{**RECORD.evaluation[0], "wer": "<b>"}]}, "evaluation must be a list, .* metrics as numbers"),
        ({"evaluation": [{**RECORD.evaluation[0], "num_utterances": "many"}]}, "evaluation must be a list"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_record_with_values_of_other_types_has_no_card(changes, message):
    with pytest.raises(ValueError, match=message):
        record_of(dataclasses.asdict(RECORD) | changes, "here")
