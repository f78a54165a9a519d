"""The arguments of a run about its anchor: which kind it is, what fits together, and its weights over the run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..analysis import Labels, Segment, read_alignments
from ..analysis.alignment import SILENCE, STRIDE
from ..analysis.alignment_files import SUFFIXES
from ..data.finding import find_files
from ..training.resume import CheckpointError, find_checkpoints
from ..utils.command_line import ArgumentError, argument_errors, refuse_unused
from ..utils.model_folder import open_config
from .anchor import load_anchor

if TYPE_CHECKING:
    from .pretraining_arguments import DataArguments, ModelArguments, RunArguments

MFCC = "mfcc"
NONE = "none"
Kind = Literal["mfcc", "labels", "model"]


class AnchorWeights(NamedTuple):
    """Weights of `anchored_loss` at an update."""

    weight: float
    unmasked_share: float

    def metrics(self) -> dict[str, float]:
        """Return them under their names in a line of metrics."""
        return {"anchor_weight": self.weight, "anchor_unmasked_share": self.unmasked_share}


def anchor_weights_at(options: RunArguments, step: int) -> AnchorWeights | None:
    """Return the weights of the update that follows `step` completed ones, from `RunArguments`; None: no anchor."""
    if options.anchor is None:
        return None
    done = min(1.0, step / options.anchor_end_step) if options.anchor_end_step else 1.0

    def between(start: float, end: float | None) -> float:
        return start if end is None else start + (end - start) * done

    return AnchorWeights(
        between(options.anchor_weight, options.anchor_end_weight),
        between(options.anchor_unmasked_share, options.anchor_end_unmasked_share),
    )


def anchor_kind(name: str) -> Kind:
    """Return what `anchor` names: "mfcc"; a file or folder of frame labels; or a model, in a folder or on the Hub."""
    path = Path(name)
    if name == MFCC:
        return "mfcc"
    if path.is_file() or name.endswith(SUFFIXES):
        return "labels"
    if not path.is_dir() or (path / "config.json").exists():
        return "model"
    if not find_files(path, ".textgrid").names:
        raise ArgumentError(
            f"anchor={name} is a folder with neither a model (config.json) nor TextGrids. If it is a run, let it"
            " finish, or give one of its step or checkpoint folders."
        )
    return "labels"


def read_anchor_labels(path: str, tier: str) -> dict[str, Labels]:
    """Read frame labels by recording, as `read_alignments` does. Raises `ArgumentError` if there are none."""
    with argument_errors(f"anchor={path} has no frame labels that can be read: "):
        return read_alignments(path, tier=tier)


def anchor_label_names(labels: Mapping[str, Labels]) -> list[str]:
    """Return the different labels, sorted; silence is one of them if segments can leave gaps."""

    def names() -> Iterator[str]:
        for own in labels.values():
            for label in own:
                yield label.label if isinstance(label, Segment) else label
            if len(own) == 0 or isinstance(own[0], Segment):
                yield SILENCE

    return sorted(set(names()))


def _anchor_defaults(run: RunArguments) -> dict[str, Any]:
    return {field.name: field.default for field in fields(run) if field.name.startswith("anchor_")}


def drop_settings_of_another_anchor(model: ModelArguments, run: RunArguments, keep: Collection[str]) -> None:
    """
    Reset what a recipe sets for its own anchor, and the one that the command line names instead does not have.

    Another model keeps `anchor_layer`, as a run that repeats the recipe on its own result needs it. `keep` are the
    names of what is on the command line itself.
    """
    kind, defaults = None if run.anchor in (None, NONE) else anchor_kind(run.anchor), _anchor_defaults(run)
    unused = {"mfcc": ["anchor_layer"], "model": ["anchor_features"], "labels": ["anchor_layer", "anchor_features"]}
    for name in defaults if kind is None else unused[kind]:
        if name not in keep:
            setattr(run, name, defaults[name])
    if kind in (None, "labels") and "num_anchor_labels" not in keep:
        model.num_anchor_labels = 0


def settle_anchor(model: ModelArguments, data: DataArguments, run: RunArguments) -> None:
    """
    Set `num_anchor_labels` if the anchor determines it, and check what `_RANGES` cannot.

    Raises `ArgumentError` if options contradict each other, or the file of labels cannot be read.
    """
    defaults = _anchor_defaults(run)
    if run.anchor == NONE:
        run.anchor = None
    if run.anchor is None:
        refuse_unused(run, defaults.get, defaults, "anchor is not", "set --anchor")
        if model.num_anchor_labels:
            raise ArgumentError(
                f"num_anchor_labels={model.num_anchor_labels} is set, but anchor is not. Set --anchor, or leave"
                " num_anchor_labels out."
            )
        return
    kind, way_out = anchor_kind(run.anchor), "set another --anchor"
    begun = _labels_of_begun_run(run)
    if begun is not None and kind == "model" and run.anchor_layer is None:
        kind = "labels"  # a folder of TextGrids that is gone
    if kind != "mfcc":
        refuse_unused(run, defaults.get, ["anchor_features"], f"anchor={run.anchor} has no MFCCs", way_out)
        if data.streaming:
            raise ArgumentError(
                f"anchor={run.anchor} labels all recordings before the first step, but a stream is not known then."
                " Use --anchor mfcc, or read the recordings from disk."
            )
    if kind != "model":
        refuse_unused(run, defaults.get, ["anchor_layer"], f"anchor={run.anchor} has no layers", way_out)
    elif run.anchor_layer is None:
        with argument_errors("anchor="):
            last = open_config(run.anchor).num_hidden_layers
        raise ArgumentError(f"anchor={run.anchor} is a model: set --anchor_layer, from 1 to {last}.")
    if kind == "labels":
        if begun is None:
            begun = len(anchor_label_names(read_anchor_labels(run.anchor, data.label_tier)))
        _settle_num_labels(model, run.anchor, begun)
    else:
        model.num_anchor_labels = model.num_anchor_labels or model.codebook_size
    ends = (run.anchor_end_weight, run.anchor_end_unmasked_share)
    if (run.anchor_end_step > 0) != (ends != (None, None)):
        raise ArgumentError(
            f"anchor_end_step={run.anchor_end_step} does not fit anchor_end_weight={ends[0]} and"
            f" anchor_end_unmasked_share={ends[1]}: it is the step at which they are reached. Set it and at least one"
            " of them, or none."
        )


def _labels_of_begun_run(run: RunArguments) -> int | None:
    """Return the number of labels of a run that has begun, which may outlive their file; None if it has not."""
    if run.resume == "never" or not find_checkpoints(run.output_dir):
        return None
    try:
        return load_anchor(run.output_dir).num_labels
    except CheckpointError:  # it is made again
        return None


def _settle_num_labels(model: ModelArguments, path: str, num_labels: int) -> None:
    if model.num_anchor_labels not in (0, num_labels):
        raise ArgumentError(
            f"num_anchor_labels={model.num_anchor_labels}, but anchor={path} has {num_labels} different labels, with"
            " silence. Leave num_anchor_labels out."
        )
    model.num_anchor_labels = num_labels


def check_mfcc_frames(run: RunArguments, stride: int) -> None:
    """Raise `ArgumentError` if the anchor is of MFCCs, which come at one rate, and the model has another."""
    if run.anchor == MFCC and stride != STRIDE:
        raise ArgumentError(
            f"anchor=mfcc labels frames every {STRIDE} samples, but the model has one every {stride}, the product of"
            " conv_stride. Change conv_stride, or use another anchor."
        )
