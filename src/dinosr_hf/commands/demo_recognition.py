"""
Fine-tune the model of `dinosr demo` to recognise spoken digits (`make demo` runs it after the other).

    dinosr demo-recognition

It trains as `dinosr finetune` does, whose flags it has too, with the recipe ctc_tiny, opens the folder with
transformers' `pipeline`, and prints the error rates on held-out voices and a transcript with its word times.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import pipeline

from ..data.synthetic import SyntheticCorpus
from ..recognition import SpeechRecognitionPipeline
from ..training.run_record import read_record
from ..utils.command_line import Parser, command, parse_groups
from ..utils.files import claim_output_folder
from ..utils.model_folder import open_dinosr_config
from ..utils.tables import markdown_table
from . import finetune_ctc
from .demo import MARKER, parse_demo


def word_times(recognise: Callable[..., Any], corpus: SyntheticCorpus) -> tuple[float, int]:
    """Return the mean error of word starts and ends in seconds, over correct utterances, and the number of words."""
    errors: list[float] = []
    for row in corpus:
        found = recognise(row["audio"]["array"], return_timestamps="word")
        if found["text"] == row["text"]:
            for word, chunk in zip(row["words"], found["chunks"], strict=True):
                start, end = chunk["timestamp"]
                errors += [abs(start - word["start"]), abs(end - word["end"])]
    return float(np.mean(errors)) if errors else float("nan"), len(errors) // 2


def make_parser() -> Parser:
    parser = Parser(__doc__, takes_file=False)
    parser.add_argument("--model", default="runs/demo", help="path to the folder that dinosr demo wrote")
    parser.add_argument(
        "--output_dir",
        default="runs/demo/recogniser",
        help="path to the folder for the recogniser; an earlier demo's is replaced",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of speech, weights and batches (%(default)s)")
    return parser


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options, flags = parse_demo(make_parser(), argv)
        flags = ["ctc_tiny", *flags, "--model", options.model, "--seed", str(options.seed)]
        flags += ["--output_dir", options.output_dir]
        open_dinosr_config(options.model)
        *_, arguments = parse_groups(flags, finetune_ctc.GROUPS)
        if not arguments.dry_run:
            claim_output_folder(options.output_dir, MARKER)
        print("\nFine-tuning on transcribed digits ...", flush=True)
        finetune_ctc.main(flags)
        if arguments.dry_run:
            return
        out = Path(options.output_dir)
        lines = [
            [result["split"], str(result["num_utterances"]), f"{result['wer']:.1%}", f"{result['cer']:.1%}"]
            for result in read_record(out).evaluation
        ]
        headings = ["held-out voices", "utterances", "word error rate", "character error rate"]
        print(f"\n{markdown_table(headings, lines)}", end="")

        recognise: Any = pipeline(
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
