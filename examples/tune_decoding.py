"""
Choose the language model weight and the word score of beam search on a development set, and write decoding.json.

    python examples/tune_decoding.py runs/recogniser librispeech/dev 4-gram.arpa.gz --trials 32

The words that come out are those of the language model, or of --lexicon; with --no_lexicon the language model is over
labels. Emissions are computed once. Prints a table of trials; what is written is the best of them.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCTC

import dinosr_hf  # registers the model  # noqa: F401
from dinosr_hf.recognition import load_processor
from dinosr_hf.recognition.decoding import BeamSearchDecoder, DecodingOptions, GreedyDecoder
from dinosr_hf.recognition.tuning import LM_WEIGHTS, WORD_SCORES, Trial, grid, random_pairs, tune
from dinosr_hf.utils.command_line import command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a recogniser")
    parser.add_argument("data", help="development set: recordings with transcripts")
    parser.add_argument("language_model", help="n-gram model: .arpa, .arpa.gz or a KenLM binary")
    parser.add_argument("--lexicon", help="the words that may come out; left out: those of an ARPA file")
    parser.add_argument("--no_lexicon", action="store_true", help="search over labels; so is the language model")
    parser.add_argument("--column", help="of the transcripts; left out: the first that is known")
    parser.add_argument("--split", help="of the data, where it has several")
    parser.add_argument("--output", help="left out: decoding.json in the model's folder")
    parser.add_argument("--lm_weights", type=float, nargs="+", help="try these, with each of --word_scores")
    parser.add_argument("--word_scores", type=float, nargs="+", help="try these, with each of --lm_weights")
    parser.add_argument("--trials", type=int, default=32, help="without these: pairs drawn at random (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument(
        "--beam_size", type=int, default=100, help="while tuning and after (%(default)s; papers: 1500)"
    )
    parser.add_argument("--beam_threshold", type=float, default=DecodingOptions.beam_threshold)
    parser.add_argument("--max_utterances", type=int, help="use the first ones only")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio of a forward pass, with padding")
    return parser.parse_args(argv)


def batches(num_samples: Sequence[int], max_samples: float) -> Iterator[list[int]]:
    """Utterances of similar length, whose padded sum stays within bounds."""
    batch: list[int] = []
    for index in sorted(range(len(num_samples)), key=lambda index: num_samples[index]):
        if batch and num_samples[index] * (len(batch) + 1) > max_samples:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def compute_emissions(model, extractor, data, num_utterances: int, batch_seconds: float) -> list[np.ndarray]:
    """Natural logarithms of the labels' probabilities, float32 (T, V) of each utterance."""
    emissions: dict[int, np.ndarray] = {}
    for batch in tqdm([*batches(data.num_samples[:num_utterances], batch_seconds * 16_000)], desc="emissions"):
        audio = [data.load(index) for index in batch]
        inputs = extractor(audio, sampling_rate=16_000, padding=True, return_tensors="pt").to(model.device)
        log_probs = model(**inputs).logits.float().log_softmax(-1).cpu().numpy()
        for index, waveform, rows in zip(batch, audio, log_probs, strict=True):
            emissions[index] = rows[: model.config.num_frames(len(waveform))]
    return [emissions[index] for index in sorted(emissions)]


def pairs_of(options: argparse.Namespace) -> list[tuple[float, float]]:
    # Without a lexicon, nothing reads the word score.
    scores = (0.0, 0.0) if options.no_lexicon else WORD_SCORES
    if options.lm_weights is None and options.word_scores is None:
        return random_pairs(options.trials, lm_weights=LM_WEIGHTS, word_scores=scores, seed=options.seed)
    defaults = DecodingOptions()
    return grid(options.lm_weights or [defaults.lm_weight], options.word_scores or [defaults.word_score])


def row(trial: Trial) -> str:
    return f"{trial.lm_weight:9.2f}  {trial.word_score:10.2f}  {trial.word_error_rate:15.2%}"


def run(options: argparse.Namespace) -> None:
    from dinosr_hf.data import open_labelled

    processor, normalization = load_processor(options.model)
    normalize = normalization or str
    model = AutoModelForCTC.from_pretrained(options.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    # Before the audio is read, so that a language model that does not fit is found at once.
    lexicon = None if options.no_lexicon else options.lexicon or options.language_model
    settings = DecodingOptions(
        options.language_model, lexicon, beam_size=options.beam_size, beam_threshold=options.beam_threshold
    )
    decoder = BeamSearchDecoder.from_tokenizer(processor.tokenizer, model.config, options=settings)
    data = open_labelled(options.data, column=options.column, split=options.split)
    num_utterances = min(options.max_utterances or math.inf, len(data.labels))
    emissions = compute_emissions(model, processor.feature_extractor, data, int(num_utterances), options.batch_seconds)
    references = data.labels[: len(emissions)]

    greedy = GreedyDecoder.from_tokenizer(processor.tokenizer, model.config)
    (without,) = tune(lambda *_: greedy, emissions, references, [(0.0, 0.0)], normalize=normalize)
    pairs = pairs_of(options)
    with tqdm(total=len(pairs), desc="trials") as progress:
        trials = tune(
            *(decoder.reweighted, emissions, references, pairs),
            normalize=normalize,
            on_trial=lambda trial: progress.update(),
        )
    best = trials[0]
    print("lm_weight  word_score  word error rate", *map(row, itertools.islice(trials, 20)), sep="\n")
    print(f"greedy search: {without.word_error_rate:.2%}, beam search: {best.word_error_rate:.2%}")
    output = Path(options.output or Path(options.model) / "decoding.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"The best is in {decoder.reweighted(best.lm_weight, best.word_score).options.save(output)}.")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
