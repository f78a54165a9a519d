"""The layout of the authors' checkpoints, both ways: settings of their configuration and names of their weights."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...model.configuration_dinosr import DinoSRConfig
from ...model.modeling_dinosr import DinoSRForPreTraining
from .checkpoint_file import CheckpointError
from .layout import Layout, Weight, make_config, rename

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
    "crop_seq_to_multiple": 1,
}

# Settings of training that this package does not have, and the value at which they do nothing. Outputs do not depend
# on them.
OF_TRAINING = {
    "dropout_features": 0.0,
    "feature_grad_mult": 1.0,
    "mask_selection": "static",
    "mask_other": 0.0,
    "mask_dropout": 0.0,
    "no_mask_overlap": False,
    "mask_channel_prob": 0.0,
    "loss_beta": 0.0,
    "loss_scale": None,
}

# Settings that say how and not what is computed, that matter only beside others, or that are of other models: the
# authors' configuration has them all.
WITHOUT_EFFECT = (
    *("_name", "final_dim", "logit_temp", "quantize_targets", "quantize_input", "same_quantizer", "target_glu"),
    *("quantizer_depth", "quantizer_factor", "latent_vars", "latent_groups", "latent_dim", "latent_temp"),
    *("mask_min_space", "require_same_masks", "mask_channel_length", "mask_channel_before", "mask_channel_selection"),
    *("mask_channel_other", "no_mask_channel_overlap", "mask_channel_min_space", "num_negatives"),
    *("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "max_positions"),
    *("checkpoint_activations", "required_seq_len_multiple", "depthwise_conv_kernel_size", "fp16"),
    *("normal_init_codebook", "max_update", "min_target_var", "min_pred_var"),
)
# Read by `config_from_settings` itself.
READ = ("conv_feature_layers", "conv_pos", "freeze_teacher_step", "freeze_pre_enc_modules")


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


def model_settings(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """
    The settings of the model in a fairseq checkpoint, with its name as `_name`; None if there are none.

    They stand under `cfg.model`, or among all others in the old flat `args`.
    """
    cfg, args = checkpoint.get("cfg"), checkpoint.get("args")
    if isinstance(cfg, Mapping):
        settings = cfg.get("model")
        return settings if isinstance(settings, Mapping) else None
    return {**args, "_name": args.get("arch")} if isinstance(args, Mapping) else None


def settings_notes(checkpoint: Mapping[str, Any]) -> list[str]:
    """What is said of the settings of a fairseq checkpoint that our configuration does not take over."""
    settings = model_settings(checkpoint) or {}
    notes = [
        f"{name}: {settings[name]!r} in the file, a setting of training that this package does not have"
        for name, usual in OF_TRAINING.items()
        if settings.get(name, usual) != usual
    ]
    if isinstance(checkpoint.get("cfg"), Mapping):
        known = {*SAME_MEANING, *MUST_BE, *OF_TRAINING, *WITHOUT_EFFECT, *READ}
        unknown = sorted(str(name)[:80] for name in settings if name not in known)
        notes += [f"{name}: a setting that is not known, left" for name in unknown[:20]]
    elif "ema_decay" in settings:
        notes.append(
            f"ema_decay: {settings['ema_decay']!r}, which in a flat list of settings may be fairseq's own and not the"
            " model's; matters only if pre-training goes on"
        )
    return notes


def _check_settings(settings: Mapping[str, Any], names: Mapping[str, str]) -> None:
    missing = [name for name in (*names, "conv_feature_layers", "conv_pos") if name not in settings]
    if missing:
        raise CheckpointError(f"The checkpoint's configuration lacks {', '.join(missing)}.")
    for name, wanted in MUST_BE.items():
        if settings.get(name, wanted) != wanted:
            raise CheckpointError(
                f"The checkpoint was made with {name}={settings[name]!r}, which this model has not: it has {wanted!r}."
            )
    for name in (*names, "conv_pos"):
        if not isinstance(settings[name], str if name == "activation_fn" else int | float):
            raise CheckpointError(f"The checkpoint was made with {name}={settings[name]!r}, which is no number.")
    if settings["pos_conv_depth"] < 2:
        raise CheckpointError(
            f"The checkpoint was made with pos_conv_depth={settings['pos_conv_depth']}, a single convolution with"
            " weight norm, which this model has not: it has stacked convolutions, at least 2."
        )


def config_from_settings(settings: Mapping[str, Any], names: Mapping[str, str] = SAME_MEANING) -> DinoSRConfig:
    """
    Derive a configuration from the settings of the authors' model.

    Args:
        settings: As `model_settings` gives them.
        names: Our field for each of theirs that must be there.

    Raises:
        CheckpointError: If one is missing, or is something that the model has not.
    """
    _check_settings(settings, names)
    conv_layers = parse_conv_layers(str(settings["conv_feature_layers"]))
    values = {ours: settings[theirs] for theirs, ours in names.items()}
    values.setdefault("num_codebooks", min(DinoSRConfig().num_codebooks, values["num_hidden_layers"]))
    if values.get("codebook_end_decay", 0) == values.get("codebook_decay"):
        values.update(codebook_end_decay=None, codebook_end_decay_step=0)
    freeze_step, stops_front_end = (
        settings.get("freeze_teacher_step", -1),
        settings.get("freeze_pre_enc_modules", True),
    )
    if not isinstance(stops_front_end, bool):
        raise CheckpointError(
            f"The checkpoint was made with freeze_pre_enc_modules={stops_front_end!r}, no true or false."
        )
    return make_config(
        conv_dim=[channels for channels, _, _ in conv_layers],
        conv_kernel=[kernel for _, kernel, _ in conv_layers],
        conv_stride=[stride for _, _, stride in conv_layers],
        conv_pos_kernel_size=max(3, settings["conv_pos"] // settings["pos_conv_depth"]),
        freeze_teacher_step=None if freeze_step == -1 else freeze_step,
        freeze_mode="frozen" if stops_front_end else "copied",
        **values,
    )


def config_from_fairseq(checkpoint: Mapping[str, Any]) -> DinoSRConfig:
    """
    Derive the whole configuration from an authors' checkpoint.

    Raises:
        CheckpointError: If there is none, it is another model's, or it has a setting that the model has not.
    """
    settings = model_settings(checkpoint)
    if settings is None or settings.get("_name") != "dinosr":
        raise CheckpointError(
            "The checkpoint has no configuration of a DinoSR model under cfg.model or args."
            f" It has these entries: {', '.join(sorted(map(str, checkpoint)))[:300] or 'none'}."
        )
    return config_from_settings(settings)


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


# Entries of the file beside the weights, and why they are left.
LEFT = {
    "args": "settings; those of the model are in config.json",
    "cfg": "settings; those of the model are in config.json",
    "criterion": "the loss, which has no weights",
    "optimizer_history": "of the training run",
    "task_state": "of the training run",
    "extra_state": "of the training run",
    "last_optimizer_state": "the optimizer's moments, of the training run",
    "best_loss": "of the training run",
}


def weights_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry `model`. Raises `CheckpointError` if there is none."""
    state = checkpoint.get("model")
    if not isinstance(state, Mapping):
        raise CheckpointError("The checkpoint has no weights under model.")
    return state


def left_of(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the weights, and why it is left. Raises `CheckpointError` for what is not known."""
    if unknown := [str(name) for name in checkpoint if name != "model" and name not in LEFT]:
        raise CheckpointError(f"The checkpoint has entries that are not known: {', '.join(unknown)[:300]}.")
    return {name: LEFT[name] for name in checkpoint if name != "model" and checkpoint[name] is not None}


def renamed(state: Mapping[str, Any]) -> Iterator[Weight]:
    """Every weight by our name."""
    for key, value in state.items():
        if key in NESTED_KEYS:
            if not isinstance(value, Mapping):
                raise CheckpointError(f"The checkpoint's {key} must be a dictionary, but is {type(value).__name__}.")
            for inner, tensor in value.items():
                yield Weight(rename(inner, NESTED_KEYS[key], f"{key}."), f"{key}.{inner}", tensor)
        else:
            yield Weight(rename(key, STUDENT_KEYS, ""), key, value)


def read_fairseq(checkpoint: Mapping[str, Any]) -> Layout:
    """
    An authors' pre-training checkpoint: student, teacher (of the last forward pass, D3), codebooks and heads.

    Raises:
        CheckpointError: As `config_from_fairseq`, and if it has no weights.
    """
    config = config_from_fairseq(checkpoint)
    left = left_of(checkpoint)
    weights = list(renamed(weights_of(checkpoint)))
    return Layout("fairseq, DinoSR", config, weights, left, settings_notes(checkpoint), licence="none is named")


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    """A table of patterns the other way round."""
    turned = {}
    for theirs, ours in table.items():
        pattern, name = re.escape(ours), theirs
        for number, group in enumerate(re.findall(r"\([^()]*\)", theirs), start=1):
            pattern = pattern.replace(rf"\\{number}", group)
            name = name.replace(group, rf"\{number}", 1)
        turned[pattern] = name.replace(r"\.", ".")
    return turned


def to_fairseq(model: DinoSRForPreTraining) -> dict[str, Any]:
    """
    The authors' layout of a model: what `read_fairseq` reads, and gives back bit for bit.

    Returns:
        `cfg.model`, the settings, and `model`, the weights; `torch.save` writes it. There is no state of a training
        run in it.
    """
    config = model.config
    layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    settings = {
        "_name": "dinosr",
        **{theirs: getattr(config, ours) for theirs, ours in SAME_MEANING.items()},
        **MUST_BE,
    }
    if config.codebook_end_decay is None:
        settings["codebook_end_decay"] = config.codebook_decay
    settings["conv_feature_layers"] = str(list(layers))
    settings["conv_pos"] = config.conv_pos_kernel_size * config.num_conv_pos_embeddings
    settings["freeze_teacher_step"] = -1 if config.freeze_teacher_step is None else config.freeze_teacher_step
    settings["freeze_pre_enc_modules"] = config.freeze_mode != "copied"
    tables = {"": _inverse(STUDENT_KEYS), **{name: _inverse(table) for name, table in NESTED_KEYS.items()}}
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if name == "codebooks.usage":  # of revival, which the authors' code does not have
            continue
        parts = (
            {f"{name}.{i}": row.clone() for i, row in enumerate(tensor)} if "codebooks." in name else {name: tensor}
        )
        for ours, value in parts.items():
            place, pattern = next((p, k) for p, table in tables.items() for k in table if re.fullmatch(k, ours))
            target = state if place == "" else state.setdefault(place, {})
            target[re.sub(pattern, tables[place][pattern], ours)] = value
    return {"args": None, "cfg": {"_name": None, "model": settings}, "model": state}
