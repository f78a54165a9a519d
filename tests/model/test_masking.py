"""Span masks: what is never masked, how much is masked, and that the generator decides all of it."""

import numpy as np
import pytest
import torch

from dinosr_hf import sample_span_mask
from dinosr_hf.model.masking_dinosr import numpy_generator, sample_spec_augment
from tiny import tiny_config


def rng(seed=0):
    return np.random.default_rng(seed)


def slow_span_mask(shape, mask_prob, mask_length, lengths, generator):
    """The twin: one frame at a time, for rows that are long enough; each row draws its own number of spans."""
    generator.random()  # drawn for the whole batch, used where there is no padding
    mask = np.zeros(shape, dtype=bool)
    for row, size in enumerate(lengths):
        num_spans = max(1, int(mask_prob * size / mask_length + generator.random()))
        for start in generator.choice(size - mask_length, num_spans, replace=False):
            for frame in range(start, start + mask_length):
                mask[row, frame] = True
    return mask


def test_equals_its_slow_twin():
    lengths = [251, 97, 180]
    arguments = {"shape": (3, 251), "mask_prob": 0.8, "mask_length": 7, "lengths": lengths}
    mask = sample_span_mask(**arguments, generator=rng(3))
    assert np.array_equal(mask, slow_span_mask(**arguments, generator=rng(3)))
    assert not np.array_equal(mask, slow_span_mask(**arguments, generator=rng(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"mask_prob": 1.1}, "mask_prob=1.1 is out of range", id="prob-above-1"),
        pytest.param({"mask_prob": -0.1}, "mask_prob=-0.1 is out of range", id="prob-negative"),
        pytest.param({"mask_length": 0}, "mask_length=0 is out of range", id="no-length"),
        pytest.param({"min_spans": -1}, "min_spans=-1 is out of range", id="negative-spans"),
        pytest.param({"lengths": [50]}, r"lengths=\[50\] does not fit shape=\(2, 50\)", id="one-length-for-two"),
        pytest.param({"lengths": [50, 51]}, r"lengths=\[50, 51\] does not fit shape=\(2, 50\)", id="longer-than-T"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    arguments = {"shape": (2, 50), "mask_prob": 0.5, "mask_length": 5, "generator": rng()}
    with pytest.raises(ValueError, match=message):
        sample_span_mask(**{**arguments, **changes})


@pytest.mark.parametrize("require_same_masks", [False, True], ids=["own-counts", "same-counts"])
def test_padding_and_last_frame_are_never_masked(require_same_masks):
    lengths = [83, 40, 61]
    for seed in range(50):
        mask = sample_span_mask(
            (3, 83), 1.0, 5, lengths=lengths, require_same_masks=require_same_masks, generator=rng(seed)
        )
        for row, length in zip(mask, lengths, strict=True):
            assert row[: length - 1].any()
            assert not row[length - 1 :].any()


def test_masks_are_whole_spans():
    mask = sample_span_mask((1, 300), 0.1, 10, generator=rng())[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    assert ((edges[1::2] - edges[::2]) >= 10).all()


def masked_share(batch_size, require_same_masks):
    masks = [
        sample_span_mask((batch_size, 250), 0.8, 10, require_same_masks=require_same_masks, generator=rng(seed))
        for seed in range(300)
    ]
    return np.mean(masks)


def test_rates_of_the_paper_s_mask():
    # the standard deviation of one row's rate is about 0.04: 0.01 is four of its mean's over 300 draws
    one_row = masked_share(1, require_same_masks=True)
    eight_rows = masked_share(8, require_same_masks=True)
    assert one_row == pytest.approx(0.57, abs=0.01)
    assert eight_rows == pytest.approx(0.51, abs=0.01)
    assert masked_share(8, require_same_masks=False) == pytest.approx(one_row, abs=0.01)


def test_same_masks_gives_all_rows_the_smallest_count():
    free = sample_span_mask((5, 120), 0.8, 10, generator=rng(1))
    same = sample_span_mask((5, 120), 0.8, 10, require_same_masks=True, generator=rng(1))
    assert set(same.sum(axis=1)) == {free.sum(axis=1).min()}
    assert len(set(free.sum(axis=1))) > 1
    assert not (same & ~free).any()  # frames are only taken away


def test_without_padding_all_rows_have_the_same_number_of_spans():
    # spans of one frame, so that the spans can be counted
    for seed in range(20):
        shared = sample_span_mask((6, 35), 0.5, 1, generator=rng(seed)).sum(axis=1)
        assert len(set(shared)) == 1
    own = {tuple(sample_span_mask((2, 35), 0.5, 1, lengths=[35, 35], generator=rng(s)).sum(axis=1)) for s in range(20)}
    assert any(first != second for first, second in own)


def test_least_number_of_spans():
    assert sample_span_mask((1, 90), 0.0, 1, min_spans=4, generator=rng()).sum() == 4
    assert not sample_span_mask((1, 90), 0.0, 1, min_spans=0, generator=rng()).any()


@pytest.mark.parametrize("size", [1, 2, 5, 10, 11])
def test_short_rows_are_masked_as_far_as_they_go(size):
    # shorter than a span: two starts for one span, cut at the end of the row
    for seed in range(20):
        mask = sample_span_mask((2, 40), 0.8, 10, lengths=[40, size], generator=rng(seed))
        assert not mask[1, size:].any()
        if size >= 2:
            assert mask[1].any()


def test_row_without_frames_stays_empty():
    mask = sample_span_mask((2, 40), 0.8, 10, lengths=[40, 0], generator=rng())
    assert mask[0].any() and not mask[1].any()


def test_spec_augment_masks_time_and_channels():
    config = tiny_config(mask_time_prob=0.3, mask_time_length=4, mask_feature_prob=0.3, mask_feature_length=5)
    over_time, over_channels = sample_spec_augment(config, 3, 70, lengths=[70, 50, 31], generator=rng())
    assert over_time.shape == (3, 70) and over_channels.shape == (3, 36)
    assert over_time.any(axis=1).all() and over_channels.any(axis=1).all()
    assert not over_time[1, 50:].any() and not over_time[2, 31:].any()
    again = sample_spec_augment(config, 3, 70, lengths=[70, 50, 31], generator=rng())
    assert np.array_equal(over_time, again[0]) and np.array_equal(over_channels, again[1])
    other = sample_spec_augment(config, 3, 70, lengths=[70, 50, 31], generator=rng(1))
    assert not np.array_equal(over_time, other[0])


@pytest.mark.parametrize(("name", "which"), [("mask_time_prob", 0), ("mask_feature_prob", 1)])
def test_spec_augment_masks_are_switched_off_by_a_probability_of_0(name, which):
    config = tiny_config(**{"mask_time_prob": 0.5, "mask_feature_prob": 0.5, name: 0.0})
    masks = sample_spec_augment(config, 2, 70, generator=rng())
    assert not masks[which].any() and masks[1 - which].any()


def test_numpy_generator_is_decided_by_torch_s():
    draws = [numpy_generator(torch.Generator().manual_seed(seed)).random(4).tolist() for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    torch.manual_seed(7)
    first = numpy_generator(None).random(4).tolist()
    second = numpy_generator(None).random(4).tolist()
    torch.manual_seed(7)
    assert numpy_generator(None).random(4).tolist() == first != second
