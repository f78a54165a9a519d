r"""
Fine-tune a DinoSR as a speech recogniser.

    dinosr finetune                                         # the tiny model, on synthetic speech
    dinosr finetune ctc_10h --model runs/base --train_data librispeech/train --eval_data librispeech/dev \
        --output_dir runs/recogniser

Arguments come from a YAML file or recipe (by default ctc_tiny) and from flags, which take precedence; all of
transformers' TrainingArguments are flags as well. `dinosr recipes` lists the recipes. The same command resumes an
interrupted run. With several GPUs, start it by `accelerate launch -m dinosr_hf.cli finetune`.
"""

import logging
from collections.abc import Sequence

from accelerate import PartialState

from ..finetuning import (
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    Recognition,
    RecognitionArguments,
    finetune,
)
from ..utils.command_line import Parser, parse_groups
from ..utils.recipes import recipes
from ._shared import resumable_command

CONFIG = recipes()["ctc_tiny"]
GROUPS = (InitialModelArguments, LabelledDataArguments, RecognitionArguments, FinetuningArguments)


def make_parser() -> Parser:
    return Parser(__doc__, GROUPS)


def main(argv: Sequence[str]) -> None:
    with resumable_command(__file__):
        start, data, recognition, arguments = parse_groups(argv, GROUPS, CONFIG, description=__doc__)
        if PartialState().is_main_process:
            logging.getLogger("dinosr_hf").setLevel(logging.INFO)
        record = finetune(Recognition(recognition), start, data, arguments)
    if PartialState().is_main_process and not arguments.dry_run:
        for result in record.evaluation:
            print(f"{result['split']}: word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}")
        print(f"The recogniser is in {arguments.output_dir}: pipeline(model={arguments.output_dir!r}).")
