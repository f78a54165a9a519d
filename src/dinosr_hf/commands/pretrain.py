"""
Pre-train a DinoSR.

    dinosr pretrain                                         # a tiny model on synthetic speech
    dinosr pretrain --data my_recordings --output_dir runs/mine
    dinosr pretrain base_ls960 --data my_recordings --output_dir runs/base

Arguments come from a YAML file or recipe (by default tiny_cpu) and from flags, which take precedence; others have the
paper's values. `dinosr recipes` lists the recipes. The same command resumes a run that was interrupted. With several
GPUs, start it by `accelerate launch -m dinosr_hf.cli pretrain`.
"""

import logging
from collections.abc import Sequence

from accelerate import PartialState

from ..pretraining import TrainingStopped, parse_arguments, run
from ..pretraining.pretraining_arguments import GROUPS
from ..utils.command_line import Parser
from ..utils.recipes import recipes
from ._shared import resumable_command


def make_parser() -> Parser:
    return Parser(__doc__, GROUPS)


def main(argv: Sequence[str]) -> None:
    logging.getLogger("dinosr_hf").setLevel(logging.INFO)
    with resumable_command(__file__, ValueError, OSError, ImportError, TrainingStopped):
        arguments = parse_arguments(argv, recipes()["tiny_cpu"], description=__doc__)
        model = run(arguments)
    if model is not None and PartialState().is_main_process:
        print(f"The model is in {arguments.run.output_dir}: AutoModel.from_pretrained({arguments.run.output_dir!r}).")
