"""
Write down what is said in recordings of any length.

    python examples/transcribe.py runs/recogniser talk.mp3
    python examples/transcribe.py runs/recogniser talks more/talk.wav --format srt --output_dir subtitles

Inputs are audio files and folders of them (wav, flac, ogg, opus, mp3), or one manifest, archive or dataset.
Transcripts go to stdout; with --output_dir each to a file of its own. Decodes as decoding.json in the model's folder
says, which examples/tune_decoding.py writes, else greedily. Ends with status 1 if a recording could not be read.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dinosr_hf.data import SAMPLING_RATE, SpeechSource, open_recordings
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.recognition import FORMATS, Transcriber, Transcript, output_path
from dinosr_hf.utils.command_line import command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of a recogniser, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file or folder; or one manifest or dataset")
    parser.add_argument("--format", default="txt", choices=list(FORMATS), help="of the transcripts (%(default)s)")
    parser.add_argument("--output_dir", help="write a file for each recording here, instead of to stdout")
    parser.add_argument("--overwrite", action="store_true", help="replace transcripts that exist")
    parser.add_argument("--decoding", help="file with options of beam search; left out: decoding.json of the model")
    parser.add_argument("--greedy", action="store_true", help="no beam search, even if there is a decoding.json")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="audio of a batch (%(default)s)")
    parser.add_argument("--window_seconds", type=float, default=30.0, help="what the model sees at once (%(default)s)")
    parser.add_argument(
        "--context_seconds", type=float, default=5.0, help="on each side of a part of a longer recording (%(default)s)"
    )
    parser.add_argument(
        "--pause_seconds", type=float, default=0.3, help="a word ends where no letter comes for so long (%(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the model (%(default)s)")
    return parser.parse_args(argv)


def plan_outputs(source: SpeechSource, options: argparse.Namespace) -> dict[str, Path]:
    """The file for each recording; none of them is there yet, unless --overwrite says that it may be."""
    if options.output_dir is None:
        return {}
    paths = {
        utterance.id: output_path(options.output_dir, utterance.id, options.format) for utterance in source.utterances
    }
    path, count = Counter(paths.values()).most_common(1)[0]
    if count > 1:
        names = ", ".join(name for name in paths if paths[name] == path)
        raise ValueError(f"{names} would all be written to {path}. Transcribe them one by one, or rename them.")
    there = [path for path in paths.values() if path.exists()]
    if there and not options.overwrite:
        raise ValueError(f"{len(there):,} transcripts exist, such as {there[0]}. Give --overwrite or another folder.")
    return paths


def with_progress(transcriber: Transcriber, source: SpeechSource) -> Iterator[Transcript]:
    """Transcripts, under a bar that tells how many seconds of audio are read in one."""
    total = sum(utterance.num_samples for utterance in source.utterances) / SAMPLING_RATE
    since, seconds = time.perf_counter(), 0.0
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=total, bar_format=form, disable=None) as bar:

        def advance(amount: float) -> None:
            nonlocal seconds
            seconds += amount
            bar.set_postfix_str(f"{seconds / (time.perf_counter() - since):.1f} times real time", refresh=False)
            bar.update(amount)

        yield from transcriber.transcribe(source, on_progress=advance)
    elapsed = time.perf_counter() - since
    print(f"{seconds:,.1f} s of audio in {elapsed:,.1f} s, {seconds / elapsed:.1f} times real time", file=sys.stderr)


def print_in_order(transcripts: dict[str, Transcript], source: SpeechSource, form: str) -> None:
    found = [transcripts[utterance.id] for utterance in source.utterances if utterance.id in transcripts]
    for transcript in found:
        if form == "txt" and len(source) > 1:
            print(f"{transcript.id}\t{transcript.text}")
        else:
            print(FORMATS[form](transcript), end="")


def run(options: argparse.Namespace) -> int:
    """Transcribe; returns how many recordings could not be read."""
    source = open_recordings(options.inputs)
    if options.output_dir is None and options.format in ("srt", "vtt") and len(source) > 1:
        raise ValueError(f"{len(source):,} recordings make as many .{options.format} files. Give --output_dir.")
    paths = plan_outputs(source, options)
    transcriber = Transcriber.from_folder(
        *(options.model,),
        device=options.device,
        dtype=options.dtype,
        decoding=options.decoding,
        greedy=options.greedy,
        window_seconds=options.window_seconds,
        context_seconds=options.context_seconds,
        batch_seconds=options.batch_seconds,
        pause_seconds=options.pause_seconds,
    )
    printed: dict[str, Transcript] = {}
    for transcript in with_progress(transcriber, source):
        if not paths:
            printed[transcript.id] = transcript
            continue
        path = paths[transcript.id]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FORMATS[options.format](transcript), encoding="utf-8")
    print_in_order(printed, source, options.format)
    skipped = {reason: len(names) for reason, names in source.skipped.items() if reason != "hidden"}
    return sum(skipped.values()) + len(transcriber.unreadable)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        num_unreadable = run(parse(argv))
    if num_unreadable:
        sys.exit(f"transcribe.py: {num_unreadable:,} recordings could not be read and were left out.")


if __name__ == "__main__":
    main(sys.argv[1:])
