"""What every layout gives, and a model made of it without a second copy of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ...model.configuration_dinosr import DinoSRConfig
from .checkpoint_file import CheckpointError

Model = TypeVar("Model", bound=PreTrainedModel)


class Weight(NamedTuple):
    """
    A tensor of the file.

    Attributes:
        ours: Its name here; a codebook's is that of the stacked tables with its number behind.
        theirs: Its name in the file, for messages.
        tensor: The tensor, or whatever stands in its place.
    """

    ours: str
    theirs: str
    tensor: Any


@dataclass
class Layout:
    """
    A checkpoint, understood.

    Attributes:
        name: Of the layout.
        config: The model's configuration.
        weights: All weights that a `DinoSRForPreTraining`, or the architecture below, takes.
        left: Name -> why, of all other entries of the file.
        notes: What the file did not say and was taken from an option or a published default, and what
            settings were left.
        architecture: "pretraining", "model" (an encoder alone) or "ctc".
        licence: What is known of the licence of such files.
        vocabulary: Label -> number, of a recogniser.
    """

    name: str
    config: DinoSRConfig
    weights: Sequence[Weight]
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    architecture: str = "pretraining"
    licence: str = "not known"
    vocabulary: dict[str, int] | None = None

    def encoder_alone(self) -> Layout:
        """The student's encoder; all other weights are left, and named."""
        left = {w.theirs: "not part of the encoder" for w in self.weights if not w.ours.startswith("dinosr.")}
        own = [Weight(w.ours.removeprefix("dinosr."), *w[1:]) for w in self.weights if w.ours.startswith("dinosr.")]
        return Layout(
            self.name, self.config, own, {**self.left, **left}, self.notes, architecture="model", licence=self.licence
        )


def make_config(**values: Any) -> DinoSRConfig:
    """A configuration; `CheckpointError` for values of another type, `ValueError` for those that no model can have."""
    try:
        return DinoSRConfig(**values)
    except (StrictDataclassError, TypeError) as error:
        raise CheckpointError(f"The checkpoint's configuration cannot be used: {error}") from error


def rename(key: str, table: Mapping[str, str], where: str) -> str:
    """Our name for a weight; `CheckpointError` if the table of patterns has none."""
    if not isinstance(key, str) or len(key) > 200:
        raise CheckpointError(f"The checkpoint has a weight whose name is no name: {where}{str(key)[:80]}.")
    for pattern, name in table.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise CheckpointError(f"The checkpoint has a weight that this model has not: {where}{key}.")


def _split_codebook(name: str) -> tuple[str, int | None]:
    table, _, index = name.rpartition(".")
    return (table, int(index)) if name.startswith("codebooks.") else (name, None)


def _checked(weight: Weight, wanted: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor, float32, if it is one that the model has and of the shape that it has."""
    name, row = _split_codebook(weight.ours)
    target = wanted.get(name)
    if target is None or (row is not None and row >= len(target)):
        raise CheckpointError(
            f"The checkpoint has a weight that a model of its configuration has not: {weight.theirs}."
        )
    shape = tuple(target.shape if row is None else target.shape[1:])
    tensor = weight.tensor
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        seen = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise CheckpointError(f"{weight.theirs} has the shape {seen}, but must have {shape}.")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{weight.theirs} has numbers of type {tensor.dtype}, but must have a floating type.")
    return tensor.float().contiguous()


def build(model_class: type[Model], config: DinoSRConfig, weights: Sequence[Weight]) -> Model:
    """
    A model whose parameters are the file's tensors themselves, where those are float32.

    In `freeze_mode="copied"`, a checkpoint from before the freeze has no copies of convolutions and projection yet;
    they equal the student's.

    Raises:
        CheckpointError: For a missing, unknown, double or misshapen weight, with its name and shapes.
    """
    if max(config.num_hidden_layers, config.num_conv_pos_embeddings, config.num_codebooks) > len(weights):
        raise CheckpointError(
            f"The checkpoint's configuration has {config.num_hidden_layers} layers and"
            f" {config.num_conv_pos_embeddings} positional convolutions, but there are {len(weights)} weights."
        )
    with torch.device("meta"):
        model = model_class(config)
    wanted = model.state_dict()
    state: dict[str, torch.Tensor] = {}
    rows: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for weight in weights:
        tensor = _checked(weight, wanted)
        place = rows if weight.ours.startswith("codebooks.") else state
        if weight.ours in place:
            raise CheckpointError(f"The checkpoint has {weight.theirs} twice, by two names.")
        storage = tensor.untyped_storage().data_ptr()
        # Weights that share memory in the file are apart here, or they could not be saved.
        place[weight.ours] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    for name in wanted:
        if name not in state and re.match(r"teacher\.feature_(extractor|projection)\.", name):
            student = name.replace("teacher.", "dinosr.", 1)
            if student in state:
                state[name] = state[student].clone()
    missing = {name for name in wanted if name not in state and not name.startswith("codebooks.")}
    for table in (name for name in wanted if name.startswith("codebooks.")):
        names = [f"{table}.{i}" for i in range(config.num_codebooks)]
        missing |= {name for name in names if name not in rows}
        if all(name in rows for name in names):
            state[table] = torch.stack([rows[name] for name in names])
    if missing:
        raise CheckpointError(f"The checkpoint lacks the weights for {', '.join(sorted(missing)[:8])}.")
    model.load_state_dict(state, assign=True)
    return model.eval()
