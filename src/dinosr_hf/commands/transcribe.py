"""
Transcribe recordings of any length.

    dinosr transcribe runs/recogniser talk.mp3
    dinosr transcribe runs/recogniser talks more/talk.wav --format srt --output_dir subtitles

Inputs are audio files (wav, flac, mp3, aiff, ...) and folders of them, or one manifest, archive or dataset.
Transcripts go to stdout, or with --output_dir each to a file of its own; then run the same command again to resume
after an interruption. Uses beam search if the model's folder has a decoding.json (`dinosr tune` writes it), else
greedy search. Exits with 1 if a recording cannot be read.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from ..data import SpeechSource
from ..data.output_folder import describe_recordings
from ..recognition import FORMATS, Transcriber, Transcript, TranscriptFiles, output_paths
from ..recognition.subtitles import to_json
from ..utils.command_line import Parser, command, parse_options, program, refuse_unused
from ._shared import AudioBar, add_device, add_dtype, add_inputs, add_windows, open_inputs, windows_of


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a recogniser, or name on the Hub")
    add_inputs(parser)
    add("--format", default="txt", choices=list(FORMATS), help="format of the transcripts (%(default)s)")
    place = "folder to write one file per recording to, instead of stdout; those of /data/a.wav and ../a.wav in a"
    add("--output_dir", help=f"{place} manifest are data/a.txt and _up/a.txt below it")
    add("--dry_run", action="store_true", help="open model and inputs, say what would be written, and end")
    add("--overwrite", action="store_true", help="make existing transcripts anew")
    add("--decoding", help="file with options of beam search (decoding.json of the model)")
    add("--greedy", action="store_true", help="use greedy search even if there is a decoding.json")
    add_windows(parser)
    pause = "seconds without a letter after which a word ends (%(default)s)"
    add("--pause_seconds", type=float, default=0.3, help=pause)
    add_device(parser)
    add_dtype(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv)


def format_for_stdout(transcript: Transcript, form: str, is_alone: bool) -> str:
    """Format a transcript; one of several as a line."""
    if is_alone:
        return FORMATS[form](transcript)
    return f"{transcript.id}\t{transcript.text}\n" if form == "txt" else to_json(transcript, indent=None)


def print_transcripts(transcriber: Transcriber, source: SpeechSource, form: str) -> None:
    """Print the transcripts in the order of the source; those that there are if it ends early."""
    texts: dict[str, str] = {}
    try:
        with AudioBar(source.seconds) as bar:
            for found in transcriber.transcribe(source, on_progress=bar.advance):
                texts[found.id] = format_for_stdout(found, form, is_alone=len(source) == 1)
        print(bar, file=sys.stderr)
    finally:
        print(*(texts[name] for name in source.ids if name in texts), sep="", end="")


def write_files(files: TranscriptFiles) -> None:
    with files:
        indices = files.todo()
        if num_kept := len(files.recordings) - len(indices):
            kept = f"{num_kept:,} of {len(files.recordings):,} transcripts are in {files.folder} already"
            print(f"{kept}. --overwrite makes them anew.", file=sys.stderr)
        with AudioBar(files.recordings.seconds_of(indices)) as bar:
            files.write(on_progress=bar.advance)
        print(bar, file=sys.stderr)


def run(options: argparse.Namespace) -> list[str]:
    """Transcribe; return why each recording that could not be read was skipped."""
    if not options.output_dir:
        refuse_unused(options, make_parser().get_default, ["overwrite"], "nothing is written", "give --output_dir")
    source = open_inputs(options)
    if options.output_dir is None and options.format in ("srt", "vtt") and len(source) > 1:
        problem = f"--format {options.format} writes one file per recording, and there are {len(source):,}"
        raise ValueError(f"{problem}: give --output_dir.")
    paths = output_paths(options.output_dir, source.ids, options.format) if options.output_dir else {}
    transcriber = Transcriber.from_folder(
        options.model,
        device=options.device,
        dtype=options.dtype,
        decoding=options.decoding,
        greedy=options.greedy,
        pause_seconds=options.pause_seconds,
        **windows_of(options),
    )
    if options.output_dir:
        how = {"form": options.format, "overwrite": options.overwrite}
        files = TranscriptFiles(options.output_dir, transcriber, source, paths, **how)
        if options.dry_run:
            print(files.plan(), "Nothing was written.")
            return []
        write_files(files)
    elif options.dry_run:
        print(describe_recordings(source), "Their transcripts go to stdout.")
        return []
    else:
        print_transcripts(transcriber, source, options.format)
    return [*source.left_out.values(), *("unreadable" for _ in transcriber.unreadable)]


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        reasons = run(parse(argv))
    if reasons:
        counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(Counter(reasons).items()))
        sys.exit(f"{program(__file__)}: {len(reasons):,} recordings could not be read and were skipped ({counts}).")
