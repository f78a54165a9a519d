"""
Compare a pre-trained model with random weights, fine-tuned on little labelled speech.

    python benchmarks/few_labels.py --output_dir runs/few_labels

For each seed it pre-trains the tiny model on synthetic sentences, then fine-tunes it, and the same model with random
weights, on about one and ten minutes of transcribed digits with examples/finetune_ctc.py, and prints word error rates
on held-out voices. The seed determines corpus, voices, weights and order. Finished runs are not repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from contest import headline

EXAMPLES = Path(__file__).parent.parent / "examples"
# Of about 2.3 s each.
UTTERANCES = {"1 minute": 26, "10 minutes": 260}
STARTS = {"pre-trained": [], "from scratch": ["--from_scratch", "true", "--freeze_steps", "0"]}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", default="runs/few_labels", help="path to the folder for all runs (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each (%(default)s)")
    parser.add_argument("--pretraining_steps", type=int, default=600, help="number of updates (%(default)s)")
    parser.add_argument("--max_steps", type=int, default=1_200, help="number of updates of fine-tuning (%(default)s)")
    parser.add_argument(
        "--scratch_learning_rates", type=float, nargs="+", default=[1e-3], help="for random weights (%(default)s)"
    )
    return parser.parse_args(argv)


def run_script(script: str, *flags: str | Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLES / script), *map(str, flags)], check=True)


def pretrained(folder: Path, seed: int, steps: int) -> Path:
    """Pre-train a model, or go on with the run, or find it finished."""
    out = folder / f"pretrained-{steps}-{seed}"
    run_script("pretrain.py", "--output_dir", out, "--seed", str(seed), "--max_steps", str(steps))
    return out


def word_error_rate(out: Path, flags: Sequence[str | Path]) -> float:
    run_script("finetune_ctc.py", EXAMPLES / "configs" / "ctc_tiny.yaml", "--output_dir", out, *flags)
    figures = json.loads((out / "run.json").read_text(encoding="utf-8"))["evaluation"]
    return next(figure["wer"] for figure in figures if figure["split"] == "test")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    folder = Path(options.output_dir)
    models = {seed: pretrained(folder, seed, options.pretraining_steps) for seed in options.seeds}
    print(headline(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.get_num_threads()))
    print("| labels | start | " + " | ".join(f"seed {seed}" for seed in models) + " | mean |")
    print("|---|---|" + "---|" * (len(models) + 1))
    for labels, num_utterances in UTTERANCES.items():
        for start, extra in STARTS.items():
            rates = options.scratch_learning_rates if start == "from scratch" else [1e-3]
            for rate in rates:
                found = []
                for seed, model in models.items():
                    flags = ["--model", model, "--seed", str(seed), "--synthetic_utterances", str(num_utterances)]
                    flags += ["--max_steps", str(options.max_steps), "--learning_rate", str(rate), *extra]
                    name = f"{start}-{labels}-{rate}-{options.pretraining_steps}-{options.max_steps}-{seed}"
                    found.append(word_error_rate(folder / name.replace(" ", "_"), flags))
                cells = " | ".join(f"{wer:.1%}" for wer in found)
                described = start if start == "pre-trained" else f"{start}, learning rate {rate:g}"
                print(f"| {labels} | {described} | {cells} | {np.mean(found):.1%} |", flush=True)


if __name__ == "__main__":
    main()
