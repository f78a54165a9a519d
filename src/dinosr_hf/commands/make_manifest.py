"""
Scan a folder of recordings, and write a manifest of those that a run can use.

    dinosr manifest my_recordings my_recordings/manifest.jsonl
    dinosr manifest interviews interviews/parts.jsonl --cut_seconds 10  # of recordings that last minutes
    dinosr pretrain --data my_recordings/manifest.jsonl

Prints hours, files, rates, channels, formats and durations, and which files are left out and why; a list of these is
written beside the manifest. Only headers and beginnings of files are read; --decode reads everything.
"""

import argparse
import time
from collections.abc import Sequence

from ..data.scan import MIN_SECONDS, check_manifest_path, scan_folder, write_manifest
from ..utils.command_line import Parser, check_ranges, command, parse_options


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
    parser.add_argument(
        "--cut_seconds",
        type=float,
        help="list longer recordings as parts of at most this length, without copies: a run takes one crop of each"
        " line in a pass, and so little of a long recording. Give the run's max_seconds.",
    )
    parser.add_argument("--decode", action="store_true", help="decode all files, which finds all damaged ones")
    parser.add_argument("--overwrite", action="store_true", help="replace the manifest if it exists")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        options, since = parse(argv), time.perf_counter()
        place = {"cut_seconds": options.cut_seconds, "overwrite": options.overwrite}
        check_manifest_path(options.manifest, **place)
        cut, least = options.cut_seconds, 2 * options.min_seconds
        check_ranges([(cut is None or cut >= least, "cut_seconds", cut, f"at least {least:g}, twice min_seconds")])
        scan = scan_folder(options.folder, min_seconds=options.min_seconds, decode=options.decode, show_progress=True)
        try:
            written = write_manifest(scan, options.manifest, **place)
        finally:
            print(scan)
        num_files, seconds = len(scan.usable) + len(scan.left_out), time.perf_counter() - since
        print(f"{num_files:,} files in {seconds:,.1f} s ({num_files / seconds:,.0f} a second)")
        print("Written:", *written)
