"""The layout of the authors' checkpoints: settings of their configuration and names of their weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..configuration_dinosr import DinoSRConfig
from ..modeling_dinosr import DinoSRForPreTraining


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted; the message says what about it."""


# Our field for each of theirs that means the same.
SAME_MEANING = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
    "encoder_layerdrop": "layerdrop",
    "conv_bias": "conv_bias",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "pos_conv_depth": "num_conv_pos_embeddings",
    "average_top_k_layers": "num_codebooks",
    "codebook_size": "codebook_size",
    "codebook_init_decay": "codebook_decay",
    "codebook_end_decay": "codebook_end_decay",
    "codebook_end_decay_step": "codebook_end_decay_step",
    "ema_decay": "ema_decay",
    "ema_end_decay": "ema_end_decay",
    "ema_anneal_end_step": "ema_anneal_steps",
    "mask_prob": "mask_prob",
    "mask_length": "mask_length",
}

# Settings that change what is computed, with the only value that the model has.
MUST_BE = {
    "extractor_mode": "layer_norm",
    "layer_type": "transformer",
    "layer_norm_first": False,
    "discrete": True,
    "instance_norm_target_layer": True,
    "layer_norm_target_layer": False,
    "batch_norm_target_layer": False,
    "group_norm_target_layer": False,
    "instance_norm_targets": False,
    "layer_norm_targets": False,
    "ema_transformer_only": True,
    "ema_layers_only": True,
    "attn_type": "",
    "pos_enc_type": "abs",
}


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """
    Read the sizes of the convolutions from their Python expression, without evaluating it.

    Args:
        text: Lists of (channels, kernel, stride), added up and multiplied by numbers:
            `"[(512,10,5)] + [(512,3,2)] * 4"`.

    Returns:
        (channels, kernel, stride) of each layer.

    Raises:
        CheckpointError: For any other expression, or more than 64 layers.
    """

    def read(node: ast.expr) -> list[tuple[int, int, int]]:
        match node:
            case ast.List(elts=items):
                return [read_layer(item) for item in items]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return read(left) + read(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))):
                layers = read(left)
                # in front of the product: a few repeats of repeats fill the memory
                if 0 <= len(layers) * times <= 64:
                    return layers * times
        raise ValueError

    def read_layer(node: ast.expr) -> tuple[int, int, int]:
        match node:
            case ast.Tuple(
                elts=[
                    ast.Constant(value=int(channels)),
                    ast.Constant(value=int(kernel)),
                    ast.Constant(value=int(stride)),
                ]
            ):
                return channels, kernel, stride
        raise ValueError

    try:
        layers = read(ast.parse(text.strip(), mode="eval").body) if len(text) <= 1000 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        layers = []
    if not 1 <= len(layers) <= 64:
        raise CheckpointError(
            f"conv_feature_layers={text[:80]!r} is no list of convolutions. It must be lists of (channels, kernel,"
            " stride), joined by + and repeated by *."
        )
    return layers


def config_from_fairseq(checkpoint: Mapping[str, Any]) -> DinoSRConfig:
    """
    Derive the whole configuration from the `cfg` of an authors' checkpoint.

    Raises:
        CheckpointError: If there is none, it is another model's, or it has a setting that the model has not.
    """
    cfg = checkpoint.get("cfg")
    settings = cfg.get("model") if isinstance(cfg, Mapping) else None
    if not isinstance(settings, Mapping) or settings.get("_name") != "dinosr":
        raise CheckpointError(
            "The checkpoint has no configuration of a DinoSR model as a plain dictionary under cfg.model."
            f" It has these entries: {', '.join(sorted(map(str, checkpoint)))[:300] or 'none'}."
        )
    missing = [name for name in (*SAME_MEANING, "conv_feature_layers", "conv_pos") if name not in settings]
    if missing:
        raise CheckpointError(f"The checkpoint's configuration lacks {', '.join(missing)}.")
    for name, wanted in MUST_BE.items():
        if settings.get(name, wanted) != wanted:
            raise CheckpointError(
                f"The checkpoint was made with {name}={settings[name]!r}, which this model has not: it has {wanted!r}."
            )
    if settings["pos_conv_depth"] < 2:
        raise CheckpointError(
            f"The checkpoint was made with pos_conv_depth={settings['pos_conv_depth']}, a single convolution with"
            " weight norm, which this model has not: it has stacked convolutions, at least 2."
        )
    conv_layers = parse_conv_layers(str(settings["conv_feature_layers"]))
    values = {ours: settings[theirs] for theirs, ours in SAME_MEANING.items()}
    if values["codebook_end_decay"] == values["codebook_decay"]:
        values.update(codebook_end_decay=None, codebook_end_decay_step=0)
    freeze_step = settings.get("freeze_teacher_step", -1)
    return DinoSRConfig(
        conv_dim=[channels for channels, _, _ in conv_layers],
        conv_kernel=[kernel for _, kernel, _ in conv_layers],
        conv_stride=[stride for _, _, stride in conv_layers],
        conv_pos_kernel_size=max(3, settings["conv_pos"] // settings["pos_conv_depth"]),
        freeze_teacher_step=None if freeze_step == -1 else freeze_step,
        freeze_mode="frozen" if settings.get("freeze_pre_enc_modules", True) else "copied",
        **values,
    )


# Their names, as patterns, and ours. `encoder.` appears in the student's names and not in the teacher's.
ENCODER_KEYS = {
    r"pos_conv\.(\d+)\.0\.(weight|bias)": r"pos_conv_embed.layers.\1.conv.\2",
    r"layer_norm\.(weight|bias)": r"layer_norm.\1",
    r"layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(weight|bias)": r"layers.\1.attention.\2_proj.\3",
    r"layers\.(\d+)\.self_attn_layer_norm\.(weight|bias)": r"layers.\1.layer_norm.\2",
    r"layers\.(\d+)\.fc1\.(weight|bias)": r"layers.\1.feed_forward.intermediate_dense.\2",
    r"layers\.(\d+)\.fc2\.(weight|bias)": r"layers.\1.feed_forward.output_dense.\2",
    r"layers\.(\d+)\.final_layer_norm\.(weight|bias)": r"layers.\1.final_layer_norm.\2",
}
CONV_KEYS = {
    r"conv_layers\.(\d+)\.0\.(weight|bias)": r"conv_layers.\1.conv.\2",
    r"conv_layers\.(\d+)\.2\.1\.(weight|bias)": r"conv_layers.\1.layer_norm.\2",
}
STUDENT_KEYS = {
    r"mask_emb": r"dinosr.masked_spec_embed",
    **{rf"feature_extractor\.{theirs}": rf"dinosr.feature_extractor.{ours}" for theirs, ours in CONV_KEYS.items()},
    r"layer_norm\.(weight|bias)": r"dinosr.feature_projection.layer_norm.\1",
    r"post_extract_proj\.(weight|bias)": r"dinosr.feature_projection.projection.\1",
    **{rf"encoder\.{theirs}": rf"dinosr.encoder.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    r"heads\.(\d+)\.(weight|bias)": r"heads.\1.\2",
    r"_codebook(\d+)": r"codebooks.sums.\1",
    r"_codebook_cnts(\d+)": r"codebooks.counts.\1",
}
# Entries of the state that are dictionaries of tensors themselves.
NESTED_KEYS: dict[str, dict[str, str]] = {
    "_ema": {theirs: rf"teacher.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    "_pre_encoder_cnn": {theirs: rf"teacher.feature_extractor.{ours}" for theirs, ours in CONV_KEYS.items()},
    "_pre_encoder_ln": {r"(weight|bias)": r"teacher.feature_projection.layer_norm.\1"},
    "_pre_encoder_proj": {r"(weight|bias)": r"teacher.feature_projection.projection.\1"},
}


def _rename(key: str, table: Mapping[str, str], where: str) -> str:
    for pattern, name in table.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise CheckpointError(f"The checkpoint has a weight that this model has not: {where}{key}.")


def _renamed(state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Our name, their name and the tensor of every weight."""
    for key, value in state.items():
        if key in NESTED_KEYS:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"The checkpoint's {key} must be a dictionary, but is {type(value).__name__}.")
            for inner, tensor in value.items():
                yield _rename(inner, NESTED_KEYS[key], f"{key}."), f"{key}.{inner}", tensor
        else:
            yield _rename(key, STUDENT_KEYS, ""), key, value


def state_dict_from_fairseq(checkpoint: Mapping[str, Any], model: DinoSRForPreTraining) -> dict[str, torch.Tensor]:
    """
    Rename the weights of an authors' checkpoint.

    Args:
        checkpoint: The file's content.
        model: A model of the checkpoint's configuration: it says which names and shapes are wanted.

    Returns:
        A state dict of `model`, complete. In `freeze_mode="copied"`, a checkpoint from before the freeze has no copies
        of convolutions and projection yet; they equal the student's.

    Raises:
        CheckpointError: For a missing, unknown or misshapen weight, with its name and shapes.
    """
    state = checkpoint.get("model")
    if not isinstance(state, Mapping):
        raise CheckpointError("The checkpoint has no weights under model.")
    # One table of all codebooks is several tensors in the file: these take them in.
    wanted = {name: torch.empty_like(tensor) for name, tensor in model.state_dict().items()}
    missing = {f"codebooks.{kind}.{i}" for kind in ("sums", "counts") for i in range(model.config.num_codebooks)}
    missing |= {name for name in wanted if not name.startswith("codebooks.")}
    for name, source, tensor in _renamed(state):
        target = _codebook_row(wanted, name) if name.startswith("codebooks.") else wanted.get(name)
        if target is None:
            raise CheckpointError(f"The checkpoint has a weight that a model of its configuration has not: {source}.")
        if not isinstance(tensor, torch.Tensor) or tensor.shape != target.shape:
            seen = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{source} has the shape {seen}, but must have {tuple(target.shape)}.")
        target.copy_(tensor)
        missing.discard(name)
    for name in sorted(missing):
        if re.match(r"teacher\.feature_(extractor|projection)\.", name):
            wanted[name].copy_(wanted[name.replace("teacher.", "dinosr.", 1)])
            missing.discard(name)
    if missing:
        raise CheckpointError(f"The checkpoint lacks the weights for {', '.join(sorted(missing)[:8])}.")
    return wanted


def _codebook_row(wanted: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    table, _, index = name.rpartition(".")
    return wanted[table][int(index)] if int(index) < len(wanted[table]) else None
