"""
Pre-train a DinoSR.

    accelerate launch examples/pretrain.py                                      # a tiny model on synthetic speech
    accelerate launch examples/pretrain.py --data my_recordings --max_steps 2000
    accelerate launch examples/pretrain.py examples/configs/base_ls960.yaml --data my_recordings --output_dir runs/base

Arguments come from a YAML file (by default examples/configs/tiny_cpu.yaml) and from flags, which take precedence;
others have the paper's values. `--help` lists them all. The same command resumes a run that was interrupted.
"""

import logging
import sys
from pathlib import Path

from accelerate import PartialState

from dinosr_hf.pretraining import RunInterrupted, TrainingStopped, parse_arguments, run
from dinosr_hf.utils.command_line import command


def main() -> None:
    logging.getLogger("dinosr_hf").setLevel(logging.INFO)
    config = Path(__file__).parent / "configs" / "tiny_cpu.yaml"
    try:
        with command(__file__, ValueError, OSError, ImportError, TrainingStopped):
            arguments = parse_arguments(sys.argv[1:], config, description=__doc__)
            model = run(arguments)
    except RunInterrupted as interruption:
        print(f"{interruption} The same command resumes from there.", file=sys.stderr)
        sys.exit(interruption.exit_code)
    if model is not None and PartialState().is_main_process:
        print(f"The model is in {arguments.run.output_dir}: AutoModel.from_pretrained({arguments.run.output_dir!r}).")


if __name__ == "__main__":
    main()
