r"""
Fine-tune a DinoSR to classify utterances: keywords, languages, speakers, emotions.

    dinosr finetune-classifier                              # languages of synthetic speech, with the tiny model
    dinosr finetune-classifier superb_ks --model runs/base --train_data speech_commands --label_column label \
        --output_dir runs/keywords

Arguments come from a YAML file or recipe (by default classify_tiny) and from flags, which take precedence; all of
transformers' TrainingArguments are flags as well. `dinosr recipes` lists the recipes. The same command resumes an
interrupted run. With several GPUs, start it by `accelerate launch -m dinosr_hf.cli finetune-classifier`.
"""

import logging
from collections.abc import Sequence

from accelerate import PartialState

from ..finetuning import (
    Classification,
    ClassificationArguments,
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    finetune,
)
from ..utils.command_line import Parser, parse_groups
from ..utils.recipes import recipes
from ._shared import resumable_command

CONFIG = recipes()["classify_tiny"]
GROUPS = (InitialModelArguments, LabelledDataArguments, ClassificationArguments, FinetuningArguments)


def make_parser() -> Parser:
    return Parser(__doc__, GROUPS)


def main(argv: Sequence[str]) -> None:
    with resumable_command(__file__):
        start, data, classification, arguments = parse_groups(argv, GROUPS, CONFIG, description=__doc__)
        if PartialState().is_main_process:
            logging.getLogger("dinosr_hf").setLevel(logging.INFO)
        record = finetune(Classification(classification), start, data, arguments)
    if PartialState().is_main_process and not arguments.dry_run:
        folder = arguments.output_dir
        for result in record.evaluation:
            print(f"{result['split']}: accuracy {result['accuracy']:.2%}, macro F1 {result['macro_f1']:.2%}")
        print(f"The classifier is in {folder}: pipeline('audio-classification', model={folder!r}).")
