"""K-means units of the MFCCs of recordings."""

import numpy as np
import pytest
import soundfile

from dinosr_hf.analysis.baselines import mfcc
from dinosr_hf.analysis.kmeans import fit_kmeans
from dinosr_hf.analysis.mfcc_units import fit_mfcc_kmeans, mfcc_units
from dinosr_hf.data import open_recordings


@pytest.fixture
def recordings(tmp_path):
    """Noise of two lengths, one recording shorter than a frame, and one that cannot be read."""
    waves = {}
    for number, num_samples in enumerate((9_000, 399, 7_123)):
        waves[f"{number}.wav"] = np.random.default_rng(number).uniform(-0.5, 0.5, num_samples)
        soundfile.write(tmp_path / f"{number}.wav", waves[f"{number}.wav"], 16_000, subtype="FLOAT")
    source = open_recordings([tmp_path])
    (tmp_path / "0.wav").write_bytes(b"RIFF no more")
    return source, waves


@pytest.mark.parametrize("kind", ["textbook", "tuned"])
def test_units_are_the_clusters_of_the_mfccs(recordings, caplog, kind):
    source, waves = recordings
    features = mfcc(waves["2.wav"].astype(np.float32), tuned=kind == "tuned")
    kmeans = fit_mfcc_kmeans(source, 4, kind, seed=3)
    np.testing.assert_array_equal(kmeans.centroids, fit_kmeans(features, 4, 3).centroids)
    assert not np.array_equal(kmeans.centroids, fit_kmeans(features, 4, 4).centroids)
    ((name, codes),) = mfcc_units(source, kmeans, kind)
    assert name == "2.wav" and codes.shape == (1, (7_123 - 400) // 320 + 1)
    np.testing.assert_array_equal(codes[0], kmeans.predict(features))
    assert "Skipped 0.wav" in caplog.text


def test_an_unknown_kind_is_refused(recordings):
    with pytest.raises(ValueError, match=r"kind='fine' is unknown. Choose one of textbook, tuned."):
        fit_mfcc_kmeans(recordings[0], 4, "fine")
