"""Batches of utterances: normalised, padded, and masked the same in any batch and on any machine."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import PretrainingCollator, min_maskable_samples, normalize_waveform, utterance_generator
from dinosr_hf.data.collator import NO_LABEL, Item, Part, utterance_hash, utterance_speed
from dinosr_hf.model.masking_dinosr import sample_span_mask

CONFIG = DinoSRConfig()


def utterance(name: str, num_samples: int, epoch: int = 0) -> Item:
    waveform = np.random.default_rng(len(name) + num_samples).normal(0.1, 0.3, num_samples)
    return Item(name, waveform.astype(np.float32), epoch)


ITEMS = [utterance("a", 16_000), utterance("b", 9_999), utterance("c/ü.wav", 20_401)]


def test_batch_of_different_lengths():
    batch = PretrainingCollator(CONFIG, seed=0)(ITEMS)

    assert batch["input_values"].shape == (3, 20_401)
    assert batch["input_values"].dtype == torch.float32
    assert batch["attention_mask"].dtype == torch.int64
    assert batch["attention_mask"].sum(1).tolist() == [16_000, 9_999, 20_401]
    assert batch["mask_time_indices"].shape == (3, 63)
    assert batch["mask_time_indices"].dtype == torch.bool
    for row, (_, waveform, *_) in enumerate(ITEMS):
        expected = normalize_waveform(waveform)
        np.testing.assert_array_equal(batch["input_values"][row, : len(waveform)], expected)
        assert not batch["input_values"][row, len(waveform) :].any()
        assert not batch["attention_mask"][row, len(waveform) :].any()
        assert not batch["mask_time_indices"][row, CONFIG.num_frames(len(waveform)) :].any()


def test_batch_of_one_length_has_no_attention_mask():
    batch = PretrainingCollator(CONFIG, seed=0)([utterance("a", 8_000), utterance("b", 8_000)])
    assert set(batch) == {"input_values", "mask_time_indices"}


def test_normalisation_can_be_left_out():
    batch = PretrainingCollator(CONFIG, seed=0, normalize=False)(ITEMS[:1])
    np.testing.assert_array_equal(batch["input_values"][0], ITEMS[0][1])


def test_mask_is_sampled_with_the_utterances_generator():
    config = DinoSRConfig(mask_prob=0.5, mask_length=4, mask_min_spans=3)
    items = [item._replace(epoch=epoch) for epoch, item in enumerate(ITEMS, 3)]
    batch = PretrainingCollator(config, seed=7)(items)
    for row, (name, waveform, epoch, *_) in enumerate(items):
        frames = config.num_frames(len(waveform))
        generator = utterance_generator(7, epoch, name, "mask")
        expected = sample_span_mask((1, frames), 0.5, 4, min_spans=3, generator=generator)
        np.testing.assert_array_equal(batch["mask_time_indices"][row, :frames], expected[0])


def test_mask_does_not_depend_on_the_batch():
    collate = PretrainingCollator(CONFIG, seed=0)
    together = collate(ITEMS)["mask_time_indices"]
    for items in (ITEMS[1:], ITEMS[::-1], ITEMS[1:2]):
        masks = collate(items)["mask_time_indices"]
        row = items.index(ITEMS[1])
        frames = CONFIG.num_frames(9_999)
        np.testing.assert_array_equal(masks[row, :frames], together[1, :frames])


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"name": "b"}], ids=["seed", "epoch", "id"])
def test_mask_depends_on_seed_epoch_and_id(other):
    settings = {"seed": 0, "epoch": 0, "name": "a"} | other
    first = PretrainingCollator(CONFIG, seed=0)([ITEMS[0]])
    item = Item(settings["name"], ITEMS[0].waveform, settings["epoch"])
    second = PretrainingCollator(CONFIG, seed=settings["seed"])([item])
    assert not torch.equal(first["mask_time_indices"], second["mask_time_indices"])


def test_hash_is_the_same_on_every_machine():
    assert utterance_hash(0, 0, "a", "mask") == 0x04894744F8646CED210B2A5EEE9D5525
    assert utterance_generator(0, 0, "a", "mask").integers(0, 1000, 4).tolist() == [4, 740, 603, 460]
    assert (
        utterance_hash(1, 2, "\udcff.wav", "crop") == 0x1FFFD5D49CCD462C1FC3CF96B140F783
    )  # a file name that is not UTF-8


def test_hash_keeps_its_arguments_apart():
    arguments = [
        (1, 2, "a", "mask"),
        (2, 1, "a", "mask"),
        (1, 2, "mask", "a"),
        (12, 0, "a", "mask"),
        (1, 20, "a", "mask"),
    ]
    assert len({utterance_hash(*each) for each in arguments}) == len(arguments)


def test_speeds_are_spread_evenly():
    speeds = np.array([utterance_speed(0, epoch, "a", 0.2) for epoch in range(2_000)])
    assert (abs(speeds - 1) <= 0.2).all() and len(set(speeds)) == 2_000
    assert np.histogram(speeds, bins=4, range=(0.8, 1.2))[0] == pytest.approx([500] * 4, rel=0.15)
    assert utterance_speed(0, 0, "a", 0.0) == 1
    others = [utterance_speed(1, 0, "a", 0.2), utterance_speed(0, 1, "a", 0.2), utterance_speed(0, 0, "b", 0.2)]
    assert utterance_speed(0, 0, "a", 0.2) not in others


@pytest.mark.parametrize("mask_length", [2, 10, 37])
def test_shortest_utterance_that_can_be_masked(mask_length):
    config = DinoSRConfig(mask_length=mask_length)
    num_samples = min_maskable_samples(config)
    assert config.num_frames(num_samples) == mask_length
    assert config.num_frames(num_samples - 1) == mask_length - 1
    assert PretrainingCollator(config, seed=0)([utterance("a", num_samples)])["mask_time_indices"].any()


def test_too_short_for_a_span():
    message = (
        "mask_length=10 does not fit: the shortest utterance has 7 frames (2,560 samples). Raise min_seconds to at"
        " least 0.21 or lower mask_length."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        PretrainingCollator(CONFIG, seed=0)([ITEMS[0], utterance("short", 2_560)])


def frame_numbers(part: Part) -> np.ndarray:
    """Label each frame of the paper's grid with the frame of the whole utterance that it is."""
    return part.start // 320 + np.arange(part.num_frames)


def test_the_anchor_labels_the_part_as_recorded():
    calls = []

    def anchor(part):
        calls.append(part._replace(waveform=part.waveform.copy()))
        return frame_numbers(part)

    items = [item._replace(start=640 * row) for row, item in enumerate(ITEMS)]
    items[1] = items[1]._replace(speed=1.25, recorded=utterance("longer", 12_499).waveform)
    batch = PretrainingCollator(CONFIG, seed=0, anchor=anchor)(items)
    labels = batch.pop("anchor_labels")
    assert labels.shape == (3, 63) and labels.dtype == torch.int64
    for row, (name, waveform, _, start, speed, recorded) in enumerate(items):
        num_frames = CONFIG.num_frames(len(waveform))
        assert calls[row]._replace(waveform=None) == (name, None, start, num_frames, speed)
        np.testing.assert_array_equal(calls[row].waveform, waveform if recorded is None else recorded)
        assert labels[row, :num_frames].tolist() == list(range(2 * row, 2 * row + num_frames))
        assert (labels[row, num_frames:] == NO_LABEL).all()
    plain = PretrainingCollator(CONFIG, seed=0)(items)
    assert batch.keys() == plain.keys() and all(torch.equal(batch[name], plain[name]) for name in plain)


def test_an_anchor_of_other_frames_is_refused():
    collate = PretrainingCollator(CONFIG, seed=0, anchor=lambda *_: np.zeros(50, dtype=np.int64))
    with pytest.raises(ValueError, match=r"gives 50 labels for 'a', which has 49 frames\. Make it for the model's"):
        collate(ITEMS[:1])


@pytest.mark.parametrize("anchor", [None, frame_numbers], ids=["plain", "anchored"])
def test_silence_has_nothing_masked(anchor):
    collate = PretrainingCollator(CONFIG, seed=0, anchor=anchor)
    batch, like = collate.silence(16_000), collate([utterance("a", 16_000)])
    assert batch.keys() == like.keys()
    for name, tensor in batch.items():
        assert (tensor.shape, tensor.dtype) == (like[name].shape, like[name].dtype)
        assert (tensor == (NO_LABEL if name == "anchor_labels" else 0)).all()
        assert like[name].any()


def test_empty_batch():
    with pytest.raises(ValueError, match="at least one utterance"):
        PretrainingCollator(CONFIG, seed=0)([])


def test_read_only_waveforms():
    waveform = ITEMS[0][1].copy()
    waveform.flags.writeable = False  # as Arrow hands them out
    PretrainingCollator(CONFIG, seed=0, normalize=False)([Item("a", waveform, 0)])["input_values"].mul_(2)
    np.testing.assert_array_equal(waveform, ITEMS[0][1])
