"""
Measure what duration buckets save: padding, cropped audio, and reading time.

    python benchmarks/batching.py my_recordings --step_seconds 600 --micro_seconds 120 --epochs 3 --workers 2
    python benchmarks/batching.py --step_seconds 200 --micro_seconds 50      # the synthetic corpus (extra `demo`)

Steps of both modes of batching, with and without buckets (one bucket: random order), are read in turn, epoch by epoch;
no model is run. Nothing is timed unless the shares of two processes make up the step of one, and the padding read is
the padding planned.
"""

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from contest import at_least, headline

from dinosr_hf import DinoSRConfig
from dinosr_hf.data import (
    SAMPLING_RATE,
    DatasetSource,
    MicroBatch,
    PlanSummary,
    PretrainingCollator,
    SpeechSource,
    StepDataset,
    StepLoader,
    open_source,
    plan_epoch,
    summarize_plan,
)
from dinosr_hf.data.batching import Mode
from dinosr_hf.data.synthetic import SyntheticCorpus


class Case(NamedTuple):
    mode: Mode
    num_buckets: int


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare steps with and without duration buckets.")
    parser.add_argument("data", nargs="?", help="folder, manifest, ... of recordings; default: the synthetic corpus")
    parser.add_argument("--utterances", type=at_least(1), default=300, help="utterances of the synthetic corpus")
    parser.add_argument("--step_seconds", type=float, default=600.0, help="audio of an optimizer step")
    parser.add_argument("--micro_seconds", type=float, default=120.0, help="audio of a forward pass, with padding")
    parser.add_argument("--min_seconds", type=float, default=2.0, help="leave out shorter utterances")
    parser.add_argument("--max_seconds", type=float, default=20.0, help="crop longer ones")
    parser.add_argument("--num_buckets", type=at_least(2), default=20, help="number of buckets, compared with one")
    parser.add_argument("--epochs", type=at_least(1), default=3, help="epochs to read of each case")
    parser.add_argument("--workers", type=at_least(0), default=0, help="reading processes")
    return parser.parse_args(argv)


def in_samples(seconds: float) -> int:
    return int(seconds * SAMPLING_RATE)


def open_data(options: argparse.Namespace) -> SpeechSource:
    if options.data:
        return open_source(options.data)
    corpus = SyntheticCorpus(num_utterances=options.utterances, seed=0, split="train", num_texts=(1, 6))
    return DatasetSource(corpus.to_dataset())


def make_steps(source: SpeechSource, case: Case, epoch: int, options: argparse.Namespace) -> tuple:
    lengths = [utterance.num_samples for utterance in source.utterances]
    minimum, micro_samples = in_samples(options.min_seconds), in_samples(options.micro_seconds)
    plan = plan_epoch(
        lengths,
        seed=0,
        epoch=epoch,
        step_samples=in_samples(options.step_seconds),
        min_samples=minimum,
        max_samples=in_samples(options.max_seconds),
        mode=case.mode,
        num_buckets=case.num_buckets,
        ids=[utterance.id for utterance in source.utterances],
    )
    collator = PretrainingCollator(DinoSRConfig(), seed=0)
    dataset = StepDataset(source, plan, collator, 0, 1, micro_samples)
    return dataset, summarize_plan(plan, lengths, min_samples=minimum, micro_samples=micro_samples)


def count(batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """Return the number of samples of speech, and with padding."""
    inputs = [batch.inputs for batch in batches]
    read = sum(each["input_values"].numel() for each in inputs)
    speech = sum(int(each.get("attention_mask", torch.ones_like(each["input_values"])).sum()) for each in inputs)
    return speech, read


def rows(batches: Sequence[MicroBatch]) -> list[tuple[float, ...]]:
    """Return numbers that identify utterances and their masks, whatever they are batched with."""
    return sorted(
        (*values[:50].tolist(), float(values.double().square().sum()), float(mask.sum()))
        for batch in batches
        for values, mask in zip(batch.inputs["input_values"], batch.inputs["mask_time_indices"], strict=True)
    )


def find_errors(source: SpeechSource, case: Case, options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the steps, if anything."""
    found = []
    dataset, summary = make_steps(source, case, 0, options)
    shares = [
        StepDataset(source, dataset.steps, dataset.collator, rank, 2, dataset.micro_samples)[0] for rank in range(2)
    ]
    whole, together = rows(dataset[0]), rows([*shares[0], *shares[1]])
    if not torch.allclose(torch.tensor(whole), torch.tensor(together)):
        found.append(f"{case}: the shares of two processes are not the step of one")
    counts = [count(batches) for batches in StepLoader(dataset, num_workers=options.workers)]
    speech, read = (sum(column) for column in zip(*counts, strict=True))
    if abs(1 - speech / read - summary.padded_share) > 1e-9:
        found.append(f"{case}: {1 - speech / read:.3%} padding was read, but {summary.padded_share:.3%} planned")
    return found


def time_epoch(dataset: StepDataset, num_workers: int) -> float:
    """Return the seconds of speech read per second."""
    since = time.perf_counter()
    speech = sum(count(batches)[0] for batches in StepLoader(dataset, num_workers=num_workers))
    return speech / SAMPLING_RATE / (time.perf_counter() - since)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    warnings.filterwarnings("ignore", "All .* utterances together")
    torch.set_num_threads(1)
    source = open_data(options)
    cases = [Case(mode, buckets) for mode in get_args(Mode) for buckets in (options.num_buckets, 1)]
    if found := [error for case in cases for error in find_errors(source, case, options)]:
        sys.exit("Nothing was timed: " + "; ".join(found))

    summaries: dict[Case, list[PlanSummary]] = defaultdict(list)
    speeds: dict[Case, list[float]] = defaultdict(list)
    for epoch, case in itertools.product(range(options.epochs), cases):
        dataset, summary = make_steps(source, case, epoch, options)
        summaries[case].append(summary)
        speeds[case].append(time_epoch(dataset, options.workers))

    print(f"{headline(torch.device('cpu'), torch.get_num_threads())}, {options.workers} worker(s)")
    hours = source.seconds / 3600
    print(
        f"{options.data or 'synthetic'}: {len(source):,} utterances, {hours:.2f} h; steps of {options.step_seconds:g}"
        f" s, micro-batches of {options.micro_seconds:g} s, {options.epochs} epochs of each in turn\n"
    )
    print("| batching | buckets | steps | cropped away | padding | median audio s/s | min | max |")
    print("|---|---|---|---|---|---|---|---|")

    def mean(case: Case, field: str) -> float:
        return statistics.mean(getattr(summary, field) for summary in summaries[case])

    for case in cases:
        speed = speeds[case]
        print(
            f"| {case.mode} | {case.num_buckets} | {mean(case, 'num_steps'):.1f} | {mean(case, 'cropped_share'):.1%} |"
            f" {mean(case, 'padded_share'):.1%} | {statistics.median(speed):.0f} | {min(speed):.0f} |"
            f" {max(speed):.0f} |"
        )
    print()
    for mode in get_args(Mode):
        few, one = Case(mode, options.num_buckets), Case(mode, 1)
        speed = statistics.median(a / b for a, b in zip(speeds[few], speeds[one], strict=True))
        kept = mean(few, "hours") / mean(one, "hours")
        useful = (1 - mean(few, "padded_share")) / (1 - mean(one, "padded_share"))
        print(
            f"{mode}, with buckets / without: audio used in an epoch {kept:.2f}, speech in what the model reads"
            f" {useful:.2f}, audio read a second {speed:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
