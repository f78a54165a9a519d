r"""
Evaluate the ABX error of features and units of selected layers, within and across speakers, in a table.

    dinosr abx runs/base --data dev-clean --labels phones.jsonl.gz --speakers folder --output_dir runs/abx
    dinosr abx runs/base hubert --data dev-clean --labels textgrids --speakers folder --output_dir runs/abx \
        --layers 5 9 --distances angular cosine

Models are pre-trained DinoSRs, or encoders of transformers (HuBERT, wav2vec 2.0, data2vec), which have features only.
Triphones are cut from the labels and written to triphones.item. Needs the extras `train` and `abx`, the latter with
Python 3.12; with --items_only neither.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..analysis.abx import (
    SPEAKERS,
    abx_errors,
    frame_rate,
    import_fastabx,
    items_text,
    triphone_items,
    write_unit_files,
)
from ..analysis.reports import write_report
from ..analysis.unit_evaluation import Reference
from ..data import SpeechSource
from ..units import FeatureFiles, UnitExtractor, open_extractors
from ..units.baseline_models import baseline_config
from ..utils.command_line import ArgumentError, Parser, command, parse_options, refuse_unused
from ..utils.files import write_atomically
from ..utils.tables import csv_table, markdown_table
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
    add_labels(parser)
    parser.add_argument("--silence", nargs="+", default=["SIL"], help="labels that are not phones (SIL)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers, counted from 1 (5, or the last of fewer)")
    add_networks(parser)
    parser.add_argument(
        "--distances",
        nargs="+",
        default=["angular"],
        choices=["angular", "cosine", "euclidean"],
        help="distances of features (angular)",
    )
    parser.add_argument(
        "--max_size_group", type=int, default=10, help="maximum number of triphones of a kind (%(default)s)"
    )
    other = "maximum number of other speakers per triphone (%(default)s)"
    parser.add_argument("--max_x_across", type=int, default=5, help=other)
    parser.add_argument("--items_only", action="store_true", help="write triphones.item, and evaluate nothing")
    parser.add_argument("--output_dir", required=True, help="folder for triphones.item, abx.md, abx.csv and abx.json")
    add_device(parser, "models")
    add_dtype(parser, "models")
    add_dry_run(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = parse_options(make_parser(), argv, max_size_group=1, max_x_across=1)
    if options.items_only:
        unused = ("layers", "sources", "distances", "max_size_group", "max_x_across", "device", "dtype")
        refuse_unused(options, make_parser().get_default, unused, "nothing is evaluated", "leave out --items_only")
        if len(options.models) > 1:
            raise ArgumentError("--items_only writes the triphones of one model, but there are several. Give one.")
    return options


def layers_of(name: str, options: argparse.Namespace) -> list[int]:
    """Return the layers of a model to evaluate: those asked for, or 5, or the last of fewer."""
    return options.layers or [min(5, baseline_config(name).num_hidden_layers)]


def plan(source: SpeechSource, reference: Reference, options: argparse.Namespace) -> Iterator[PlanRow]:
    """Yield the rows of a dry run's plan; `ValueError` as `triphone_items`."""
    for name in options.models:
        items = triphone_items(source, reference, baseline_config(name), silence=options.silence)
        what = name if options.items_only else describe_features(name, layers_of(name, options), options.sources)
        yield "model", f"{what}; {len(items):,} triphones"
    if not options.items_only:
        distances = ", ".join(options.distances)
        yield "distances", f"{distances} for features, identical for units of layers with a codebook"
    yield "recordings", describe_speech(source, reference)
    yield "results", options.output_dir


def write_representations(
    name: str, source: SpeechSource, folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, int, str, Path]]:
    """Write features and units of one model; yield source, layer, distance, and the folder to compare by it."""
    where = {"device": options.device, "dtype": options.dtype}
    layers = layers_of(name, options)
    for features in open_extractors(name, layers=layers, sources=options.sources, **where):
        kind = features.source
        FeatureFiles(folder / kind, features, source).write()
        for layer in layers:
            yield from ((kind, layer, distance, folder / kind / f"layer-{layer}") for distance in options.distances)
        with_codebook = [layer for layer in layers if layer in features.config.codebook_layers]
        if with_codebook and isinstance(features, UnitExtractor):
            extractor = UnitExtractor(features.model, layers=with_codebook, source=kind)
            write_unit_files(extractor.units(source), folder / f"{kind}-units", with_codebook)
            for layer in with_codebook:
                yield kind, layer, "identical", folder / f"{kind}-units" / f"layer-{layer}"


def report(rows: Sequence[dict], out: Path) -> None:
    headings = [f"{name} speakers, %" if name in SPEAKERS else name for name in rows[0]]
    cells = [[f"{100 * row[name]:.2f}" if name in SPEAKERS else str(row[name]) for name in row] for row in rows]
    markdown, csv = markdown_table(headings, cells), csv_table(list(rows[0]), [list(row.values()) for row in rows])
    sentence = write_report(out, "abx", markdown=markdown, csv=csv, rows=rows)
    print(markdown, sentence, sep="")


def run(options: argparse.Namespace) -> None:
    if not options.items_only:
        import_fastabx()
    source, reference = open_labelled_speech(options.data, options, options.split)
    require_speakers(reference, "ABX within and across speakers")
    check_inputs(options.models, options.layers, (source, reference))
    check_sources(options, make_parser())
    out = claim_output(Path(options.output_dir, "abx.md"), options).parent
    if options.dry_run:
        print_plan(plan(source, reference, options))
        return
    rows = []
    for number, name in enumerate(options.models):
        config = baseline_config(name)
        items = triphone_items(source, reference, config, silence=options.silence)
        if number == 0:
            print(f"{len(items):,} triphones are in {write_atomically(out / 'triphones.item', items_text(items))}.")
        if options.items_only:
            return
        sizes = {"max_size_group": options.max_size_group, "max_x_across": options.max_x_across}
        with TemporaryDirectory(dir=out, prefix=".features-") as folder:
            for kind, layer, distance, files in write_representations(name, source, Path(folder), options):
                row = {"model": name, "source": kind, "layer": layer}
                row |= {"what": "units" if distance == "identical" else "features", "distance": distance}
                compare = {"distance": distance, "device": options.device}
                rows.append(row | abx_errors(items, files, frame_rate(config), **compare, **sizes))
    report(rows, out)


def main(argv: Sequence[str]) -> None:
    with command(__file__):
        run(parse(argv))
