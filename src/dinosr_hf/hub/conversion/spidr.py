"""
The layout of package spidr's checkpoints, known from a file and from what is published of it; its code was not read.

Queries, keys and values of attention are one matrix there, in this order. Licence of its weights: CC BY-NC 4.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...model.configuration_dinosr import DinoSRConfig
from .checkpoint_file import CheckpointError
from .layout import Layout, Weight, make_config, rename

ENCODER_KEYS = {
    r"pos_conv_embed\.convs\.(\d+)\.(weight|bias)": r"pos_conv_embed.layers.\1.conv.\2",
    r"layer_norm\.(weight|bias)": r"layer_norm.\1",
    r"layers\.(\d+)\.attention\.proj\.(weight|bias)": r"layers.\1.attention.out_proj.\2",
    r"layers\.(\d+)\.(layer_norm|final_layer_norm)\.(weight|bias)": r"layers.\1.\2.\3",
    r"layers\.(\d+)\.feed_forward\.(intermediate|output)_dense\.(weight|bias)": r"layers.\1.feed_forward.\2_dense.\3",
}
KEYS = {
    r"mask_embedding": r"dinosr.masked_spec_embed",
    r"feature_extractor\.conv_layers\.(\d+)\.(conv|layer_norm)\.(weight|bias)": (
        r"dinosr.feature_extractor.conv_layers.\1.\2.\3"
    ),
    r"feature_projection\.(layer_norm|projection)\.(weight|bias)": r"dinosr.feature_projection.\1.\2",
    **{rf"student\.{theirs}": rf"dinosr.encoder.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    **{rf"teacher\.{theirs}": rf"teacher.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    r"heads\.(\d+)\.0\.(weight|bias)": r"heads.\1.\2",
    r"codebooks\.(\d+)\.codebook": r"codebooks.sums.\1",
    r"codebooks\.(\d+)\.counts": r"codebooks.counts.\1",
}
QKV = r"(student|teacher)\.layers\.(\d+)\.attention\.qkv\.(weight|bias)"
LEFT = {
    "current_step": "the number of updates, of the training run",
    "optimizer": "of the training run",
    "scheduler": "of the training run",
    "scaler": "of the training run",
    "epoch": "of the training run",
    "step": "of the training run",
}
SAME_MEANING = {
    "extractor_conv_bias": "conv_bias",
    "encoder_embed_dim": "hidden_size",
    "encoder_projection_dropout": "feat_proj_dropout",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_pos_conv_depth": "num_conv_pos_embeddings",
    "encoder_num_layers": "num_hidden_layers",
    "encoder_num_heads": "num_attention_heads",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_features": "intermediate_size",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_drop": "layerdrop",
    "codebook_size": "codebook_size",
    "codebook_decay": "codebook_decay",
    "num_codebooks": "num_codebooks",
    "ema_start_decay": "ema_decay",
    "ema_final_decay": "ema_end_decay",
    "ema_final_step": "ema_anneal_steps",
    "freeze_step": "freeze_teacher_step",
}
# Of the objective, which an encoder alone has no use for.
OF_THE_OBJECTIVE = re.compile(r"codebook|ema_|freeze_step")
MUST_BE = {
    "extractor_mode": "layer_norm",
    "encoder_layer_norm_first": False,
    "ema_exclude_layers": ["pos_conv_embed"],
}
ELSEWHERE = ("extractor_conv_layer_config", "encoder_pos_conv_kernel", "encoder_qkv_bias")
PUBLISHED_KERNELS = (10, 3, 3, 3, 3, 2, 2)
HEAD_WIDTH = 64


def is_spidr(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a file has this layout, by the names of its weights."""
    state = checkpoint.get("model", checkpoint)
    return isinstance(state, Mapping) and "mask_embedding" in state and "student.layer_norm.weight" in state


def _config_from_settings(settings: Mapping[str, Any], encoder_only: bool) -> DinoSRConfig:
    names = {k: v for k, v in SAME_MEANING.items() if not (encoder_only and OF_THE_OBJECTIVE.search(k))}
    must_be = {k: v for k, v in MUST_BE.items() if not (encoder_only and OF_THE_OBJECTIVE.search(k))}
    for name, value in settings.items():
        known = name in {*names, *must_be, *ELSEWHERE} or (encoder_only and OF_THE_OBJECTIVE.search(name))
        if not known:
            raise CheckpointError(
                f"The configuration has {name}={str(value)[:80]}, which is not known. For a checkpoint of the SpidR"
                " objective, give --objective spidr, which converts its encoder."
            )
        if name in must_be and value != must_be[name]:
            raise CheckpointError(
                f"The checkpoint was made with {name}={value!r}, which this model has not: it has {must_be[name]!r}."
            )
    missing = [name for name in (*names, *ELSEWHERE[:2]) if name not in settings]
    if missing:
        raise CheckpointError(f"The configuration lacks {', '.join(missing)}.")
    layers = settings["extractor_conv_layer_config"]
    if not isinstance(layers, list) or not all(isinstance(layer, list) and len(layer) == 3 for layer in layers):
        raise CheckpointError(
            f"extractor_conv_layer_config={str(layers)[:80]} must be a list of [channels, kernel, stride] a layer."
        )
    channels, kernels, strides = ([layer[i] for layer in layers] for i in range(3))
    for name in ("encoder_pos_conv_kernel", "encoder_pos_conv_depth", "encoder_num_layers"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise CheckpointError(f"The configuration has {name}={str(settings[name])[:80]}, which is no count.")
    values = {ours: settings[theirs] for theirs, ours in names.items()}
    values.setdefault("num_codebooks", min(DinoSRConfig().num_codebooks, values["num_hidden_layers"]))
    return make_config(
        conv_dim=channels,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_pos_kernel_size=max(3, settings["encoder_pos_conv_kernel"] // settings["encoder_pos_conv_depth"]),
        **values,
    )


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for key in state if (match := re.fullmatch(pattern, str(key)))})


def _shape(state: Mapping[str, Any], key: str, num_dims: int) -> tuple[int, ...]:
    tensor = state.get(key)
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"The checkpoint lacks {key}, whose shape the configuration is derived from.")
    if tensor.dim() != num_dims:
        raise CheckpointError(f"{key} has the shape {tuple(tensor.shape)}, but must have {num_dims} dimensions.")
    return tuple(tensor.shape)


def _config_from_shapes(
    state: Mapping[str, Any], num_attention_heads: int | None, encoder_only: bool
) -> tuple[DinoSRConfig, list[str]]:
    """Sizes are in the shapes; strides and heads are not."""
    num_convs = _count(state, r"feature_extractor\.conv_layers\.(\d+)\.conv\.weight")
    convs = [_shape(state, f"feature_extractor.conv_layers.{i}.conv.weight", 3) for i in range(num_convs)]
    hidden, per_group, pos_kernel = _shape(state, "student.pos_conv_embed.convs.0.weight", 3)
    if tuple(kernel for *_, kernel in convs) != PUBLISHED_KERNELS:
        raise CheckpointError(
            f"The convolutions have kernels {[kernel for *_, kernel in convs]}, not the published"
            f" {list(PUBLISHED_KERNELS)}, and shapes do not tell their strides. Give its config.json (--config)."
        )
    if num_attention_heads is None and hidden % HEAD_WIDTH:
        raise CheckpointError(
            f"Shapes do not tell the number of attention heads, and {hidden} channels are no multiple of"
            f" {HEAD_WIDTH}, the published width of a head. Give its config.json (--config) or --num_attention_heads."
        )
    heads = num_attention_heads or hidden // HEAD_WIDTH
    defaults = DinoSRConfig()
    notes = [
        "strides of the convolutions: 5, 2, 2, 2, 2, 2, 2, the published ones",
        f"attention heads: {heads}, " + ("as given" if num_attention_heads else "the published width of 64 each"),
        "dropouts, decays, masks and freeze step: this package's defaults, which are the paper's",
    ]
    num_layers = _count(state, r"student\.layers\.(\d+)\.attention\.qkv\.weight")
    objective: dict[str, Any] = {"num_codebooks": min(defaults.num_codebooks, num_layers)}
    if not encoder_only:
        size, _ = _shape(state, "codebooks.0.codebook", 2)
        objective = {"codebook_size": size, "num_codebooks": _count(state, r"codebooks\.(\d+)\.codebook")}
    config = make_config(
        conv_dim=[shape[0] for shape in convs],
        conv_kernel=[shape[2] for shape in convs],
        conv_stride=list(defaults.conv_stride),
        conv_bias="feature_extractor.conv_layers.0.conv.bias" in state,
        hidden_size=hidden,
        intermediate_size=_shape(state, "student.layers.0.feed_forward.intermediate_dense.weight", 2)[0],
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_conv_pos_embeddings=_count(state, r"student\.pos_conv_embed\.convs\.(\d+)\.weight"),
        conv_pos_kernel_size=pos_kernel,
        num_conv_pos_embedding_groups=hidden // max(1, per_group),
        **objective,
    )
    return config, notes


def _weights(state: Mapping[str, Any]) -> Iterator[Weight]:
    for key, tensor in state.items():
        if key in LEFT:
            continue
        match = re.fullmatch(QKV, str(key))
        if match is None:
            yield Weight(rename(key, KEYS, ""), key, tensor)
            continue
        side, layer, kind = match.groups()
        prefix = f"{'dinosr.encoder' if side == 'student' else 'teacher'}.layers.{layer}.attention"
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != (2 if kind == "weight" else 1) or len(tensor) % 3:
            seen = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"{key} has the shape {seen}, but must have three parts of the same size.")
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield Weight(f"{prefix}.{part}_proj.{kind}", f"{key} ({part})", rows.clone())
            if kind == "weight" and key.replace("weight", "bias") not in state:
                yield Weight(f"{prefix}.{part}_proj.bias", f"{key} ({part}, no bias)", tensor.new_zeros(len(rows)))


def read_spidr(
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    *,
    num_attention_heads: int | None = None,
    objective: str = "dinosr",
) -> Layout:
    """
    A checkpoint of package spidr.

    Args:
        checkpoint: The file's content.
        settings: Of its config.json, as a whole or what is under `model`; None: sizes from shapes.
        num_attention_heads: Where there are no settings; None: heads of the published width, 64.
        objective: "dinosr", or "spidr": then the encoder alone, since the heads read other layers than DinoSR's. The
            file itself does not tell which it is.

    Raises:
        CheckpointError: For settings and weights that are not known or missing, and for what shapes cannot tell.
    """
    encoder_only = objective == "spidr"
    state = checkpoint.get("model", checkpoint)
    beside = [str(name) for name in checkpoint if name != "model"] if "model" in checkpoint else []
    if unknown := [name for name in beside if name not in LEFT]:
        raise CheckpointError(f"The checkpoint has entries that are not known: {', '.join(unknown)[:300]}.")
    left = {name: LEFT[name] for name in (*beside, *state) if name in LEFT}
    notes: list[str] = []
    if settings is None:
        config, notes = _config_from_shapes(state, num_attention_heads, encoder_only)
    else:
        config = _config_from_settings(settings.get("model", settings), encoder_only)
    layout = Layout("spidr", config, list(_weights(state)), left, notes, licence="CC BY-NC 4.0, by spidr's README")
    return layout.encoder_alone() if encoder_only else layout
