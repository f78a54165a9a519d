"""
Fine-tune a DinoSR to tell classes of utterances apart: keywords, languages, speakers, emotions.

    accelerate launch examples/finetune_classification.py         # languages of synthetic speech, by the tiny model
    accelerate launch examples/finetune_classification.py examples/configs/superb_ks.yaml --model runs/base \
        --train_data speech_commands --label_column label --output_dir runs/keywords

A YAML file first, if any, then flags over it; without a file, examples/configs/classify_tiny.yaml is the file. All of
transformers' TrainingArguments are flags as well; `--help` lists them.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from dinosr_hf.finetuning import (
    Classification,
    ClassificationArguments,
    FinetuningArguments,
    LabelledDataArguments,
    StartArguments,
    finetune,
)
from dinosr_hf.utils.command_line import ArgumentError, command, parse_groups

CONFIG = Path(__file__).parent / "configs" / "classify_tiny.yaml"
GROUPS = (StartArguments, LabelledDataArguments, ClassificationArguments, FinetuningArguments)


def main() -> None:
    with command(__file__, ArgumentError):
        start, data, classification, arguments = parse_groups(sys.argv[1:], GROUPS, CONFIG)
        if PartialState().is_main_process:
            logging.getLogger("dinosr_hf").setLevel(logging.INFO)
        record = finetune(Classification(classification), start, data, arguments)
    if PartialState().is_main_process:
        folder = arguments.output_dir
        for figure in record.evaluation:
            print(f"{figure['split']}: accuracy {figure['accuracy']:.2%}, macro F1 {figure['macro_f1']:.2%}")
        print(f"The classifier is in {folder}: pipeline('audio-classification', model={folder!r}).")


if __name__ == "__main__":
    main()
