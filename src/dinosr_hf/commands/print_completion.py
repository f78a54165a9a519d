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
INHERITED = {"demo": "pretrain", "demo-recognition": "finetune"}  # whose flags these take too

# After a flag of several words another flag may come, which shtab does not offer. `current_option_strings` is shtab's.
BASH = """
_dinosr_files() {
  if [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
    compgen -W "${current_option_strings[*]}" -- "${COMP_WORDS[COMP_CWORD]}"
  else
    compgen -f -- "$1"
  fi
}
_dinosr_recipe_files() {
  compgen -W "$_dinosr_recipes" -- "$1"
  compgen -f -X "!*.y*ml" -- "$1"
  compgen -d -- "$1"
}
"""


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("shell", choices=SHELLS, help="shell that you use")
    return parser


def _parser_of(name: str, files: dict[str, str]) -> Parser:
    parser: Parser = importlib.import_module(f"{__package__}.{COMMANDS[name][0]}").make_parser()
    for action in parser.arguments().values():
        if action.nargs != 0 and not action.choices:
            vars(action)["complete"] = files
    return parser


def all_commands(files: dict[str, str], recipe_files: dict[str, str]) -> argparse.ArgumentParser:
    """Return a parser of `dinosr` with all subcommands, whose files and recipes shtab completes by these mappings."""
    whole = argparse.ArgumentParser("dinosr")
    subcommands = whole.add_subparsers()
    for name, (*_, text) in COMMANDS.items():
        parents = [_parser_of(parent, files) for parent in (INHERITED.get(name), name) if parent]
        if parents[-1].dataclass_types:
            vars(parents[-1].add_argument("recipe", nargs="?"))["complete"] = recipe_files
        # Of two flags of one name the last stays, the command's own.
        subcommands.add_parser(
            name, help=text, description=text, parents=parents, add_help=False, conflict_handler="resolve"
        )
    return whole


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        shell = parse_options(make_parser(), argv).shell
        shtab = import_extra("shtab", "train", "Completion")
        names = " ".join(recipes())
        files = {**shtab.FILE, "bash": "_dinosr_files"}
        recipe_files = {"bash": "_dinosr_recipe_files", "zsh": f"({names})", "tcsh": f"({names})"}
        preamble = {"bash": f'_dinosr_recipes="{names}"{BASH}'}
        print(shtab.complete(all_commands(files, recipe_files), shell=shell, preamble=preamble))
