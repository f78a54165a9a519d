r"""
Print a script for a shell that completes subcommands, flags and their values. Needs the extra `train`.

    dinosr completion bash > ~/.local/share/bash-completion/completions/dinosr
    dinosr completion zsh > ~/.zfunc/_dinosr                # a folder of your fpath

The script has all flags in it, so that completing runs no Python. Print it again after an update.
"""

import argparse
import importlib
from collections.abc import Sequence

from dinosr_cli import COMMANDS

from ..utils.command_line import Parser, command, parse_options
from ..utils.extras import import_extra
from ..utils.recipes import recipes

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("shell", choices=SHELLS, help="shell that you use")
    return parser


def all_commands(files: dict[str, str]) -> argparse.ArgumentParser:
    """Return a parser of `dinosr` with all subcommands; `files` is what shtab takes to complete names of files."""
    whole = argparse.ArgumentParser("dinosr")
    subcommands = whole.add_subparsers()
    for name, (module_name, text) in COMMANDS.items():
        own = importlib.import_module(f"{__package__}.{module_name}").make_parser()
        if own.dataclass_types:
            own.add_argument("recipe", nargs="?", choices=[*recipes()])
        for action in own.arguments().values():
            if action.nargs != 0 and not action.choices:
                vars(action)["complete"] = files
        subcommands.add_parser(name, help=text, description=text, parents=[own], add_help=False)
    return whole


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        shell = parse_options(make_parser(), argv).shell
        shtab = import_extra("shtab", "train", "Completion")
        print(shtab.complete(all_commands(shtab.FILE), shell=shell))
