"""Units of a live signal: independent of its chunks, with bounded memory and latency, close to the offline units."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from audio_files import noise
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import normalize_waveform
from dinosr_hf.inference.windowed import RunningMoments
from dinosr_hf.units import UnitStreamer
from tiny import randomize, tiny_config, vary_anchor
from tolerances import ACTIVATIONS

SOURCES = ("student", "teacher")
SETTINGS = {"context_seconds": 0.05, "lookahead_seconds": 0.01, "step_seconds": 0.01}
SIGNAL = noise(5_003) * 0.3 + 0.02


def build(**changes):
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=3, num_anchor_labels=6, **changes)
    return vary_anchor(randomize(DinoSRForPreTraining(config)))


@pytest.fixture(scope="module")
def model():
    return build()


def offline(model, signal, layers, source):
    values = torch.from_numpy(normalize_waveform(signal))[None]
    return model.encode_units(values, layers=layers, source=source)[0][:, 0].numpy()


def streamed(streamer, pieces):
    return np.concatenate([*(streamer.push(piece) for piece in pieces), streamer.flush()], axis=-1)


def cuts(kind):
    if kind == "at random":
        return np.split(SIGNAL, np.sort(np.random.default_rng(0).integers(0, len(SIGNAL), 40)))
    return np.split(SIGNAL, range(kind, len(SIGNAL), kind))


@pytest.mark.parametrize("source", SOURCES)
def test_units_do_not_depend_on_the_chunks(model, source):
    streamer = UnitStreamer(model, layers=[2, 3], source=source, **SETTINGS)
    whole = streamed(streamer, [SIGNAL])
    assert whole.shape == (2, model.config.num_frames(len(SIGNAL))) and whole.dtype == np.int64
    for kind in (7, 160, 1_000, "at random"):  # and flush resets the streamer
        np.testing.assert_array_equal(streamed(streamer, cuts(kind)), whole)
    single = streamed(UnitStreamer(model, 3, source, **SETTINGS), [SIGNAL])
    np.testing.assert_array_equal(single, whole[1])
    other = streamed(UnitStreamer(model, 3, source, **{**SETTINGS, "step_seconds": 0.02}), [SIGNAL])
    assert not np.array_equal(single, other)


def test_streamers_of_one_model_do_not_disturb_each_other():
    model = build(feature_encoder="log_mel")
    settings = {"context_seconds": 0.5, "lookahead_seconds": 0.1, "step_seconds": 0.1}
    signals = [noise(16_000, seed=seed) * np.linspace(0.1, 3, 16_000) for seed in (0, 1)]

    def units(signal):
        return streamed(UnitStreamer(model, layer=3, **settings), np.split(signal, 40))

    alone = [units(signal) for signal in signals]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(units, signals))
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(*alone)


@pytest.mark.parametrize("source", SOURCES)
def test_signal_within_one_step_equals_offline(model, source):
    streamer = UnitStreamer(model, 2, source, step_seconds=1.0)
    np.testing.assert_array_equal(streamed(streamer, cuts(333)), offline(model, SIGNAL, [2], source)[0])


@pytest.mark.parametrize("front_end", ["conv", "log_mel"])
def test_units_of_the_anchor_and_of_log_mel_frames(front_end):
    model, signal = build(feature_encoder=front_end), noise(20_011) * np.linspace(0.1, 0.3, 20_011, dtype=np.float32)
    whole = streamed(UnitStreamer(model, 3, "anchor", step_seconds=9.0), [signal])
    np.testing.assert_array_equal(whole, offline(model, signal, [3], "anchor")[0])
    agreement = []
    for seconds in (0.02, 0.5):
        settings = {"context_seconds": seconds, "lookahead_seconds": 0.2 * seconds, "step_seconds": 0.1}
        found = streamed(UnitStreamer(model, 3, "anchor", **settings), [signal])
        in_pieces = streamed(UnitStreamer(model, 3, "anchor", **settings), np.array_split(signal, 37))
        np.testing.assert_array_equal(in_pieces, found)
        assert len(found) == model.config.num_frames(len(signal))
        agreement.append((found == whole).mean())
    assert agreement[0] < agreement[1] and agreement[1] > 0.5, agreement


@pytest.mark.parametrize(
    ("source", "changes"), [("student", {}), ("teacher", {}), ("teacher", {"freeze_mode": "copied"})], ids=str
)
def test_log_mel_frames_are_normalised_over_the_signal_so_far(source, changes):
    model, signal = build(feature_encoder="log_mel", **changes), noise(20_011) * np.linspace(0.1, 3, 20_011)
    seen = []
    for projection in (model.dinosr.feature_projection, model.teacher.feature_projection):
        if projection is not None:
            projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].numpy()))
    settings = {"context_seconds": 0.2, "lookahead_seconds": 0.06, "step_seconds": 0.1, "level": (0.0, 1.0)}
    streamed(UnitStreamer(model, 3, source, **settings), np.array_split(signal, 7))
    energies = model.dinosr.feature_extractor.energies(torch.from_numpy(signal.astype(np.float32))[None])[0].double()
    assert len(seen) > 8 and sum(map(len, seen)) > 1.5 * len(energies)
    for number, frames in enumerate(seen):
        last = min(5 * (number + 1) + 3, len(energies))
        so_far, window = energies[:last], energies[last - len(frames) : last]
        expected = (window - so_far.mean(dim=0)) / (so_far.var(dim=0, correction=0) + 1e-5).sqrt()
        np.testing.assert_allclose(frames, expected, **ACTIVATIONS)
    assert len(window) < len(so_far)  # or a window would do
    assert not model.dinosr.feature_extractor._forward_hooks


@pytest.mark.parametrize("source", SOURCES)
def test_more_context_agrees_more_with_offline(model, source):
    expected = offline(model, SIGNAL, [2], source)[0]
    agreement = []
    for seconds in (0.0, 0.02, 0.3):
        settings = {"context_seconds": seconds, "lookahead_seconds": min(seconds, 0.1), "step_seconds": 0.02}
        found = streamed(UnitStreamer(model, 2, source, **settings), [SIGNAL])
        agreement.append((found == expected).mean())
    assert agreement[0] < agreement[2] and agreement[2] > 0.6, agreement


def test_level_known_in_advance_helps(model):
    level = (float(SIGNAL.mean()), float(SIGNAL.var()))
    settings = {"context_seconds": 1.0, "lookahead_seconds": 0.1, "step_seconds": 0.01}
    expected = offline(model, SIGNAL, [2], "student")[0]
    loud = np.concatenate([SIGNAL[:500] * 1e-3, SIGNAL[500:]])
    with_level, without = (
        streamed(UnitStreamer(model, 2, level=known, **settings), [SIGNAL if known else loud])
        for known in (level, None)
    )
    assert (with_level == expected).mean() > (without == offline(model, loud, [2], "student")[0]).mean()


@pytest.mark.parametrize("source", SOURCES)
def test_latency_stays_within_delay_seconds(model, source):
    streamer = UnitStreamer(model, 2, source, **SETTINGS)
    hop, done = model.config.inputs_to_logits_ratio, 0
    for num_samples, sample in enumerate(SIGNAL, start=1):
        done += len(streamer.push([sample]))
        assert num_samples - done * hop <= streamer.delay_seconds * 16_000
    assert streamer.delay_seconds < 0.03


def test_memory_is_bounded(model):
    streamer = UnitStreamer(model, 2, **SETTINGS)
    sizes = []
    for _ in range(4):
        streamer.push(SIGNAL)
        sizes.append(sum(map(len, streamer._pieces)))
    assert max(sizes) <= (0.05 + 0.01 + 0.01) * 16_000 + model.config.receptive_field
    assert streamer.push(np.zeros(0)).shape == (0,)


def test_caller_may_reuse_its_buffer(model):
    streamer, buffer = UnitStreamer(model, 2, **SETTINGS), np.empty(100, np.float32)
    found = []
    for start in range(0, 5_000, 100):
        buffer[:] = SIGNAL[start : start + 100]
        found.append(streamer.push(buffer))
        buffer[:] = 9.0
    found = np.concatenate([*found, streamer.flush()])
    np.testing.assert_array_equal(found, streamed(streamer, [SIGNAL[:5_000]]))


def test_signal_shorter_than_a_frame_has_no_units(model):
    streamer = UnitStreamer(model, 2)
    assert streamer.flush().shape == (0,)
    streamer.push(SIGNAL[:30])  # shorter than a frame
    assert streamer.flush().shape == (0,)


def test_running_moments_equal_those_of_all_rows():
    rows = noise(999).reshape(111, 9).astype(np.float64) * 3 + 100
    moments = RunningMoments()
    for part in np.split(rows, [0, 1, 7, 50]):
        moments.add(part)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(moments.normalize(rows), expected, atol=1e-5)


def test_invalid_arguments_raise(model):
    streamer = UnitStreamer(model, 2, **SETTINGS)
    for samples in (np.zeros((2, 3)), [0.0, np.nan]):
        with pytest.raises(ValueError, match="Give one channel of audio at 16 kHz as finite numbers"):
            streamer.push(samples)
    np.testing.assert_array_equal(streamed(streamer, [SIGNAL]), streamed(streamer, [SIGNAL]))
    with pytest.raises(ValueError, match=r"step_seconds=0 must be at least 0.00125, one frame"):
        UnitStreamer(model, 2, step_seconds=0)
    with pytest.raises(ValueError, match="lookahead_seconds=-1"):
        UnitStreamer(model, 2, lookahead_seconds=-1)
    with pytest.raises(ValueError, match="layer=1 has no codebook"):
        UnitStreamer(model, 1)
    with pytest.raises(ValueError, match="source='both' is unknown"):
        UnitStreamer(model, 2, "both")
    with pytest.raises(ValueError, match="source='anchor' has units on the last layer alone"):
        UnitStreamer(model, 2, "anchor")
    with pytest.raises(ValueError, match=r"layer=2 and layers=\[3\] are both given"):
        UnitStreamer(model, 2, layers=[3])


@pytest.mark.parametrize("source", ["student", "anchor"])
def test_the_layer_is_by_default_that_of_the_other_ways_to_units(model, source):
    found = streamed(UnitStreamer(model, source=source, **SETTINGS), [SIGNAL])
    np.testing.assert_array_equal(found, streamed(UnitStreamer(model, 3, source, **SETTINGS), [SIGNAL]))
