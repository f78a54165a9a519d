"""A tiny pre-training run, and ways to start it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import forks
from dinosr_hf import DinoSRConfig
from dinosr_hf.data import FolderSource
from dinosr_hf.pretraining import parse_arguments
from scripts import ROOT

CONFIGS = ROOT / "examples" / "configs"

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 2,
    "conv_pos_kernel_size": 3,
    "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layerdrop": 0.0,
    "num_codebooks": 2,
    "codebook_size": 8,
    "ema_decay": 0.9,
    "ema_end_decay": 0.99,
    "ema_anneal_steps": 3,
    "freeze_teacher_step": None,
    "mask_length": 4,
    "step_seconds": 8.0,
    "micro_seconds": 8.0,
    "min_seconds": 0.3,
    "max_seconds": 2.0,
    "num_buckets": 2,
    "num_workers": 0,
    "num_threads": 1,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "log_steps": 1,
    "save_steps": 0,
}
# Of these, those of the configuration of the model.
SIZES = {name: value for name, value in TINY.items() if hasattr(DinoSRConfig, name)}


def read_config(name, *flags):
    """Parse a recipe of examples/configs."""
    return parse_arguments([str(CONFIGS / f"{name}.yaml"), *flags], "unused")


# With dropout and layerdrop, so that random states matter; two steps per line of metrics, so that checkpoints cut an
# interval; codebooks updated every third step, so that checkpoints cut what they accumulate; other speeds each epoch.
CHANCE = {
    "speed_change": 0.13,
    "codebook_update_steps": 3,
    "codebook_revival_share": 0.5,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "layerdrop": 0.3,
    "max_steps": 10,
    "log_steps": 2,
}
# And an anchor, whose weights change from step to step.
ANCHORED = {
    **CHANCE,
    "anchor": "mfcc",
    "num_anchor_labels": 5,
    "anchor_end_weight": 0.5,
    "anchor_end_unmasked_share": 0.1,
    "anchor_end_step": 7,
}
TIMED = {"audio_seconds_per_second", "elapsed_seconds", "seconds_left", "memory_gib"}


def write_config(folder, **changes):
    path = Path(folder) / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def tiny_arguments(tmp_path, recordings, **changes):
    path = write_config(tmp_path, **{"data": str(recordings), "output_dir": str(tmp_path / "out"), **changes})
    return parse_arguments([str(path)], CONFIGS / "tiny_cpu.yaml")


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    """Return the metrics without those that depend on the clock."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in metrics_of(folder)]


def assert_same_run(folder, other):
    """Compare weights and metrics, bit for bit."""
    weights, expected = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert figures(folder) == figures(other)


def send_at_load(monkeypatch, number, call, source=FolderSource):
    """Send this process a signal when its loop, which answers it, reads a recording for the `call`-th time, from 0."""
    loads = iter(range(10**9))
    plain = source.load

    def load(self, *arguments):
        # Not when the anchor is made: nothing is lost then, and a signal ends the process as it always does.
        is_answered = signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
        if is_answered and next(loads) == call:
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(source, "load", load)


def launch(tmp_path, name, num_processes, *flags, through_accelerate=False):
    """
    Run the real subcommand in processes of its own; return the weights, the metrics and what it printed.

    They are forks, which know of each other as under `accelerate launch`, or are started by that, which takes longer.
    """
    words = ["-m", "dinosr_hf.cli", "pretrain", tmp_path / "tiny.yaml", "--output_dir", tmp_path / name, *flags]
    if through_accelerate:
        # Several processes on a CPU need torchrun: with --cpu, accelerate wants MPI and starts a single one.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--multi_gpu"]
        command += ["--num_processes", num_processes, "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", 29500 + os.getpid() % 2000, *words]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=280)
    else:
        done = forks.run_in_processes(num_processes, words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{num_processes} process(es)" in done.stderr
    return load_file(tmp_path / name / "model.safetensors"), metrics_of(tmp_path / name), done
