"""Steps do not depend on micro-batches and processes; freezing, learning rates, evaluation and invalid arguments."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

import forks
from dinosr_hf import DinoSRForCTC
from dinosr_hf.finetuning import FinetuningArguments, LabelledCollator, SpeechTrainer
from dinosr_hf.training.run_record import read_record
from dinosr_hf.utils.command_line import ArgumentError
from finetuning_runs import recognise, run_settings, write_corpus, write_model
from scripts import ROOT
from tiny import deterministic_config, waveforms


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 17)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class Watch(TrainerCallback):
    """Record what a run logs, and all weights after each update."""

    def __init__(self):
        self.losses, self.weights, self.rates, self.evaluations = [], [], [], []

    def __call__(self, trainer):
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        named = dict(model.named_parameters())
        self.weights.append({key: value.detach().clone() for key, value in named.items()})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in logs:
            self.evaluations.append(dict(logs))
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(first, second, tolerance):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_accumulation_equals_one_batch(tmp_path, model, corpus, reduction):
    whole, cut = Watch(), Watch()
    options = {"recognition": {"ctc_loss_reduction": reduction}}
    recognise(model, corpus, tmp_path / "whole", micro_seconds=9.0, on_trainer=whole, **options)
    recognise(model, corpus, tmp_path / "cut", micro_seconds=0.2, on_trainer=cut, **options)
    assert len(whole.losses) == 3
    assert cut.losses == pytest.approx(whole.losses, rel=1e-4)
    assert_equal_weights(weights(tmp_path / "cut"), weights(tmp_path / "whole"), 1e-5)


def test_mean_of_means_differs_from_one_batch(tmp_path, model, corpus, monkeypatch):
    # The control of the test above: micro-batches have different numbers of utterances.
    whole, cut = Watch(), Watch()
    recognise(model, corpus, tmp_path / "whole", micro_seconds=9.0, on_trainer=whole)

    def mean_of_means(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        count = int((inputs.pop("index") >= 0).sum())
        return model(**inputs).loss / max(1, count) / self.args.gradient_accumulation_steps

    monkeypatch.setattr(SpeechTrainer, "compute_loss", mean_of_means)
    recognise(model, corpus, tmp_path / "cut", micro_seconds=0.2, on_trainer=cut)
    difference = max(
        float((first - second).abs().max())
        for first, second in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True)
    )
    assert difference > 1e-4


def run_in_two_processes(script, *words):
    """Run a script in two processes; return what they wrote to stderr."""
    done = forks.run_in_processes(2, [ROOT / script, *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, model, corpus):
    data = {"eval_data": [str(corpus)]}
    settings = {"max_steps": 4, "freeze_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    settings |= {"save_strategy": "steps", "load_best_model_at_end": False}
    one = recognise(model, corpus, tmp_path / "one", data=data, micro_seconds=9.0, **settings)
    (tmp_path / "empty.yaml").write_text("{}")
    options = {"model": model, "train_data": corpus, "eval_data": corpus, "min_seconds": 0.01}
    options |= {"output_dir": tmp_path / "two", **run_settings(micro_seconds=0.3, **settings)}
    words = [tmp_path / "empty.yaml", *(word for name, value in options.items() for word in (f"--{name}", value))]
    run_in_two_processes("examples/finetune_ctc.py", *words)
    assert_equal_weights(weights(tmp_path / "two"), weights(tmp_path / "one"), 1e-5)
    start = weights(model)
    two = read_record(tmp_path / "two")
    assert "2 process(es)" in two.hardware
    names = ("wer", "cer", "num_utterances")
    assert [{name: figures[name] for name in names} for figures in two.evaluation] == [
        {name: figures[name] for name in names} for figures in one.evaluation
    ]
    predictions = [(tmp_path / name / "predictions-eval.jsonl").read_text() for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    assert len(predictions[0].splitlines()) == 17
    final = weights(tmp_path / "two")
    layer = "dinosr.encoder.layers.0.attention.q_proj.weight"
    assert (final[layer] - start[layer]).abs().max() > 1e-4
    # The same command resumes: as if the run had been interrupted after its second step.
    record = tmp_path / "two" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": None}))
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    (tmp_path / "two" / "model.safetensors").unlink()
    if transformers.__version__.startswith("5.17."):
        with pytest.raises(AssertionError, match=r"transformers 5\.17.* cannot resume a run in several processes"):
            run_in_two_processes("examples/finetune_ctc.py", *words)
        return
    assert "Resuming from" in run_in_two_processes("examples/finetune_ctc.py", *words)
    assert_equal_weights(weights(tmp_path / "two"), final, 0.0)
    assert "This run is finished" in run_in_two_processes("examples/finetune_ctc.py", *words)


def test_plain_trainer_averages_accumulated_batches(tmp_path):
    torch.manual_seed(0)
    model = DinoSRForCTC(deterministic_config(ctc_loss_reduction="mean"))
    rows = [{"input_values": wave, "labels": torch.tensor([3, 4])} for wave in waveforms(4, 400)]

    def gradients(batch_size, accumulated):
        found = {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                found.update(
                    {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
                )

        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[Keep()]).train()
        return found

    whole, cut = gradients(4, 1), gradients(2, 2)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_encoder_is_frozen_at_first_and_convolutions_always(tmp_path, model, corpus):
    watch = Watch()
    recognise(model, corpus, tmp_path / "out", freeze_steps=2, max_steps=3, on_trainer=watch)
    first, second, third = watch.weights
    layer, conv = (
        "dinosr.encoder.layers.0.attention.q_proj.weight",
        "dinosr.feature_extractor.conv_layers.0.conv.weight",
    )
    start = weights(model)
    torch.testing.assert_close(second[layer], start[layer], atol=0, rtol=0)
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])
    assert not torch.equal(third[layer], start[layer])
    torch.testing.assert_close(third[conv], start[conv], atol=0, rtol=0)


def test_head_learning_rate_applies_to_the_head_only(tmp_path, model, corpus):
    watch = Watch()
    recognise(model, corpus, tmp_path / "out", learning_rate=1e-12, head_learning_rate=0.1, on_trainer=watch)
    layer = "dinosr.encoder.layers.0.attention.q_proj.weight"
    assert (watch.weights[-1][layer] - weights(model)[layer]).abs().max() < 1e-9
    assert (watch.weights[-1]["lm_head.weight"] - watch.weights[0]["lm_head.weight"]).abs().max() > 1e-3


def test_learning_rates_follow_the_schedule(tmp_path, model, corpus):
    watch = Watch()
    settings = {"warmup_share": 0.2, "hold_share": 0.4, "final_lr_scale": 0.05, "max_steps": 10}
    recognise(model, corpus, tmp_path / "out", on_trainer=watch, **settings)
    from dinosr_hf.training.schedules import tri_stage

    assert watch.rates == pytest.approx([1e-3 * tri_stage(step, **settings) for step in range(10)])


def test_network_selects_student_or_teacher(tmp_path, model, corpus):
    layer = "dinosr.encoder.layers.0.attention.q_proj.weight"
    start = weights(model)
    teacher = start["teacher.layers.0.attention.q_proj.weight"]
    assert not torch.equal(teacher, start[layer])
    for network, wanted in (("student", start[layer]), ("teacher", teacher)):
        recognise(model, corpus, tmp_path / network, start={"network": network}, freeze_steps=3)
        assert torch.equal(weights(tmp_path / network)[layer], wanted)
    with pytest.raises(ArgumentError, match="network=teacher needs a pre-training checkpoint"):
        recognise(tmp_path / "student", corpus, tmp_path / "again", start={"network": "teacher"})


def test_configuration_fields_that_are_not_given_stay(tmp_path, corpus):
    model = write_model(tmp_path / "model", mask_feature_prob=0.125, mask_feature_length=5)
    recognise(model, corpus, tmp_path / "kept")
    recognise(model, corpus, tmp_path / "changed", start={"mask_feature_prob": 0.25})
    kept, changed = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "changed"))
    assert (kept["mask_feature_prob"], changed["mask_feature_prob"]) == (0.125, 0.25)
    assert kept["hidden_dropout"] == 0.0


def test_unreadable_recordings_are_left_out(tmp_path, model):
    corpus = write_corpus(tmp_path / "corpus", 6)

    watch = Watch()

    def spoil(trainer):
        watch(trainer)
        for name in ("00.wav", "03.wav"):
            (corpus / name).write_bytes(b"nothing")

    record = recognise(model, corpus, tmp_path / "out", micro_seconds=0.05, max_steps=2, on_trainer=spoil)
    assert np.isfinite(watch.losses).all()
    assert record.data[0]["unreadable"] == 2


def test_steps_of_a_recording_each_without_a_readable_one_stop_the_run(tmp_path, model):
    corpus = write_corpus(tmp_path / "corpus", 6)

    def spoil(trainer):
        for file in corpus.glob("*.wav"):
            file.write_bytes(b"nothing")

    options = {"micro_seconds": 0.05, "step_seconds": 0.05, "max_steps": 5}
    with pytest.raises(ArgumentError, match=r"None of the 2 recordings up to step 2 could be read"):
        recognise(model, corpus, tmp_path / "out", on_trainer=spoil, **options)


def trainer_of(model, tmp_path, **changes):
    """A trainer of the tiny model, without a data set."""
    loaded = DinoSRForCTC.from_pretrained(model, vocab_size=9)
    return SpeechTrainer(loaded, FinetuningArguments(output_dir=str(tmp_path), **run_settings(**changes)))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_empty_micro_batch_has_zero_gradients(tmp_path, model, reduction):
    trainer = trainer_of(model, tmp_path)
    trainer.model.config.update({"ctc_loss_reduction": reduction, "apply_spec_augment": True, "mask_time_prob": 0.9})
    trainer.model.train()
    silence = LabelledCollator(trainer.model.config.receptive_field)([])
    silence.pop("unreadable")
    for count in (torch.tensor(0), torch.tensor(5)):
        loss = trainer.compute_loss(trainer.model, dict(silence), num_items_in_batch=count)
        loss.backward()
        assert loss == 0
    touched = [value.grad for value in trainer.model.parameters() if value.grad is not None]
    assert touched  # since other processes wait for their gradients
    assert not any(gradient.any() for gradient in touched)


def test_evaluation_loss_is_finite_for_short_utterances(tmp_path, corpus):
    model = write_model(tmp_path / "model", ctc_zero_infinity=False)
    short = write_corpus(tmp_path / "short", 3)
    soundfile.write(short / "01.wav", np.random.default_rng(0).normal(size=100) * 0.1, 16_000)  # a few frames
    soundfile.write(short / "02.wav", np.random.default_rng(0).normal(size=30) * 0.1, 16_000)  # not even one
    data = {"eval_data": [str(short)]}
    metrics = []
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "load_best_model_at_end": False}
    for micro_seconds in (9.0, 0.01):  # a single batch, and batches of one
        logged = Watch()
        out = tmp_path / str(micro_seconds)
        recognise(model, corpus, out, data=data, micro_seconds=micro_seconds, on_trainer=logged, **options)
        metrics.append(logged.evaluations[0])
    assert np.isfinite(metrics[0]["eval_loss"])
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-4)
    assert metrics[0]["eval_wer"] == metrics[1]["eval_wer"]


def test_short_long_and_empty_utterances_are_left_out_of_training(tmp_path, model, caplog):
    train = write_corpus(tmp_path / "train", 8)
    table = (train / "metadata.csv").read_text().splitlines()
    table[1] = "00.wav,...,en"
    table[2] = "01.wav," + "hello moon " * 60 + ",en"
    (train / "metadata.csv").write_text("\n".join(table) + "\n")
    for name, seconds in (("02", 0.02), ("03", 0.9)):
        soundfile.write(
            train / f"{name}.wav", np.random.default_rng(0).normal(size=int(16_000 * seconds)) * 0.1, 16_000
        )
    data = {"min_seconds": 0.03, "max_seconds": 0.8}
    with caplog.at_level("WARNING", "dinosr_hf"):
        record = recognise(model, train, tmp_path / "out", data=data, max_steps=1)
    assert record.data[0]["utterances"] == 4
    assert (
        "4 of 8 utterances are left out of training: 1 too long (e.g. 03.wav), 1 too short (e.g. 02.wav),"
        " 1 too short for their transcript (e.g. 01.wav), 1 with an empty transcript (e.g. 00.wav)."
    ) in caplog.text
    with pytest.raises(
        ArgumentError, match=r"none of 8 utterances can be trained on: 8 too short \(e\.g\. 00\.wav\)\. Check"
    ):
        recognise(model, train, tmp_path / "none", data={"min_seconds": 5.0})


def test_predictions_do_not_depend_on_padding(tmp_path, model, corpus):
    predictions = []
    for name, micro_seconds in (("together", 60.0), ("alone", 0.01)):
        recognise(
            *(model, corpus, tmp_path / name),
            data={"eval_data": [str(corpus)]},
            max_steps=1,
            micro_seconds=micro_seconds,
            learning_rate=1e-9,
            eval_strategy="steps",
            load_best_model_at_end=False,
        )
        predictions.append((tmp_path / name / "predictions-eval.jsonl").read_text())
    assert predictions[0] == predictions[1]
    assert any(json.loads(line)["prediction"] for line in predictions[0].splitlines())


def test_processes_that_are_not_connected_are_refused(tmp_path, model, monkeypatch):
    arguments = FinetuningArguments(output_dir=str(tmp_path), **run_settings())
    assert arguments.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match=r"2 processes were started, but they are not connected\. Set ddp_backend"):
        SpeechTrainer(DinoSRForCTC.from_pretrained(model), arguments)


@pytest.mark.parametrize("step_seconds", [1.0, 1.001, 7.0])
def test_accumulation_keeps_a_pass_below_micro_seconds(tmp_path, model, step_seconds):
    trainer = trainer_of(model, tmp_path, step_seconds=step_seconds, micro_seconds=0.5)
    assert trainer.args.gradient_accumulation_steps == math.ceil(step_seconds / 0.5)


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, 8), (2.9, 11), (3.1, 8)])
def test_accumulation_of_little_data(tmp_path, model, seconds, expected):
    loaded = DinoSRForCTC.from_pretrained(model, vocab_size=9)
    arguments = FinetuningArguments(output_dir=str(tmp_path), **run_settings(step_seconds=2.0, micro_seconds=0.25))
    train = SimpleNamespace(num_samples=[int(1_600 * seconds)] * 10)  # one or two steps
    trainer = SpeechTrainer(loaded, arguments, train_dataset=train)
    assert trainer.args.gradient_accumulation_steps == expected
    assert seconds / trainer.sampler.num_steps / expected <= 1.1 * 0.25


@pytest.mark.slow
def test_compiled_models_are_unfrozen(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 1)  # another length would be traced again
    few = {"conv_dim": [11], "conv_kernel": [40], "conv_stride": [20], "num_conv_pos_embeddings": 1}
    few |= {"num_hidden_layers": 1, "num_codebooks": 1}  # each layer takes seconds to trace
    model = write_model(tmp_path / "model", **few)
    watch = Watch()
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    graphs = torch._dynamo.utils.counters
    graphs.clear()
    recognise(model, corpus, tmp_path / "out", freeze_steps=1, max_steps=2, on_trainer=watch, **compiled)
    assert graphs["stats"]["unique_graphs"] > 0
    recognise(model, corpus, tmp_path / "plain", freeze_steps=1, max_steps=2)
    assert_equal_weights(weights(tmp_path / "out"), weights(tmp_path / "plain"), 1e-6)
    layer = "encoder.layers.0.attention.q_proj.weight"
    before = load_file(model / "model.safetensors")[f"dinosr.{layer}"]
    first, second = [next(value for name, value in step.items() if name.endswith(layer)) for step in watch.weights]
    assert torch.equal(before, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 4}, "per_device_train_batch_size=4 has no effect.*step_seconds"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4 has no effect"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type=.*has no effect.*schedule"),
        ({"warmup_steps": 4}, "warmup_steps=4 has no effect.*warmup_share"),
        ({"step_seconds": 0}, "step_seconds=0 is out of range"),
        ({"push_to_hub": True}, "push_to_hub=True has no effect: publish the finished folder with dinosr publish"),
        ({"hub_model_id": "me/mine"}, "hub_model_id=me/mine has no effect: publish the finished folder"),
        ({"hub_token": "hf_S3cr3t"}, "hub_token has no effect: publish the finished folder"),
        ({"fsdp": "full_shard"}, "fsdp splits the weights, and evaluation and saving need them whole"),
        ({"deepspeed": "zero.json"}, "deepspeed splits the weights"),
        ({"hold_share": 0.7, "warmup_share": 0.5}, "hold_share=0.7 is out of range"),
        ({"schedule": "linear"}, "schedule=linear is out of range: it must be one of tri_stage"),
    ],
    ids=[
        "batch",
        "accumulation",
        "scheduler",
        "warmup",
        "step",
        "push",
        "name",
        "token",
        "fsdp",
        "deepspeed",
        "hold",
        "schedule",
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        FinetuningArguments(**changes)
