"""Mixtures: shares of an epoch, equal use of all utterances in the long run, and any epoch directly."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from dinosr_hf.data import MixedSource, SpeechSource, Utterance, plan_epoch
from dinosr_hf.data.collator import utterance_generator
from dinosr_hf.data.mixture import JoinedSource, PartialSource, hold_out


class Tones(SpeechSource):
    """`count` utterances of about `length` samples, whose values encode the utterance and the position."""

    def __init__(self, count: int, length: int, seed: int = 0) -> None:
        lengths = np.random.default_rng(seed).integers(length // 2, 2 * length, count)
        self.utterances = [Utterance(f"{k}.wav", int(n)) for k, n in enumerate(lengths)]
        self.skipped = {"empty": ["x.wav"]} if count == 40 else {}

    def load(self, index, start=0, num_samples=None):
        stop = self.utterances[index].num_samples if num_samples is None else start + num_samples
        return (1_000_000 * index + np.arange(start, stop)).astype(np.float32)


NAMES = ["big", "small", "tiny"]
SOURCES = [Tones(400, 500), Tones(40, 300), Tones(3, 700)]
LIMITS = {"min_samples": 200, "max_samples": 600}


def used(source: SpeechSource) -> list[int]:
    return [min(n, 600) for _, n in source.utterances if n >= 200]


HOURS = np.array([sum(used(source)) for source in SOURCES])


def audio_of(mixture: MixedSource, members: list[tuple[int, int]]) -> np.ndarray:
    """Return the number of samples of each source among the members."""
    totals = Counter()
    for index, _ in members:
        utterance = mixture.utterances[index]
        totals[utterance.id.partition("/")[0]] += min(utterance.num_samples, 600)
    return np.array([totals[name] for name in NAMES])


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [1, 5, 0.3]], ids=["no_weights", "ones", "weights"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.01])
def test_shares_of_an_epoch(weights, temperature):
    mixture = MixedSource(SOURCES, NAMES, weights=weights, temperature=temperature)
    expected = np.array(weights or [1, 1, 1]) * HOURS.astype(float) ** temperature
    expected *= HOURS.sum() / expected.sum()
    total = np.zeros(3)
    for epoch in range(4):
        audio = audio_of(mixture, mixture.epoch_members(epoch, seed=0, **LIMITS))
        assert np.all(np.abs(audio - expected) <= 600)  # one utterance more or less at either end
        total += audio
    assert np.all(np.abs(total - 4 * expected) <= 600)  # the difference does not accumulate


def test_without_weights_and_temperature_an_epoch_is_every_utterance_once():
    mixture = MixedSource(SOURCES, NAMES)
    lengths = [n for _, n in mixture.utterances]
    ids = [utterance.id for utterance in mixture.utterances]
    for epoch in (0, 1, 9_999):
        members = mixture.epoch_members(epoch, seed=0, **LIMITS)
        assert members == [(index, epoch) for index, n in enumerate(lengths) if n >= 200]
        options = {"seed": 0, "epoch": epoch, "step_samples": 4_000, "ids": ids, **LIMITS}
        assert plan_epoch(lengths, members=members, **options) == plan_epoch(lengths, **options)


def test_utterances_of_a_source_are_used_equally_often():
    mixture = MixedSource(SOURCES, NAMES, temperature=0.3, weights=[1, 2, 1])
    times, everything = Counter(), []
    for epoch in range(30):
        members = mixture.epoch_members(epoch, seed=0, **LIMITS)
        everything += members
        times.update(index for index, _ in members)
    assert len(set(everything)) == len(everything)
    # The passes of an utterance are 0, 1, 2, ... without a gap.
    assert all(max(own for i, own in everything if i == index) == times[index] - 1 for index in (0, 3, 400, 440))
    first = 0
    for source in SOURCES:
        counts = [times[first + k] for k, (_, n) in enumerate(source.utterances) if n >= 200]
        assert max(counts) - min(counts) <= 1
        assert min(counts) >= 1
        assert not any(times[first + k] for k, (_, n) in enumerate(source.utterances) if n < 200)
        first += len(source)


def naive_members(mixture, num_epochs, *, seed, shares):
    """Draw epochs one after the other, in the most literal way."""
    tapes = [[] for _ in SOURCES]
    drawn, passes = [0] * 3, [0] * 3
    for epoch in range(num_epochs):
        members, first = [], 0
        for k, source in enumerate(SOURCES):
            eligible = [i for i, (_, n) in enumerate(source.utterances) if n >= 200]
            while drawn[k] < (epoch + 1) * shares[k] * HOURS.sum():
                if not tapes[k]:
                    order = utterance_generator(seed, passes[k], NAMES[k], "mixture").permutation(len(eligible))
                    tapes[k] = [(eligible[i], passes[k]) for i in order]
                    passes[k] += 1
                index, own_epoch = tapes[k].pop(0)
                members.append((first + index, own_epoch))
                drawn[k] += min(source.utterances[index].num_samples, 600)
            first += len(source)
        yield sorted(members)


def test_epochs_do_not_depend_on_previous_calls():
    mixture = MixedSource(SOURCES, NAMES, temperature=0.5)
    shares = HOURS**0.5 / (HOURS**0.5).sum()
    for epoch, members in enumerate(naive_members(mixture, 12, seed=7, shares=shares)):
        assert mixture.epoch_members(epoch, seed=7, **LIMITS) == members
        assert mixture.epoch_members(epoch, seed=8, **LIMITS) != members


def test_far_epochs_are_exact():
    """There are no gaps or repeats, which floating point would cause."""
    mixture = MixedSource(SOURCES, NAMES, temperature=0.37)
    epochs = [mixture.epoch_members(10**9 + k, seed=0, **LIMITS) for k in range(3)]
    assert all(not set(one) & set(other) for one, other in pairwise(epochs))
    tiny = [own_epoch for members in epochs for index, own_epoch in members if index == 442]
    assert sorted(tiny) == list(range(min(tiny), max(tiny) + 1))


def test_mixture_reads_its_sources():
    mixture = pickle.loads(pickle.dumps(MixedSource(SOURCES, NAMES)))
    assert len(mixture) == 443
    assert mixture.skipped == {"empty": ["small/x.wav"]}
    for index, name, own in [
        (0, "big", 0),
        (399, "big", 399),
        (400, "small", 0),
        (439, "small", 39),
        (442, "tiny", 2),
    ]:
        source = SOURCES[NAMES.index(name)]
        assert mixture.utterances[index] == (f"{name}/{own}.wav", source.utterances[own].num_samples)
        np.testing.assert_array_equal(mixture.load(index, 3, 50), source.load(own, 3, 50))
        np.testing.assert_array_equal(mixture.load(index), source.load(own))


def test_a_part_knows_the_others_of_its_source():
    source = SOURCES[1]
    first, second = PartialSource(source, [0, 3, 39]), PartialSource(source, [5])
    assert set(first.others) == {"x.wav"} | {f"{k}.wav" for k in range(40)} - {"0.wav", "3.wav", "39.wav"}
    assert set(PartialSource(first, [1]).others) == {"0.wav", "39.wav", *first.others}
    joined = JoinedSource([second, SOURCES[2], first], ["a/", "b/", "c/"])
    assert joined.others == [*(f"a/{name}" for name in second.others), *(f"c/{name}" for name in first.others)]


def held(names: list[str], share: float) -> set[str]:
    source = Tones(0, 100)
    source.utterances = [Utterance(name, 100) for name in names]
    training, held_out = hold_out(source, share)
    assert sorted([*training.utterances, *held_out.utterances]) == sorted(source.utterances)
    return {utterance.id for utterance in held_out.utterances}


def test_whether_a_recording_is_held_out_does_not_depend_on_the_others():
    names = [f"{number}.wav" for number in range(2_000)]
    all_held = held(names, 0.1)
    assert 160 < len(all_held) < 240  # three standard deviations
    assert held(names[::-1], 0.1) == all_held and held(names, 0.3) > all_held
    for number in (50, 60, 100, 120, 777):
        assert held(names[:number], 0.1) == all_held & set(names[:number])


def test_at_least_one_recording_is_held_out_and_one_is_not():
    names = [f"{number}.wav" for number in range(20)]
    (one,) = held(names, 1e-9)
    assert held(names[::-1], 1e-9) == {one} and {one} <= held(names, 0.2)
    with pytest.raises(ValueError, match=r"A share of 0\.999 of 20 recordings leaves none to train on\. Give more"):
        held(names, 0.999)


def test_description():
    lines = MixedSource([Tones(1, 100), Tones(1, 100)], ["a", "b"], weights=[3, 1]).describe().split("\n")
    assert lines[0].startswith("Mixture of 2 sources, 0.00 h an epoch, temperature 1:")
    assert lines[1].endswith("in 1 utterances, weight 3: 50.0% of the audio, 75.0% of an epoch (1.50 passes)")
    assert lines[2].endswith("weight 1: 50.0% of the audio, 25.0% of an epoch (0.50 passes)")
    num_long = sum(n >= 300 for _, n in SOURCES[0].utterances)
    assert num_long < 400
    assert f"in {num_long} utterances" in MixedSource(SOURCES, NAMES).describe(min_samples=300, max_samples=600)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "0 sources, 0 names and 0 weights: there must be as many of each, at least one"),
        (SOURCES, {"names": ["a", "b"]}, "3 sources, 2 names and 3 weights"),
        (SOURCES, {"weights": [1, 2]}, "3 sources, 3 names and 2 weights"),
        (SOURCES, {"names": ["a", "b", "a"]}, "has a name twice"),
        (SOURCES, {"weights": [1, 0, 1]}, r"weights=\[1, 0, 1\] must be numbers above 0. Leave out"),
        (SOURCES, {"weights": [1, float("nan"), 1]}, "must be numbers above 0"),
        (SOURCES, {"temperature": 0.0}, "temperature=0.0 is out of range: it must be above 0 and at most 1"),
        (SOURCES, {"temperature": 1.5}, "temperature=1.5 is out of range"),
        ([MixedSource(SOURCES, NAMES)], {"names": ["all"]}, "all is a mixture itself. Give its sources one by one"),
    ],
)
def test_invalid_mixtures_are_refused(sources, options, message):
    options = {"names": NAMES[: len(sources)]} | options
    with pytest.raises(ValueError, match=message):
        MixedSource(sources, **options)


def test_duplicate_ids_are_refused():
    below = Tones(1, 100)
    below.utterances = [Utterance("x/0.wav", 100)]
    with pytest.raises(ValueError, match=r"With the names a, a/x some ids are the same\. Give other names"):
        MixedSource([below, Tones(1, 100)], ["a", "a/x"])


def test_source_without_an_utterance_that_is_long_enough():
    mixture = MixedSource(SOURCES, NAMES)
    message = r"None of the 40 utterances of small is at least 0\.0375625 s long \(min_samples=601, .* out\.$"
    with pytest.raises(ValueError, match=message):
        mixture.epoch_members(0, seed=0, min_samples=601)
