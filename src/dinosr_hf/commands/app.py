"""
Try models on a page in the browser: record or choose speech, and see its words, their times and its units.

    dinosr app runs/recogniser
    dinosr app runs/recogniser runs/base --max_seconds 60

A recogniser gives the words, a pre-trained model the units; a page has one of them, or one of each. The page is served
to this machine alone; Gradio's variables change that, such as GRADIO_SERVER_NAME=0.0.0.0 and GRADIO_SERVER_PORT=8080.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..hub.space import Listener, build_page
from ..utils.command_line import Parser, command, parse_options
from ..utils.extras import import_extra
from ._shared import add_device


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model, or its name on the Hub")
    longest = "seconds of the longest recording to accept (%(default)s)"
    parser.add_argument("--max_seconds", type=float, default=30.0, help=longest)
    greedy = "transcribe without the beam search that a recogniser's decoding.json asks for"
    parser.add_argument("--greedy", action="store_true", help=greedy)
    add_device(parser, "models")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options = parse(argv)
        import_extra("gradio", "app", "The page")  # fail before the models are loaded
        listener = Listener(
            options.models, device=options.device, greedy=options.greedy, max_seconds=options.max_seconds
        )
        title = " and ".join(Path(name).resolve().name for name in options.models)
        build_page(listener, title).launch()
