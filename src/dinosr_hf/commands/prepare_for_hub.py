"""
Prepare the folder of a run for the Hub, and upload it with --push.

    dinosr publish runs/tiny hub/tiny --provenance provenance.yaml
    dinosr publish runs/tiny hub/tiny-2 --provenance provenance.yaml --push

The card is rendered from the run's record and from a provenance file with what a run cannot know (docs/publishing.md).
A new repository is private unless you give --public.
"""

import argparse
from collections.abc import Sequence

from ..hub import prepare, push, read_provenance
from ..utils.command_line import ArgumentError, Parser, command, parse_options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folder", help="output folder of the run")
    parser.add_argument("out", help="folder to write; new or empty")
    parser.add_argument("--provenance", help="YAML file with names, languages and licences")
    parser.add_argument("--repo_id", help="organisation/name on the Hub; this and the next three override the file")
    parser.add_argument("--license", help="licence of the weights, such as cc-by-4.0")
    parser.add_argument("--languages", nargs="+", help="ISO 639 codes, such as en de")
    parser.add_argument("--base_model", help="Hub name of the model that the run started from, or unpublished")
    parser.add_argument("--include", nargs="+", default=[], help="further files to copy")
    parser.add_argument("--push", action="store_true", help="upload the folder; needs `hf auth login` once")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv)
    if options.public and not options.push:
        raise ArgumentError("--public needs --push.")
    return options


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options = parse(argv)
        given = {name: getattr(options, name) for name in ("repo_id", "license", "languages", "base_model")}
        provenance, record = read_provenance(options.folder, options.provenance, **given)
        ready = prepare(options.folder, options.out, provenance, record, include=options.include)
        print(f"{ready} is ready: {', '.join(sorted(file.name for file in ready.iterdir()))}")
        if options.push:
            print("Uploaded to", push(ready, provenance.repo_id, private=not options.public))
        else:
            print(f"Nothing was uploaded. Read its README.md, then: hf upload --private {provenance.repo_id} {ready}")
