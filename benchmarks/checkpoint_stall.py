"""
Measure how long pre-training stands still for a checkpoint, beside how long its files take.

    python benchmarks/checkpoint_stall.py --size base

A run of random weights is made with Adam's averages, and its state saved as the loop saves it. Each checkpoint is read
back and compared with the weights before anything is printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from accelerate import Accelerator
from contest import CONFIGS, add_size, headline, model_config, timing_parser
from safetensors.torch import load_file

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import SAMPLING_RATE, open_source
from dinosr_hf.pretraining import parse_arguments, read_checkpoint
from dinosr_hf.pretraining.train_state import TrainState, make_train_state

CONFIG = CONFIGS / "tiny_cpu.yaml"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=5)
    add_size(parser)
    return parser.parse_args(argv)


def make_state(size: str, folder: Path) -> tuple[TrainState, list[str]]:
    """Make the state of a run after an update without gradients."""
    (folder / "audio").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).normal(size=3 * SAMPLING_RATE)
        soundfile.write(folder / "audio" / f"{number}.wav", 0.1 * noise, SAMPLING_RATE)
    words = ["--data", str(folder / "audio"), "--output_dir", str(folder / "run"), "--num_workers", "0"]
    arguments = parse_arguments([str(CONFIG), *words], CONFIG)
    model = DinoSRForPreTraining(model_config(size))
    state = make_train_state(model, open_source(str(folder / "audio")), arguments, Accelerator(cpu=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    return state, [str(CONFIG), *words]


def check(state: TrainState, path: Path) -> None:
    """Exit unless a checkpoint is complete and has the weights of the model."""
    read_checkpoint(path)
    saved, weights = load_file(path / "model.safetensors"), state.model.state_dict()
    if any(not torch.equal(saved[name], weights[name]) for name in weights):
        sys.exit(f"{path} has other weights than the model. Nothing is measured.")


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        state, words = make_state(options.size, folder)
        arguments = parse_arguments(words, CONFIG)
        (folder / "run").mkdir()
        stalls, totals, num_bytes = [], [], 0
        for step in range(1, options.repeats + 1):
            state.progress.step = step
            since = time.perf_counter()
            state.save(arguments)
            stalls.append(time.perf_counter() - since)
            state.writer.wait()
            totals.append(time.perf_counter() - since)
            path = folder / "run" / f"checkpoint-{step}"
            check(state, path)
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
    stall, total = statistics.median(stalls), statistics.median(totals)
    size = f"{options.size}, {num_bytes / 1e6:,.0f} MB a checkpoint"
    print(headline(torch.device("cpu"), options.threads))
    print(f"{size}, medians of {options.repeats}")
    print("| training stands still, s | files take, s | share |\n|---|---|---|")
    print(f"| {stall:.3f} | {total:.3f} | {stall / total:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
