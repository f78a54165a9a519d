"""
How well units agree with phones: every figure for every layer of one or several models, as a table and a picture.

    python examples/evaluate_units.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/evaluated
    python examples/evaluate_units.py runs/base hubert --data dev-clean --labels textgrids --kmeans_data train-clean \
        --kmeans_layers 6 9 --output_dir runs/compared

Models are folders that pre-training leaves, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), whose units
are those of k-means on a layer. Labels: JSONL, CTM, or a folder of TextGrids; `--data synthetic` has its own.
Intervals are bootstrapped over speakers. Needs the extras `train` and `analysis`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from dinosr_hf.analysis.plots import layer_curves_figure
from dinosr_hf.analysis.reports import write_report
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import EvaluatedUnits, units_csv, units_curves, units_table
from dinosr_hf.data import SAMPLING_RATE, SpeechSource, open_recordings
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import UnitExtractor, Units, fit_kmeans, has_codebooks, load_baseline, load_model
from dinosr_hf.utils.command_line import command
from dinosr_hf.utils.model_folder import open_config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders, or names on the Hub")
    parser.add_argument("--data", required=True, help="folder, table, manifest or dataset to judge on; or: synthetic")
    parser.add_argument("--labels", help="file (.jsonl, .jsonl.gz, .ctm, .TextGrid) or folder of TextGrids")
    parser.add_argument("--tier", default="phones", help="of TextGrids (%(default)s)")
    parser.add_argument("--step_seconds", type=float, default=0.01, help="of labels one a step (%(default)s)")
    parser.add_argument("--speakers", help="column of --data with the speaker (speaker_id, if there is one)")
    parser.add_argument("--sources", nargs="+", default=["student", "teacher"], choices=["student", "teacher"])
    parser.add_argument("--layers", type=int, nargs="+", help="with a codebook (all)")
    parser.add_argument("--kmeans_data", nargs="+", default=[], help="recordings to fit k-means on, none of --data")
    parser.add_argument("--kmeans_layers", type=int, nargs="+", default=[], help="layers for units by k-means")
    parser.add_argument("--num_clusters", type=int, help="of k-means (the codebooks' size; 256 for other models)")
    parser.add_argument(
        "--num_samples", type=int, default=1_000, help="of the bootstrap; 0: no intervals (%(default)s)"
    )
    parser.add_argument("--output_dir", required=True, help="for units.md, .csv, .json, .png and .pdf")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the models (%(default)s)")
    options = parser.parse_args(argv)
    if bool(options.kmeans_data) != bool(options.kmeans_layers):
        parser.error("--kmeans_data and --kmeans_layers belong together: what to fit on, and on which layers.")
    return options


def contestants(
    name: str, source: SpeechSource, fit: SpeechSource | None, options: argparse.Namespace
) -> Iterator[tuple[str, UnitExtractor, Iterator[Units], int]]:
    """Kind of units, where they come from, the units, and how many different ones there can be, of one model."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)
    if has_codebooks(config):
        model = load_model(name, **where)
        for kind in options.sources:
            layers = options.layers or list(model.config.codebook_layers)
            extractor = UnitExtractor(model, layers=layers, source=kind)
            yield kind, extractor, extractor.units(source), model.config.codebook_size
    elif fit is None:
        raise ValueError(f"{name} has no codebooks. Give --kmeans_data and --kmeans_layers for units by k-means.")
    num_clusters = options.num_clusters or getattr(config, "codebook_size", None) or 256
    for layer in options.kmeans_layers if fit is not None else []:
        peer = load_baseline(name, layers=[layer], **where)
        yield "k-means", peer, peer.units(source, kmeans=fit_kmeans(peer, fit, num_clusters)), num_clusters


def run(options: argparse.Namespace) -> None:
    source, reference = open_reference(
        options.data,
        labels=options.labels,
        tier=options.tier,
        step_seconds=options.step_seconds,
        speaker_column=options.speakers,
    )
    seconds = sum(utterance.num_samples for utterance in source.utterances) / SAMPLING_RATE
    print(f"{len(reference.ids):,} of {len(source):,} recordings have labels; {seconds / 60:.1f} minutes in all.")
    fit = open_recordings(options.kmeans_data) if options.kmeans_data else None
    rows: list[EvaluatedUnits] = []
    for name in options.models:
        for kind, extractor, units, num_codes in contestants(name, source, fit, options):
            counts = reference.judge(
                tqdm(units, f"{name}, {kind}", len(source), disable=None, unit=" recordings"),
                num_codes=num_codes,
                stride=extractor.config.inputs_to_logits_ratio,
                field=extractor.config.receptive_field,
            )
            for layer, speakers in zip(extractor.layers, counts, strict=True):
                rows.append(EvaluatedUnits.of(name, layer, kind, speakers, num_samples=options.num_samples))
    table = units_table(rows)
    print(table, end="")
    print(
        write_report(
            options.output_dir,
            "units",
            markdown=table,
            csv=units_csv(rows),
            rows=[row.to_dict() for row in rows],
            figure=layer_curves_figure(units_curves(rows)),
        )
    )


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
