"""What all tests share: no network, one thread (also in the processes they start), a folder for the code of models."""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="dinosr-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish():
    """Look for garbage more rarely, and not among what was imported: it took a fifth of some tests' time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def fresh_process():
    """Undo what outlives a test: Accelerate's precision, torch's threads, and variables that Accelerate reads."""
    from accelerate.state import AcceleratorState  # an optional package

    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


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


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave the pictures of reports and pages empty: each takes up to a second."""
    monkeypatch.setattr("dinosr_hf.analysis.reports.save_figure", lambda figure, path, dpi: path.touch())
    monkeypatch.setattr("dinosr_hf.analysis.inspection.page.png_uri", lambda figure, dpi: "data:image/png;base64,")
