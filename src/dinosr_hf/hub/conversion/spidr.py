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
from ...model.modeling_dinosr import DinoSRForPreTraining
from .checkpoint_file import ConversionError
from .layout import (
    Layout,
    Weight,
    check_has_place,
    convert_settings,
    make_config,
    rename,
    shape_of,
    unstacked_weights,
    unused_entries,
)

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
UNUSED = dict.fromkeys(
    ("optimizer", "scheduler", "scaler", "epoch", "step", "supervised_epoch"), "state of the training run"
)
# Of runs of SpidR-Adapt with labels: one for each language.
CLASSIFIER = re.compile(r"supervised_classifiers\..+")
OBJECTIVES = ("dinosr", "spidr")

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
    "encoder_qkv_bias": "qkv_bias",
    **{name: name for name in ("codebook_size", "codebook_decay", "num_codebooks")},
    "ema_start_decay": "ema_decay",
    "ema_final_decay": "ema_end_decay",
    "ema_final_step": "ema_anneal_steps",
}
# Those that have another meaning with each objective.
OBJECTIVE_FIELDS = {
    "dinosr": {"freeze_step": "freeze_teacher_step"},
    "spidr": {
        "freeze_step": "freeze_front_end_step",
        "ema_timescale": "ema_timescale",
        "ema_threshold": "ema_threshold",
    },
}
# Fields of the configuration that are the same in all models of the SpidR objective.
SPIDR_VALUES: dict[str, Any] = {
    "head_input": "own_layer",
    "ema_schedule": "exponential",
    "teacher_init": "random",
    "attention_init": "xavier",
    "freeze_teacher_step": None,
    "mask_min_spans": 2,
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


def objective_of(state: Mapping[str, Any], settings: Mapping[str, Any] | None) -> str | None:
    """
    Return the objective of a checkpoint, one of `OBJECTIVES`, or None if nothing tells.

    Settings tell by their names. Weights tell if the last norm of the student is as it began: no loss of SpidR's reads
    it, so it is never trained.
    """
    if settings is not None:
        return "spidr" if "ema_timescale" in settings else "dinosr"
    last = _count(state, r"student\.layers\.\d+\.final_layer_norm\.weight") - 1
    weight, bias = (state.get(f"student.layers.{last}.final_layer_norm.{name}") for name in ("weight", "bias"))
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
        return None
    return "spidr" if bool((weight == 1).all()) and bool((bias == 0).all()) else None


def config_from_settings(settings: Mapping[str, Any], objective: str) -> DinoSRConfig:
    """Convert the configuration of a checkpoint, what is under `model` in its config.json."""
    fields = FIELDS | OBJECTIVE_FIELDS[objective]
    if unknown := [name for name in settings if name not in {*fields, *SUPPORTED}]:
        value = str(settings[unknown[0]])[:80]
        raise ConversionError(f"The configuration has an unknown setting: {unknown[0]}={value}.")
    values = SPIDR_VALUES if objective == "spidr" else {}
    return convert_settings(settings, fields, SUPPORTED, **values)


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
    state: Mapping[str, Any], num_attention_heads: int | None, objective: str | None
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
    if objective is None:
        raise ConversionError(
            "The checkpoint does not tell whether it is of DinoSR's objective or of SpidR's. Give its config.json"
            " (--config), or --objective dinosr (dinosr_base_reproduced.pt) or --objective spidr (spidr_base.pt)."
        )
    defaults = DinoSRConfig()
    name = "SpidR" if objective == "spidr" else "DinoSR"
    notes = [
        "strides of the convolutions: 5, 2, 2, 2, 2, 2, 2, the published ones",
        f"attention heads: {num_heads}, " + ("as given" if num_attention_heads else "the published size of 64 each"),
        f"dropouts, decays, masks and freeze step: those published for {name}",
    ]
    num_layers = _count(state, r"student\.layers\.\d+\.attention\.qkv\.weight")
    values = {**SPIDR_VALUES, "freeze_front_end_step": 200_000, "layerdrop": 0.0} if objective == "spidr" else {}
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
        qkv_bias="student.layers.0.attention.qkv.bias" in state,
        codebook_size=_shape(state, "codebooks.0.codebook", 2)[0],
        num_codebooks=_count(state, r"codebooks\.\d+\.codebook"),
        **values,
    )
    return config, notes


def _rename_weights(state: Mapping[str, Any]) -> Iterator[Weight]:
    for key, tensor in state.items():
        if key == "current_step" or CLASSIFIER.fullmatch(str(key)):
            continue
        if ".attention.qkv." not in str(key):
            yield Weight(rename(key, KEYS), key, tensor)
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.dim() or len(tensor) % 3:
            raise ConversionError(f"{key} has shape {shape_of(tensor)}; expected three parts of the same size.")
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield Weight(rename(key.replace("qkv", f"{part}_proj"), KEYS), f"{key} ({part})", rows.clone())


def read_spidr(
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    num_attention_heads: int | None = None,
    objective: str | None = None,
) -> Layout:
    """
    Read a checkpoint of package spidr.

    Args:
        checkpoint: Content of the file.
        settings: Content of its config.json, or what is under `model` there; None: derive the sizes from shapes.
        num_attention_heads: Number of heads if there are no settings; None: heads of the published size, 64.
        objective: One of `OBJECTIVES`; None: what settings or weights tell. Raises `ConversionError` if they tell
            nothing, or the other.
    """
    state = checkpoint.get("model", checkpoint)
    inner = None if settings is None else settings.get("model")
    settings = inner if isinstance(inner, Mapping) else settings
    unused = unused_entries(checkpoint, UNUSED) if "model" in checkpoint else {}
    unused |= {name: "a classifier of labelled frames" for name in state if CLASSIFIER.fullmatch(str(name))}
    found = objective_of(state, settings)
    if objective is not None and found not in (None, objective):
        raise ConversionError(f"The checkpoint is of the objective {found}, not {objective}. Leave --objective out.")
    objective = objective or found
    notes: list[str] = []
    if settings is None:
        config, notes = _config_from_shapes(state, num_attention_heads, objective)
    else:
        assert objective is not None  # settings tell it
        config = config_from_settings(settings, objective)
    step = state.get("current_step")
    if isinstance(step, torch.Tensor) and step.numel() == 1 and bool(step.isfinite().all()):
        config.current_step = int(step)  # to be written back by `to_spidr`
    license = "CC BY-NC 4.0, by spidr's README; CC BY-NC-SA 4.0 for models of VoxPopuli"
    return Layout("spidr", config, list(_rename_weights(state)), unused, license, notes)


def to_spidr(model: DinoSRForPreTraining) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Convert a model to the content of a checkpoint of package spidr, weights under `model`, and of its config.json.

    `read_spidr` restores it bit for bit. Raises `ConversionError` for a model that has no place in that layout: with
    log-mel frames, or an objective that is neither DinoSR's nor SpidR's.
    """
    config = model.config
    objective = "spidr" if config.head_input == "own_layer" else "dinosr"
    needed: dict[str, Any] = {"feature_encoder": "conv", "freeze_mode": "frozen"}
    if objective == "spidr":
        needed |= {"ema_schedule": "exponential", "freeze_teacher_step": None}
    else:
        needed |= {"ema_schedule": "linear", "freeze_front_end_step": None}
    needed |= {"layer_norm_eps": 1e-5, "feat_extract_activation": "gelu", "hidden_act": "gelu"}
    check_has_place(config, "spidr's layout", needed, {"conv_pos_kernel_size": 3})
    fields = FIELDS | OBJECTIVE_FIELDS[objective]
    settings = {theirs: getattr(config, ours) for theirs, ours in fields.items() if ours != "conv_layers"} | SUPPORTED
    layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    settings["extractor_conv_layer_config"] = [list(layer) for layer in layers]
    settings["encoder_pos_conv_kernel"] = config.conv_pos_kernel_size * config.num_conv_pos_embeddings
    names = {ours: theirs for theirs, ours in KEYS.items()}
    state = {"current_step": torch.tensor([getattr(config, "current_step", 0)])}
    weights = unstacked_weights(model)
    for ours, tensor in weights.items():
        if match := re.fullmatch(r"(.+\.attention\.)([qkv])_proj\.(weight|bias)", ours):
            if match[2] == "q":
                parts = [weights[f"{match[1]}{part}_proj.{match[3]}"] for part in "qkv"]
                key = rename(ours, names).replace("q_proj", "qkv")
                state[key] = torch.cat(parts)
        else:
            state[rename(ours, names)] = tensor
    return {"model": state}, {"model": settings}
