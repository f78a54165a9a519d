"""
Measure how well units of windows and of a live signal agree with those of whole recordings in a single pass.

    python benchmarks/unit_agreement.py runs/tiny --layer 3
    python benchmarks/unit_agreement.py runs/base my_talks --layer 5 --sources teacher

Without INPUT, the recordings are synthetic, with 16 texts each (extra `demo`). Prints the share of frames with the
same unit: of all frames, of those within 0.2 s of a seam between windows, and of the first 5 s of a stream. Nothing is
measured unless a stream of a single step gives the units of the whole recording.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from contest import headline

from dinosr_hf.data import SAMPLING_RATE, DatasetSource, SpeechSource, open_recordings
from dinosr_hf.data.synthetic import SyntheticCorpus
from dinosr_hf.inference.windowed import plan_windows
from dinosr_hf.model.modeling_dinosr import UNIT_SOURCES, check_unit_layers
from dinosr_hf.units import UnitExtractor, UnitStreamer, load_model

WHOLE = 1e6  # seconds: longer than any recording


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder written by pre-training")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="recordings (synthetic ones)")
    parser.add_argument("--num_recordings", type=int, default=4, help="number of synthetic recordings (%(default)s)")
    parser.add_argument("--layer", type=int, default=5, help="layer, counted from 1 (%(default)s)")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["student", "teacher"],
        choices=UNIT_SOURCES,
        help="what gives the units; the anchor's are of the last layer (%(default)s)",
    )
    parser.add_argument(
        "--windows", type=float, nargs="+", default=[10.0, 30.0], help="seconds of a window (%(default)s)"
    )
    parser.add_argument(
        "--contexts",
        type=float,
        nargs="+",
        default=[0.0, 0.5, 2.0, 4.0],
        help="context of a window in seconds, on each side (%(default)s)",
    )
    parser.add_argument(
        "--stream_contexts",
        type=float,
        nargs="+",
        default=[1.0, 5.0, 15.0],
        help="context of a stream in seconds (%(default)s)",
    )
    parser.add_argument(
        "--lookaheads",
        type=float,
        nargs="+",
        default=[0.0, 0.1, 0.5, 1.0],
        help="lookahead of a stream in seconds (%(default)s)",
    )
    parser.add_argument("--step_seconds", type=float, default=0.5, help="step of a stream (%(default)s)")
    return parser.parse_args(argv)


def open_inputs(options: argparse.Namespace) -> SpeechSource:
    if options.inputs:
        return open_recordings(options.inputs)
    corpus = SyntheticCorpus(options.num_recordings, seed=1, split="test", noise=False, num_texts=(16, 16))
    return DatasetSource(corpus.to_dataset())


def percent_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], last: int | None = None) -> float:
    """Return the percentage of equal units, of the first `last` frames of each recording or of all."""
    same = np.concatenate([found[name][:last] == expected[name][:last] for name in expected])
    return 100 * float(same.mean())


class Study:
    def __init__(self, options: argparse.Namespace, source: str) -> None:
        self.model = load_model(options.model)
        self.recordings, self.layer, self.source = open_inputs(options), options.layer, source
        self.whole = self.windowed(WHOLE, 0.0)

    def windowed(self, window_seconds: float, context_seconds: float) -> dict[str, np.ndarray]:
        settings = {"window_seconds": window_seconds, "context_seconds": context_seconds, "batch_seconds": 60.0}
        extractor = UnitExtractor(self.model, layers=[self.layer], source=self.source, **settings)
        return {units.id: units.codes[0] for units in extractor.units(self.recordings)}

    def at_seams(self, found: dict[str, np.ndarray], window_seconds: float, context_seconds: float) -> float:
        """Return the percentage of frames within 0.2 s of a seam that have the same unit, or nan without seams."""
        config, same = self.model.config, []
        frames = SAMPLING_RATE / config.inputs_to_logits_ratio
        for name, codes in self.whole.items():
            window = config.num_frames(int(window_seconds * SAMPLING_RATE))
            for part in plan_windows(len(codes), window, round(context_seconds * frames))[1:]:
                near = slice(part.first - round(0.2 * frames), part.first + round(0.2 * frames))
                same.append(found[name][near] == codes[near])
        return 100 * float(np.concatenate(same).mean()) if same else np.nan

    def streamed(self, known: bool = False, **settings: float) -> tuple[dict[str, np.ndarray], float]:
        found = {}
        for index, utterance in enumerate(self.recordings.utterances):
            signal = self.recordings.load(index)
            level = (float(signal.mean()), float(signal.var())) if known else None
            streamer = UnitStreamer(self.model, self.layer, self.source, level=level, **settings)
            pieces = [streamer.push(signal[start : start + 1_600]) for start in range(0, len(signal), 1_600)]
            found[utterance.id] = np.concatenate([*pieces, streamer.flush()])
        return found, streamer.delay_seconds

    def check(self) -> None:
        found, _ = self.streamed(step_seconds=WHOLE)
        if percent_equal(found, self.whole) < 99.9:
            raise SystemExit("Nothing was measured: a stream of a single step has other units than the whole.")


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    config = load_model(options.model).config
    for source in options.sources:
        check_unit_layers(config, [options.layer], source)
    for source in options.sources:
        study = Study(options, source)
        study.check()
        early = round(5 * SAMPLING_RATE / study.model.config.inputs_to_logits_ratio)
        seconds = study.recordings.seconds
        print(f"\n{source}, layer {options.layer}, {len(study.recordings)} recordings, {seconds:.0f} s\n")
        print("| window, s | context, s | same units, % | at seams, % |\n|---|---|---|---|")
        for window, context in product(options.windows, options.contexts):
            if 2 * context < window:
                found = study.windowed(window, context)
                figures = f"{percent_equal(found, study.whole):.1f} | {study.at_seams(found, window, context):.1f}"
                print(f"| {window:g} | {context:g} | {figures} |", flush=True)
        print("\n| context, s | lookahead, s | delay, s | level known | same units, % | in the first 5 s, % |")
        print("|---|---|---|---|---|---|")
        for context, lookahead, known in product(options.stream_contexts, options.lookaheads, [False, True]):
            settings = {"context_seconds": context, "lookahead_seconds": lookahead}
            found, delay = study.streamed(known, step_seconds=options.step_seconds, **settings)
            figures = f"{percent_equal(found, study.whole):.1f} | {percent_equal(found, study.whole, early):.1f}"
            print(
                f"| {context:g} | {lookahead:g} | {delay:.2f} | {'yes' if known else 'no'} | {figures} |", flush=True
            )
    print(f"\n{headline(torch.device('cpu'), torch.get_num_threads())}")


if __name__ == "__main__":
    main(sys.argv[1:])
