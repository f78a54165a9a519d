"""
Pre-train a DinoSR.

    accelerate launch examples/pretrain.py                                      # a tiny one, on synthetic speech
    accelerate launch examples/pretrain.py --data my_recordings --max_steps 2000
    accelerate launch examples/pretrain.py examples/configs/base_ls960.yaml --data my_recordings --output_dir runs/base

A YAML file first, if any, then flags over it; without a file, examples/configs/tiny_cpu.yaml is the file. What neither
has is at the paper's values. `--help` lists all arguments.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from dinosr_hf.pretraining import (
    ArgumentError,
    CheckpointError,
    RunInterrupted,
    TrainingStopped,
    parse_arguments,
    run,
)
from dinosr_hf.utils.command_line import command


def main() -> None:
    logging.getLogger("dinosr_hf").setLevel(logging.INFO)
    try:
        with command(__file__, ArgumentError, CheckpointError, TrainingStopped):
            arguments = parse_arguments(sys.argv[1:], Path(__file__).parent / "configs" / "tiny_cpu.yaml")
            model = run(arguments)
    except RunInterrupted as interruption:
        print(f"{interruption} The same command goes on from there.", file=sys.stderr)
        sys.exit(interruption.exit_code)
    if model is not None and PartialState().is_main_process:
        print(f"The model is in {arguments.run.output_dir}: AutoModel.from_pretrained({arguments.run.output_dir!r}).")


if __name__ == "__main__":
    main()
