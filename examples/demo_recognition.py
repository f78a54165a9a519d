"""
Fine-tune the model of examples/demo.py to recognise spoken digits (`make demo` runs it after the other).

It runs examples/finetune_ctc.py with examples/configs/ctc_tiny.yaml, opens the folder with transformers' `pipeline`,
and prints the error rates on held-out voices and a transcript with its word times.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from transformers import pipeline

from dinosr_hf.data.synthetic import SyntheticCorpus
from dinosr_hf.recognition import SpeechRecognitionPipeline
from dinosr_hf.utils.command_line import command
from dinosr_hf.utils.files import claim_output_folder
from dinosr_hf.utils.model_folder import open_dinosr_config

HERE = Path(__file__).parent
CONFIG = HERE / "configs" / "ctc_tiny.yaml"
MARKER = ".dinosr-demo"  # only a folder with this file is emptied


def fine_tune(model: str, out: Path, flags: list[str]) -> None:
    """Run examples/finetune_ctc.py in one process."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(HERE / "finetune_ctc.py"), str(CONFIG)]
    launch += ["--model", model, "--output_dir", str(out), *flags]
    if subprocess.run(launch).returncode:
        sys.exit("demo_recognition.py: the fine-tuning failed; the reason is above.")


def word_times(recognise, corpus: SyntheticCorpus) -> tuple[float, int]:
    """Return the mean error of word starts and ends in seconds, over correct utterances, and the number of words."""
    errors: list[float] = []
    for row in corpus:
        found = recognise(row["audio"]["array"], return_timestamps="word")
        if found["text"] == row["text"]:
            for word, chunk in zip(row["words"], found["chunks"], strict=True):
                start, end = chunk["timestamp"]
                errors += [abs(start - word["start"]), abs(end - word["end"])]
    return float(np.mean(errors)) if errors else float("nan"), len(errors) // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="path to the folder that examples/demo.py wrote")
    parser.add_argument(
        "--output_dir",
        default="runs/demo/recogniser",
        help="path to the folder for the recogniser; an earlier demo's is replaced",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of speech, weights and batches (%(default)s)")
    options, flags = parser.parse_known_args()
    with command(__file__):
        open_dinosr_config(options.model)
        out = claim_output_folder(options.output_dir, MARKER)
    print("\nFine-tuning on transcribed digits ...", flush=True)
    fine_tune(options.model, out, [*flags, "--seed", str(options.seed)])
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))

    print("\n| held-out voices | utterances | word error rate | character error rate |\n|---|---|---|---|")
    for figure in record["evaluation"]:
        print(f"| {figure['split']} | {figure['num_utterances']} | {figure['wer']:.1%} | {figure['cer']:.1%} |")

    recognise = pipeline(
        "automatic-speech-recognition", str(out), pipeline_class=SpeechRecognitionPipeline, trust_remote_code=False
    )
    corpus = SyntheticCorpus(20, seed=options.seed, split="test", noise=False, text="digits")
    row = corpus[0]
    found = recognise(row["audio"]["array"], return_timestamps="word")
    print(f"\nSaid:  {row['text']}\nHeard: {found['text']}")
    for chunk in found["chunks"]:
        print(f"  {chunk['timestamp'][0]:5.2f} to {chunk['timestamp'][1]:5.2f} s  {chunk['text']}")
    error, count = word_times(recognise, corpus)
    if count:
        print(f"\nMean error of word starts and ends: {error * 1000:.0f} ms over {count} words.")
    print(f"The recogniser is in {out}.")


if __name__ == "__main__":
    main()
