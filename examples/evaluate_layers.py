"""
What each layer of one or several models knows about phones and speakers: one table, one picture.

    python examples/evaluate_layers.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/layers
    python examples/evaluate_layers.py runs/base hubert --data test --fit_data train --labels textgrids \
        --output_dir runs/layers

Models are folders that pre-training leaves, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec). Layers are
judged on other speakers than k-means, probe and correlations are fitted on: those of --fit_data, or else half of the
speakers of --data. Needs the extras `train` and `analysis`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from dinosr_hf.analysis.layers import (
    EvaluatedLayer,
    Recordings,
    check_apart,
    draw_frames,
    evaluate_layer,
    layers_csv,
    layers_curves,
    layers_table,
)
from dinosr_hf.analysis.plots import layer_curves_figure
from dinosr_hf.analysis.reports import write_report
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import UnitExtractor, has_codebooks, load_baseline, load_model
from dinosr_hf.utils.command_line import command
from dinosr_hf.utils.model_folder import open_config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, or names on the Hub")
    parser.add_argument("--data", required=True, help="folder, table, manifest or dataset to judge on; or: synthetic")
    parser.add_argument("--fit_data", help="the same, to fit on, of other speakers; left out: half of --data's")
    parser.add_argument("--labels", help="of both: file (.jsonl, .jsonl.gz, .ctm, .TextGrid) or folder of TextGrids")
    parser.add_argument("--tier", default="phones", help="of TextGrids (%(default)s)")
    parser.add_argument("--step_seconds", type=float, default=0.01, help="of labels one a step (%(default)s)")
    parser.add_argument("--speakers", help="column of the data with the speaker (speaker_id, if there is one)")
    parser.add_argument("--layers", type=int, nargs="+", help="the lowest is 1 (all)")
    parser.add_argument(
        "--sources", nargs="+", default=["student"], choices=["student", "teacher"], help="of a DinoSR (%(default)s)"
    )
    parser.add_argument("--num_clusters", type=int, default=100, help="of k-means (%(default)s)")
    parser.add_argument(
        "--max_frames", type=int, default=20_000, help="to fit on, and as many to judge on (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of speakers, frames and k-means (%(default)s)")
    parser.add_argument("--output_dir", required=True, help="for layers.md, .csv, .json, .png and .pdf")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the models (%(default)s)")
    return parser.parse_args(argv)


def open_recordings(name: str, options: argparse.Namespace) -> Recordings:
    place = {"tier": options.tier, "step_seconds": options.step_seconds, "speaker_column": options.speakers}
    return Recordings.all_of(*open_reference(name, labels=options.labels, **place))


def extractors(name: str, options: argparse.Namespace) -> Iterator[tuple[str, UnitExtractor]]:
    """Whose features they are, and what gives them, of one model."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)
    layers = options.layers or list(range(1, config.num_hidden_layers + 1))
    if has_codebooks(config):
        model = load_model(name, **where)
        for source in options.sources:
            yield source, UnitExtractor(model, layers=layers, source=source)
    else:
        yield "student", load_baseline(name, layers=layers, **where)


def run(options: argparse.Namespace) -> None:
    judged = open_recordings(options.data, options)
    if options.fit_data:
        fit = open_recordings(options.fit_data, options)
        check_apart(fit, judged)
    else:
        fit, judged = judged.split(options.seed)
    print(f"Fitted on {len(fit.speakers)} speakers, judged on {len(judged.speakers)} others.")
    rows: list[EvaluatedLayer] = []
    for name in options.models:
        for source, extractor in extractors(name, options):
            draw = {"max_frames": options.max_frames, "seed": options.seed}
            train, test = (draw_frames(extractor, recordings, **draw) for recordings in (fit, judged))
            for position, layer in enumerate(tqdm(extractor.layers, f"{name}, {source}", disable=None)):
                figures = evaluate_layer(train, test, position, num_clusters=options.num_clusters, seed=options.seed)
                rows.append(EvaluatedLayer(name, source, layer, figures))
    table = layers_table(rows)
    print(table, end="")
    print(
        write_report(
            options.output_dir,
            "layers",
            markdown=table,
            csv=layers_csv(rows),
            rows=[row.to_dict() for row in rows],
            figure=layer_curves_figure(layers_curves(rows)),
        )
    )


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
