"""
Scan a folder of recordings, and write a manifest of those that a run can use.

    dinosr manifest my_recordings my_recordings/manifest.jsonl
    dinosr pretrain --data my_recordings/manifest.jsonl

Prints hours, files, rates, channels, formats and durations, and which files are left out and why; a list of these is
written beside the manifest. Only headers and beginnings of files are read; --decode reads everything.
"""

import argparse
import time
from collections.abc import Sequence

from ..data.scan import MIN_SECONDS, check_manifest_path, scan_folder, write_manifest
from ..utils.command_line import Parser, command, parse_options


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("folder", help="folder with audio files (wav, flac, mp3, aiff, ...) in it or below it")
    parser.add_argument(
        "manifest", help="manifest to write: .jsonl, .csv, or .tsv (fairseq's; files of one rate only)"
    )
    parser.add_argument(
        "--min_seconds",
        type=float,
        default=MIN_SECONDS,
        help="leave out shorter files. The default, %(default)s, is one masked span of the paper's model: no run can"
        " use less. A run leaves out more by its own min_seconds.",
    )
    parser.add_argument("--decode", action="store_true", help="decode all files, which finds all damaged ones")
    parser.add_argument("--overwrite", action="store_true", help="replace the manifest if it exists")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options, since = parse(argv), time.perf_counter()
        check_manifest_path(options.manifest, overwrite=options.overwrite)
        scan = scan_folder(options.folder, min_seconds=options.min_seconds, decode=options.decode, show_progress=True)
        try:
            written = write_manifest(scan, options.manifest, overwrite=options.overwrite)
        finally:
            print(scan)
        num_files, seconds = len(scan.usable) + len(scan.left_out), time.perf_counter() - since
        print(f"{num_files:,} files in {seconds:,.1f} s ({num_files / seconds:,.0f} a second)")
        print("Written:", *written)
