"""The demo runs from the command to the picture; whether it learns is docs/experiments.md's matter, not a test's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.pretraining import parse_arguments
from dinosr_hf.utils.model_folder import save_folder
from scripts import load_script

ROOT = Path(__file__).parent.parent
SIZES = {
    "max_steps": 2,
    "synthetic_utterances": 6,
    "step_seconds": 20,
    "test_utterances": 3,
    "codebook_size": 16,
    "num_threads": 1,
}
TINY = [word for name, value in {**SIZES, "num_threads": 1}.items() for word in (f"--{name}", str(value))]


def run_demo(folder, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--output_dir", str(folder), *TINY, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_the_demo_prints_its_tables_and_leaves_model_and_picture(tmp_path):
    done = run_demo(tmp_path / "demo")
    assert done.returncode == 0, done.stderr[-3000:]
    for row in ("at the start", "at the end", "DinoSR, layer", "untrained model, layer", "k-means on MFCCs"):
        cells = next(line for line in done.stdout.splitlines() if line.startswith(f"| {row}")).split("|")
        assert float(cells[2]) > 0
    assert (tmp_path / "demo" / "phone_by_codeword.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "model.safetensors").exists()


@pytest.mark.parametrize("script", ["demo.py", "demo_recognition.py"])
def test_the_demo_leaves_a_folder_of_something_else_alone(tmp_path, monkeypatch, script):
    (tmp_path / "thesis.tex").write_text("everything")
    monkeypatch.setattr(sys, "argv", [script, "--output_dir", str(tmp_path)])
    demo = load_script(f"examples/{script}")
    for _ in range(2):  # the first time must not make it the demo's own
        with pytest.raises(SystemExit, match=rf"{script}: .* has files of something else"):
            demo.main()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_the_demo_goes_on_to_a_recogniser(tmp_path):
    config = parse_arguments(["--num_hidden_layers", "2"], ROOT / "examples" / "configs" / "tiny_cpu.yaml")
    save_folder(DinoSRForPreTraining(config.model_config()), tmp_path / "demo")
    sizes = {
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "synthetic_utterances": 6,
        "synthetic_eval_utterances": 3,
    }
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "examples" / "demo_recognition.py"), "--model", str(tmp_path / "demo")]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "demo" / "recogniser"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\| test \| 3 \| [\d.]+% \| [\d.]+% \|$", done.stdout, re.MULTILINE)
    assert re.search(r"^Said:  (zero|one|two|three|four|five|six|seven|eight|nine)", done.stdout, re.MULTILINE)
    assert (tmp_path / "demo" / "recogniser" / "run.json").exists()
