r"""
Fine-tune a DinoSR as a speech recogniser.

    accelerate launch examples/finetune_ctc.py                               # the tiny model, on synthetic speech
    accelerate launch examples/finetune_ctc.py examples/configs/ctc_10h.yaml --model runs/base \
        --train_data librispeech/train --eval_data librispeech/dev --output_dir runs/recogniser

The YAML file, if any, comes first, and flags override it; the default is examples/configs/ctc_tiny.yaml. All of
transformers' TrainingArguments are flags as well; `--help` lists them. The same command resumes an interrupted run.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from dinosr_hf.finetuning import (
    FinetuningArguments,
    InitialModelArguments,
    LabelledDataArguments,
    Recognition,
    RecognitionArguments,
    finetune,
)
from dinosr_hf.utils.command_line import command, parse_groups

CONFIG = Path(__file__).parent / "configs" / "ctc_tiny.yaml"
GROUPS = (InitialModelArguments, LabelledDataArguments, RecognitionArguments, FinetuningArguments)


def main() -> None:
    with command(__file__):
        start, data, recognition, arguments = parse_groups(sys.argv[1:], GROUPS, CONFIG, description=__doc__)
        if PartialState().is_main_process:
            logging.getLogger("dinosr_hf").setLevel(logging.INFO)
        record = finetune(Recognition(recognition), start, data, arguments)
    if PartialState().is_main_process:
        for result in record.evaluation:
            print(f"{result['split']}: word error rate {result['wer']:.2%}, character error rate {result['cer']:.2%}")
        print(f"The recogniser is in {arguments.output_dir}: pipeline(model={arguments.output_dir!r}).")


if __name__ == "__main__":
    main()
