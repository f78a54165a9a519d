"""What readers of checkpoints share: they translate names and settings by tables, and `build` makes the model."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ...model.configuration_dinosr import DinoSRConfig
from ...utils.model_folder import check_config_size
from ...utils.text_files import read_json
from .checkpoint_file import ConversionError

Model = TypeVar("Model", bound=PreTrainedModel)

# Parts of the names of settings of the targets, which an encoder does not have.
OBJECTIVE_SETTING = re.compile(r"codebook|ema_|freeze_|average_top_k|discrete|norm_target")
# Stacked tables; the checkpoints have each row as a weight.
STACKED = ("codebooks.sums", "codebooks.counts")


class Weight(NamedTuple):
    """A weight of a checkpoint: its name in our model and in the checkpoint, and what should be a tensor."""

    name: str  # of a table of the stacked codebooks: with its index appended
    source_name: str
    tensor: Any


@dataclass
class Layout:
    """The content of a checkpoint in this package's terms."""

    name: str
    config: DinoSRConfig
    weights: Sequence[Weight]
    unused: dict[str, str]  # all other entries -> the reason why it is not used
    license: str  # what is known of it
    notes: list[str] = field(default_factory=list)  # settings that were assumed or dropped
    architecture: str = "pretraining"  # or "model" (the encoder alone), "ctc"
    vocabulary: dict[str, int] | None = None  # of a recogniser: label -> index

    def encoder_only(self) -> Layout:
        """Return the student's encoder alone; all other weights become unused."""
        prefix = "dinosr."
        dropped = {w.source_name: "not part of the encoder" for w in self.weights if not w.name.startswith(prefix)}
        kept = [w._replace(name=w.name.removeprefix(prefix)) for w in self.weights if w.name.startswith(prefix)]
        unused = {**self.unused, **dropped}
        return dataclasses.replace(self, weights=kept, unused=unused, architecture="model", vocabulary=None)


def read_settings(file: str | os.PathLike) -> dict[str, Any]:
    """Read a configuration in JSON. Raises `ConversionError` if it is not a JSON object."""
    if not Path(file).is_file():
        raise ConversionError(f"{file} is not a file. Give a model's folder, or its configuration in JSON.")
    try:
        check_config_size(Path(file))
        settings = read_json(file)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} is not a configuration in JSON ({error}).") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{file} holds a {type(settings).__name__}; expected a dictionary.")
    return settings


def check_settings(settings: Mapping[str, Any], required: Iterable[str], supported: Mapping[str, Any]) -> None:
    """Raise `ConversionError` if a required setting is missing, or one is not the only supported value."""
    if missing := [name for name in required if name not in settings]:
        raise ConversionError(f"The checkpoint's configuration lacks {', '.join(missing)}.")
    for name, value in supported.items():
        if settings.get(name, value) != value:
            raise ConversionError(
                f"The checkpoint has {name}={settings[name]!r}, which is not supported; expected {value!r}."
            )


def parse_conv_layers(text: str, name: str = "conv_feature_layers") -> list[tuple[int, int, int]]:
    """
    Return the (channels, kernel, stride) of each layer from a Python expression, without evaluating it.

    It consists of lists, added and multiplied by integers: `"[(512,10,5)] + [(512,3,2)] * 4"`. `ConversionError` for
    any other expression, or more than 64 layers; `name` is that of the setting.
    """

    def read(node: ast.expr) -> list[tuple[int, int, int]]:
        match node:
            case ast.List():
                layers = ast.literal_eval(node)
                if all(isinstance(layer, tuple | list) and list(map(type, layer)) == [int] * 3 for layer in layers):
                    return layers
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return read(left) + read(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))):
                layers = read(left)
                if 0 <= len(layers) * times <= 64:  # before multiplying: repeats of repeats fill the memory
                    return layers * times
        raise ValueError

    try:
        layers = read(ast.parse(text.strip(), mode="eval").body) if len(text) <= 1000 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        layers = []
    if not 1 <= len(layers) <= 64:
        raise ConversionError(
            f"{name}={text[:80]!r} is not a list of convolutions. Expected lists of (channels, kernel, stride), joined"
            " by + and repeated by *."
        )
    return layers


def make_config(**values: Any) -> DinoSRConfig:
    """Make a configuration. Raises `ConversionError` if a value is of another type or out of range."""
    try:
        return DinoSRConfig(**values)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConversionError(f"The checkpoint's configuration is not valid: {error}") from error


def convert_settings(
    settings: Mapping[str, Any],
    fields: Mapping[str, str],
    supported: Mapping[str, Any],
    *,
    encoder_only: bool = False,
    **values: Any,
) -> DinoSRConfig:
    """
    Convert settings by tables.

    Args:
        settings: Settings of a checkpoint. Its positional convolutions together have the kernel size of its setting.
        fields: Name of each required setting -> the field of `DinoSRConfig`, or "conv_layers" for the convolutions.
        supported: Name of each setting that changes what the model computes -> the only value that is supported.
        encoder_only: Whether to ignore the settings of the targets.
        **values: Further fields of the configuration, which replace those of the settings.

    Raises:
        ConversionError: If a setting is missing or not supported.
    """
    if encoder_only:
        fields = {name: ours for name, ours in fields.items() if not OBJECTIVE_SETTING.search(name)}
        supported = {name: value for name, value in supported.items() if not OBJECTIVE_SETTING.search(name)}
    check_settings(settings, fields, supported)
    names = {ours: theirs for theirs, ours in fields.items()}
    for name in (names["num_hidden_layers"], names["num_conv_pos_embeddings"], names["conv_pos_kernel_size"]):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ConversionError(f"The checkpoint has {name}={settings[name]!r:.80}; expected a positive number.")
    conv_layers = parse_conv_layers(str(settings[names["conv_layers"]]), names.pop("conv_layers"))
    translated = {ours: settings[theirs] for ours, theirs in names.items()}
    translated.setdefault("num_codebooks", min(DinoSRConfig().num_codebooks, translated["num_hidden_layers"]))
    pos_kernel = max(3, translated["conv_pos_kernel_size"] // translated["num_conv_pos_embeddings"])
    sizes = map(list, zip(*conv_layers, strict=True))
    translated |= dict(zip(("conv_dim", "conv_kernel", "conv_stride"), sizes, strict=True))
    return make_config(**{**translated, "conv_pos_kernel_size": pos_kernel, **values})


def rename(key: str, names: Mapping[str, str], prefix: str = "") -> str:
    """
    Translate the name of a weight by a table of names -> names. A `*` is a part without dots, the same in both.

    `ConversionError` if the table does not have the name; `prefix` stands before it in the message.
    """
    if not isinstance(key, str) or len(key) > 200:
        raise ConversionError(f"The checkpoint has a weight with an invalid name: {prefix}{str(key)[:80]}.")
    for theirs, ours in names.items():
        if match := re.fullmatch(re.escape(theirs).replace(r"\*", r"(\w+)"), key):
            return ours.replace("*", "{}").format(*match.groups())
    raise ConversionError(f"The checkpoint has an unknown weight: {prefix}{key}.")


def unused_entries(checkpoint: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """Return the entries beside the weights, each with the reason from `known` why it is not used."""
    if unknown := [str(name) for name in checkpoint if name != "model" and name not in known]:
        raise ConversionError(f"The checkpoint has unknown entries: {', '.join(unknown)[:300]}.")
    return {name: known[name] for name in checkpoint if name != "model" and checkpoint[name] is not None}


def shape_of(value: Any) -> tuple[int, ...] | str:
    """Return the shape of a tensor, or the name of the type of anything else, for messages."""
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def build(model_class: type[Model], config: DinoSRConfig, weights: Sequence[Weight]) -> Model:
    """
    Build a model in evaluation mode whose parameters are the checkpoint's tensors themselves, where those are float32.

    In `freeze_mode="copied"`, a checkpoint from before the freeze lacks the teacher's convolutions and projection;
    they are copied from the student. `ConversionError` if a weight is missing, unknown, duplicate or of another shape.
    """
    if max(config.num_hidden_layers, config.num_conv_pos_embeddings, config.num_codebooks) > len(weights):
        raise ConversionError(
            f"The checkpoint's configuration has {config.num_hidden_layers} layers and"
            f" {config.num_conv_pos_embeddings} positional convolutions, but there are {len(weights)} weights."
        )
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    stacked = {name: expected.pop(name) for name in STACKED if name in expected}
    expected |= {f"{name}.{i}": row for name, table in stacked.items() for i, row in enumerate(table)}
    state: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, source_name, tensor in weights:
        if name not in expected:
            raise ConversionError(f"A model with the checkpoint's configuration has no weight {source_name}.")
        if name in state:
            raise ConversionError(f"The checkpoint has {source_name} twice, under two names.")
        if (shape := shape_of(tensor)) != (wanted := tuple(expected[name].shape)):
            raise ConversionError(f"{source_name} has shape {shape}; expected {wanted}.")
        if not tensor.is_floating_point():
            raise ConversionError(f"{source_name} has dtype {tensor.dtype}; expected a floating-point type.")
        tensor = tensor.float().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # save_pretrained refuses weights that share memory.
        state[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    for name in expected.keys() - state:
        student = re.sub(r"^teacher(?=\.feature_(extractor|projection)\.)", "dinosr", name)
        if student in state:
            state[name] = state[student].clone()
    if missing := sorted(expected.keys() - state):
        raise ConversionError(f"The checkpoint lacks the weights for {', '.join(missing[:8])}.")
    for name, table in stacked.items():
        state[name] = torch.stack([state.pop(f"{name}.{i}") for i in range(len(table))])
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_has_place(config: DinoSRConfig, layout: str, needed: Mapping[str, Any], least: Mapping[str, int]) -> None:
    """Raise `ConversionError` if a field has not the value, or the least one, that another layout has a place for."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ConversionError(
                f"{name}={getattr(config, name)} has no place in {layout}, where it is at least {value}."
            )
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise ConversionError(
                f"{name}={getattr(config, name)!r} has no place in {layout}. Only models with {name}={value!r} can be"
                " converted back."
            )


def unstacked_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights that other layouts have too, without revival and anchor, each codebook as one of its own."""
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("codebooks.usage", "anchor_head."))
    }
    for name in STACKED:
        weights.update({f"{name}.{i}": row.clone() for i, row in enumerate(weights.pop(name))})
    return weights
