"""Recordings to read."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """A folder of coloured noise in several formats, rates and channels."""
    import soundfile  # an optional package

    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, (suffix, rate, channels) in enumerate(
        [("wav", 16000, 1), ("flac", 22050, 2), ("ogg", 16000, 1), ("mp3", 44100, 2), ("wav", 8000, 1)] * 3
    ):
        seconds = 0.8 + 0.15 * number
        audio = generator.standard_normal((int(rate * seconds), channels)).cumsum(axis=0) * 0.002
        soundfile.write(folder / f"{number:02d}.{suffix}", np.clip(audio, -0.9, 0.9), rate)
    return folder
