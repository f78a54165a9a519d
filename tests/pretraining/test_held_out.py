"""Held-out speech: the same figures for any batches and processes, an unchanged model, an evaluation that fails."""

import contextlib
import json
import logging
import types

import numpy as np
import pytest
import torch

from dinosr_hf.analysis import Segment, UnitQuality, unit_quality
from dinosr_hf.analysis.model_units import frame_units, layer_tables
from dinosr_hf.data import AudioFileError, SpeechSource, Utterance, normalize_waveform, utterance_generator
from dinosr_hf.model.masking_dinosr import sample_span_mask
from dinosr_hf.pretraining import run
from dinosr_hf.pretraining.held_out import HeldOut
from pretraining_runs import metrics_of, tiny_arguments
from tiny import pretraining_model, state_of, tiny_config

# A frame has 20 samples, the first one 40; a second has 16,000.
LENGTHS = {"a/1.flac": 1601, "a/2.flac": 990, "b/3.flac": 2405, "b/4.flac": 700}
SECONDS = {"batch_seconds": 0.35, "limit_seconds": 10.0, "max_seconds": 0.125}  # 2,000 samples, which cuts b/3
CLOSE = {"rel": 1e-5}


class MemorySource(SpeechSource):
    """Noise of given lengths; some utterances cannot be read."""

    def __init__(self, lengths=LENGTHS, broken=()):
        self.utterances = [Utterance(name, length) for name, length in lengths.items()]
        self.skipped = {}
        self.broken = broken

    def load(self, index, start=0, num_samples=None):
        name, length = self.utterances[index]
        if name in self.broken:
            raise AudioFileError(f"{name} has gone bad.", "broken")
        samples = np.random.default_rng(length).normal(size=length).astype(np.float32)
        return samples[start:][:num_samples]


def model_in_training(**changes):
    return pretraining_model(tiny_config(**changes)).train()


def held_out(model, source=None, **changes):
    return HeldOut(source or MemorySource(), model.config, **{**SECONDS, "step_seconds": 20 / 16_000, **changes})


def labels_of(lengths=LENGTHS, num_phones=3):
    """Return a phone for each step of 20 samples, the same for 16 consecutive steps."""
    return {name: [f"P{step // 16 % num_phones}" for step in range(length // 20)] for name, length in lengths.items()}


def assert_same(figures, expected):
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, **CLOSE), name


@torch.no_grad()
def test_the_loss_is_the_mean_over_single_utterances():
    model = model_in_training()
    figures = held_out(model).evaluate(model)
    model.eval()
    total, frames, counts = torch.zeros(2), 0, 0
    for index, (name, length) in enumerate(LENGTHS.items()):
        waveform = normalize_waveform(MemorySource().load(index, 0, min(length, 2000)))
        generator = utterance_generator(0, 0, name, "mask")
        shape = (1, model.config.num_frames(len(waveform)))
        mask = sample_span_mask(shape, model.config.mask_prob, model.config.mask_length, generator=generator)
        output = model(torch.from_numpy(waveform)[None], mask_time_indices=torch.from_numpy(mask))
        total += output.codebook_losses * mask.sum()
        frames, counts = frames + mask.sum(), counts + output.code_counts
    assert figures["codebook_losses"] == pytest.approx((total / frames).tolist(), **CLOSE)
    assert figures["loss"] == pytest.approx((total / frames).mean().item(), **CLOSE)
    assert figures["codebook_active_codewords"] == (counts > 0).sum(dim=1).tolist()
    assert figures["seconds"] == (1601 + 990 + 2000 + 700) / 16_000
    assert figures["skipped_files"] == 0
    assert "pnmi" not in figures and "padded_share" not in figures


def test_evaluation_changes_nothing():
    model = model_in_training()
    model.dinosr.encoder.eval()  # differs from the rest
    speech = held_out(model, labels=labels_of())
    before, modes = state_of(model), [module.training for module in model.modules()]
    random_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = speech.evaluate(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert np.array_equal(np.random.get_state()[1], random_state[1])
    model.update_targets(1)  # commits nothing, since nothing was accumulated
    for name in ("codebooks.sums", "codebooks.counts"):
        assert torch.equal(model.state_dict()[name], before[name])
    model.load_state_dict(before)
    assert speech.evaluate(model) == first


def test_another_model_gets_other_figures():
    model = model_in_training()
    speech = held_out(model)
    first = speech.evaluate(model)
    with torch.no_grad():
        model.heads[0].weight.mul_(1.5)
    assert speech.evaluate(model)["loss"] != pytest.approx(first["loss"], rel=1e-3)


@pytest.mark.parametrize("batch_seconds", [0.01, 0.2, 100.0], ids=["alone", "some", "together"])
def test_any_batches_give_the_same_figures(batch_seconds):
    model = model_in_training()
    expected = held_out(model, labels=labels_of()).evaluate(model)
    speech = held_out(model, labels=labels_of(), batch_seconds=batch_seconds)
    assert_same(speech.evaluate(model), expected)


class Processes:
    """Fake the accelerators of several processes: adds up what each reduces, and returns the sum so far."""

    def __init__(self, num_processes):
        self.num_processes = num_processes
        self.seen = []

    def of_rank(self, rank):
        calls = iter(range(10))

        def reduce(tensor, reduction):
            assert reduction == "sum"
            call = next(calls)
            if rank == 0:
                self.seen.append(tensor.clone())
            else:
                self.seen[call] += tensor
            return self.seen[call].clone()

        cpu = torch.autocast("cpu", enabled=False)
        return types.SimpleNamespace(
            process_index=rank, num_processes=self.num_processes, reduce=reduce, autocast=lambda: cpu
        )


@pytest.mark.parametrize("num_processes", [2, 3, 5], ids=["two", "three", "more-than-batches"])
def test_any_number_of_processes_gives_the_same_figures(num_processes):
    model = model_in_training()
    speech = held_out(model, MemorySource(broken=["a/2.flac"]), labels=labels_of(), batch_seconds=0.13)
    expected = speech.evaluate(model)
    processes = Processes(num_processes)
    for rank in range(num_processes - 1):
        # the first ones get the sum so far, which may be nothing
        with contextlib.suppress(ValueError):
            speech.evaluate(model, processes.of_rank(rank))
    assert_same(speech.evaluate(model, processes.of_rank(num_processes - 1)), expected)
    assert expected["skipped_files"] == 1


def test_autocast_is_the_accelerator_s():
    model = model_in_training()
    accelerator = Processes(1).of_rank(0)
    expected = held_out(model).evaluate(model, accelerator)
    accelerator = Processes(1).of_rank(0)
    accelerator.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    low = held_out(model, labels=labels_of()).evaluate(model, accelerator)
    assert low["loss"] == pytest.approx(expected["loss"], abs=0.05)
    assert low["loss"] != expected["loss"]


def test_the_choice_is_of_whole_utterances_and_does_not_depend_on_their_order():
    model = model_in_training()
    lengths = {f"{number}.wav": 400 + 37 * number for number in range(30)}
    limits = {"limit_seconds": 6000 / 16_000, "batch_seconds": 1.0}
    figures = held_out(model, MemorySource(lengths), **limits).evaluate(model)
    assert 5000 / 16_000 < figures["seconds"] <= 6000 / 16_000
    turned = dict(reversed(lengths.items()))
    assert_same(held_out(model, MemorySource(turned), **limits).evaluate(model), figures)
    other = held_out(model, MemorySource(lengths), **limits, seed=1).evaluate(model)
    assert other["loss"] != pytest.approx(figures["loss"], rel=1e-4)


def test_the_digest_is_of_what_the_loss_depends_on():
    model = model_in_training()
    digest = held_out(model).digest
    turned = MemorySource(dict(reversed(LENGTHS.items())))
    for same in (held_out(model, turned), held_out(model, batch_seconds=1.0, labels=labels_of())):
        assert same.digest == digest
    sources = [MemorySource({**LENGTHS, "b/4.flac": 701}), MemorySource({f"x/{name}": 990 for name in LENGTHS})]
    others = [held_out(model, source) for source in sources]
    others += [held_out(model, limit_seconds=0.12), held_out(model, max_seconds=0.12), held_out(model, seed=1)]
    others += [held_out(model_in_training(**{name: 4})) for name in ("mask_length", "mask_min_spans")]
    others.append(held_out(model_in_training(mask_prob=0.5)))
    assert len({digest, *(other.digest for other in others)}) == 9


def test_phone_purity_is_over_all_frames_of_the_teacher():
    model = model_in_training()
    figures = held_out(model, labels=labels_of()).evaluate(model)
    model.eval()
    phones, units = [], []
    for index, length in enumerate(LENGTHS.values()):
        waveform = normalize_waveform(MemorySource().load(index, 0, min(length, 2000)))
        num_frames = model.config.num_frames(len(waveform))
        # the centre of frame i is sample 20 i + 20, where step i + 1 begins
        phones += [f"P{(i + 1) // 16 % 3}" for i in range(num_frames)]
        units.append(frame_units(model, waveform).numpy())
    qualities = [unit_quality(phones, codes, num_codes=7) for codes in np.concatenate(units, axis=1)]
    assert figures["pnmis"] == pytest.approx([quality.pnmi for quality in qualities])
    assert figures["phone_purities"] == pytest.approx([quality.phone_purity for quality in qualities])
    best = max((0, 1), key=lambda number: qualities[number].pnmi)
    assert figures["pnmi"] == figures["pnmis"][best] and figures["phone_purity"] == figures["phone_purities"][best]
    assert figures["best_layer"] == 2 + best


@torch.no_grad()
def test_an_anchor_s_labels_are_evaluated_too():
    model = model_in_training(num_anchor_labels=9)  # more than codewords
    speech = held_out(model, labels=labels_of())
    figures = speech.evaluate(model)
    model.eval()
    phones = [phone for _, own in speech.labelled_speech() for phone in own]
    units = [frame_units(model, waveform, "anchor")[0].numpy() for waveform, _ in speech.labelled_speech()]
    expected = unit_quality(phones, np.concatenate(units), num_codes=9).pnmi
    assert figures["anchor_pnmi"] == pytest.approx(expected) and expected > 0
    assert len(figures["pnmis"]) == 2 and figures["anchor_pnmi"] not in figures["pnmis"]
    assert "anchor_pnmi" not in held_out(model).evaluate(model)
    plain = model_in_training()
    assert "anchor_pnmi" not in held_out(plain, labels=labels_of()).evaluate(plain)


def test_labelled_speech_gives_the_same_quality():
    model = model_in_training()
    labels = {name: phones for name, phones in labels_of().items() if name != "a/1.flac"}
    broken = held_out(model, MemorySource(broken=["b/4.flac"]), labels=labels)
    speech = list(broken.labelled_speech())
    # longest first; b/3 is cut to 2,000 samples
    for index, (waveform, phones) in zip((2, 1), speech, strict=True):
        assert torch.equal(
            torch.from_numpy(waveform), torch.from_numpy(normalize_waveform(MemorySource().load(index, 0, 2000)))
        )
        assert len(phones) == model.config.num_frames(len(waveform))
    pnmis = broken.evaluate(model)["pnmis"]
    for evaluated, is_all in ((speech, True), (speech[:1], False)):
        tables, _ = layer_tables(model.eval(), evaluated)
        assert ([UnitQuality.from_table(table).pnmi for table in tables] == pytest.approx(pnmis)) == is_all


def test_labels_are_found_by_file_name():
    model = model_in_training()
    expected = held_out(model, labels=labels_of()).evaluate(model)
    by_stem = {name[2]: labels for name, labels in labels_of().items()}
    assert_same(held_out(model, labels=by_stem).evaluate(model), expected)


def test_utterances_without_labels_count_for_the_loss_only(caplog):
    model = model_in_training()
    some = {name: labels for name, labels in labels_of().items() if name != "b/3.flac"}
    with caplog.at_level(logging.INFO, "dinosr_hf"):
        figures = held_out(model, labels=some).evaluate(model)
    assert "4 of 4 utterances" in caplog.text and "3 with labels of 3 phones" in caplog.text
    everything = held_out(model, labels=labels_of()).evaluate(model)
    assert figures["loss"] == pytest.approx(everything["loss"])
    assert figures["pnmi"] != pytest.approx(everything["pnmi"])


def test_labels_can_be_those_of_the_synthetic_corpus():
    phones = [{"label": "x", "start": 0.0, "end": 0.03}, {"label": "y", "start": 0.03, "end": 1.0}]
    model = model_in_training()
    figures = held_out(model, labels=dict.fromkeys(LENGTHS, phones)).evaluate(model)
    assert 0 <= figures["pnmi"] <= 1 and figures["phone_purity"] > 0.5
    segments = [Segment("x", 0.0, 0.03), Segment("y", 0.03, 1.0)]
    assert held_out(model, labels=dict.fromkeys(LENGTHS, segments)).evaluate(model) == figures


def test_unreadable_utterances_are_skipped_and_counted(caplog):
    model = model_in_training()
    broken = MemorySource(broken=["a/2.flac", "b/4.flac"])
    figures = held_out(model, broken, labels=labels_of()).evaluate(model)
    whole = MemorySource({name: length for name, length in LENGTHS.items() if name not in broken.broken})
    expected = held_out(model, whole, labels=labels_of()).evaluate(model)
    assert figures.pop("skipped_files") == 2 and expected.pop("skipped_files") == 0
    assert_same(figures, expected)
    assert "Skipped held-out utterance a/2.flac: a/2.flac has gone bad." in caplog.text


@pytest.mark.parametrize("count", [3, 4])
def test_an_evaluation_that_lacks_most_utterances_is_an_error(count):
    model = model_in_training()
    with pytest.raises(ValueError, match=f"{count} of 4 held-out utterances could not be read"):
        held_out(model, MemorySource(broken=list(LENGTHS)[:count])).evaluate(model)


def test_labels_of_recordings_that_are_not_used_are_not_anothers():
    source = MemorySource({"ann/1.wav": 900, "bob/1.wav": 50})  # bob's is too short
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'ann/1\.wav' and 'bob/1\.wav'"):
        held_out(pretraining_model(), source, labels={"1": ["A"] * 45})
    source = MemorySource({"ann/1.wav": 900})
    source.skipped = {"hidden": [".old/1.wav"]}  # a copy
    assert held_out(pretraining_model(), source, labels={"1": ["A"] * 45}).num_utterances == 1
    source.skipped["empty"] = ["bob/1.wav"]
    with pytest.raises(ValueError, match=r"labels of '1' fit two recordings, 'ann/1\.wav' and 'bob/1\.wav'"):
        held_out(pretraining_model(), source, labels={"1": ["A"] * 45})


@pytest.mark.parametrize(
    ("lengths", "labels", "message"),
    [
        ({"a": 50}, None, r"None of 1 held-out recordings is at least 0\.005 s long, which mask_length"),
        (LENGTHS, {"z": ["A"]}, r"None of 4 .* has labels. They are named like '.*flac', the labels like 'z'"),
        (LENGTHS, {}, "the labels like 'nothing'"),
        ({"a/1.wav": 900, "b/1.wav": 900}, {"1": ["A"] * 5}, "labels of '1' fit two recordings, './1.wav' and"),
        ({"a": 1600}, {"a": ["A"]}, "labels of the held-out utterance 'a': 1 labels of 0.00125 s cover 0.001 s"),
    ],
    ids=["too-short", "no-match", "no-labels", "ambiguous", "labels-of-something-else"],
)
def test_unusable_speech_or_labels_are_refused(lengths, labels, message):
    with pytest.raises(ValueError, match=message):
        held_out(pretraining_model(), MemorySource(lengths), labels=labels)


def test_a_failed_last_evaluation_costs_nothing(tmp_path, recordings, monkeypatch):
    changes = {"eval_data": str(recordings), "eval_steps": 1, "max_steps": 2, "checkpoint_steps": 2}
    arguments = tiny_arguments(tmp_path, recordings, **changes)
    plain, steps = HeldOut.evaluate, []

    def fail_at_the_second(*given, **options):
        steps.append(len(steps))
        if len(steps) == 2:
            raise RuntimeError("out of memory")
        return plain(*given, **options)

    monkeypatch.setattr(HeldOut, "evaluate", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(arguments)
    monkeypatch.setattr(HeldOut, "evaluate", plain)
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file()
    run(arguments)  # from the checkpoint: only the evaluation is left
    lines = [(line["step"], "eval_loss" in line) for line in metrics_of(out)]
    assert lines == [(1, False), (1, True), (2, False), (2, True)]
    assert json.loads((out / "run.json").read_text())["finished"]
