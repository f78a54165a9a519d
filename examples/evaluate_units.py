r"""
Evaluate how well units agree with phones: all metrics, for all layers of one or several models, in a table and a plot.

    python examples/evaluate_units.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/evaluated
    python examples/evaluate_units.py runs/base hubert --data dev-clean --labels textgrids --kmeans_data train-clean \
        --kmeans_layers 6 9 --mfccs textbook tuned --output_dir runs/compared

Models are pre-trained DinoSRs, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), whose units are k-means
clusters of a layer; `--mfccs` adds the baseline, k-means on MFCCs. Labels are JSONL, CTM, or a folder of TextGrids;
`--data synthetic` has its own. Intervals are bootstrapped over speakers. Needs the extras `train` and `analysis`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dinosr_hf.analysis.baselines import MFCC_KINDS
from dinosr_hf.analysis.mfcc_units import fit_mfcc_kmeans, mfcc_units
from dinosr_hf.analysis.model_units import unit_layers
from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import REPORT, evaluate_units
from dinosr_hf.data import SAMPLING_RATE, SpeechSource, open_recordings
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.model.modeling_dinosr import UNIT_SOURCES
from dinosr_hf.units import UnitExtractor, fit_layer_kmeans, has_codebooks, load_baseline, load_model
from dinosr_hf.utils.command_line import command, parse_options
from dinosr_hf.utils.files import claim_output_file
from dinosr_hf.utils.model_folder import open_config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of models, or names on the Hub")
    parser.add_argument(
        "--data", required=True, help="folder, table, manifest or dataset to evaluate on; or: synthetic"
    )
    parser.add_argument("--labels", help="phones: file (.jsonl, .jsonl.gz, .ctm, .TextGrid) or folder of TextGrids")
    parser.add_argument("--tier", default="phones", help="tier of TextGrids (%(default)s)")
    parser.add_argument("--step_seconds", type=float, default=0.01, help="step of fixed-rate labels (%(default)s)")
    parser.add_argument("--speakers", help="column of --data with the speaker (speaker_id, if it exists)")
    parser.add_argument("--sources", nargs="+", choices=UNIT_SOURCES, help="what gives a DinoSR's units (all it has)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers with a codebook (all)")
    parser.add_argument(
        "--kmeans_data", nargs="+", default=[], help="recordings to fit k-means on, not those of --data"
    )
    parser.add_argument("--kmeans_layers", type=int, nargs="+", default=[], help="layers for k-means units")
    parser.add_argument(
        "--mfccs", nargs="+", default=[], choices=list(MFCC_KINDS), help="kinds of MFCCs for k-means units"
    )
    parser.add_argument(
        "--num_clusters", type=int, help="number of k-means clusters (the codebooks' size; 256 for other models)"
    )
    parser.add_argument("--num_samples", type=int, default=1_000, help="bootstrap samples; 0: none (%(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder for units.md, .csv, .json, .png and .pdf")
    parser.add_argument("--smooth", action="store_true", help="smooth features for k-means, as fit_kmeans.py does")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device, help="device of the models (%(default)s)")
    types = list(DTYPES)
    parser.add_argument("--dtype", default="float32", choices=types, help="precision of the models (%(default)s)")
    options = parse_options(parser, argv, num_clusters=1, num_samples=0)
    if bool(options.kmeans_data) != bool(options.kmeans_layers or options.mfccs):
        parser.error(
            "--kmeans_data belongs to --kmeans_layers and --mfccs: give it with one of them, or leave it out."
        )
    return options


# Model, kind, layers and units of recordings; the number of codes; stride and field, if they are not the paper's.
UnitSet = tuple[str, str, Sequence[int], Iterator[Any], int, dict[str, int]]


def extract_units(
    name: str, source: SpeechSource, fit: SpeechSource | None, options: argparse.Namespace
) -> Iterator[UnitSet]:
    """Yield the units of one model, kind by kind."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)

    def extracted(kind: str, extractor: UnitExtractor, num_codes: int, **kmeans: Any) -> UnitSet:
        frames = {"stride": extractor.config.inputs_to_logits_ratio, "field": extractor.config.receptive_field}
        return name, kind, extractor.layers, extractor.units(source, **kmeans), num_codes, frames

    if has_codebooks(config):
        model = load_model(name, **where)
        for kind in options.sources or model.config.unit_sources:
            layers = options.layers if options.layers and kind != "anchor" else unit_layers(model.config, kind)
            yield extracted(kind, UnitExtractor(model, layers=layers, source=kind), model.config.num_units(kind))
    elif not options.kmeans_layers:
        raise ValueError(f"{name} has no codebooks. Give --kmeans_data and --kmeans_layers for k-means units.")
    num_clusters = num_clusters_for(name, options)
    for layer in options.kmeans_layers if fit is not None else []:
        extractor = load_baseline(name, layers=[layer], is_smoothed=options.smooth, **where)
        kmeans = fit_layer_kmeans(extractor, fit, num_clusters)
        yield extracted("k-means", extractor, num_clusters, kmeans=kmeans)


def num_clusters_for(name: str, options: argparse.Namespace) -> int:
    return options.num_clusters or getattr(open_config(name), "codebook_size", None) or 256


def cluster_mfccs(source: SpeechSource, fit: SpeechSource, options: argparse.Namespace) -> Iterator[UnitSet]:
    """Yield the k-means units of MFCCs, as many as the first model's; their layer is 0, the input."""
    num_clusters = num_clusters_for(options.models[0], options)
    for kind in options.mfccs:
        units = mfcc_units(source, fit_mfcc_kmeans(fit, num_clusters, kind), kind)
        yield "none", f"k-means on {kind} MFCCs", [0], units, num_clusters, {}


def run(options: argparse.Namespace) -> None:
    claim_output_file(Path(options.output_dir, "units.md"))
    source, reference = open_reference(
        options.data,
        labels=options.labels,
        tier=options.tier,
        step_seconds=options.step_seconds,
        speaker_column=options.speakers,
    )
    seconds = sum(utterance.num_samples for utterance in source.utterances) / SAMPLING_RATE
    print(f"{len(reference.labels):,} of {len(source):,} recordings have labels; {seconds / 60:.1f} minutes in total.")
    fit = open_recordings(options.kmeans_data) if options.kmeans_data else None
    rows = []
    parts = [extract_units(name, source, fit, options) for name in options.models]
    if fit is not None:
        parts.append(cluster_mfccs(source, fit, options))
    for model, kind, layers, units, num_codes, frames in chain.from_iterable(parts):
        bar = tqdm(units, f"{model}, {kind}", len(source), disable=None, unit=" recordings")
        counts = reference.count_by_speaker(bar, num_codes=num_codes, **frames)
        for layer, speakers in zip(layers, counts, strict=True):
            rows.append(evaluate_units(model, layer, kind, speakers, num_samples=options.num_samples))
    sentence = REPORT.write(options.output_dir, "units", rows)
    print(REPORT.markdown(rows), sentence, sep="")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
