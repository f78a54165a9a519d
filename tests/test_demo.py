"""The demos run from the command to their results; how well they learn is documented in docs/experiments.md."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

import forks
from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.commands.demo import MARKER
from dinosr_hf.pretraining import parse_arguments
from dinosr_hf.utils.files import claim_output_folder
from dinosr_hf.utils.model_folder import save_folder
from scripts import ROOT, load_command
from tiny import tiny_config

SIZES = {
    "max_steps": 2,
    "synthetic_utterances": 6,
    "step_seconds": 20,
    "test_utterances": 3,
    "codebook_size": 16,
    "num_threads": 1,
}
TINY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def run_demo(folder, *flags):
    return forks.run([ROOT / "examples" / "demo.py", "--output_dir", folder, *TINY, *flags])


@pytest.mark.slow
def test_the_demo_prints_its_tables_and_writes_model_and_picture(tmp_path):
    done = run_demo(tmp_path / "demo")
    assert done.returncode == 0, done.stderr[-3000:]
    models = ("at the start", "at the end", "DinoSR, layer", "untrained model, layer")
    for row in (*models, "k-means on textbook MFCCs", "k-means on tuned MFCCs"):
        cells = next(line for line in done.stdout.splitlines() if line.startswith(f"| {row}")).split("|")
        assert float(cells[2]) > 0
    assert (tmp_path / "demo" / "phone_by_codeword.png").stat().st_size > 10_000
    assert (tmp_path / "demo" / "model.safetensors").exists()


def test_a_signal_ends_the_demo_with_its_training(tmp_path):
    flags = ["--output_dir", tmp_path / "demo", *TINY, "--max_steps", "100000", "--log_steps", "1"]
    demo = forks.Program([ROOT / "examples" / "demo.py", *flags])
    while not (tmp_path / "demo" / "metrics.jsonl").exists():
        assert demo.is_running
        time.sleep(0.01)
    os.kill(demo.pid, signal.SIGTERM)
    done = demo.wait()
    assert done.returncode == 143, done.stderr[-3000:]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("SIGTERM: stopped after step") and last.endswith("begins anew when it is run again.")


@pytest.mark.parametrize("script", ["demo", "demo_recognition"])
def test_the_demo_refuses_a_folder_of_something_else(tmp_path, script):
    tiny_config().save_pretrained(tmp_path / "model")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("everything")
    flags = ["--model", str(tmp_path / "model")] if script == "demo_recognition" else []
    demo = load_command(script)
    for _ in range(2):  # the first attempt must not mark it as the demo's own
        with pytest.raises(SystemExit, match=rf"{script}\.py: .* has files of something else"):
            demo.main([*flags, "--output_dir", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("script", ["demo", "demo_recognition"])
def test_an_earlier_demo_is_kept_by_a_plan_and_by_a_wrong_flag(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    save_folder(DinoSRForPreTraining(tiny_config()), tmp_path / "model")
    earlier = Path("runs", "demo") if script == "demo" else Path("runs", "demo", "recogniser")
    for folder in (earlier, Path("mine")):
        (claim_output_folder(folder, MARKER) / "kept").touch()
    flags = ["--synthetic_utterances", "6"]
    if script == "demo_recognition":
        flags += ["--model", str(tmp_path / "model"), "--synthetic_eval_utterances", "3"]
    demo = load_command(script)
    with pytest.raises(SystemExit, match="learning_rat"):
        demo.main([*flags, "--output-dir", "mine", "--learning_rat", "1"])
    demo.main([*flags, "--output-dir", "mine", "--dry_run", "true"])
    assert (earlier / "kept").exists() and Path("mine", "kept").exists()


def test_the_demo_of_recognition_names_a_missing_model(tmp_path):
    out = tmp_path / "recogniser"
    with pytest.raises(
        SystemExit, match=r"demo_recognition\.py: .*nothing is neither a folder nor a model on the Hub"
    ):
        load_command("demo_recognition").main(["--model", str(tmp_path / "nothing"), "--output_dir", str(out)])
    assert not out.exists()


@pytest.mark.slow
def test_the_demo_of_recognition(tmp_path):
    config = parse_arguments(["--num_hidden_layers", "2"], ROOT / "examples" / "configs" / "tiny_cpu.yaml")
    save_folder(DinoSRForPreTraining(config.model_config()), tmp_path / "demo")
    sizes = {"max_steps": 2, "eval_steps": 2, "save_steps": 2}
    sizes |= {"synthetic_utterances": 6, "synthetic_eval_utterances": 3}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [ROOT / "examples" / "demo_recognition.py", "--model", tmp_path / "demo"]
    done = forks.run([*command, "--output_dir", tmp_path / "demo" / "recogniser", *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^\| test \| 3 \| [\d.]+% \| [\d.]+% \|$", done.stdout, re.MULTILINE)
    assert re.search(r"^Said:  (zero|one|two|three|four|five|six|seven|eight|nine)", done.stdout, re.MULTILINE)
    assert (tmp_path / "demo" / "recogniser" / "run.json").exists()
