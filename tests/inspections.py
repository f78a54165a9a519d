"""A small corpus with given units, and names that try to inject code into the page."""

from pathlib import Path

import numpy as np

from audio_files import sf
from dinosr_hf.analysis.inspection import CodewordInspector, render_page
from dinosr_hf.data import open_recordings

ATTACK = "<script>alert('1')<b>\"&.wav"
EVIL_PHONE = '"><img src=x onerror=alert(2)>'
EVIL_TITLE = "</title><script>alert(3)</script>"
STRIDE, FIELD = 320, 400
NUM_CODES = 9

# Runs of the units of each recording: code, number of frames, score of each frame.
RUNS = {
    "a.wav": [(3, 10, 0.5), (5, 4, 0.25), (3, 2, 0.75), (0, 8, 1.0)],
    "b.wav": [(5, 3, 0.875), (3, 20, 0.25), (0, 1, 0.5)],
    ATTACK: [(3, 3, 1.0), (5, 30, 0.5)],
}
# Phone of each code; code 5 has another one in the last recording.
PHONES = {0: "SIL", 3: EVIL_PHONE, 5: "AA"}


def unroll(runs):
    """Units (T,) and scores (T,)."""
    codes = np.repeat([code for code, _, _ in runs], [length for _, length, _ in runs])
    return codes, np.repeat([score for _, _, score in runs], [length for _, length, _ in runs]).astype(np.float32)


def num_samples(runs) -> int:
    return FIELD + STRIDE * (sum(length for _, length, _ in runs) - 1)


def write_recordings(folder: Path) -> None:
    for seed, (name, runs) in enumerate(RUNS.items()):
        noise = np.random.default_rng(seed).normal(0, 0.1, num_samples(runs))
        sf.write(folder / name, noise, 16_000, subtype="PCM_16")


def labels():
    """Phones every 10 ms; the last recording has AA and then B for its code 5."""
    found = {}
    for name, runs in RUNS.items():
        steps = [PHONES[code] for code in unroll(runs)[0] for _ in range(2)]
        found[name.removesuffix(".wav")] = [*steps, steps[-1]]
    found[ATTACK.removesuffix(".wav")][-31:] = ["B"] * 31
    return found


def inspect(with_labels: bool = True, with_scores: bool = True, **options):
    inspector = CodewordInspector(NUM_CODES, labels=labels() if with_labels else None, **options)
    for name, runs in RUNS.items():
        codes, scores = unroll(runs)
        inspector.add(name, codes, scores if with_scores else None)
    return inspector.result()


def make_page(folder: Path, inspection=None, **options):
    """Render the page of the corpus in a folder, whose recordings are written if they do not exist."""
    if not (folder / "a.wav").exists():
        write_recordings(folder)
    texts = {"title": EVIL_TITLE, "name": "layer 5, <teacher>", "facts": {"data": "a & b"}}
    return render_page(inspection or inspect(), open_recordings([folder]), **{**texts, **options})
