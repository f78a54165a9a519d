r"""
Evaluate how well units agree with phones: all metrics, for all layers of one or several models, in a table and a plot.

    python examples/evaluate_units.py runs/base --data dev-clean --labels phones.jsonl.gz --output_dir runs/evaluated
    python examples/evaluate_units.py runs/base hubert --data dev-clean --labels textgrids --kmeans_data train-clean \
        --kmeans_layers 6 9 --output_dir runs/compared

Models are pre-trained DinoSRs, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), whose units are k-means
clusters of a layer. Labels are JSONL, CTM, or a folder of TextGrids; `--data synthetic` has its own. Intervals are
bootstrapped over speakers. Needs the extras `train` and `analysis`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from dinosr_hf.analysis.speech import open_reference
from dinosr_hf.analysis.unit_evaluation import REPORT, evaluate_units
from dinosr_hf.data import SAMPLING_RATE, SpeechSource, open_recordings
from dinosr_hf.inference.windowed import DTYPES
from dinosr_hf.units import UnitExtractor, Units, fit_layer_kmeans, has_codebooks, load_baseline, load_model
from dinosr_hf.utils.command_line import command
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
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["student", "teacher"],
        choices=["student", "teacher"],
        help="networks that give the units of a DinoSR (student teacher)",
    )
    parser.add_argument("--layers", type=int, nargs="+", help="layers with a codebook (all)")
    parser.add_argument(
        "--kmeans_data", nargs="+", default=[], help="recordings to fit k-means on, not those of --data"
    )
    parser.add_argument("--kmeans_layers", type=int, nargs="+", default=[], help="layers for k-means units")
    parser.add_argument(
        "--num_clusters", type=int, help="number of k-means clusters (the codebooks' size; 256 for other models)"
    )
    parser.add_argument("--num_samples", type=int, default=1_000, help="bootstrap samples; 0: none (%(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder for units.md, .csv, .json, .png and .pdf")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the models (%(default)s)",
    )
    parser.add_argument(
        "--dtype", default="float32", choices=list(DTYPES), help="precision of the models (%(default)s)"
    )
    options = parser.parse_args(argv)
    if bool(options.kmeans_data) != bool(options.kmeans_layers):
        parser.error("--kmeans_data and --kmeans_layers belong together: give both, or neither.")
    return options


def extract_units(
    name: str, source: SpeechSource, fit: SpeechSource | None, options: argparse.Namespace
) -> Iterator[tuple[str, UnitExtractor, Iterator[Units], int]]:
    """Yield kind, extractor and units of one model, and the number of codes."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)
    if has_codebooks(config):
        model = load_model(name, **where)
        for kind in options.sources:
            layers = options.layers or list(model.config.codebook_layers)
            extractor = UnitExtractor(model, layers=layers, source=kind)
            yield kind, extractor, extractor.units(source), model.config.codebook_size
    elif fit is None:
        raise ValueError(f"{name} has no codebooks. Give --kmeans_data and --kmeans_layers for k-means units.")
    num_clusters = options.num_clusters or getattr(config, "codebook_size", None) or 256
    for layer in options.kmeans_layers if fit is not None else []:
        extractor = load_baseline(name, layers=[layer], **where)
        kmeans = fit_layer_kmeans(extractor, fit, num_clusters)
        yield "k-means", extractor, extractor.units(source, kmeans=kmeans), num_clusters


def run(options: argparse.Namespace) -> None:
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
    for name in options.models:
        for kind, extractor, units, num_codes in extract_units(name, source, fit, options):
            counts = reference.count_by_speaker(
                tqdm(units, f"{name}, {kind}", len(source), disable=None, unit=" recordings"),
                num_codes=num_codes,
                stride=extractor.config.inputs_to_logits_ratio,
                field=extractor.config.receptive_field,
            )
            for layer, speakers in zip(extractor.layers, counts, strict=True):
                rows.append(evaluate_units(name, layer, kind, speakers, num_samples=options.num_samples))
    print(REPORT.markdown(rows), end="")
    print(REPORT.write(options.output_dir, "units", rows))


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
