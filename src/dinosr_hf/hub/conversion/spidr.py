"""
Read checkpoints of package spidr, whose layout is known from a file and from what is published; its code was not read.

Queries, keys and values of attention are one matrix there, in this order. Licence of its weights: CC BY-NC 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...model.configuration_dinosr import DinoSRConfig
from .checkpoint_file import ConversionError
from .layout import OBJECTIVE_SETTING, Layout, Weight, convert_settings, make_config, rename, shape_of, unused_entries

# Their names of weights -> ours. The fused matrix is split into `q_proj`, `k_proj` and `v_proj` before.
ENCODER_KEYS = {
    "pos_conv_embed.convs.*.*": "pos_conv_embed.layers.*.conv.*",
    "layer_norm.*": "layer_norm.*",
    "layers.*.attention.proj.*": "layers.*.attention.out_proj.*",
    "layers.*.attention.*_proj.*": "layers.*.attention.*_proj.*",
    "layers.*.layer_norm.*": "layers.*.layer_norm.*",
    "layers.*.final_layer_norm.*": "layers.*.final_layer_norm.*",
    "layers.*.feed_forward.*.*": "layers.*.feed_forward.*.*",
}
KEYS = {
    "mask_embedding": "dinosr.masked_spec_embed",
    "feature_extractor.conv_layers.*.*.*": "dinosr.feature_extractor.conv_layers.*.*.*",
    "feature_projection.*.*": "dinosr.feature_projection.*.*",
    **{f"student.{theirs}": f"dinosr.encoder.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    **{f"teacher.{theirs}": f"teacher.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    "heads.*.0.*": "heads.*.*",
    "codebooks.*.codebook": "codebooks.sums.*",
    "codebooks.*.counts": "codebooks.counts.*",
}
UNUSED = {
    "current_step": "the number of updates of the training run",
    **dict.fromkeys(("optimizer", "scheduler", "scaler", "epoch", "step"), "state of the training run"),
}

# Their setting -> the field of `DinoSRConfig` with the same meaning.
FIELDS = {
    "extractor_conv_layer_config": "conv_layers",
    "extractor_conv_bias": "conv_bias",
    "encoder_embed_dim": "hidden_size",
    "encoder_projection_dropout": "feat_proj_dropout",
    "encoder_pos_conv_kernel": "conv_pos_kernel_size",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_pos_conv_depth": "num_conv_pos_embeddings",
    "encoder_num_layers": "num_hidden_layers",
    "encoder_num_heads": "num_attention_heads",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_features": "intermediate_size",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_drop": "layerdrop",
    **{name: name for name in ("codebook_size", "codebook_decay", "num_codebooks")},
    "ema_start_decay": "ema_decay",
    "ema_final_decay": "ema_end_decay",
    "ema_final_step": "ema_anneal_steps",
    "freeze_step": "freeze_teacher_step",
}
# Settings that change what the model computes -> the only value that is supported.
SUPPORTED = {
    "extractor_mode": "layer_norm",
    "encoder_layer_norm_first": False,
    "ema_exclude_layers": ["pos_conv_embed"],
}
PUBLISHED_KERNELS = [10, 3, 3, 3, 3, 2, 2]
PUBLISHED_HEAD_SIZE = 64


def is_spidr(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has this layout, judging by the names of its weights."""
    state = checkpoint.get("model", checkpoint)
    return isinstance(state, Mapping) and "mask_embedding" in state and "student.layer_norm.weight" in state


def _config_from_settings(settings: Mapping[str, Any], encoder_only: bool) -> DinoSRConfig:
    unknown = [name for name in settings if name not in {*FIELDS, *SUPPORTED, "encoder_qkv_bias"}]
    if encoder_only:
        unknown = [name for name in unknown if not OBJECTIVE_SETTING.search(name)]
    if unknown:
        raise ConversionError(
            f"The configuration has an unknown setting: {unknown[0]}={str(settings[unknown[0]])[:80]}. For a"
            " checkpoint of the SpidR objective, give --objective spidr, which converts its encoder."
        )
    return convert_settings(settings, FIELDS, SUPPORTED, encoder_only=encoder_only)


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return sum(re.fullmatch(pattern, str(key)) is not None for key in state)


def _shape(state: Mapping[str, Any], key: str, num_dims: int) -> tuple[int, ...]:
    if key not in state:
        raise ConversionError(f"The checkpoint lacks {key}, whose shape the configuration is derived from.")
    shape = shape_of(state[key])
    if isinstance(shape, str) or len(shape) != num_dims:
        raise ConversionError(f"{key} has shape {shape}; expected {num_dims} dimensions.")
    return shape


def _config_from_shapes(
    state: Mapping[str, Any], num_attention_heads: int | None, encoder_only: bool
) -> tuple[DinoSRConfig, list[str]]:
    """Derive the sizes from shapes, which do not tell strides and heads; return the assumptions as well."""
    num_convs = _count(state, r"feature_extractor\.conv_layers\.\d+\.conv\.weight")
    convs = [_shape(state, f"feature_extractor.conv_layers.{i}.conv.weight", 3) for i in range(num_convs)]
    hidden_size, group_size, pos_kernel = _shape(state, "student.pos_conv_embed.convs.0.weight", 3)
    if (kernels := [kernel for *_, kernel in convs]) != PUBLISHED_KERNELS:
        raise ConversionError(
            f"The convolutions have kernels {kernels}, not the published {PUBLISHED_KERNELS}, and shapes do not tell"
            " their strides. Give its config.json (--config)."
        )
    if num_attention_heads is None and hidden_size % PUBLISHED_HEAD_SIZE:
        raise ConversionError(
            f"Shapes do not tell the number of attention heads, and hidden_size={hidden_size} is not a multiple of"
            f" {PUBLISHED_HEAD_SIZE}, the published size of a head. Give its config.json (--config) or"
            " --num_attention_heads."
        )
    num_heads = num_attention_heads or hidden_size // PUBLISHED_HEAD_SIZE
    defaults = DinoSRConfig()
    notes = [
        "strides of the convolutions: 5, 2, 2, 2, 2, 2, 2, the published ones",
        f"attention heads: {num_heads}, " + ("as given" if num_attention_heads else "the published size of 64 each"),
        "dropouts, decays, masks and freeze step: this package's defaults, which are the paper's",
    ]
    num_layers = _count(state, r"student\.layers\.\d+\.attention\.qkv\.weight")
    objective = {"num_codebooks": min(defaults.num_codebooks, num_layers)}
    if not encoder_only:
        codebook_size, _ = _shape(state, "codebooks.0.codebook", 2)
        objective = {"codebook_size": codebook_size, "num_codebooks": _count(state, r"codebooks\.\d+\.codebook")}
    config = make_config(
        conv_dim=[channels for channels, *_ in convs],
        conv_kernel=kernels,
        conv_stride=list(defaults.conv_stride),
        conv_bias="feature_extractor.conv_layers.0.conv.bias" in state,
        hidden_size=hidden_size,
        intermediate_size=_shape(state, "student.layers.0.feed_forward.intermediate_dense.weight", 2)[0],
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_conv_pos_embeddings=_count(state, r"student\.pos_conv_embed\.convs\.\d+\.weight"),
        conv_pos_kernel_size=pos_kernel,
        num_conv_pos_embedding_groups=hidden_size // max(1, group_size),
        **objective,
    )
    return config, notes


def _rename_weights(state: Mapping[str, Any]) -> Iterator[Weight]:
    for key, tensor in state.items():
        if key in UNUSED:
            continue
        if ".attention.qkv." not in str(key):
            yield Weight(rename(key, KEYS), key, tensor)
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.dim() or len(tensor) % 3:
            raise ConversionError(f"{key} has shape {shape_of(tensor)}; expected three parts of the same size.")
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            name = rename(key.replace("qkv", f"{part}_proj"), KEYS)
            yield Weight(name, f"{key} ({part})", rows.clone())
            if key.replace("weight", "bias") not in state:
                yield Weight(name.replace("weight", "bias"), f"{key} ({part}, no bias)", tensor.new_zeros(len(rows)))


def read_spidr(
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    num_attention_heads: int | None = None,
    *,
    encoder_only: bool = False,
) -> Layout:
    """
    Read a checkpoint of package spidr.

    Args:
        checkpoint: Content of the file.
        settings: Content of its config.json, or what is under `model` there; None: derive the sizes from shapes.
        num_attention_heads: Number of heads if there are no settings; None: heads of the published size, 64.
        encoder_only: Whether it has the SpidR objective, which the file does not tell. Its heads read other layers
            than DinoSR's, so the encoder alone is read.
    """
    state = checkpoint.get("model", checkpoint)
    unused = unused_entries(checkpoint, UNUSED) if "model" in checkpoint else {}
    unused |= {name: UNUSED[name] for name in state if name in UNUSED}
    notes: list[str] = []
    if settings is None:
        config, notes = _config_from_shapes(state, num_attention_heads, encoder_only)
    else:
        config = _config_from_settings(settings.get("model", settings), encoder_only)
    weights = list(_rename_weights(state))
    layout = Layout("spidr", config, weights, unused, "CC BY-NC 4.0, by spidr's README", notes)
    return layout.encoder_only() if encoder_only else layout
