"""
Cluster the features of a layer with k-means, to use the clusters as units.

    dinosr kmeans runs/base my_speech --output kmeans.safetensors --layer 6 --num_clusters 100
    dinosr units runs/base my_speech --output_dir units --kmeans kmeans.safetensors

Inputs are audio files and folders of them, or one manifest, archive or dataset. The layer needs no codebook. 300,000
frames, 100 minutes of speech, take up to three minutes of one core. Needs scikit-learn (the extra `analysis`).
"""

import argparse
from collections.abc import Sequence

from ..analysis.kmeans import MAX_FRAMES, check_num_clusters
from ..data.output_folder import describe_recordings
from ..model.modeling_dinosr import SOURCES
from ..units import UnitExtractor, fit_layer_kmeans, load_model
from ..utils.command_line import Parser, command, parse_options
from ..utils.extras import import_extra
from ._shared import (
    AudioBar,
    add_device,
    add_dry_run,
    add_dtype,
    add_inputs,
    claim_output,
    count_frames,
    open_inputs,
    print_plan,
)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder that pre-training wrote, or name on the Hub")
    add_inputs(parser)
    add("--output", required=True, help="path of the .safetensors file to write")
    add("--layer", type=int, help="layer, counted from 1 (5, or the last of fewer)")
    add("--source", default="student", choices=SOURCES, help="what gives the features (%(default)s)")
    smooth = "normalise the student's features over the recording and average three frames: tells more of phones"
    add("--smooth", action="store_true", help=smooth)
    add("--num_clusters", type=int, default=100, help="number of clusters (%(default)s)")
    add("--max_frames", type=int, default=MAX_FRAMES, help="number of frames to fit on, drawn at random (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the draw and of k-means (%(default)s)")
    add("--batch_seconds", type=float, default=120.0, help="seconds of audio per batch (%(default)s)")
    add_device(parser)
    add_dtype(parser)
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    return parse_options(make_parser(), argv, layer=1, num_clusters=1, max_frames=1)


def run(options: argparse.Namespace) -> None:
    if not options.output.endswith(".safetensors"):
        raise ValueError("--output must end in .safetensors.")
    claim_output(options.output, options)
    source = open_inputs(options)
    model = load_model(options.model, device=options.device, dtype=options.dtype)
    if options.smooth and options.source == "teacher":
        raise ValueError("--smooth is for the student: the teacher's features are normalised anyway. Leave it out.")
    extractor = UnitExtractor(
        model,
        layers=[options.layer or min(5, model.config.num_hidden_layers)],
        source=options.source,
        is_smoothed=options.smooth,
        batch_seconds=options.batch_seconds,
    )
    if options.dry_run:
        import_extra("sklearn.cluster", "analysis", "K-means")  # it and the next check are those of fit_layer_kmeans
        num_frames = min(count_frames(source, extractor.config), options.max_frames)
        check_num_clusters(options.num_clusters, num_frames)
        smoothed = ", smoothed" if extractor.is_smoothed else ""
        rows = [
            ("model", f"{options.model}: layers {extractor.layers} of the {extractor.source}{smoothed}"),
            ("recordings", describe_recordings(source)),
            ("clusters", f"{options.num_clusters:,}, fitted on {num_frames:,} frames"),
            ("results", options.output),
        ]
        print_plan(rows)
        return
    with AudioBar(source.seconds) as bar:
        kmeans = fit_layer_kmeans(
            extractor,
            source,
            options.num_clusters,
            max_frames=options.max_frames,
            seed=options.seed,
            on_progress=bar.advance,
        )
    print(kmeans.save(options.output))


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
