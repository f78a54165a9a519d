"""The pre-trained model is written before its last evaluation."""

import json

import pytest

from audio_files import write
from dinosr_hf.pretraining import run
from dinosr_hf.pretraining.held_out import HeldOut
from pretraining_runs import metrics_of, tiny_arguments


@pytest.fixture
def recordings(tmp_path):
    for number in range(8):
        write(tmp_path / "speech" / f"{number}.wav", 16_000 + 100 * number)
    return tmp_path / "speech"


def test_a_failed_last_evaluation_costs_nothing(tmp_path, recordings, monkeypatch):
    changes = {"eval_data": str(recordings), "eval_steps": 1, "max_steps": 2, "checkpoint_steps": 2}
    arguments = tiny_arguments(tmp_path, recordings, **changes)
    plain, steps = HeldOut.evaluate, []

    def fail_at_the_second(*given, **options):
        steps.append(len(steps))
        if len(steps) == 2:
            raise RuntimeError("out of memory")
        return plain(*given, **options)

    monkeypatch.setattr(HeldOut, "evaluate", fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(arguments)
    monkeypatch.setattr(HeldOut, "evaluate", plain)
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file()
    run(arguments)  # from the checkpoint: only the evaluation is left
    lines = [(line["step"], "eval_loss" in line) for line in metrics_of(out)]
    assert lines == [(1, False), (1, True), (2, False), (2, True)]
    assert json.loads((out / "run.json").read_text())["finished"]
