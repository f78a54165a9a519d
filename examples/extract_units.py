"""
Turn recordings into acoustic units, or into the continuous features of layers.

    python examples/extract_units.py runs/base my_speech --output_dir units
    accelerate launch examples/extract_units.py runs/base my_speech --output_dir units --deduplicate --dtype bfloat16
    python examples/extract_units.py runs/base my_speech --output_dir features --features npy --layers 5 9

Inputs are audio files and folders of them (wav, flac, ogg, opus, mp3), or one manifest, archive or dataset. The same
command goes on where it was stopped, however it was. Recordings that cannot be read are left out and listed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from dinosr_hf.data import SAMPLING_RATE, SpeechSource, open_recordings, open_source
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import FEATURE_FORMATS, FeatureFiles, LayerKMeans, UnitCorpus, UnitExtractor, load_model
from dinosr_hf.units.corpus import FORMATS
from dinosr_hf.utils.command_line import command
from dinosr_hf.utils.threads import set_cpu_threads


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder that pre-training leaves, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file or folder; or one manifest or dataset")
    parser.add_argument("--output_dir", required=True, help="a folder of units, or of features")
    parser.add_argument("--split", help="of the data, where it has several")
    parser.add_argument("--layers", type=int, nargs="+", default=[5], help="the lowest is 1 (%(default)s)")
    parser.add_argument("--source", default="student", choices=["student", "teacher"], help="(%(default)s)")
    parser.add_argument("--kmeans", help="file of examples/fit_kmeans.py, whose clusters, layer and source are taken")
    parser.add_argument("--deduplicate", action="store_true", help="runs of a unit as one, with durations in frames")
    parser.add_argument("--format", default="jsonl", choices=FORMATS, help="of the units (%(default)s)")
    parser.add_argument("--features", choices=list(FEATURE_FORMATS), help="write features like this, and no units")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="audio of a batch (%(default)s)")
    parser.add_argument("--window_seconds", type=float, default=30.0, help="what the model sees at once (%(default)s)")
    parser.add_argument(
        "--context_seconds", type=float, default=5.0, help="on each side of a part of a longer recording (%(default)s)"
    )
    parser.add_argument(
        "--shard_seconds", type=float, default=3600.0, help="audio of a shard: what a kill can cost (%(default)s)"
    )
    parser.add_argument("--device", help="left out: the GPU of the process, if there is one, else the CPU")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the model (%(default)s)")
    parser.add_argument("--num_threads", type=int, default=0, help="of a process on a CPU; 0: its share of the cores")
    return parser.parse_args(argv)


class Bar:
    """A progress bar in seconds of audio, with hours of audio an hour, of all processes if they are alike."""

    def __init__(self, seconds: float, state: PartialState) -> None:
        form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
        quiet = None if state.is_main_process else True
        self._bar = tqdm(total=seconds, bar_format=form, disable=quiet)
        self._since, self._factor, self.seconds = time.perf_counter(), state.num_processes, 0.0

    @property
    def speed(self) -> float:
        return self.seconds / (time.perf_counter() - self._since) * self._factor

    def advance(self, seconds: float) -> None:
        self.seconds += seconds
        self._bar.set_postfix_str(f"{self.speed:,.0f} hours an hour", refresh=False)
        self._bar.update(seconds)

    def close(self) -> None:
        self._bar.close()


def seconds_of(source: SpeechSource, indices: Sequence[int]) -> float:
    return sum(source.utterances[index].num_samples for index in indices) / SAMPLING_RATE


def run(options: argparse.Namespace, state: PartialState) -> int:
    """Extract; returns how many recordings could not be read."""
    if options.split and len(options.inputs) > 1:
        raise ValueError(f"--split is of one input, but there are {len(options.inputs)}. Give them one by one.")
    if options.features and (options.kmeans or options.deduplicate):
        raise ValueError("--features writes no units. Leave out --kmeans and --deduplicate, or --features.")
    source = open_source(options.inputs[0], split=options.split) if options.split else open_recordings(options.inputs)
    kmeans = LayerKMeans.load(options.kmeans) if options.kmeans else None
    if kmeans is not None:
        options.layers, options.source = [kmeans.layer], kmeans.source
    model = load_model(options.model, device=options.device or state.device, dtype=options.dtype)
    if model.device.type == "cpu":
        set_cpu_threads(options.num_threads, state.num_processes)
    extractor = UnitExtractor(
        model,
        layers=options.layers,
        source=options.source,
        window_seconds=options.window_seconds,
        context_seconds=options.context_seconds,
        batch_seconds=options.batch_seconds,
    )
    place = {"process": state.process_index, "num_processes": state.num_processes}
    if options.features:
        files = FeatureFiles(options.output_dir, extractor, source, form=options.features, **place)
        bar = Bar(seconds_of(source, files.todo()), state)
        num_written = files.write(on_progress=bar.advance)
        bar.close()
        print(f"{num_written:,} recordings, of each {len(extractor.layers)} file(s), in {options.output_dir}")
        return sum(map(len, source.skipped.values())) + len(extractor.unreadable)
    names = ("model", "layers", "source", "kmeans", "window_seconds", "context_seconds", "dtype")
    settings = {name: getattr(options, name) for name in names}
    form = {"form": options.format, "deduplicate": options.deduplicate, "shard_seconds": options.shard_seconds}
    corpus = UnitCorpus(Path(options.output_dir), settings, **form, **place)
    if state.is_main_process:
        corpus.open()
    state.wait_for_everyone()
    bar = Bar(seconds_of(source, corpus.todo(source)), state)
    corpus.write(extractor, source, kmeans=kmeans, on_progress=bar.advance)
    bar.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return 0
    num_units = model.config.codebook_size if kmeans is None else len(kmeans.centroids)
    summary = corpus.finish(extractor, source, num_units)
    print(
        f"{summary['num_recordings']:,} recordings, {summary['hours']:,.2f} hours, in {len(summary['files'])} files"
        f" of {options.output_dir}; {bar.seconds:,.1f} s of audio at {bar.speed:,.0f} hours an hour"
    )
    return len(summary["left_out"])


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    # A process that is done waits for all others, however long that takes.
    state = PartialState(cpu=options.device == "cpu", timeout=timedelta(days=30))
    try:
        with command(__file__):
            num_left_out = run(options, state)
    finally:
        state.destroy_process_group()
    if num_left_out:
        print(f"extract_units.py: {num_left_out:,} recordings could not be read and were left out.", file=sys.stderr)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
