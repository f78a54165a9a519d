"""
Convert a DinoSR checkpoint to a Transformers folder, without running any code of the file.

    dinosr convert dinosr.ckpt runs/converted --verify speech.wav

docs/converting.md lists the supported files and their licences.
"""

import argparse
from collections.abc import Sequence

from .. import DinoSRForPreTraining
from ..data.audio import audio_info
from ..hub.conversion import convert, convert_to_fairseq, convert_to_spidr, statistics_table
from ..utils.command_line import ArgumentError, Parser, command, parse_options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument(
        "file", help="checkpoint (.pt, .ckpt), data2vec folder, or name on the Hub; with --to, a DinoSR folder"
    )
    parser.add_argument("out", help="folder to write; with --to, the checkpoint to write")
    parser.add_argument(
        "--as", dest="as_", choices=("pretraining", "model", "ctc"), help="what to convert: model is the encoder alone"
    )
    parser.add_argument("--dictionary", metavar="dict.ltr.txt", help="dictionary of a fairseq recogniser")
    parser.add_argument("--config", metavar="config.json", help="configuration of a spidr checkpoint")
    parser.add_argument("--num_attention_heads", type=int, help="for a spidr checkpoint without --config")
    objective = "objective of a spidr checkpoint, if neither the file nor its config.json tells it"
    parser.add_argument("--objective", choices=("dinosr", "spidr"), help=objective)
    parser.add_argument("--license", help="licence of the weights for the card, such as cc-by-nc-4.0")
    parser.add_argument("--to", choices=("fairseq", "spidr"), help="write the authors' layout or spidr's instead")
    parser.add_argument("--verify", metavar="AUDIO", help="print how many codewords a recording uses in each layer")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv, num_attention_heads=1)
    others = ("as_", "verify", "dictionary", "config", "license", "num_attention_heads", "objective")
    if options.to and any(getattr(options, name) for name in others):
        raise ArgumentError("--to takes only a folder and a file. Leave out the other flags.")
    return options


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options = parse(argv)
        if options.to:
            write = convert_to_fairseq if options.to == "fairseq" else convert_to_spidr
            print("Written:", write(options.file, options.out))
            return
        if options.verify:
            audio_info(options.verify)  # before the work
        names = ("as_", "dictionary", "config", "num_attention_heads", "objective", "license")
        model = convert(options.file, options.out, **{name: getattr(options, name) for name in names})
        print(f"Written: {options.out}, a {type(model).__name__}")
        if options.verify and isinstance(model, DinoSRForPreTraining):
            print(statistics_table(model, options.verify))
        elif options.verify:
            print("--verify was ignored: it needs codebooks, and this model has none.")
