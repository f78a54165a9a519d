"""
Cluster the features of a layer with k-means, whose clusters then are units.

    python examples/fit_kmeans.py runs/base my_speech --output kmeans.safetensors --layer 6 --num_clusters 100
    python examples/extract_units.py runs/base my_speech --output_dir units --kmeans kmeans.safetensors

Inputs are audio files and folders of them, or one manifest, archive or dataset. Any layer will do, with or without a
codebook. Needs scikit-learn (the extra `analysis`).
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from dinosr_hf.data import SAMPLING_RATE, open_recordings
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import UnitExtractor, fit_kmeans, load_model
from dinosr_hf.utils.command_line import command


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder that pre-training leaves, or its name on the Hub")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="audio file or folder; or one manifest or dataset")
    parser.add_argument("--output", required=True, help="a .safetensors file")
    parser.add_argument("--layer", type=int, default=5, help="the lowest is 1 (%(default)s)")
    parser.add_argument("--source", default="student", choices=["student", "teacher"], help="(%(default)s)")
    parser.add_argument("--num_clusters", type=int, default=100, help="(%(default)s)")
    parser.add_argument(
        "--max_frames", type=int, default=500_000, help="to learn from, drawn from all recordings (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of k-means (%(default)s)")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="audio of a batch (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the model (%(default)s)")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    source = open_recordings(options.inputs)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    extractor = UnitExtractor(
        model, layers=[options.layer], source=options.source, batch_seconds=options.batch_seconds
    )
    total = sum(utterance.num_samples for utterance in source.utterances) / SAMPLING_RATE
    with tqdm(total=total, unit=" s of audio", disable=None) as bar:
        kmeans = fit_kmeans(
            extractor,
            source,
            options.num_clusters,
            max_frames=options.max_frames,
            seed=options.seed,
            on_progress=bar.update,
        )
    print(kmeans.save(options.output))


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
