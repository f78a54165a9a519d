r"""
Fine-tune a DinoSR to classify utterances: keywords, languages, speakers, emotions.

    accelerate launch examples/finetune_classification.py         # languages of synthetic speech, with the tiny model
    accelerate launch examples/finetune_classification.py examples/configs/superb_ks.yaml --model runs/base \
        --train_data speech_commands --label_column label --output_dir runs/keywords

The YAML file, if any, comes first, and flags override it; the default is examples/configs/classify_tiny.yaml. All of
transformers' TrainingArguments are flags as well; `--help` lists them. The same command resumes an interrupted run.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from dinosr_hf.finetuning import (
    Classification,
    ClassificationArguments,
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    finetune,
)
from dinosr_hf.utils.command_line import command, parse_groups

CONFIG = Path(__file__).parent / "configs" / "classify_tiny.yaml"
GROUPS = (InitialModelArguments, LabelledDataArguments, ClassificationArguments, FinetuningArguments)


def main() -> None:
    with command(__file__):
        start, data, classification, arguments = parse_groups(sys.argv[1:], GROUPS, CONFIG, description=__doc__)
        if PartialState().is_main_process:
            logging.getLogger("dinosr_hf").setLevel(logging.INFO)
        record = finetune(Classification(classification), start, data, arguments)
    if PartialState().is_main_process:
        folder = arguments.output_dir
        for result in record.evaluation:
            print(f"{result['split']}: accuracy {result['accuracy']:.2%}, macro F1 {result['macro_f1']:.2%}")
        print(f"The classifier is in {folder}: pipeline('audio-classification', model={folder!r}).")


if __name__ == "__main__":
    main()
