"""Small labelled corpora, a tiny pre-trained model, and fine-tuning runs on them."""

import csv
from pathlib import Path

import numpy as np
import soundfile
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.finetuning import (
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    Recognition,
    RecognitionArguments,
    finetune,
)
from dinosr_hf.utils.model_folder import save_folder
from tiny import NO_DROPOUT, randomize, tiny_config

WORDS = ("oh", "no", "hello", "moon", "noon")


def write_corpus(folder: Path, num_utterances: int, seed: int = 0, rate: int = 16_000) -> Path:
    """Write an audio folder of coloured noise of different lengths, each with a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file_name", "transcription", "language"])
        for number in range(num_utterances):
            words = generator.choice(WORDS, size=int(generator.integers(1, 4)))
            noise = generator.standard_normal(int(rate * generator.uniform(0.12, 0.3))).cumsum() * 0.01
            soundfile.write(folder / f"{number:02d}.wav", np.clip(noise, -0.9, 0.9), rate)
            table.writerow([f"{number:02d}.wav", " ".join(words), ("en", "de")[number % 2]])
    return folder


def write_model(folder: Path, **changes) -> Path:
    """Save a pre-training checkpoint whose teacher differs from its student, with no randomness in training."""
    settings = {**NO_DROPOUT, "mask_time_prob": 0.0, **changes}
    torch.manual_seed(0)  # the same weights in any order of tests
    model = randomize(DinoSRForPreTraining(tiny_config(**settings)))
    save_folder(model, folder)
    return folder


def run_settings(**changes):
    """Arguments of a short run on a CPU."""
    defaults = {
        "step_seconds": 1.0,
        "micro_seconds": 1.0,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "warmup_share": 0.0,
        "hold_share": 1.0,
        "adam_epsilon": 1e-2,  # rounding decides gradients near zero: let them move weights little
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "num_threads": 1,
        "disable_tqdm": True,
    }
    return {**defaults, **changes}


def recognition_of(model: Path, train: Path, out: Path, *, data=None, start=None, recognition=None, **run):
    """Return the arguments of `finetune` for a run with CTC."""
    return (
        Recognition(RecognitionArguments(**(recognition or {}))),
        InitialModelArguments(model=str(model), **(start or {})),
        LabelledDataArguments(**{"train_data": [str(train)], "min_seconds": 0.01, **(data or {})}),
        FinetuningArguments(output_dir=str(out), **run_settings(**run)),
    )


def recognise(model: Path, train: Path, out: Path, *, on_trainer=None, **changes):
    """Fine-tune with CTC, and return the record of the run."""
    return finetune(*recognition_of(model, train, out, **changes), on_trainer=on_trainer)
