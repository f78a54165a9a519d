"""Batches of labelled utterances: the same steps for any processes, each utterance once, and padding."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dinosr_hf.data import AudioFileError, LabelledSource, SpeechSource, Utterance
from dinosr_hf.data.packing import pack_evenly
from dinosr_hf.finetuning import LabelledCollator, LabelledDataset, LengthBatchSampler, StepBatchSampler
from dinosr_hf.finetuning.batches import Example

GENERATOR = np.random.default_rng(7)
LENGTHS = GENERATOR.integers(800, 9_000, 103).tolist()


def sampler(num_accumulated=1, rank=0, world_size=1, *, lengths=LENGTHS, step_samples=40_000, seed=3, num_buckets=5):
    return StepBatchSampler(
        lengths,
        step_samples=step_samples,
        num_accumulated=num_accumulated,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_buckets=num_buckets,
    )


def steps_of(num_accumulated, world_size, epoch=0, **settings):
    """The set of utterances of each step, from the batches of all processes."""
    steps = None
    for rank in range(world_size):
        own = sampler(num_accumulated, rank, world_size, **settings)
        own.set_epoch(epoch)
        batches = list(own)
        assert len(batches) == len(own)
        groups = [batches[first : first + num_accumulated] for first in range(0, len(batches), num_accumulated)]
        flat = [sorted(index for batch in group for index in batch) for group in groups]
        steps = flat if steps is None else [sorted(a + b) for a, b in zip(steps, flat, strict=True)]
    return steps


# -- steps


def test_steps_are_the_same_for_any_processes_and_micro_batches():
    one = steps_of(1, 1)
    for num_accumulated, world_size in ((8, 1), (1, 3), (4, 2), (50, 2)):
        assert steps_of(num_accumulated, world_size) == one
    assert steps_of(8, 1, seed=4) != one


@pytest.mark.parametrize("epoch", [0, 1, 2, 9])
def test_each_utterance_is_in_one_step_of_an_epoch(epoch):
    steps = steps_of(3, 2, epoch)
    assert sorted(index for step in steps for index in step) == list(range(len(LENGTHS)))


def test_epochs_have_equally_many_different_steps():
    epochs = [steps_of(1, 1, epoch) for epoch in range(12)]
    assert {len(steps) for steps in epochs} == {round(sum(LENGTHS) / 40_000)}
    assert len({str(steps) for steps in epochs}) == 12
    assert steps_of(1, 1, 5) == epochs[5]


def test_steps_have_the_requested_audio():
    for epoch in range(5):
        for step in steps_of(1, 1, epoch):
            assert sum(LENGTHS[index] for index in step) == pytest.approx(40_000, abs=max(LENGTHS))


def test_a_step_has_utterances_of_similar_lengths():
    spread = np.mean([np.std([LENGTHS[index] for index in step]) for step in steps_of(1, 1)])
    assert spread < 0.5 * np.std(LENGTHS)
    mixed = np.mean([np.std([LENGTHS[index] for index in step]) for step in steps_of(1, 1, num_buckets=1)])
    assert mixed > spread


def test_micro_batches_are_of_similar_size():
    own = sampler(4)
    for batch in own:
        padded = max((LENGTHS[index] for index in batch), default=0) * len(batch)
        assert padded <= 40_000 / 4 + 2 * max(LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "step_samples", "num_steps"),
    [([500], 40_000, 1), ([500] * 3, 100, 3), ([40_000, 40_000, 100], 40_000, 2), (LENGTHS, 10**9, 1)],
    ids=["one", "more steps than utterances", "two long ones", "all in one"],
)
def test_few_utterances(lengths, step_samples, num_steps):
    own = sampler(3, lengths=lengths, step_samples=step_samples)
    assert own.num_steps == num_steps
    assert len(list(own)) == len(own) == 3 * num_steps
    assert sorted(index for batch in own for index in batch) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths", [[900, 10, 10, 10, 900, 10, 10], [100] * 9 + [2_000], [1_000] * 5])
def test_no_step_is_empty(lengths):
    own = sampler(lengths=lengths, step_samples=500)
    for epoch in range(5):
        steps = own.steps(epoch)
        assert len(steps) == own.num_steps and all(steps)
        assert sorted(index for step in steps for index in step) == list(range(len(lengths)))


def test_no_utterances_are_refused():
    with pytest.raises(ValueError, match="There are no utterances to train on"):
        sampler(lengths=[])


@pytest.mark.parametrize("num_pieces", [1, 2, 3, 5, 11])
def test_even_batches_have_the_smallest_maximum(num_pieces):
    lengths = np.array([9, 9, 7, 6, 4, 4, 2, 1])
    pieces = pack_evenly(range(8), lengths.__getitem__, num_pieces)
    assert len(pieces) == num_pieces
    assert [member for piece in pieces for member in piece] == list(range(8))

    def greatest(found):
        return max(len(piece) * lengths[piece[0]] for piece in found if len(piece))

    # All ways to cut the eight, longest first, into so many pieces.
    cuts = np.array(np.meshgrid(*[[0, 1]] * 7)).reshape(7, -1).T
    ways = [np.split(np.arange(8), np.flatnonzero(cut) + 1) for cut in cuts if cut.sum() < num_pieces]
    assert greatest(pieces) == min(map(greatest, ways))


# -- evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_each_utterance_once(world_size):
    found = []
    for rank in range(world_size):
        own = LengthBatchSampler(LENGTHS, micro_samples=20_000, rank=rank, world_size=world_size)
        batches = list(own)
        assert len(batches) == len(own)
        found += [index for batch in batches for index in batch]
        for batch in batches:
            assert len(batch) == 1 or max(LENGTHS[index] for index in batch) * len(batch) <= 20_000
    assert sorted(found) == list(range(len(LENGTHS)))


def test_long_utterance_is_a_batch_of_its_own():
    assert list(LengthBatchSampler([5, 100, 5, 4], micro_samples=12)) == [[1], [0, 2], [3]]
    assert list(LengthBatchSampler([5], micro_samples=12, rank=1, world_size=2)) == []


# -- reading and padding


class Ramps(SpeechSource):
    """Utterance k has 300 + 100 k samples; those named are unreadable."""

    def __init__(self, num_utterances, broken=()):
        self.utterances = [Utterance(f"u{number}", 300 + 100 * number) for number in range(num_utterances)]
        self.skipped = {}
        self.broken = set(broken)

    def load(self, index, start=0, num_samples=None):
        if index in self.broken:
            raise AudioFileError(f"u{index} has gone bad.", "unreadable")
        ramp = np.arange(self.utterances[index].num_samples, dtype=np.float32)
        return ramp[start : None if num_samples is None else start + num_samples]


def dataset(num_utterances, broken=(), positions=None, **settings):
    source = LabelledSource(Ramps(num_utterances, broken), ["text"] * num_utterances)
    targets = [np.arange(1, 2 + number) for number in range(num_utterances)]
    return LabelledDataset(source, targets, positions, **settings)


def test_a_batch_is_normalised_and_padded():
    data = dataset(5, positions=[4, 1])
    assert (data.num_samples, data.ids) == ([700, 400], ["u4", "u1"])
    batch = LabelledCollator(40)([data[0], data[1]])
    assert batch["input_values"].shape == batch["attention_mask"].shape == (2, 700)
    assert batch["attention_mask"].sum(dim=1).tolist() == [700, 400]
    for row, length in enumerate((700, 400)):
        samples = batch["input_values"][row, :length]
        assert samples.mean().abs() < 1e-5
        assert samples.var(unbiased=False) == pytest.approx(1, abs=1e-3)
        assert not batch["input_values"][row, length:].any()
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5], [1, 2, -100, -100, -100]]
    assert (batch["index"].tolist(), batch["unreadable"].tolist()) == ([0, 1], [])


def test_classes_are_not_padded():
    data = LabelledDataset(LabelledSource(Ramps(2), ["a", "b"]), [1, 0])
    assert LabelledCollator(40)([data[0], data[1]])["labels"].tolist() == [1, 0]


def test_short_batches_are_padded_to_a_frame():
    batch = LabelledCollator(400)([Example(0, np.ones(10, dtype=np.float32), np.array([1]))])
    assert batch["input_values"].shape == (1, 400)
    assert batch["attention_mask"].sum() == 10


def test_unreadable_utterances_are_left_out_and_listed(caplog):
    data = dataset(4, broken=[1, 2])
    with caplog.at_level(logging.WARNING, "dinosr_hf"):
        batch = LabelledCollator(40)([data[index] for index in (1, 0, 2)])
    assert (batch["index"].tolist(), batch["unreadable"].tolist()) == ([0], [1, 2])
    assert len(batch["input_values"]) == 1
    assert "u1 is left out: u1 has gone bad." in caplog.text


@pytest.mark.parametrize("examples", [[], [Example(2, None, np.array([1]))]], ids=["empty", "unreadable"])
def test_batch_without_readable_utterances_is_a_silent_row(examples):
    batch = LabelledCollator(40)(examples)
    assert batch["index"].tolist() == [-1]
    assert batch["input_values"].tolist() == [[0.0] * 40]
    assert batch["labels"].tolist() == [[-100]]
    assert batch["unreadable"].tolist() == [example.index for example in examples]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_returns_the_batches_of_its_sampler(num_workers):
    data = dataset(9, broken=[3])
    own = sampler(4, lengths=data.num_samples, step_samples=2_000)
    found = list(DataLoader(data, batch_sampler=own, collate_fn=LabelledCollator(40), num_workers=num_workers))
    assert len(found) == len(own)
    for batch, wanted in zip(found, own, strict=True):
        read = [index for index in wanted if index != 3]
        assert batch["index"].tolist() == (read or [-1])
        assert batch["unreadable"].tolist() == [index for index in wanted if index == 3]


# -- parts and speeds


def test_crops_depend_on_the_epoch_only():
    data = dataset(8, crop_samples=500, seed=1)
    assert data.num_samples == [300, 400, 500, 500, 500, 500, 500, 500]
    first = data[7].waveform
    assert len(first) == 500
    assert np.array_equal(data[7].waveform, first)
    again = dataset(8, positions=[7], crop_samples=500, seed=1)
    assert np.array_equal(again[0].waveform, first)
    assert len(data[0].waveform) == 300


def test_speeds_depend_on_the_epoch_only():
    pytest.importorskip("soxr")
    data = dataset(8, speed_change=0.1, seed=1)
    lengths = []
    for epoch in range(20):
        data.epoch = epoch
        waveform = data[7].waveform
        assert waveform.dtype == np.float32
        assert np.array_equal(data[7].waveform, waveform)
        lengths.append(len(waveform))
    assert min(lengths) >= 1_000 / 1.1 - 2
    assert max(lengths) <= 1_000 / 0.9 + 2
    assert len(set(lengths)) > 10
    assert torch.from_numpy(waveform).isfinite().all()
    assert len(dataset(8)[7].waveform) == 1_000
