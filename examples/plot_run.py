"""
Plot the curves of pre-training runs, with those of a published full-size run behind them.

    python examples/plot_run.py runs/tiny
    python examples/plot_run.py runs/a runs/b --x hours --output both.png

RUN is the output_dir of a run, finished or not. Compare runs with steps of different sizes by hours of audio.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dinosr_hf.analysis.plots import read_run, run_figure, save_figure
from dinosr_hf.utils.command_line import command, parse_options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--output", help="path of the plot, .png or .pdf (curves.png in the first run's folder)")
    parser.add_argument(
        "--x", default="step", choices=["step", "hours"], help="updates, or hours of audio (%(default)s)"
    )
    parser.add_argument("--title", help="title of the plot")
    return parse_options(parser, argv)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    with command(__file__):
        figure = run_figure([read_run(folder) for folder in options.runs], x=options.x, title=options.title)
        output = save_figure(figure, options.output or Path(options.runs[0]) / "curves.png")
    print(f"The picture is {output}.")


if __name__ == "__main__":
    main(sys.argv[1:])
