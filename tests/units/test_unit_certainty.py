"""Units with scores: the units of the model, and scores that equal a direct computation."""

from itertools import product

import numpy as np
import pytest
import torch

from audio_files import noise, sf
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import normalize_waveform, open_recordings
from dinosr_hf.units import scored_units
from tiny import randomize, tiny_config, vary_anchor
from tolerances import SAME_ARITHMETIC

SOURCES = ("student", "teacher")


def tiny_model(**changes):
    torch.manual_seed(0)
    return vary_anchor(randomize(DinoSRForPreTraining(tiny_config(num_anchor_labels=6, **changes))))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for seed, (name, length) in enumerate({"short": 30, "a": 1_234, "b": 2_345}.items()):
        sf.write(folder / f"{name}.wav", noise(length, seed), 16_000, subtype="FLOAT")
    return open_recordings([folder])


def input_values(recordings, name):
    index = [utterance.id for utterance in recordings.utterances].index(name)
    return torch.from_numpy(normalize_waveform(recordings.load(index)))[None]


@pytest.mark.parametrize("changes", [{}, {"reference_padding": True}, {"head_input": "own_layer"}], ids=str)
@pytest.mark.parametrize(("layer", "source"), [*product((2, 3), SOURCES), (3, "anchor")])
def test_units_equal_encode_units(recordings, layer, source, changes):
    model = tiny_model(**changes)
    found = {units.id: units for units in scored_units(model, recordings, layer=layer, source=source)}
    assert found.keys() == {"short.wav", "a.wav", "b.wav"}
    for name in ("a.wav", "b.wav"):
        expected, _ = model.encode_units(input_values(recordings, name), layer=layer, source=source)
        np.testing.assert_array_equal(found[name].codes, expected[0])
        assert found[name].codes.shape == found[name].scores.shape and found[name].scores.dtype == np.float32
    assert found["short.wav"].codes.shape == (0,)
    assert len(np.unique(found["b.wav"].codes)) > 1


@pytest.mark.parametrize("source", ["student", "anchor"])
def test_scores_of_heads_are_probabilities(model, recordings, source):
    units = next(scored_units(model, recordings, layer=3, source=source))
    head = model.anchor_head if source == "anchor" else model.heads[1]
    with torch.no_grad():
        hidden = model.dinosr(input_values(recordings, units.id)).last_hidden_state[0]
        expected = torch.softmax(head(hidden), dim=-1)
    np.testing.assert_allclose(units.scores, expected.max(dim=-1).values, **SAME_ARITHMETIC)


def test_teacher_scores_are_negative_distances(model, recordings):
    seconds = []
    units, *_ = scored_units(model, recordings, layer=2, source="teacher", on_progress=seconds.append)
    samples = input_values(recordings, units.id)
    with torch.no_grad():
        targets = model.compute_targets(samples, model.dinosr(samples).extract_features)[0, 0]
    distances = (targets[:, None] - model.codebooks.codewords[0]).square().mean(dim=-1).sqrt()
    np.testing.assert_allclose(-units.scores, distances.min(dim=-1).values, **SAME_ARITHMETIC)
    assert sum(seconds) == pytest.approx(sum(utterance.num_samples for utterance in recordings.utterances) / 16_000)


def test_the_layer_is_by_default_that_of_the_configuration(model, recordings):
    found, wanted = (next(scored_units(model, recordings, **layer)) for layer in ({}, {"layer": 3}))
    np.testing.assert_array_equal(found.codes, wanted.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, "layer=1 has no codebook"),
        ({"layer": 2, "source": "pupil"}, "source='pupil' is unknown"),
        ({"layer": 2, "source": "anchor"}, "source='anchor' has units on the last layer alone"),
    ],
)
def test_invalid_arguments_raise(model, recordings, options, message):
    with pytest.raises(ValueError, match=message):
        next(scored_units(model, recordings, **options))
