"""Plans of steps against a slow and simple twin, and equal steps for any processes, micro-batches and workers."""

from __future__ import annotations

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import (
    AudioFileError,
    Crop,
    FolderSource,
    PretrainingCollator,
    SpeechSource,
    StepDataset,
    StepLoader,
    Utterance,
    micro_batches,
    plan_epoch,
    summarize_plan,
)
from dinosr_hf.data.batching import MicroBatch, SkippedUtterance
from dinosr_hf.data.collator import Item, Part, utterance_generator, utterance_hash, utterance_speed
from tolerances import SAME_ARITHMETIC


def corpus(num_utterances: int, seed: int = 0) -> list[int]:
    """Return lengths with a long tail, some equal, some below and above the limits of the tests."""
    lengths = np.random.default_rng(seed).gamma(4.0, 30, num_utterances).astype(int) + 5
    lengths[::7] = 90
    return lengths.tolist()


LIMITS = {"step_samples": 1_000, "min_samples": 40, "max_samples": 250}
SIZES = [1, 2, 13, 100, 731]


def naive_plan(num_samples, *, seed, epoch, step_samples, min_samples, max_samples, mode, num_buckets, ids, speeds):
    """Plan an epoch in the most literal way, with random draws in the same order as `plan_epoch`."""
    speeds = speeds or [1.0] * len(num_samples)
    num_samples = [math.floor(n / speed) for n, speed in zip(num_samples, speeds, strict=True)]
    generator = utterance_generator(seed, epoch, "", "plan")
    length = {index: min(n, max_samples) for index, n in enumerate(num_samples) if n >= min_samples}
    tie = dict(zip(length, generator.random(len(length)), strict=True))
    in_order = sorted(length, key=lambda index: (length[index], tie[index]))
    total, place = 0, {}
    for index in in_order:
        total += length[index]
        place[index] = total
    for index, shift in zip(in_order, generator.random(len(length)), strict=True):
        place[index] += shift * sum(length.values()) / num_buckets
    in_order.sort(key=place.__getitem__)
    if generator.random() >= 0.5:
        in_order.reverse()

    steps = [[]]
    for index in in_order:
        if sum(length[other] for other in steps[-1]) + length[index] > step_samples:
            steps.append([])
        steps[-1].append(index)
    if len(steps) > 1 and sum(length[index] for index in steps[-1]) < step_samples / 2:
        steps.pop()

    plan = []
    for step in steps:
        shortest = min(length[index] for index in step)
        plan.append([])
        for index in step:
            taken = shortest if mode == "crop" else length[index]
            share = utterance_hash(seed, epoch, ids[index], "crop") / 2**128
            plan[-1].append((index, math.floor(share * (num_samples[index] - taken + 1)), taken, epoch, speeds[index]))
    return [plan[position] for position in generator.permutation(len(plan))]


@pytest.mark.filterwarnings("ignore:All .* utterances together")
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("num_buckets", [1, 7])
@pytest.mark.parametrize("speed_change", [None, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_plan_equals_the_naive_plan(size, speed_change, num_buckets, mode):
    lengths, ids = corpus(size), [f"u{k}" for k in range(size)]
    speeds = None if speed_change is None else [utterance_speed(3, 2, name, speed_change) for name in ids]
    options = dict(LIMITS, seed=3, epoch=2, mode=mode, num_buckets=num_buckets, ids=ids, speeds=speeds)
    assert plan_epoch(lengths, **options) == naive_plan(lengths, **options)


@pytest.mark.filterwarnings("ignore:All .* utterances together")
@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epoch", range(3))
def test_invariants_of_a_plan(size, mode, epoch):
    lengths = corpus(size, seed=epoch)
    steps = plan_epoch(lengths, **LIMITS, seed=0, epoch=epoch, mode=mode)

    members = [crop.index for step in steps for crop in step]
    assert len(members) == len(set(members))
    assert all(steps)
    for step in steps:
        taken = [crop.num_samples for crop in step]
        uncropped = [min(lengths[crop.index], LIMITS["max_samples"]) for crop in step]
        assert sum(taken) <= sum(uncropped) <= LIMITS["step_samples"]
        assert taken == ([min(uncropped)] * len(step) if mode == "crop" else uncropped)
        for index, start, num_samples, own_epoch, speed in step:
            assert (own_epoch, speed) == (epoch, 1)
            assert lengths[index] >= LIMITS["min_samples"]
            assert 0 <= start <= lengths[index] - num_samples
    if len(steps) > 1:
        eligible = sum(n >= LIMITS["min_samples"] for n in lengths)
        left_over = LIMITS["step_samples"] / 2 / LIMITS["min_samples"]
        assert eligible - left_over < len(members) <= eligible
        assert min(sum(min(lengths[c.index], LIMITS["max_samples"]) for c in step) for step in steps) >= 500


def test_same_seed_and_epoch_give_the_same_plan():
    lengths = corpus(200)
    first, again, epoch, seed = (
        plan_epoch(lengths, **LIMITS, seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 0), (0, 1), (1, 0)]
    )
    assert first == again
    assert sorted(map(sorted, first)) != sorted(map(sorted, epoch))
    assert sorted(map(sorted, first)) != sorted(map(sorted, seed))


@pytest.mark.filterwarnings("ignore:All .* utterances together")
def test_start_of_a_crop_depends_on_its_utterance_only():
    """It is a fraction of the available room: the same in any order of the corpus, for any other utterances."""
    lengths = [300, 500, 700, 900]
    ids = ["a", "b", "c", "d"]
    options = {"seed": 0, "epoch": 0, "step_samples": 4_000, "min_samples": 1, "max_samples": 250, "mode": "pad"}
    plan = plan_epoch(lengths, **options, ids=ids)
    turned = plan_epoch(lengths[::-1], **options, ids=ids[::-1])
    alone = plan_epoch(lengths[2:3], **options, ids=ids[2:3])
    starts = {ids[crop.index]: crop.start for crop in plan[0]}
    assert starts == {ids[::-1][crop.index]: crop.start for crop in turned[0]}
    assert alone[0][0].start == starts["c"]
    assert len(set(starts.values())) == 4


@pytest.mark.filterwarnings("ignore:All .* utterances together")
def test_crops_are_uniform_and_change_with_the_epoch():
    options = {"seed": 0, "step_samples": 100, "min_samples": 1, "max_samples": 100}
    starts = [plan_epoch([1_099], epoch=epoch, **options)[0][0].start for epoch in range(2_000)]
    assert min(starts) < 10
    assert max(starts) > 990
    assert abs(np.mean(starts) - 499.5) < 5 * 1_000 / math.sqrt(12 * 2_000)


def test_buckets_group_similar_lengths():
    lengths = corpus(2_000)
    lost = []
    for num_buckets in (1, 5, 40):
        steps = plan_epoch(lengths, **LIMITS, seed=0, epoch=0, num_buckets=num_buckets)
        lost.append(summarize_plan(steps, lengths, min_samples=40, micro_samples=1_000).cropped_share)
    assert lost[0] > 1.5 * lost[1] > 1.5**2 * lost[2]


def test_dropped_utterances_vary_in_length():
    lengths = list(range(100, 149))
    options = {"seed": 0, "step_samples": 1_000, "min_samples": 1, "max_samples": 1_000}
    dropped = set()
    for epoch in range(20):
        members = {crop.index for step in plan_epoch(lengths, epoch=epoch, **options) for crop in step}
        dropped |= set(range(49)) - members
    assert min(dropped) < 5
    assert max(dropped) > 43


def test_members_of_an_epoch_may_repeat():
    """A plan of members equals that of a corpus with one utterance per member, but for the passes that seed crops."""
    lengths = corpus(150)
    ids = [f"u{k}" for k in range(150)]
    members = [(index, own_epoch) for index in range(0, 150, 2) for own_epoch in range(7, 7 + index % 3)]
    assert len(members) > len({index for index, _ in members})
    options = dict(LIMITS, max_samples=100, seed=3, epoch=2)
    steps = plan_epoch(lengths, ids=ids, members=members, **options)
    apart = plan_epoch([lengths[index] for index, _ in members], **options)

    assert [[members[crop.index] for crop in step] for step in apart] == [
        [(c.index, c.epoch) for c in s] for s in steps
    ]
    for step in steps:
        for index, start, num_samples, own_epoch, _ in step:
            share = utterance_hash(3, own_epoch, ids[index], "crop") / 2**128
            assert start == math.floor(share * (lengths[index] - num_samples + 1))
    starts = {}
    for crop in (crop for step in steps for crop in step if lengths[crop.index] > 150):
        starts.setdefault(crop.index, []).append(crop.start)
    assert all(len(set(each)) == len(each) for each in starts.values())
    assert max(map(len, starts.values())) == 2


@pytest.mark.filterwarnings("ignore:All .* utterances together")
def test_limits_hold_at_each_speed():
    members = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    speeds = [1.25, 0.8, 1.25, 0.8, 1.5]
    options = {"min_samples": 90, "max_samples": 110, "step_samples": 1_000, "seed": 0, "epoch": 0}
    (step,) = plan_epoch([100, 120, 1_000], members=members, speeds=speeds, **options, mode="pad")
    # Of 80, 125, 96, 150 and 666 samples.
    assert sorted((c.index, c.epoch, c.speed, c.num_samples) for c in step) == [
        (0, 1, 0.8, 110),
        (1, 0, 1.25, 96),
        (1, 1, 0.8, 110),
        (2, 0, 1.5, 110),
    ]
    assert all(
        crop.start <= length - crop.num_samples for crop, length in zip(sorted(step), (125, 96, 150, 666), strict=True)
    )


def test_all_members_are_the_default():
    lengths = corpus(100)
    options = dict(LIMITS, seed=0, epoch=4)
    members = [(index, 4) for index in range(100)]
    assert plan_epoch(lengths, members=members, **options) == plan_epoch(lengths, **options)
    assert plan_epoch(lengths, members=np.array(members), **options) == plan_epoch(lengths, **options)


def test_no_members():
    with pytest.raises(ValueError, match=r"None of 0 utterances is at least .*min_samples"):
        plan_epoch([100, 100], members=[], **LIMITS, seed=0, epoch=0)


def test_windows_of_an_epoch_have_different_orders():
    lengths = corpus(100)
    plans = [plan_epoch(lengths, **LIMITS, seed=0, epoch=0, window=window) for window in (0, 0, 1, 2)]
    assert plans[0] == plans[1] == plan_epoch(lengths, **LIMITS, seed=0, epoch=0)
    assert plans[0] != plans[2] != plans[3] != plans[0]


def test_the_crop_of_an_utterance_does_not_depend_on_its_window():
    lengths = corpus(100)
    first, other = (
        {
            crop.index: crop
            for step in plan_epoch(lengths, **LIMITS, seed=0, epoch=0, mode="pad", window=w)
            for crop in step
        }
        for w in (0, 1)
    )
    both = first.keys() & other.keys()
    assert any(first[index].start > 0 for index in both)
    assert all(first[index] == other[index] for index in both)


def test_less_than_a_step_is_one_step_with_a_warning():
    with pytest.warns(UserWarning, match=r"All 3 utterances together \(120 samples, 0.0 s\) are no more than a step"):
        steps = plan_epoch([40, 40, 10, 40], **LIMITS, seed=0, epoch=0)
    assert sorted(crop.index for crop in steps[0]) == [0, 1, 3]


def test_no_utterance_is_long_enough():
    message = r"None of 2 utterances is at least 0\.0025 s long \(min_samples=40, .* the longest: 39 samples, 0.0 s"
    with pytest.raises(ValueError, match=message):
        plan_epoch([12, 39], **LIMITS, seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"None of 0 utterances .* there are none"):
        plan_epoch([], **LIMITS, seed=0, epoch=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_samples": 251}, "min_samples=251, max_samples=250 and step_samples=1,000 must .* rise in this order"),
        ({"max_samples": 1_001}, "max_samples=1,001 and step_samples=1,000 must be at least 1 and rise"),
        ({"min_samples": 0}, "min_samples=0, .* must be at least 1"),
        ({"mode": "cut"}, "mode='cut' is unknown. Choose one of crop, pad"),
        ({"num_buckets": 0}, "num_buckets=0 is out of range"),
        ({"ids": ["a"]}, "There are 1 ids for 2 utterances"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradicting_limits_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_epoch([100, 100], **(dict(LIMITS, seed=0, epoch=0) | change))


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_samples", [250, 400, 5_000])
def test_micro_batches_share_out_the_step(world_size, micro_samples, mode):
    lengths = corpus(500)
    plan = plan_epoch(lengths, **LIMITS, seed=0, epoch=0, mode=mode)
    steps = [step for step in plan if len(step) >= world_size]
    assert len(steps) > len(plan) / 2
    for step in steps:
        before = copy.copy(step)
        shares = [
            micro_batches(step, rank=rank, world_size=world_size, micro_samples=micro_samples)
            for rank in range(world_size)
        ]
        assert step == before
        assert sorted(crop for pieces in shares for piece in pieces for crop in piece) == sorted(step)
        for pieces in shares:
            assert pieces
            for piece in pieces:
                assert len(piece) * max(crop.num_samples for crop in piece) <= micro_samples
        counts = [len(pieces) for pieces in shares]
        sizes = [sum(map(len, pieces)) for pieces in shares]
        assert max(sizes) - min(sizes) <= 1
        # Equal, unless a process has fewer utterances than others have micro-batches.
        assert all(count == max(counts) or count == size for count, size in zip(counts, sizes, strict=True))


def test_micro_batches_are_as_few_as_possible():
    step = [Crop(k, 0, 100) for k in range(10)]
    assert [len(piece) for piece in micro_batches(step, rank=0, world_size=1, micro_samples=1_000)] == [10]
    assert [len(piece) for piece in micro_batches(step, rank=0, world_size=1, micro_samples=999)] == [5, 5]
    assert [len(piece) for piece in micro_batches(step, rank=0, world_size=1, micro_samples=420)] == [3, 3, 4]
    assert [len(piece) for piece in micro_batches(step, rank=1, world_size=4, micro_samples=200)] == [1, 2]


def test_step_with_too_few_utterances():
    step = [Crop(k, 0, 16_000) for k in range(3)]
    with pytest.raises(
        ValueError, match=r"A step of 3 utterances \(48,000 samples, 3.0 s\) cannot be shared by 4 processes"
    ):
        micro_batches(step, rank=0, world_size=4, micro_samples=100_000)


def test_micro_batch_too_small_for_one_utterance():
    with pytest.raises(ValueError, match=r"micro_samples=15,999 is less than one utterance \(16,000 samples, 1.0 s\)"):
        micro_batches([Crop(0, 0, 16_000)], rank=0, world_size=1, micro_samples=15_999)


@pytest.mark.parametrize("rank", [-1, 2])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank={rank} is out of range"):
        micro_batches([Crop(0, 0, 5)] * 4, rank=rank, world_size=2, micro_samples=10)


def test_summary_counts_everything():
    lengths = [10, 30, 90, 100, 100, 200]
    steps = [[Crop(3, 0, 90), Crop(2, 0, 90)], [Crop(5, 0, 80), Crop(4, 0, 100)]]
    summary = summarize_plan(steps, lengths, min_samples=20, micro_samples=200)

    assert summary[:5] == (2, 4, 1, 1, 2)
    assert summary.hours == pytest.approx(360 / 16_000 / 3_600)
    assert summary.seconds_per_step == pytest.approx(180 / 16_000)
    assert summary.cropped_share == pytest.approx(1 - 360 / 490)
    assert summary.padded_share == pytest.approx(1 - 360 / 380)
    assert "4 utterances in 2 steps" in str(summary)
    assert "1 too short, 1 left over; 26.5% of the audio cropped away, 5.3% padding" in str(summary)
    members = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0)]
    twice = summarize_plan(steps, lengths, min_samples=20, micro_samples=200, members=members)
    assert (twice.num_too_short, twice.num_dropped) == (1, 2)
    # At these speeds the first has 20 samples, the second 15, the last 250.
    fast = [[crop._replace(speed=0.8) if crop.index == 5 else crop for crop in step] for step in steps]
    at_speed = summarize_plan(fast, lengths, min_samples=20, micro_samples=200, speeds=[0.5, 2.0, 1.0, 1.0, 1.0, 0.8])
    assert (at_speed.num_too_short, at_speed.num_dropped) == (1, 1)
    assert at_speed.cropped_share == pytest.approx(1 - 360 / 540)
    mixed = summarize_plan(
        fast, lengths, min_samples=20, micro_samples=200, members=members[1:], speeds=[2.0, 1.0, 1.0, 1.0, 1.0, 0.8]
    )
    assert (mixed.num_too_short, mixed.num_dropped) == (2, 1)
    halves = summarize_plan(steps, lengths, min_samples=20, world_size=2, micro_samples=200)
    assert (halves.num_micro_batches, halves.padded_share) == (4, 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    soundfile = pytest.importorskip("soundfile")
    folder = tmp_path_factory.mktemp("speech")
    generator = np.random.default_rng(0)
    for k in range(14):
        samples = generator.normal(0, 0.1, 8_000 + 700 * k).astype(np.float32)
        soundfile.write(folder / f"{k}.flac", samples, 16_000)
    return FolderSource(folder)


def centres(part: Part) -> np.ndarray:
    """Label each frame of a part with the sample of the whole utterance at its centre."""
    return part.start + part.centres(320, 400).astype(np.int64)


def step_dataset(source, *, rank=0, world_size=1, micro_samples=32_000, mode="crop", epoch=0, speed_change=None):
    ids = [utterance.id for utterance in source.utterances]
    steps = plan_epoch(
        [utterance.num_samples for utterance in source.utterances],
        ids=ids,
        speeds=None if speed_change is None else [utterance_speed(0, epoch, name, speed_change) for name in ids],
        seed=0,
        epoch=epoch,
        step_samples=50_000,
        min_samples=4_000,
        max_samples=16_000,
        mode=mode,
    )
    collator = PretrainingCollator(DinoSRConfig(), seed=0, anchor=centres)
    return StepDataset(source, steps, collator, rank, world_size, micro_samples)


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.skipped == other.skipped
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


def rows(batches):
    """Return samples, mask and anchor's labels of each utterance, in an order that does not depend on the batches."""
    found = [
        (values[: int(length)].tolist(), mask.tolist(), labels.tolist())
        for batch, _ in batches
        for values, mask, labels, length in zip(
            batch["input_values"],
            batch["mask_time_indices"],
            batch["anchor_labels"],
            batch.get("attention_mask", torch.ones_like(batch["input_values"])).sum(1),
            strict=True,
        )
    ]
    num_frames = DinoSRConfig().num_frames
    return sorted((v, mask[: num_frames(len(v))], labels[: num_frames(len(v))]) for v, mask, labels in found)


def test_step_holds_the_planned_crops(source):
    dataset = step_dataset(source)
    assert len(dataset) > 1
    batches = dataset[0]
    pieces = dataset.micro_batches(0)
    assert len(batches) == len(pieces) == 2
    for batch, piece in zip(batches, pieces, strict=True):
        items = [
            Item(source.utterances[c.index].id, source.load(c.index, c.start, c.num_samples), 0, c.start)
            for c in piece
        ]
        assert_same([batch], [MicroBatch(dataset.collator(items), [])])
        assert batch.inputs["anchor_labels"][:, 0].tolist() == [c.start + 200 for c in piece]
    assert any(c.start > 0 for piece in pieces for c in piece)


class Made(SpeechSource):
    """A source of one recording in memory."""

    def __init__(self, waveform):
        self.waveform, self.skipped = waveform.astype(np.float32), {}
        self.utterances = [Utterance("a", len(waveform))]

    def load(self, index, start=0, num_samples=None):
        assert start >= 0 and start + num_samples <= len(self.waveform)
        return self.waveform[start : start + num_samples]


def read_at_speed(waveform, start, num_samples, speed, anchor=None):
    """Return input and labels of a part of a recording at some speed, not normalised."""
    collator = PretrainingCollator(DinoSRConfig(), seed=0, normalize=False, anchor=anchor)
    dataset = StepDataset(Made(waveform), [], collator, 0, 1, 1_000_000)
    inputs = dataset.read([Crop(0, start, num_samples, 0, speed)]).inputs
    return inputs["input_values"][0].numpy(), inputs.get("anchor_labels")


@pytest.mark.parametrize("speed", [0.6066, 0.9123, 1.0, 1.25, 1.6487])
def test_a_tone_is_as_much_higher_as_its_speed(speed):
    tone = np.sin(2 * np.pi * 440 / 16_000 * np.arange(30_001))
    for start, num_samples in [(0, 4_321), (777, 9_999), (int(30_001 / speed) - 8_000, 8_000)]:
        faster, _ = read_at_speed(tone, start, num_samples, speed)
        assert faster.shape == (num_samples,)
        samples = math.floor(start * speed) + speed * np.arange(num_samples)
        # At the ends the filter reaches past the part.
        inner = slice(200, -200) if speed != 1 else slice(None)
        angles = 2 * np.pi * 440 / 16_000 * samples[inner]
        np.testing.assert_allclose(faster[inner], np.sin(angles), **SAME_ARITHMETIC)
        assert abs(faster[inner] - np.sin(angles / speed)).max() > 0.5 or speed == 1


def test_every_length_is_exact_at_every_speed():
    rng, waveform = np.random.default_rng(0), np.random.default_rng(1).normal(size=9_000)
    for _ in range(200):
        speed = utterance_speed(0, int(rng.integers(10**6)), "a", 0.5)
        length = int(9_000 / speed)
        num_samples = int(rng.integers(4_000, length + 1))
        for start in (0, length - num_samples):
            assert len(read_at_speed(waveform, start, num_samples, speed)[0]) == num_samples


@pytest.mark.parametrize("speed", [0.75, 1.0, 1.31])
def test_labels_follow_the_speed(speed):
    onset = 20_000  # of noise after silence
    noise = np.random.default_rng(0).normal(size=40_000) * (np.arange(40_000) >= onset)
    start, num_samples = 7_000, 20_000
    faster, labels = read_at_speed(noise, start, num_samples, speed, lambda part: (centres(part) >= onset) + 0)
    first = np.flatnonzero(abs(faster) > 0.1)[0]
    assert first == pytest.approx(onset / speed - start, abs=10)
    at_frame = np.searchsorted(200 + 320 * np.arange(labels.shape[1]), onset / speed - start)
    assert labels[0].argmax() == at_frame > 0 and labels[0, at_frame:].all()
    assert (at_frame == np.searchsorted(start + 200 + 320 * np.arange(labels.shape[1]), onset)) == (speed == 1)


def test_recordings_too_bad_for_a_speed_are_skipped_as_well():
    for waveform, message in [(np.zeros(9_000), "are 0"), (np.full(9_000, np.nan), "NaN or infinite")]:
        collator = PretrainingCollator(DinoSRConfig(), seed=0)
        (skipped,) = StepDataset(Made(waveform), [], collator, 0, 1, 10**6).read([Crop(0, 9, 5_000, 0, 1.2)]).skipped
        assert re.search(message, skipped.message)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_step_does_not_depend_on_processes_and_micro_batches(source, mode):
    perturbed = {"mode": mode, "speed_change": 0.2, "epoch": 1}  # whose steps have three utterances at least
    whole = step_dataset(source, **perturbed, micro_samples=1_000_000)
    assert len({crop.speed for step in whole.steps for crop in step}) > 10
    for step in range(len(whole)):
        expected = rows(whole[step])
        for world_size, micro_samples in [(1, 16_000), (2, 32_000), (3, 16_000)]:
            batches = [
                batch
                for rank in range(world_size)
                for batch in step_dataset(
                    source, **perturbed, rank=rank, world_size=world_size, micro_samples=micro_samples
                )[step]
            ]
            assert len(batches) > 1
            assert rows(batches) == expected
    assert rows(whole[0]) != rows(step_dataset(source, **perturbed | {"epoch": 0}, micro_samples=1_000_000)[0])
    assert rows(whole[0]) != rows(step_dataset(source, mode=mode, epoch=1, micro_samples=1_000_000)[0])


class Damaged(SpeechSource):
    """A source with utterances that became unusable after they were listed."""

    def __init__(self, source, damages):
        self.source = source
        self.utterances = source.utterances
        self.skipped = {}
        self.damages = damages

    def load(self, index, start=0, num_samples=None):
        waveform = self.source.load(index, start, num_samples).copy()
        damage = self.damages.get(index)
        if isinstance(damage, Exception):
            raise damage
        if damage is not None:
            waveform[slice(None) if damage == 0 else 7] = damage
        return waveform


DAMAGES = {
    "unreadable": (AudioFileError("x.flac is truncated", "truncated"), "x.flac is truncated"),
    "disk": (OSError(5, "Input/output error"), r"\[Errno 5\] Input/output error"),
    "silent": (0, "All [0-9,]+ samples of the part are 0"),
    "nan": (np.nan, "NaN or infinite"),
    "infinite": (np.inf, "NaN or infinite"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_unusable_utterances_are_skipped_and_reported(source, damage, message, num_workers):
    dataset = step_dataset(source, mode="pad", micro_samples=1_000_000)
    bad = dataset.micro_batches(1)[0][0]  # the longest: without it there is less padding
    rest = [[crop for crop in piece if crop != bad] for piece in dataset.micro_batches(1)]
    damaged = step_dataset(Damaged(source, {bad.index: damage}), mode="pad", micro_samples=1_000_000)
    batches = list(StepLoader(damaged, num_workers=num_workers))[1]

    (skipped,) = batches[0].skipped
    assert skipped.utterance_id == source.utterances[bad.index].id
    assert re.search(message, skipped.message)
    assert [batch.skipped for batch in batches[1:]] == [[]] * (len(batches) - 1)
    expected = [dataset.read(piece) for piece in rest]
    assert_same([batch._replace(skipped=[]) for batch in batches], expected)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_micro_batch_with_all_skipped_is_silence(source, mode):
    dataset = step_dataset(Damaged(source, dict.fromkeys(range(14), 0)), mode=mode)
    for step in range(len(dataset)):
        for (inputs, skipped), piece in zip(dataset[step], dataset.micro_batches(step), strict=True):
            assert [entry.utterance_id for entry in skipped] == [source.utterances[crop.index].id for crop in piece]
            num_samples = min(crop.num_samples for crop in piece)
            assert inputs["input_values"].shape == (1, num_samples)
            assert inputs["mask_time_indices"].shape == (1, DinoSRConfig().num_frames(num_samples))
            assert (inputs.pop("anchor_labels") == -100).all()
            assert not any(tensor.any() for tensor in inputs.values())


def test_other_errors_are_raised(source):
    dataset = step_dataset(Damaged(source, {k: ImportError("no decoder") for k in range(14)}))
    with pytest.raises(ImportError, match="no decoder"):
        next(iter(StepLoader(dataset)))


def test_pinning_keeps_the_types(monkeypatch):
    """torch would convert plain tuples to lists; tested without a GPU."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    batch = MicroBatch({"input_values": torch.ones(1, 3)}, [SkippedUtterance("a", "b", "silent")])
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(pinned) is MicroBatch
    assert [type(part) for part in pinned.skipped] == [SkippedUtterance]
    assert_same([pinned], [batch])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU")
def test_pinned_batches_are_of_the_same_types(source):
    dataset = step_dataset(Damaged(source, {0: 0, 5: np.nan}))
    steps = list(StepLoader(dataset, num_workers=1, pin_memory=True))
    assert sum(len(batch.skipped) for step in steps for batch in step) == 2
    for loaded, expected in zip(steps, dataset, strict=False):
        assert_same(loaded, expected)
        for inputs, skipped in loaded:
            assert all(tensor.is_pinned() for tensor in inputs.values())
            assert all(isinstance(part, SkippedUtterance) for part in skipped)


@pytest.mark.parametrize(("num_workers", "context"), [(0, None), (2, "fork")])  # "spawn": test_workers.py
def test_workers_give_the_same_steps(source, num_workers, context):
    dataset = step_dataset(source, mode="pad", speed_change=0.2)
    loader = StepLoader(dataset, num_workers=num_workers, multiprocessing_context=context)
    loaded = list(loader)
    assert len(loaded) == len(loader) == len(dataset)
    for step, batches in enumerate(loaded):
        assert_same(batches, dataset[step])


def test_a_dataset_can_be_sent_to_another_process(source):
    dataset = step_dataset(source, mode="pad", speed_change=0.2)
    sent = pickle.loads(pickle.dumps(dataset))
    for step in range(len(dataset)):
        assert_same(sent[step], dataset[step])


def test_plain_data_loader_gives_whole_steps(source):
    dataset = step_dataset(source)
    for step, batches in enumerate(DataLoader(dataset, batch_size=None)):
        assert_same(batches, dataset[step])


def test_loader_does_not_change_the_global_random_state(source):
    dataset = step_dataset(source)
    state = torch.get_rng_state()
    list(StepLoader(dataset))
    assert torch.equal(torch.get_rng_state(), state)
    list(DataLoader(dataset, batch_size=None))
    assert not torch.equal(torch.get_rng_state(), state)
