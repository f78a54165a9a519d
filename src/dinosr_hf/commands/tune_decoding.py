"""
Tune the language model weight and word score of beam search on a development set, and write decoding.json.

    dinosr tune runs/recogniser librispeech/dev 4-gram.arpa.gz --trials 32

Beam search outputs the words of --lexicon, by default those of the language model; with --no_lexicon the language
model is over labels. Emissions are computed once, in windows as `dinosr transcribe` does. Prints a table of trials,
and writes the best one.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import DinoSRForCTC
from ..data import LabelledSource, open_labelled
from ..data.mixture import PartialSource
from ..recognition import Transcriber, load_processor
from ..recognition.decoding import BeamSearchDecoder, CTCDecoder, DecodingOptions
from ..recognition.transcription import decode_in_pieces
from ..recognition.tuning import WORD_SCORES, Trial, random_pairs, tune
from ..utils.command_line import Parser, command, parse_options, refuse_unused
from ..utils.model_folder import open_weights
from ._shared import (
    AudioBar,
    add_dataset_options,
    add_device,
    add_dry_run,
    claim_output,
    dataset_options,
    describe_labelled,
    print_plan,
)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="folder of a recogniser")
    add("data", help="development set: recordings with transcripts")
    add("language_model", help="n-gram model: .arpa, .arpa.gz or KenLM binary")
    add("--lexicon", help="file of the words that may be output (those of an ARPA language model)")
    add("--no_lexicon", action="store_true", help="search over labels, with a language model over labels")
    add("--column", help="column of the transcripts (the first known name)")
    add_dataset_options(parser)
    add("--output", help="file to write (decoding.json in the model's folder)")
    add("--lm_weights", type=float, nargs="+", help="weights to try with each of --word_scores")
    add("--word_scores", type=float, nargs="+", help="scores to try with each of --lm_weights")
    add("--trials", type=int, default=32, help="number of random pairs, if neither is given (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the random pairs (%(default)s)")
    add("--beam_size", type=int, default=100, help="beam size for tuning and afterwards (%(default)s; papers: 1500)")
    threshold = "drop hypotheses this much below the best (%(default)s)"
    add("--beam_threshold", type=float, default=DecodingOptions.beam_threshold, help=threshold)
    add("--max_utterances", type=int, help="use only the first utterances")
    add("--batch_seconds", type=float, default=60.0, help="seconds of audio per batch (%(default)s)")
    add_device(parser)
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv, trials=1, max_utterances=1, beam_size=1)


def compute_emissions(
    transcriber: Transcriber, data: LabelledSource, num_utterances: int | None
) -> tuple[list[np.ndarray], list[str]]:
    """Return emissions (T, V) and transcript of the first utterances (None: all), without unreadable ones."""
    indices = data.indices[:num_utterances]
    with AudioBar(data.source.seconds_of(indices)) as bar:
        found = dict(transcriber.emissions(data.source, indices=indices, on_progress=bar.advance))
    labelled = zip(indices, data.labels, strict=False)
    readable = [(found[index], label) for index, label in labelled if index in found]
    return [emissions for emissions, _ in readable], [label for _, label in readable]


def pairs_of(options: argparse.Namespace) -> list[tuple[float, float]]:
    # Without a lexicon, the word score is not used.
    scores = (0.0, 0.0) if options.no_lexicon else WORD_SCORES
    if options.lm_weights is None and options.word_scores is None:
        return random_pairs(options.trials, word_scores=scores, seed=options.seed)
    lm_weights = options.lm_weights or [DecodingOptions.lm_weight]
    return list(itertools.product(lm_weights, options.word_scores or [DecodingOptions.word_score]))


def row(trial: Trial) -> str:
    rates = f"{trial.word_error_rate:15.2%}  {trial.character_error_rate:20.2%}"
    return f"{trial.lm_weight:9.2f}  {trial.word_score:10.2f}  {rates}"


def check_options(options: argparse.Namespace) -> None:
    """Raise `ArgumentError` for an option that would have no effect beside the others."""
    default_of, lists = make_parser().get_default, options.lm_weights or options.word_scores
    if options.no_lexicon:
        names, reason = ("lexicon", "word_scores"), "a search over labels has no words"
        refuse_unused(options, default_of, names, reason, "leave --no_lexicon out")
    if lists:
        reason = "the pairs of lm_weights and word_scores are tried"
        refuse_unused(options, default_of, ("trials", "seed"), reason, "leave those out")


def run(options: argparse.Namespace) -> None:
    check_options(options)
    if not (options.output or Path(options.model).is_dir()):
        raise ValueError(f"{options.model} is not a folder here, which could take the result. Give --output.")
    output = claim_output(options.output or Path(options.model) / "decoding.json", options)
    processor, normalization = load_processor(options.model)
    normalize = normalization or str
    model = open_weights(DinoSRForCTC, options.model, device=options.device, dtype=torch.float32)
    transcriber = Transcriber(model, processor, batch_seconds=options.batch_seconds)
    # Before the audio is read, so that an unsuitable language model fails at once.
    lexicon = None if options.no_lexicon else options.lexicon or options.language_model
    settings = DecodingOptions(
        options.language_model, lexicon, beam_size=options.beam_size, beam_threshold=options.beam_threshold
    )
    decoder = BeamSearchDecoder.from_tokenizer(processor.tokenizer, model.config, options=settings)
    data = open_labelled(options.data, column=options.column, **dataset_options(options))
    pairs = pairs_of(options)
    if options.dry_run:
        used = PartialSource(data.source, data.indices[: options.max_utterances])
        rows = [
            ("model", f"{options.model}, with {options.language_model}"),
            ("recordings", describe_labelled(used, num_without=len(data.source) - len(data))),
            ("trials", f"{len(pairs):,} pairs of lm_weight and word_score, beam_size={options.beam_size}"),
            ("results", str(output)),
        ]
        print_plan(rows)
        return
    emissions, references = compute_emissions(transcriber, data, options.max_utterances)

    def decode(decoder: CTCDecoder, frames: np.ndarray) -> str:  # as the transcriber does
        return decode_in_pieces(decoder, frames, transcriber.search_frames).text

    how: dict[str, Any] = {"normalize": normalize, "decode": decode}
    (without,) = tune(lambda *_: transcriber.decoder, emissions, references, [(0.0, 0.0)], **how)
    with tqdm(total=len(pairs), desc="trials") as progress:
        trials = tune(
            *(decoder.reweighted, emissions, references, pairs),
            **how,
            on_trial=lambda trial: progress.update(),
        )
    best = trials[0]
    decoder.reweighted(best.lm_weight, best.word_score).options.save(output)
    print("lm_weight  word_score  word error rate  character error rate")
    print(*map(row, trials[:20]), sep="\n")
    print(f"greedy search: {without.word_error_rate:.2%}, beam search: {best.word_error_rate:.2%}")
    print(f"The best trial is in {output}.")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
