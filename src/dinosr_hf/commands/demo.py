"""
Pre-train a tiny DinoSR on synthetic speech in minutes, and show the acoustic units that it learnt (`make demo`).

    dinosr demo
    dinosr demo --steps 200 --output_dir runs/short_demo

It trains as `dinosr pretrain` does, whose flags it has too, with the recipe tiny_cpu, then evaluates the model on
held-out synthetic voices: loss, perplexity and active codewords before and after, and how well its units tell phones
apart, compared with an untrained model and k-means on MFCCs: the textbook's, and ours, tuned to be as hard to beat as
we can.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from .. import DinoSRForPreTraining, sample_span_mask
from ..analysis import UnitQuality, frame_labels, unit_quality
from ..analysis.baselines import mfcc
from ..analysis.kmeans import fit_kmeans
from ..analysis.model_units import LabelledSpeech, layer_tables, target_features
from ..analysis.plots import phone_codeword_figure, save_figure
from ..data import normalize_waveform
from ..pretraining import (
    PretrainingArguments,
    TrainingStopped,
    parse_arguments,
    run,
    synthetic_corpus,
)
from ..pretraining.metrics import MetricSums
from ..utils.command_line import ArgumentError, Parser, check_ranges, plain_words
from ..utils.files import claim_output_folder
from ..utils.recipes import recipes
from ..utils.tables import markdown_table
from ._shared import resumable_command

MARKER = ".dinosr-demo"  # only a folder with this file is emptied


def labelled_speech(arguments: PretrainingArguments, split: str, num_utterances: int) -> list[LabelledSpeech]:
    """Return synthetic utterances with a phone for each frame of the model."""
    config, speech = arguments.model_config(), []
    for row in synthetic_corpus(arguments.data, num_utterances=num_utterances, seed=arguments.run.seed, split=split):
        waveform = normalize_waveform(row["audio"]["array"])
        num_frames = config.num_frames(len(waveform))
        labels = frame_labels(row["phones"], num_frames, field=config.receptive_field)
        speech.append(LabelledSpeech(waveform, labels))
    return speech


@torch.no_grad()
def held_out_metrics(model: DinoSRForPreTraining, speech: list[LabelledSpeech]) -> dict[str, Any]:
    """Return the metrics of a run, see `MetricSums.compute`, on held-out speech with fixed masks."""
    config, generator = model.config, np.random.default_rng(0)
    sums = MetricSums(config, model.device)
    for waveform, labels in speech:
        shape, min_spans = (1, len(labels)), config.mask_min_spans
        mask = sample_span_mask(shape, config.mask_prob, config.mask_length, min_spans=min_spans, generator=generator)
        output = model(torch.from_numpy(waveform)[None], mask_time_indices=torch.from_numpy(mask))
        sums.add(output, len(waveform), 0)
    return sums.compute(torch.clone)


def evaluate_model(
    model: DinoSRForPreTraining, validation: list[LabelledSpeech], test: list[LabelledSpeech]
) -> tuple[UnitQuality, np.ndarray, list[str], int]:
    """Return test quality, table and phones of the codebook that is best on the validation split, and its layer."""
    tables, _ = layer_tables(model, validation)
    best = max(range(len(tables)), key=lambda layer: UnitQuality.from_table(tables[layer]).pnmi)
    tables, phones = layer_tables(model, test)
    return UnitQuality.from_table(tables[best]), tables[best], phones, model.config.codebook_layers[best]


def evaluate_kmeans(
    features: Callable[[np.ndarray], np.ndarray],
    num_clusters: int,
    train: list[LabelledSpeech],
    test: list[LabelledSpeech],
) -> UnitQuality:
    """Return the quality of k-means units on features, a function of a waveform (S,) to (T, D)."""
    clusters = fit_kmeans(np.concatenate([features(waveform) for waveform, _ in train]), num_clusters, seed=0)
    labels = [phone for _, phones in test for phone in phones]
    codes = np.concatenate([clusters.predict(features(waveform)) for waveform, _ in test])
    return unit_quality(labels, codes, num_codes=num_clusters)


def make_parser() -> Parser:
    parser = Parser(__doc__, takes_file=False)
    parser.add_argument("--steps", type=int, help="number of training steps (as the recipe has)")
    parser.add_argument(
        "--output_dir", default="runs/demo", help="path to the folder for the results; an earlier demo's is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of speech, weights and masks (%(default)s)")
    parser.add_argument("--test_utterances", type=int, default=50, help="number of held-out utterances to evaluate on")
    return parser


def parse_demo(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a demo's options, and return the flags of its training; it has its own recipe and data."""
    options, flags = parser.parse_known_args(plain_words(argv))
    if flags and not flags[0].startswith("-"):
        raise ArgumentError(f"{flags[0]}: a demo takes no file or recipe. Use `dinosr pretrain` or `dinosr finetune`.")
    if given := {flag.partition("=")[0] for flag in flags} & {"--data", "--train_data"}:
        raise ArgumentError(f"{given.pop()}: a demo has synthetic speech. Use `dinosr pretrain` or `dinosr finetune`.")
    return options, flags


def evaluate(arguments: PretrainingArguments, out: Path, num_test: int) -> None:
    """Print how the model in a folder does on held-out voices, and draw its units."""
    print("\nEvaluating on held-out voices ...", flush=True)
    train, test = labelled_speech(arguments, "train", num_test), labelled_speech(arguments, "test", num_test)
    validation = labelled_speech(arguments, "validation", max(1, num_test // 2))
    trained = DinoSRForPreTraining.from_pretrained(out).eval()
    set_seed(arguments.run.seed)
    untrained = DinoSRForPreTraining(arguments.model_config()).eval()
    config, num_codes = trained.config, trained.config.codebook_size

    headings = ["held-out speech", "loss (nats)", "target perplexity", "prediction perplexity", "active codewords"]
    lines = []
    for name, model in (("at the start", untrained), ("at the end", trained)):
        metrics = held_out_metrics(model, test)
        perplexities = (f"{metrics[f'{kind}_perplexity']:.1f}" for kind in ("target", "prediction"))
        active = f"{metrics['active_codewords']:.1f} of {num_codes}"
        lines.append([name, f"{metrics['loss']:.3f}", *perplexities, active])
    print(f"\n{markdown_table(headings, lines)}")

    quality, table, phones, layer = evaluate_model(trained, validation, test)
    first, _, _, first_layer = evaluate_model(untrained, validation, test)

    def untrained_features(waveform: np.ndarray) -> np.ndarray:
        return target_features(untrained, waveform)[-1].numpy()

    def cepstra(tuned: bool) -> Callable[[np.ndarray], np.ndarray]:
        return partial(mfcc, field=config.receptive_field, tuned=tuned)

    rows = {
        f"DinoSR, layer {layer}": quality,
        f"untrained model, layer {first_layer}": first,
        "k-means on the untrained model": evaluate_kmeans(untrained_features, num_codes, train, test),
        "k-means on textbook MFCCs": evaluate_kmeans(cepstra(tuned=False), num_codes, train, test),
        "k-means on tuned MFCCs": evaluate_kmeans(cepstra(tuned=True), num_codes, train, test),
    }
    num_frames = sum(len(labels) for _, labels in test)
    headings = [f"units (at most {num_codes}), {num_frames:,} frames", "phone purity", "PNMI", "units in use"]
    lines = [
        [name, f"{row.phone_purity:.3f}", f"{row.pnmi:.3f}", str(row.num_active_codes)] for name, row in rows.items()
    ]
    print(markdown_table(headings, lines))
    title = f"P(phone | codeword), layer {layer}, held-out synthetic voices"
    picture = save_figure(phone_codeword_figure(table, phones, title=title), out / "phone_by_codeword.png")
    print(f"The picture is {picture}. The model is in {out}.")


def main(argv: Sequence[str]) -> None:
    logging.getLogger("dinosr_hf").setLevel(logging.INFO)
    errors, anew = (ValueError, OSError, ImportError, TrainingStopped), "The demo begins anew when it is run again."
    with resumable_command(__file__, *errors, after=anew):
        options, flags = parse_demo(make_parser(), argv)
        num_test = options.test_utterances
        check_ranges([(num_test >= 1, "test_utterances", num_test, "at least 1")])
        flags += ["--output_dir", options.output_dir, "--seed", str(options.seed)]
        if options.steps is not None:
            flags += ["--max_steps", str(options.steps)]
        arguments = parse_arguments(flags, recipes()["tiny_cpu"])
        if arguments.run.dry_run:
            run(arguments)
            return
        out = claim_output_folder(options.output_dir, MARKER)
        run(arguments)
        evaluate(arguments, out, num_test)
