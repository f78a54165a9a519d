"""A complete run: its files, its initial model, the checkpoint that it keeps, and its errors."""

import json
import logging
import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCTC, AutoProcessor, BertConfig, TrainerCallback

from dinosr_hf import DinoSRForCTC
from dinosr_hf.data import open_labelled
from dinosr_hf.finetuning import FinetuningArguments, InitialModelArguments, Recognition, load_initial_model
from dinosr_hf.recognition import TextNormalization, texts_of
from dinosr_hf.recognition.timing import stored_emission_delay
from dinosr_hf.training.run_record import read_record
from dinosr_hf.utils.command_line import ArgumentError
from finetuning_runs import recognise, write_corpus, write_model
from scripts import load_command
from tiny import tiny_config, waveforms

LAYER = "dinosr.encoder.layers.0.attention.q_proj.weight"
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", mask_feature_prob=0.125, mask_feature_length=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with three splits; one letter of the test transcripts is in no other split."""
    root = tmp_path_factory.mktemp("corpus")
    for number, split in enumerate(("train", "validation", "test")):
        write_corpus(root / split, 12 if split == "train" else 5, seed=number)
    table = root / "test" / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], "00.wav,zoo,en", *lines[2:], ""]))
    return root


@pytest.fixture(scope="module")
def finished(model, corpus, tmp_path_factory):
    """Record, output folder and log messages of a run."""
    out = tmp_path_factory.mktemp("runs") / "out"
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep()
    logging.getLogger("dinosr_hf").addHandler(handler)
    record = recognise(
        model, corpus, out, start={"mask_feature_prob": 0.25}, recognition={"case": "upper"}, **EVERY_STEP
    )
    logging.getLogger("dinosr_hf").removeHandler(handler)
    return record, out, messages


def test_run_record_is_complete(finished, model, corpus):
    record, out, _ = finished
    assert read_record(out) == record
    assert (record.task, record.steps, record.base_model) == ("automatic-speech-recognition", 3, str(model))
    (data,) = record.data
    assert (data["name"], data["split"], data["utterances"], data["unreadable"]) == (str(corpus), "train", 12, 0)
    assert data["hours"] == pytest.approx(sum(open_labelled(corpus, split="train").num_samples) / 16_000 / 3600)
    assert [(figures["split"], figures["num_utterances"]) for figures in record.evaluation] == [
        ("validation", 5),
        ("test", 5),
    ]
    for figures in record.evaluation:
        assert figures["real_time_factor"] > 0
    arguments = record.arguments
    assert (arguments["case"], arguments["mask_feature_prob"], arguments["step_seconds"]) == ("upper", 0.25, 1.0)
    assert {"dinosr_hf", "torch", "transformers"} <= set(record.versions)
    assert record.started <= record.finished


def test_error_rates_are_totals_of_the_predictions_file(finished):
    record, out, _ = finished
    for figures, name in zip(record.evaluation, ("eval", "test"), strict=True):
        rows = [json.loads(line) for line in (out / f"predictions-{name}.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == 5
        assert figures["wer"] == sum(row["word_errors"] for row in rows) / sum(row["num_words"] for row in rows)
        assert figures["cer"] == sum(row["character_errors"] for row in rows) / sum(
            row["num_characters"] for row in rows
        )
        assert f"# Errors on {name}" in (out / f"errors-{name}.md").read_text("utf-8")


def test_characters_of_other_splits_are_reported_and_left_out_of_the_vocabulary(finished):
    _, out, messages = finished
    assert set(AutoProcessor.from_pretrained(out).tokenizer.get_vocab()) == {
        *("<pad>", "<s>", "</s>", "<unk>", "|"),
        *"HELOMN",
    }
    assert any("1 labels are not in the vocabulary: 'Z' 1 times" in message for message in messages)
    references = [json.loads(line)["reference"] for line in (out / "predictions-test.jsonl").read_text().splitlines()]
    assert "ZOO" in references


def test_saved_model_reproduces_the_predictions(finished, corpus):
    _, out, _ = finished
    assert TextNormalization.load(out) == TextNormalization(case="upper")
    processor, model = AutoProcessor.from_pretrained(out), AutoModelForCTC.from_pretrained(out).eval()
    assert model.config.vocab_size == len(processor.tokenizer)
    assert model.lm_head.weight.dtype == torch.float32
    rows = [json.loads(line) for line in (out / "predictions-eval.jsonl").read_text("utf-8").splitlines()]
    said = {row["id"]: row["prediction"] for row in rows}
    source = open_labelled(corpus, split="validation")
    for position, name in enumerate(source.ids):
        inputs = processor(source.load(position), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            frames = model(**inputs).logits[0].argmax(dim=-1)
        assert texts_of([frames.numpy()], processor.tokenizer) == [said[name]]


def test_emission_delay_is_measured_and_saved(model, corpus, tmp_path, monkeypatch):
    measure = "dinosr_hf.finetuning.ctc_task.measure_emission_delay"
    monkeypatch.setattr(measure, lambda utterances: len(list(utterances)) / 100)
    recognise(model, corpus / "train", tmp_path / "out", data={"eval_data": str(corpus / "validation")}, max_steps=1)
    rows = (tmp_path / "out" / "predictions-eval.jsonl").read_text("utf-8").splitlines()
    assert len(rows) > 0
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert stored_emission_delay(tokenizer) == len(rows) / 100


def test_each_dataset_has_its_hours_in_the_record(model, tmp_path):
    folders = [write_corpus(tmp_path / name, count, seed=count) for name, count in (("a", 5), ("b", 7))]
    table = folders[1] / "metadata.csv"
    table.write_text(re.sub("^02.wav,.*", "02.wav,...,en", table.read_text(), flags=re.MULTILINE))

    def spoil(trainer):
        (folders[1] / "05.wav").write_bytes(b"nothing")

    data = {"train_data": [*map(str, folders)], "eval_data": [*map(str, folders)]}
    record = recognise(model, folders[0], tmp_path / "out", data=data, max_steps=3, on_trainer=spoil)
    counts = [(entry["name"], entry["utterances"], entry["unreadable"]) for entry in record.data]
    assert counts == [(str(folders[0]), 5, 0), (str(folders[1]), 6, 1)]
    lengths = open_labelled(folders[0]).num_samples
    assert record.data[0]["hours"] == pytest.approx(sum(lengths) / 16_000 / 3600)
    assert [result["dataset"] for result in record.evaluation] == [", ".join(map(str, folders))]


def test_only_arguments_change_the_configuration(finished, model):
    _, out, _ = finished
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert after["mask_feature_prob"] == 0.25
    assert changed <= {
        *("mask_feature_prob", "vocab_size", "architectures", "ctc_loss_reduction", "auto_map"),
        *("transformers_version", "use_cache"),  # the latter is Trainer's
    }


def test_from_scratch_uses_only_the_configuration(model):
    random, start = (
        load_initial_model(DinoSRForCTC, InitialModelArguments(model=str(model), from_scratch=flag), {"vocab_size": 9})
        for flag in (True, False)
    )
    assert random.config.mask_feature_prob == 0.125
    assert random.config.hidden_size == start.config.hidden_size
    assert {name: value.shape for name, value in random.named_parameters()} == {
        name: value.shape for name, value in start.named_parameters()
    }
    assert not torch.equal(random.state_dict()[LAYER], start.state_dict()[LAYER])
    assert torch.equal(start.state_dict()[LAYER], load_file(model / "model.safetensors")[LAYER])
    # Random convolutions are trained; those of a checkpoint are frozen.
    assert all(value.requires_grad for value in random.parameters())
    assert not any(value.requires_grad for value in start.dinosr.feature_extractor.parameters())


def test_fine_tuning_continues_with_the_same_vocabulary(finished, corpus, tmp_path):
    _, out, _ = finished
    processor = {"processor": str(out)}
    recognise(out, corpus, tmp_path / "again", recognition=processor, learning_rate=1e-12, max_steps=1)
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"], atol=1e-6, rtol=0)
    assert (tmp_path / "again" / "vocab.json").read_text() == (out / "vocab.json").read_text()
    assert TextNormalization.load(tmp_path / "again").case == "upper"


def test_a_head_for_other_labels_starts_anew(finished, corpus, tmp_path, caplog):
    _, out, _ = finished
    recognise(out, corpus, tmp_path / "lower", learning_rate=1e-12, max_steps=1)  # as many letters, none the same
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "lower"))
    assert after["lm_head.weight"].shape == before["lm_head.weight"].shape
    assert (after["lm_head.weight"] - before["lm_head.weight"]).abs().max() > 1e-3
    assert after["lm_head.weight"].std() == pytest.approx(0.02, rel=0.3)
    torch.testing.assert_close(after[LAYER], before[LAYER], atol=1e-6, rtol=0)
    assert "was trained with other labels" in caplog.text and "give its folder as --processor" in caplog.text


def test_fine_tuning_continues_with_another_vocabulary(finished, corpus, tmp_path):
    _, out, _ = finished
    phones = corpus / "phones.csv"
    phones.write_text("path,phones\ntrain/00.wav,HH AH L OW\ntrain/01.wav,M UW N\n")
    options = {"data": {"label_column": "phones"}, "recognition": {"units": "phonemes"}, "max_steps": 1}
    recognise(out, phones, tmp_path / "phones", **options)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "phones").tokenizer
    assert {"HH", "OW", "UW"} < set(tokenizer.get_vocab())
    assert AutoModelForCTC.from_pretrained(tmp_path / "phones").lm_head.out_features == len(tokenizer)


@pytest.mark.parametrize("is_best", [True, False], ids=["the best", "the last"])
def test_checkpoint_with_the_lowest_ranking_is_kept(model, corpus, tmp_path, monkeypatch, is_best):
    rankings = iter([0.5, 0.2, 0.9, *[0.4] * 9])
    metrics = {"wer": 1.0, "cer": 1.0}  # which do not tell them apart
    monkeypatch.setattr(Recognition, "metrics", lambda self, prediction: metrics | {"ranking": next(rankings)})
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.lm_head.weight.detach().clone())

    recognise(
        *(model, corpus, tmp_path / "out"),
        on_trainer=lambda trainer: trainer.add_callback(Keep()),
        load_best_model_at_end=is_best,
        **EVERY_STEP,
    )
    kept = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert [torch.equal(kept, weight) for weight in seen] == [False, is_best, not is_best]


def test_number_of_epochs_sets_the_number_of_steps(model, corpus, tmp_path):
    record = recognise(
        *(model, corpus, tmp_path / "out"),
        max_steps=-1,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    hours = record.data[0]["hours"]
    assert record.steps == 2 * max(1, round(hours * 3600 / 1.0))
    assert (tmp_path / "out" / f"checkpoint-{record.steps}").is_dir()


def logits_of(model):
    with torch.no_grad():
        return model.eval()(waveforms(2, 700)).logits


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16 and recomputation"])
def test_adapters_are_trained_merged_and_resumed(model, corpus, tmp_path, mixed):
    train = corpus / "train"
    start = {"lora_rank": 2, "hidden_dropout": 0.1}
    start |= {"lora_targets": ["q_proj", "output_dense"]} if mixed else {}
    options = {"start": start, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    options |= {"bf16": True, "gradient_checkpointing": True} if mixed else {}
    last = {}

    class Keep(TrainerCallback):
        def __init__(self, stop=None):
            self.stop = stop

        def on_step_end(self, args, state, control, model=None, **kwargs):
            control.should_training_stop = state.global_step == (self.stop or 99)
            last.update({name: value.detach().clone() for name, value in model.named_parameters()})
            if state.global_step == 4:
                last["logits"] = logits_of(model)

    recognise(model, train, tmp_path / "whole", on_trainer=lambda t: t.add_callback(Keep()), **options)
    start_weights = load_file(model / "model.safetensors")
    learnt = {name for name, value in last.items() if "lora_B" in name and value.any()}
    assert len(learnt) == 2 * 3  # two of each of three layers; by default q_proj and v_proj
    for name, value in last.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain.startswith("dinosr.") and "lora" not in name:
            assert torch.equal(value, start_weights[plain]), name
    merged = AutoModelForCTC.from_pretrained(tmp_path / "whole")
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    tolerance = 5e-2 if mixed else 1e-4
    torch.testing.assert_close(logits_of(merged), last["logits"], atol=tolerance, rtol=tolerance)
    assert not torch.equal(merged.state_dict()[LAYER], start_weights[LAYER])

    cut = tmp_path / "cut"
    recognise(model, train, cut, on_trainer=lambda t: t.add_callback(Keep(2)), **options)
    recognise(model, train, cut, resume_from_checkpoint="true", **options)
    resumed = load_file(cut / "model.safetensors")
    for name, value in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("speed_change", [0.0, 0.15])
def test_labels_must_fit_at_the_highest_speed(model, corpus, tmp_path, caplog, speed_change):
    train, samples = shutil.copytree(corpus / "train", tmp_path / "train"), waveforms(1, 700)[0].numpy()
    soundfile.write(train / "just.wav", samples / 10, 16_000)
    with open(train / "metadata.csv", "a") as file:  # as many letters as frames
        file.write(f"just.wav,{('ab' * 99)[: tiny_config().num_frames(700)]},en\n")
    recognise(model, train, tmp_path / "out", data={"speed_change": speed_change}, max_steps=1)
    message = "1 of 13 utterances are left out of training: 1 too short for their transcript (e.g. just.wav)"
    assert (message in caplog.text) is (speed_change > 0)


def assert_refused(message, *arguments, **options):
    with pytest.raises(ArgumentError, match=message):
        recognise(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"eval_strategy": "steps", "load_best_model_at_end": False},
            r"There is no evaluation data\. Give eval_data or eval_split",
        ),
        (
            {"start": {"lora_rank": 2, "lora_targets": ["query"]}},
            "lora_targets has query, but the model has no layer of that name",
        ),
        ({"start": {"mask_time_prob": 2.0}}, r"mask_time_prob=2\.0 is out of range: .*at most 1"),
        ({"start": {"mask_feature_length": 0}}, "mask_feature_length=0 is out of range: it must be at least 1"),
        ({"start": {"mask_feature_length": 99}}, "mask_feature_length=99 is longer than hidden_size=36"),
        ({"start": {"hidden_dropout": -1.0}}, r"hidden_dropout=-1\.0 is out of range"),
        ({"start": {"lora_rank": -1}}, "lora_rank=-1 is out of range"),
        ({"data": {"max_seconds": 0.001}}, r"max_seconds=0\.001 is out of range: it must be more than min_seconds"),
        ({"data": {"speed_change": 1.0}}, r"speed_change=1\.0 is out of range"),
        ({"data": {"synthetic_utterances": 0}}, "synthetic_utterances=0 is out of range"),
        (
            {"data": {"label_column": "words"}},
            "label_column=words: .* has no column 'words'. Its columns are file_name, transcription, language",
        ),
        ({"recognition": {"processor": "nowhere"}}, "processor=nowhere is not a folder, and the Hub cannot"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model=loss has no effect: the task decides"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0\.1 has no effect"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True has no effect"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False has no effect"),
        ({"num_train_epochs": 4.5}, r"num_train_epochs=4\.5 has no effect: max_steps=3 counts. Set --max_steps -1"),
        ({"save_only_model": True}, "save_only_model=True has no effect: .* could not be resumed"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True has no effect: a signal such as SIGTERM"),
    ],
)
def test_invalid_runs_are_refused(model, corpus, tmp_path, options, message):
    assert_refused(message, model, corpus / "train", tmp_path / "out", **options)


def test_evaluation_data_without_a_known_letter_is_refused(model, corpus, tmp_path):
    other = shutil.copytree(corpus / "validation", tmp_path / "other")
    (other / "metadata.csv").write_text("file_name,transcription\n00.wav,OH\n01.wav,NO\n")
    message = r"other: none of its 2 transcripts has a label of the vocabulary, which is .* e h l m n o\. Is --case or"
    data, case = {"eval_data": [str(other)]}, {"case": "keep"}
    assert_refused(message, model, corpus / "train", tmp_path / "out", data=data, recognition=case, **EVERY_STEP)


def test_the_last_checkpoint_is_always_kept():
    assert FinetuningArguments(save_total_limit=1).save_total_limit == 2
    assert FinetuningArguments(save_total_limit=1, eval_strategy="no").save_total_limit == 1


def test_other_models_are_refused(model, corpus, tmp_path):
    assert_refused(
        "model=.*nowhere is neither a folder nor a model on the Hub", tmp_path / "nowhere", corpus, tmp_path / "out"
    )
    BertConfig().save_pretrained(tmp_path / "bert")
    assert_refused("model=.*bert is a bert, not a DinoSR", tmp_path / "bert", corpus, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    shutil.copy(model / "config.json", tmp_path / "empty")
    assert_refused("model=.*empty.*no file named|model=.*empty: ", tmp_path / "empty", corpus, tmp_path / "out")


@pytest.fixture
def script(monkeypatch):
    module = load_command("finetune_ctc")
    monkeypatch.setattr(logging.getLogger("dinosr_hf"), "level", logging.INFO)

    def call(*words):
        module.main([*map(str, words)])

    return call


def test_script_trains_and_prints_error_rates(script, model, corpus, tmp_path, capsys):
    path, out = tmp_path / "a.yaml", tmp_path / "out"
    path.write_text(f"model: {model}\ntrain_data: [{corpus}]\nmin_seconds: 0.01\nstep_seconds: 1.0\neval_steps: 2\n")
    flags = ["--max_steps", 2, "--save_steps=2", "--micro_seconds", 1, "--use_cpu", "true", "--disable_tqdm", "true"]
    flags += ["--num_threads", 1]
    script(path, "--output_dir", out, *flags)
    said = capsys.readouterr().out
    figures = read_record(out).evaluation
    for entry in figures:
        assert f"{entry['split']}: word error rate {entry['wer']:.2%}" in said
    assert f"pipeline(model={str(out)!r})" in said
    assert np.isfinite([entry["wer"] for entry in figures]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--learning_rat", "1"],
            r"finetune_ctc\.py: learning_rat is not a known argument\. The nearest is learning_rate",
        ),
        (["--train_data", "nowhere"], r"finetune_ctc\.py: nowhere does not exist"),
        (["--warmup_steps", "9"], r"finetune_ctc\.py: warmup_steps=9.* has no effect"),
        (["--save_steps", "3", "--eval_steps", "2"], r"finetune_ctc\.py: .*multiple of the evaluation steps"),
        (
            ["--save_steps", "4", "--eval_steps", "2"],
            r"finetune_ctc\.py: save_steps=4 is not eval_steps=2, so the best",
        ),
    ],
    ids=["flag", "data", "warm-up", "evaluation without checkpoint", "best without checkpoint"],
)
def test_script_reports_errors_in_one_line(script, model, tmp_path, words, message):
    with pytest.raises(SystemExit, match=message):
        script("--model", model, "--output_dir", tmp_path / "out", *words)


def test_a_gpu_without_memory_says_what_to_change(script, model, corpus, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr("dinosr_hf.finetuning.trainer.SpeechTrainer.train", fail)
    flags = ["--model", model, "--train_data", corpus, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    message = r"^finetune_ctc\.py: CUDA out of memory\. Tried to allocate 2\.00 GiB\. Lower --micro_seconds, which"
    with pytest.raises(SystemExit, match=message):
        script(*flags, "--min_seconds", 0.01, "--max_steps", 1, "--eval_strategy", "no")


def test_a_head_that_learns_alone_to_the_end_is_said(script, model, corpus, tmp_path, caplog):
    flags = ["--model", model, "--train_data", corpus, "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    script(*flags, "--min_seconds", 0.01, "--max_steps", 2, "--freeze_steps", 2, "--eval_strategy", "no", "--dry_run")
    assert "freeze_steps=2 reaches to the last of max_steps=2: only the head learns." in caplog.text


def test_a_dry_run_says_what_would_be_trained(script, model, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", model, "--train_data", corpus, "--output_dir", out, "--use_cpu", "true", "--num_threads", 1]
    script(*flags, "--min_seconds", 0.01, "--step_seconds", 2.0, "--micro_seconds", 1, "--max_steps", 7, "--dry_run")
    said = capsys.readouterr().out
    assert re.search(r"^training +\d+ of \d+ utterances, [\d.]+ minutes$", said, re.MULTILINE)
    assert re.search(r"^labels +11: <pad> <s> </s> <unk> \| e h l m n o$", said, re.MULTILINE)
    assert re.search(r"^steps +7 of [\d.]+ s of audio on average over 1 process\(es\), in \d+ micro-batch", said, re.M)
    assert "start       the first step" in said and said.endswith("Nothing was trained.\n")
    assert not list(out.glob("*"))
