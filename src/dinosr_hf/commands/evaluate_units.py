r"""
Evaluate how well units agree with phones: all metrics, for all layers of one or several models, in a table and a plot.

    dinosr evaluate runs/base --data dev-clean --labels phones.jsonl.gz --speakers folder --output_dir runs/out
    dinosr evaluate runs/base hubert --data dev-clean --labels textgrids --speakers folder \
        --kmeans_data train-clean --kmeans_layers 6 9 --mfccs textbook tuned --output_dir runs/compared
    dinosr evaluate runs/base --discophon discophon_data --layers 5 --abx --output_dir runs/discophon

Models are pre-trained DinoSRs, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), whose units are k-means
clusters of a layer; `--kmeans` adds those of `dinosr kmeans`, and `--mfccs` the baseline, k-means on MFCCs. Labels are
JSONL, CTM, or a folder of TextGrids; `--data synthetic` has its own. Intervals are bootstrapped over speakers. Needs
the extras `train` and `analysis`; `--abx` the extra `abx`, and `--discophon`, which runs the benchmark's own
evaluation, the extra `discophon`.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tqdm import tqdm

from ..analysis import discophon
from ..analysis.abx import SPEAKERS, abx_errors, frame_rate, import_fastabx, triphone_items, write_unit_files
from ..analysis.baselines import MFCC_KINDS
from ..analysis.kmeans import check_num_clusters
from ..analysis.mfcc_units import fit_mfcc_kmeans, mfcc_units
from ..analysis.model_units import unit_layers
from ..analysis.reports import LayerReport, Metric, write_report
from ..analysis.unit_evaluation import REPORT, Reference, evaluate_units
from ..data import SpeechSource, open_recordings
from ..data.output_folder import describe_recordings
from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import UNIT_SOURCES, DinoSRForPreTraining, check_unit_layers
from ..units import (
    LayerExtractor,
    LayerKMeans,
    UnitExtractor,
    fit_layer_kmeans,
    has_codebooks,
    load_baseline,
    load_model,
)
from ..units.baseline_models import baseline_config, open_feature_extractor
from ..utils.command_line import ArgumentError, Parser, argument_errors, command, parse_options, refuse_unused
from ..utils.model_folder import open_config
from ._evaluation import (
    add_labels,
    check_inputs,
    check_sources,
    describe_speech,
    open_labelled_speech,
    require_speakers,
)
from ._shared import (
    PlanRow,
    add_device,
    add_dry_run,
    add_dtype,
    claim_output,
    count_frames,
    dataset_options,
    describe_labelled,
    print_plan,
)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of models, or names on the Hub")
    parser.add_argument("--data", help="folder, table, manifest or dataset to evaluate on; or: synthetic")
    parser.add_argument(
        "--discophon",
        metavar="FOLDER",
        help="evaluate on DiscoPhon's data instead (its test, or --split), by its functions",
    )
    languages = {"nargs": "+", "default": [], "choices": discophon.LANGUAGES, "metavar": "LANGUAGE"}
    parser.add_argument("--languages", **languages, help="languages of DiscoPhon, such as eng (all that are there)")
    parser.add_argument("--abx", action="store_true", help="add the ABX error of the units, by fastabx")
    add_labels(parser)
    parser.add_argument("--sources", nargs="+", choices=UNIT_SOURCES, help="what gives a DinoSR's units (all it has)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers with a codebook (all)")
    parser.add_argument(
        "--kmeans", nargs="+", default=[], metavar="FILE", help="files of dinosr kmeans, to evaluate their units too"
    )
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
    parser.add_argument("--smooth", action="store_true", help="smooth features for k-means, as dinosr kmeans does")
    add_device(parser, "models")
    add_dtype(parser, "models")
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv, num_clusters=1, num_samples=0)
    if bool(options.data) == bool(options.discophon):
        raise ArgumentError("Give either --data with --labels, or --discophon.")
    unused = partial(refuse_unused, options, make_parser().get_default)
    if options.discophon:
        of_data = ("labels", "tier", "step_seconds", "fold_stress", "speakers", "num_samples")
        unused(of_data, "DiscoPhon has labels of its own, and no intervals", "give --data instead")
        if not options.kmeans_data:
            unused(["audio_column", "data_config"], "DiscoPhon has files", "give --data instead")
    else:
        unused(["languages"], "--discophon is not", "give it instead of --data")
    if options.kmeans and len(options.models) > 1:
        raise ArgumentError("--kmeans has clusters of one model, but there are several. Evaluate that one alone.")
    if bool(options.kmeans_data) != bool(options.kmeans_layers or options.mfccs):
        raise ArgumentError(
            "--kmeans_data belongs to --kmeans_layers and --mfccs: give it with one of them, or leave it out."
        )
    if not options.kmeans_data:
        unused(["num_clusters"], "there is no k-means", "give --kmeans_data")
    if not options.kmeans_layers:
        unused(["smooth"], "no layer is clustered", "give --kmeans_layers")
    return options


ABX_METRICS = {f"abx_{speaker}": Metric(f"ABX {speaker} speakers, %", digits=2, scale=100) for speaker in SPEAKERS}


class UnitSet(NamedTuple):
    """The units of one kind for all recordings, each (L, T); `config` gives stride and receptive field."""

    model: str
    kind: str
    layers: Sequence[int]
    units: Iterable[Any]
    num_codes: int
    config: DinoSRConfig


def layers_of(config: DinoSRConfig, kind: str, options: argparse.Namespace) -> list[int]:
    """Return the layers to take a kind of units from: those asked for, but for the anchor, which has one."""
    return options.layers if options.layers and kind != "anchor" else unit_layers(config, kind)


class OpenedKMeans(NamedTuple):
    """Clusters in a file, and the extractor of their features."""

    file: str
    extractor: UnitExtractor
    kmeans: LayerKMeans


def open_kmeans(model: DinoSRForPreTraining, options: argparse.Namespace) -> list[OpenedKMeans]:
    """Open the files of k-means; `ValueError` for those of another model."""
    opened = []
    for file in options.kmeans:
        kmeans = LayerKMeans.load(file)
        extractor = UnitExtractor(model, layers=[kmeans.layer], source=kmeans.source, is_smoothed=kmeans.is_smoothed)
        extractor.check_kmeans(kmeans)
        opened.append(OpenedKMeans(file, extractor, kmeans))
    return opened


def extract_units(
    name: str, source: SpeechSource, fit: SpeechSource | None, options: argparse.Namespace
) -> Iterator[UnitSet]:
    """Yield the units of one model, kind by kind."""
    where = {"device": options.device, "dtype": options.dtype}
    config = open_config(name)

    def extracted(kind: str, extractor: LayerExtractor, num_codes: int, **kmeans: Any) -> UnitSet:
        return UnitSet(name, kind, extractor.layers, extractor.units(source, **kmeans), num_codes, extractor.config)

    if has_codebooks(config):
        model = load_model(name, **where)
        fitted = open_kmeans(model, options)  # all of them before hours of work
        for kind in options.sources or model.config.unit_sources:
            extractor = UnitExtractor(model, layers=layers_of(model.config, kind, options), source=kind)
            yield extracted(kind, extractor, model.config.num_units(kind))
        for file, extractor, kmeans in fitted:
            yield extracted(f"k-means of {file}", extractor, len(kmeans.centroids), kmeans=kmeans)
    if fit is None:
        return
    num_clusters = num_clusters_for(name, options)
    for layer in options.kmeans_layers:
        clustered = load_baseline(name, layers=[layer], is_smoothed=options.smooth, **where)
        kmeans = fit_layer_kmeans(clustered, fit, num_clusters)
        yield extracted("k-means", clustered, num_clusters, kmeans=kmeans)


def check_models(options: argparse.Namespace) -> None:
    """Raise `ValueError`, before hours of work, if a model lacks the requested units, or options have no effect."""
    check_sources(options, make_parser(), ["layers", "sources"])
    for name in options.models:
        config = open_config(name)
        if has_codebooks(config):
            for kind in options.sources or config.unit_sources:
                with argument_errors(f"{name}: "):
                    check_unit_layers(config, layers_of(config, kind, options), kind)
        elif options.kmeans or not options.kmeans_layers:
            advice = (
                "Give --kmeans_data and --kmeans_layers for k-means units, and no --kmeans, which is for a DinoSR."
            )
            raise ValueError(f"{name} has no codebooks. {advice}")
        if options.kmeans_layers:
            open_feature_extractor(name)


def num_clusters_for(name: str, options: argparse.Namespace) -> int:
    return options.num_clusters or getattr(open_config(name), "codebook_size", None) or 256


def cluster_mfccs(source: SpeechSource, fit: SpeechSource, options: argparse.Namespace) -> Iterator[UnitSet]:
    """Yield the k-means units of MFCCs, as many as the first model's; their layer is 0, the input."""
    num_clusters = num_clusters_for(options.models[0], options)
    for kind in options.mfccs:
        units = mfcc_units(source, fit_mfcc_kmeans(fit, num_clusters, kind), kind)
        yield UnitSet("none", f"k-means on {kind} MFCCs", [0], units, num_clusters, DinoSRConfig())


def open_kmeans_data(options: argparse.Namespace) -> SpeechSource | None:
    """Open the recordings to fit k-means on, if it is fitted; `ValueError` if they have too few frames."""
    if not options.kmeans_data:
        return None
    columns = {**dataset_options(options, options.kmeans_data[0]), "split": None}
    fit = open_recordings(options.kmeans_data, **columns)
    clustered = [(name, baseline_config(name)) for name in options.models if options.kmeans_layers]
    clustered += [(options.models[0], DinoSRConfig())] if options.mfccs else []
    for name, config in clustered:
        check_num_clusters(num_clusters_for(name, options), count_frames(fit, config))
    return fit


def describe_units(name: str, options: argparse.Namespace) -> str:
    """Say which units of a model are evaluated, for a dry run; loads the model only to check files of k-means."""
    config = open_config(name)
    parts: list[str] = []
    if has_codebooks(config):
        kinds = options.sources or config.unit_sources
        parts += [f"layers {layers_of(config, kind, options)} of the {kind}" for kind in kinds]
    if options.kmeans:
        opened = open_kmeans(load_model(name, device=options.device, dtype=options.dtype), options)
        parts += [f"layers {extractor.layers} of the {extractor.source} by {file}" for file, extractor, _ in opened]
    if options.kmeans_layers:
        parts.append(f"layers {options.kmeans_layers} by k-means, {num_clusters_for(name, options)} clusters")
    return f"{name}: {'; '.join(parts)}"


def plan(recordings: str, fit: SpeechSource | None, options: argparse.Namespace) -> Iterator[PlanRow]:
    """Yield the rows of a dry run's plan, of which one says of the `recordings`."""
    for name in options.models:
        yield "model", describe_units(name, options)
    if options.mfccs:
        num_clusters = num_clusters_for(options.models[0], options)
        yield "MFCCs", f"{' and '.join(options.mfccs)}, by k-means, {num_clusters} clusters"
    yield "recordings", recordings
    if fit is not None:
        yield "k-means on", describe_recordings(fit)
    yield "results", options.output_dir


def unit_sets(source: SpeechSource, fit: SpeechSource | None, options: argparse.Namespace) -> Iterator[UnitSet]:
    """Yield the units of all models and MFCCs, with a progress bar."""
    parts = [extract_units(name, source, fit, options) for name in options.models]
    if fit is not None:
        parts.append(cluster_mfccs(source, fit, options))
    for part in chain.from_iterable(parts):
        bar = tqdm(part.units, f"{part.model}, {part.kind}", len(source), disable=None, unit=" recordings")
        yield part._replace(units=bar)


def add_abx(
    rows: Sequence[dict], source: SpeechSource, reference: Reference, part: UnitSet, options: argparse.Namespace
) -> None:
    """Add the ABX errors of the units to the rows of their layers."""
    items = triphone_items(source, reference, part.config)
    with TemporaryDirectory(dir=options.output_dir, prefix=".units-") as folder:
        write_unit_files(part.units, folder, part.layers)
        for row, layer in zip(rows, part.layers, strict=True):
            files, rate = Path(folder, f"layer-{layer}"), frame_rate(part.config)
            errors = abx_errors(items, files, rate, distance="identical", device=options.device)
            row.update({f"abx_{speaker}": error for speaker, error in errors.items()})


def evaluate_on_phones(options: argparse.Namespace) -> tuple[LayerReport, list[dict]] | None:
    """Return the report and its rows; None after a dry run."""
    source, reference = open_labelled_speech(options.data, options, options.split)
    if options.abx:
        require_speakers(reference, "ABX within and across speakers")
    check_models(options)
    check_inputs(options.models, options.kmeans_layers, (source, reference))
    fit = open_kmeans_data(options)
    if options.dry_run:
        print_plan(plan(describe_speech(source, reference), fit, options))
        return None
    minutes = source.seconds / 60
    print(f"{len(source):,} of {len(reference.speakers):,} recordings have labels; {minutes:.1f} minutes in total.")
    rows: list[dict] = []
    for part in unit_sets(source, fit, options):
        if options.abx:
            part = part._replace(units=list(part.units))
        frames = {"stride": part.config.inputs_to_logits_ratio, "field": part.config.receptive_field}
        counts = reference.count_by_speaker(part.units, num_codes=part.num_codes, **frames)
        own = [
            evaluate_units(part.model, layer, part.kind, speakers, num_samples=options.num_samples)
            for layer, speakers in zip(part.layers, counts, strict=True)
        ]
        if options.abx:
            add_abx(own, source, reference, part, options)
        rows += own
    return (REPORT._replace(metrics={**REPORT.metrics, **ABX_METRICS}) if options.abx else REPORT), rows


def evaluate_on_discophon(options: argparse.Namespace) -> tuple[LayerReport, list[dict]] | None:
    """Return the report and its rows; None after a dry run."""
    benchmark = discophon.DiscoPhon(options.discophon, options.languages, options.split or "test")
    check_models(options)
    check_inputs(options.models, options.kmeans_layers)
    fit = open_kmeans_data(options)
    if options.dry_run:
        print_plan(plan(describe_labelled(benchmark.source, num_without=0), fit, options))
        return None
    print(f"{len(benchmark.source):,} recordings of {', '.join(benchmark.languages)}.")
    rows: list[dict] = []
    for part in unit_sets(benchmark.source, fit, options):
        frames = {"num_units": part.num_codes, "stride": part.config.inputs_to_logits_ratio}
        found = benchmark.evaluate(part.units, **frames, with_abx=options.abx)
        for layer, own in zip(part.layers, found, strict=True):
            rows += [{"model": part.model, "layer": layer, "units": part.kind, **row} for row in own]
    if benchmark.split == "test" and any(row["num_units"] == discophon.NUM_UNITS for row in rows):
        rows += discophon.published_rows(benchmark.languages, with_abx=options.abx)
    report, abx = discophon.REPORT, discophon.ABX_METRIC if options.abx else {}
    return report._replace(metrics={**report.metrics, **abx}), discophon.add_means(rows)


def run(options: argparse.Namespace) -> None:
    name = "discophon" if options.discophon else "units"
    claim_output(Path(options.output_dir, f"{name}.md"), options)
    if options.discophon:
        discophon.import_discophon()
    if options.abx:
        import_fastabx()
    evaluated = (evaluate_on_discophon if options.discophon else evaluate_on_phones)(options)
    if evaluated is None:
        return
    report, rows = evaluated
    markdown = report.markdown(rows)
    if options.discophon:  # too many languages for curves
        sentence = write_report(options.output_dir, name, markdown=markdown, csv=report.csv(rows), rows=rows)
    else:
        sentence = report.write(options.output_dir, name, rows)
    print(markdown, sentence, sep="")


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
