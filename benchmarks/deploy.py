"""
Compare speed and size of a recogniser in PyTorch, in onnxruntime, and in onnxruntime with int8 weights.

    python benchmarks/deploy.py --size base --seconds 10 --repeats 5 --threads 1

Weights are random and speech is noise: times and sizes are those of a trained model, and the differences of the
outputs show numerical errors, but not word error rates. The three forms are timed in turn. Nothing is timed unless the
output of the float32 network equals torch's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from contest import SAMPLING_RATE, add_size, at_least, headline, model_config, print_times, time_in_turn, timing_parser

from dinosr_hf import DinoSRForCTC
from dinosr_hf.hub.export import FolderModel, OnnxModel, TorchModel, compare, export_onnx, quantize_onnx
from dinosr_hf.utils.model_folder import feature_extractor

# Measured with the base model: 6e-6.
TOLERANCE = 1e-4


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = timing_parser(__doc__, repeats=5)
    parser.set_defaults(threads=1)
    add_size(parser)
    parser.add_argument("--seconds", type=at_least(0.1), default=10.0, help="length of the utterance (%(default)s)")
    return parser.parse_args(argv)


def save_model(size: str, folder: Path) -> None:
    """Save a recogniser with random weights and a vocabulary of 32 characters."""
    torch.manual_seed(0)
    model = DinoSRForCTC(model_config(size))
    model.save_pretrained(folder)
    labels = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
    (folder / "labels.json").write_text(json.dumps({label: number for number, label in enumerate(labels)}))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "labels.json"))
    transformers.Wav2Vec2Processor(feature_extractor(), tokenizer).save_pretrained(folder)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    waveform = np.random.default_rng(0).standard_normal(int(options.seconds * SAMPLING_RATE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_model(options.size, folder / "torch")
        export_onnx(folder / "torch", folder / "onnx")
        quantize_onnx(folder / "onnx", folder / "int8")
        models: dict[str, FolderModel] = {
            "torch": TorchModel(folder / "torch"),
            "onnx": OnnxModel(folder / "onnx", num_threads=options.threads),
            "onnx int8": OnnxModel(folder / "int8", num_threads=options.threads),
        }
        found = {name: compare(models["torch"], model, [waveform]) for name, model in models.items()}
    if not found["onnx"].max_difference <= TOLERANCE:
        difference = found["onnx"].max_difference
        sys.exit(f"Nothing was timed: the network's output differs from torch's by {difference:.1e}")

    cpu_times: dict[str, list[float]] = {name: [] for name in models}

    def run(name: str) -> None:
        since = time.process_time()
        models[name].run([waveform])
        cpu_times[name].append(time.process_time() - since)

    def cells(name: str, median: float) -> dict[str, str]:
        return {
            "CPU (s)": f"{statistics.median(cpu_times[name]):.3f}",
            "size (MiB)": f"{found[name].num_bytes[1] / 2**20:.1f}",
            "largest difference": f"{found[name].max_difference:.1e}",
            "other best labels": f"{found[name].changed_decisions:.1%}",
        }

    times = time_in_turn({name: partial(run, name) for name in models}, options.repeats, torch.device("cpu"))
    print(headline(torch.device("cpu"), options.threads, "onnxruntime"))
    print(f"{options.size}: one utterance of {options.seconds:g} s, {options.repeats} runs of each in turn\n")
    print_times("form", times, cells)
    print()
    for clock, measured in (("wall time", times), ("CPU time, which depends less on other programs", cpu_times)):
        medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
        ratios = (f"torch / {name}: {medians['torch'] / medians[name]:.2f}" for name in list(medians)[1:])
        print(f"{', '.join(ratios)} ({clock})")


if __name__ == "__main__":
    main(sys.argv[1:])
