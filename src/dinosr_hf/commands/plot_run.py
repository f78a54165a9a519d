"""
Plot the curves of pre-training runs, with those of a published full-size run behind them.

    dinosr plot runs/tiny
    dinosr plot runs/a runs/b --x hours --output both.png

RUN is the output_dir of a run, finished or not. Compare runs with steps of different sizes by hours of audio.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..analysis.plots import read_runs, run_figure, save_figure
from ..utils.command_line import Parser, command, parse_options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", help="path of the plot, .png or .pdf (curves.png in the first run's folder)")
    parser.add_argument(
        "--x", default="step", choices=["step", "hours"], help="updates, or hours of audio (%(default)s)"
    )
    parser.add_argument("--title", help="title of the plot")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options = parse(argv)
        figure = run_figure(read_runs(options.runs), x=options.x, title=options.title)
        output = save_figure(figure, options.output or Path(options.runs[0]) / "curves.png")
        print(f"The picture is {output}.")
