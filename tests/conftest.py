"""What all tests share: no network, one thread (also in the processes they start), a folder for the code of models."""

import atexit
import gc
import os
import shutil
import tempfile
from itertools import groupby

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="dinosr-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)  # after some are deselected
def pytest_collection_modifyitems(config, items):
    """Let every worker of xdist begin with files of slow tests: one that begins last keeps all others waiting."""
    num_workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if num_workers == 1:
        return
    is_slow = {item.path for item in items if item.get_closest_marker("slow")}
    slow = [list(tests) for path, tests in groupby(items, key=lambda item: item.path) if path in is_slow]
    others = [item for item in items if item.path not in is_slow]
    num_left = len(items)
    items.clear()
    for number in range(num_workers):
        first = [item for tests in slow[number::num_workers] for item in tests]
        size = num_left // (num_workers - number)  # of what this worker gets at the start
        num_others = max(0, size - len(first))
        items += first + others[:num_others]
        del others[:num_others]
        num_left -= size
    items += others


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
    """A folder of coloured noise in several formats."""
    import soundfile  # an optional package

    folder = tmp_path_factory.mktemp("recordings")
    generator = np.random.default_rng(0)
    for number, suffix in enumerate(["wav", "flac", "ogg", "mp3", "wav"] * 3):
        audio = generator.standard_normal(12_800 + 2_400 * number).cumsum() * 0.002
        soundfile.write(folder / f"{number:02d}.{suffix}", np.clip(audio, -0.9, 0.9), 16_000)
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave the pictures of reports and pages empty: each takes up to a second."""
    monkeypatch.setattr("dinosr_hf.analysis.reports.save_figure", lambda figure, path, dpi: path.touch())
    monkeypatch.setattr("dinosr_hf.analysis.inspection.page.png_uri", lambda figure, dpi: "data:image/png;base64,")


@pytest.fixture
def no_pauses(monkeypatch, tmp_path):
    """Let `datasets` cache in the test's folder, and not wait for seconds at the end of a stream of parquet files."""
    import datasets  # an optional package

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # for a bug in old pyarrow
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
