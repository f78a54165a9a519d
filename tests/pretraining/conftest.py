"""Recordings for runs."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def recordings(tmp_path_factory):
    """
    A folder of coloured noise in the formats of `tests/conftest.py`, at 16 kHz.

    Reading other rates and several channels, which takes a third of a short run, is tested in tests/data.
    """
    import soundfile  # an optional package

    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, suffix in enumerate(["wav", "flac", "ogg", "mp3", "wav"] * 3):
        audio = generator.standard_normal(12_800 + 2_400 * number).cumsum() * 0.002
        soundfile.write(folder / f"{number:02d}.{suffix}", np.clip(audio, -0.9, 0.9), 16_000)
    return folder
