"""
List the recipes: YAML files of arguments that come with the package.

    dinosr recipes
    dinosr pretrain small --data my_recordings --output_dir runs/mine
    dinosr finetune ctc_10h --model runs/mine --train_data my_transcripts --output_dir runs/recogniser

To change one, copy its file, and give the copy's path instead of the name. Flags take precedence over the file.
"""

from collections.abc import Sequence

from ..utils.command_line import Parser, command, parse_options
from ..utils.recipes import first_clause, recipes


def make_parser() -> Parser:
    return Parser(__doc__, takes_file=False)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        parse_options(make_parser(), argv)
        files = recipes()
        for name, path in files.items():
            print(f"{name:15} {first_clause(path)}")
        print(f"The files are in {path.parent}.")
