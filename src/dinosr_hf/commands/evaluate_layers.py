r"""
Evaluate what each layer of one or several models knows about phones and speakers, in a table and a plot.

    dinosr layers runs/base --data dev-clean --labels phones.jsonl.gz --speakers folder --output_dir runs/layers
    dinosr layers runs/base hubert --data test --fit_data train --labels textgrids \
        --output_dir runs/layers

Models are pre-trained DinoSRs, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec). K-means, probe and
correlations are fitted on the speakers of --fit_data, or else half of those of --data, and evaluated on others. Needs
the extras `train` and `analysis`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from ..analysis.kmeans import check_num_clusters
from ..analysis.layers import REPORT, Recordings, check_disjoint_speakers, draw_frames, evaluate_layer
from ..units import open_extractors
from ..units.baseline_models import baseline_config
from ..utils.command_line import Parser, command, parse_options, refuse_unused
from ..utils.model_folder import open_config
from ._evaluation import (
    add_labels,
    add_networks,
    check_inputs,
    check_sources,
    describe_features,
    describe_speech,
    open_labelled_speech,
    require_speakers,
)
from ._shared import PlanRow, add_device, add_dry_run, add_dtype, claim_output, print_plan


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of models, or names on the Hub")
    parser.add_argument(
        "--data", required=True, help="folder, table, manifest or dataset to evaluate on; or: synthetic"
    )
    parser.add_argument("--fit_data", help="data of other speakers to fit on (half of the speakers of --data)")
    parser.add_argument("--fit_split", help="split of --fit_data, if it has several")
    add_labels(parser)
    parser.add_argument("--layers", type=int, nargs="+", help="layers, counted from 1 (all)")
    add_networks(parser)
    parser.add_argument("--num_clusters", type=int, default=100, help="number of k-means clusters (%(default)s)")
    parser.add_argument(
        "--max_frames",
        type=int,
        default=20_000,
        help="maximum number of frames to fit on, and to evaluate on (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of speakers, frames and k-means (%(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder for layers.md, .csv, .json, .png and .pdf")
    add_device(parser, "models")
    add_dtype(parser, "models")
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv, num_clusters=1, max_frames=1)
    if not options.fit_data:
        refuse_unused(options, make_parser().get_default, ["fit_split"], "--fit_data is not", "give that too")
    return options


def layers_of(name: str, options: argparse.Namespace) -> list[int]:
    """Return the layers of a model to evaluate: those asked for, or all."""
    return options.layers or list(range(1, open_config(name).num_hidden_layers + 1))


def plan(fit: Recordings, held_out: Recordings, options: argparse.Namespace) -> Iterator[PlanRow]:
    """Yield the rows of a dry run's plan."""
    for name in options.models:
        yield "model", describe_features(name, layers_of(name, options), options.sources)
    yield "recordings", describe_speech(held_out.source, held_out.reference)
    if options.fit_data:
        yield "fitted on", describe_speech(fit.source, fit.reference)
    yield "speakers", f"{len(fit.speakers)} to fit on, {len(held_out.speakers)} others to evaluate on"
    yield "results", options.output_dir


def run(options: argparse.Namespace) -> None:
    claim_output(Path(options.output_dir, "layers.md"), options)
    labelled = open_labelled_speech(options.data, options, options.split)
    if not options.fit_data:
        require_speakers(labelled[1], "A split into speakers to fit on and to evaluate on")
    check_inputs(options.models, options.layers, labelled)
    check_sources(options, make_parser())
    held_out = Recordings.with_labels(*labelled)
    if options.fit_data:
        labelled = open_labelled_speech(options.fit_data, options, options.fit_split)
        check_inputs(options.models, options.layers, labelled)
        fit = Recordings.with_labels(*labelled)
        check_disjoint_speakers(fit, held_out)
    else:
        fit, held_out = held_out.split(options.seed)
    for name in options.models:
        num_frames = sum(fit.num_frames(baseline_config(name)).values())
        check_num_clusters(options.num_clusters, min(num_frames, options.max_frames))
    if options.dry_run:
        print_plan(plan(fit, held_out, options))
        return
    print(f"Fitted on {len(fit.speakers)} speakers, evaluated on {len(held_out.speakers)} others.")
    rows = []
    for name in options.models:
        where = {"device": options.device, "dtype": options.dtype}
        for extractor in open_extractors(name, layers=layers_of(name, options), sources=options.sources, **where):
            draw = {"max_frames": options.max_frames, "seed": options.seed}
            train, test = (draw_frames(extractor, recordings, **draw) for recordings in (fit, held_out))
            for position, layer in enumerate(tqdm(extractor.layers, f"{name}, {extractor.source}", disable=None)):
                figures = evaluate_layer(train, test, position, num_clusters=options.num_clusters, seed=options.seed)
                rows.append({"model": name, "source": extractor.source, "layer": layer, **figures})
    sentence = REPORT.write(options.output_dir, "layers", rows)
    print(REPORT.markdown(rows), sentence, sep="")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
