"""
Measure how many hours of audio are read per hour, and whether the model waits for them.

    python benchmarks/dataloading.py --utterances 400 --epochs 3 --workers 0 1 2 4
    python benchmarks/dataloading.py my_flacs --train base --step_seconds 20 --micro_seconds 20

The same speech is stored as flac files, mp3 files, flac in a tar archive, and a stream of parquet files, and read in
steps as in pre-training, epoch by epoch in turn; then a model is trained on each with the most workers, and the
fraction of time that it waits is measured. Nothing is timed unless all forms have the same samples (mp3: equally many,
and nearly the same).
"""

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import soundfile as sf
import torch
from contest import SAMPLING_RATE, SIZES, at_least, choose_device, headline, model_config, wait_for

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.data import FolderSource, MicroBatch, SpeechSource, SpeechStream, open_source, open_stream
from dinosr_hf.data.synthetic import SyntheticCorpus
from dinosr_hf.pretraining import DataArguments
from dinosr_hf.pretraining.feed import StepFeed

# Least correlation of speech after mp3 with the original.
MIN_CORRELATION = 0.9


class Storage(NamedTuple):
    """A form in which recordings are stored."""

    name: str
    place: Path
    streaming: bool = False


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the reading of steps from files of several kinds.")
    parser.add_argument("data", nargs="?", help="folder of recordings; default: the synthetic corpus")
    parser.add_argument("--utterances", type=at_least(1), default=300, help="utterances of the synthetic corpus")
    parser.add_argument("--step_seconds", type=float, default=200.0, help="audio of an optimizer step")
    parser.add_argument("--micro_seconds", type=float, default=50.0, help="audio of a forward pass")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="epochs to read of each form")
    parser.add_argument("--workers", type=at_least(0), nargs="+", default=[0, 1, 2], help="reading processes")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads(), help="threads of the model")
    parser.add_argument("--train", choices=SIZES, default="tiny", help="size of the model to train")
    return parser.parse_args(argv)


def store(source: SpeechSource, place: Path) -> list[Storage]:
    """Write each recording in each form."""
    for kind in ("flac", "mp3", "parquet"):
        (place / kind).mkdir()
    rows = []
    for index in range(len(source)):
        waveform = source.load(index)
        for kind in ("flac", "mp3"):
            sf.write(place / kind / f"{index:06d}.{kind}", waveform, SAMPLING_RATE)
        rows.append({"id": str(index), "audio": {"bytes": (place / f"flac/{index:06d}.flac").read_bytes()}})
    with tarfile.open(place / "flac.tar", "w") as archive:
        archive.add(place / "flac", "flac")
    for part in range(4):
        datasets.Dataset.from_list(rows[part::4]).to_parquet(place / "parquet" / f"train-{part}.parquet")
    kinds = [Storage(kind, place / kind) for kind in ("flac", "mp3")]
    return [*kinds, Storage("flac in tar", place / "flac.tar"), Storage("parquet stream", place / "parquet", True)]


def find_errors(forms: Sequence[Storage]) -> list[str]:
    """Return what is wrong with the stored recordings, if anything."""
    found = []
    original = FolderSource(forms[0].place)
    for form in forms[1:]:
        if form.streaming:
            waveforms = [sf.read(io.BytesIO(row["audio"]["bytes"]))[0] for row in read_back(form.place)]
        else:
            source = open_source(form.place)
            waveforms = [source.load(index) for index in range(len(source))]
        for index, waveform in enumerate(waveforms):
            expected = original.load(index)
            if len(waveform) != len(expected):
                found.append(f"{form.name}: recording {index} has {len(waveform)} samples, not {len(expected)}")
            elif form.name == "mp3":
                correlation = np.corrcoef(waveform, expected)[0, 1]
                if not correlation > MIN_CORRELATION:
                    found.append(f"{form.name}: recording {index} has correlation {correlation:.2f} with the original")
            elif not np.allclose(waveform, expected):
                found.append(f"{form.name}: recording {index} has other samples")
    return found


def read_back(place: Path) -> list[dict]:
    """Return the rows of all parquet files, in the order of their ids."""
    rows = datasets.Dataset.from_parquet([str(path) for path in sorted(place.iterdir())]).to_list()
    return sorted(rows, key=lambda row: int(row["id"]))


def open_form(form: Storage) -> SpeechSource | SpeechStream:
    return open_stream(form.place) if form.streaming else open_source(form.place)


def steps(source: SpeechSource | SpeechStream, workers: int, options: argparse.Namespace) -> Iterator:
    """Return an endless iterator over steps, as in pre-training."""
    data = DataArguments(
        step_seconds=options.step_seconds,
        micro_seconds=options.micro_seconds,
        min_seconds=1.0,
        max_seconds=min(20.0, options.step_seconds),
        num_workers=workers,
    )
    return iter(StepFeed(source, data, model_config(options.train), seed=0))


def audio_of(micro_batches: Sequence[MicroBatch]) -> float:
    """Return the seconds of audio."""
    return sum(batch.inputs["input_values"].numel() for batch in micro_batches) / SAMPLING_RATE


def time_epoch(form: Storage, workers: int, options: argparse.Namespace) -> float:
    """Return the hours of audio read per hour, from the end of the first step of an epoch to that of its last."""
    read, times = 0.0, []
    for step in steps(open_form(form), workers, options):
        if step.epoch > 0:
            break
        read += audio_of(step.micro_batches) if times else 0.0
        times.append(time.perf_counter())
    if len(times) < 2:
        sys.exit("An epoch has a single step, too few to measure: lower --step_seconds, or give more speech.")
    return read / (times[-1] - times[0])


def share_of_waiting(form: Storage, workers: int, options: argparse.Namespace, device: torch.device) -> float:
    """Return the fraction of an epoch's training spent waiting, from the second step on."""
    torch.manual_seed(0)
    model = DinoSRForPreTraining(model_config(options.train)).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    feed = steps(open_form(form), workers, options)
    waited, since, taken = 0.0, 0.0, 0
    while True:
        before = time.perf_counter()
        step = next(feed)
        if step.epoch > 0:
            return waited / (before - since)
        if taken:
            waited += time.perf_counter() - before
        else:
            since = time.perf_counter()
        for batch in step.micro_batches:
            inputs = {name: value.to(device) for name, value in batch.inputs.items()}
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        model.update_targets(taken)
        wait_for(device)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    warnings.filterwarnings("ignore", "All .* utterances together")
    datasets.disable_progress_bars()
    device = choose_device(options.threads)
    if options.data:
        source: SpeechSource = open_source(options.data)
        hours = source.seconds / 3600
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if not options.data:
            corpus = SyntheticCorpus(num_utterances=options.utterances, seed=0, split="train", num_texts=(1, 6))
            source = FolderSource(corpus.export(place / "corpus"))
            hours = source.seconds / 3600
        forms = store(source, place)
        if found := find_errors(forms):
            sys.exit("Nothing was timed: " + "; ".join(found[:3]))
        speeds: dict[tuple[Storage, int], list[float]] = {}
        for _ in range(options.epochs):
            for form in forms:
                for workers in options.workers:
                    speeds.setdefault((form, workers), []).append(time_epoch(form, workers, options))
        waiting = {form: share_of_waiting(form, max(options.workers), options, device) for form in forms}
    print(headline(device, options.threads, "soundfile", "datasets") + f", {os.cpu_count()} cores")
    print(
        f"{options.data or 'synthetic'}: {len(source):,} utterances, {hours:.2f} h; steps of {options.step_seconds:g}"
        f" s, {options.epochs} epochs of each in turn; training of the {options.train} model\n"
    )
    columns = [f"{workers} worker{'' if workers == 1 else 's'}" for workers in options.workers]
    print(f"| hours of audio per hour | {' | '.join(columns)} | waiting, {columns[-1]} |")
    print("|---" * (len(columns) + 2) + "|")
    for form in forms:
        cells = [f"{statistics.median(speeds[form, workers]):,.0f}" for workers in options.workers]
        print(f"| {form.name} | {' | '.join(cells)} | {waiting[form]:.1%} |")


if __name__ == "__main__":
    main(sys.argv[1:])
