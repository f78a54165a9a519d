"""
Read fairseq's checkpoints of DinoSR, CTC recognisers on it (`Wav2VecCtc`), and data2vec, which has the same encoder.

The authors' layout is that of their DinoSR models; `to_fairseq` writes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...model.configuration_dinosr import DinoSRConfig
from ...model.modeling_dinosr import DinoSRForPreTraining
from ...recognition.text import SPECIAL_TOKENS
from ...utils.text_files import text_lines
from .checkpoint_file import ConversionError
from .layout import Layout, Weight, check_has_place, convert_settings, rename, unstacked_weights, unused_entries

DATA2VEC = "data2vec_audio"
RECOGNISER_PREFIX = "w2v_encoder.w2v_model."

# Their setting -> the field of `DinoSRConfig` with the same meaning.
FIELDS = {
    "encoder_embed_dim": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "activation_fn": "hidden_act",
    "dropout": "hidden_dropout",
    "dropout_input": "feat_proj_dropout",
    "encoder_layerdrop": "layerdrop",
    "conv_feature_layers": "conv_layers",
    "conv_pos": "conv_pos_kernel_size",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "pos_conv_depth": "num_conv_pos_embeddings",
    "average_top_k_layers": "num_codebooks",
    "codebook_init_decay": "codebook_decay",
    "ema_anneal_end_step": "ema_anneal_steps",
    **{name: name for name in ("attention_dropout", "activation_dropout", "conv_bias", "mask_prob", "mask_length")},
    **{name: name for name in ("codebook_size", "codebook_end_decay", "codebook_end_decay_step", "ema_decay")},
    "ema_end_decay": "ema_end_decay",
}

# Settings that change what the model computes -> the only value that is supported.
SUPPORTED = {
    "extractor_mode": "layer_norm",
    "layer_type": "transformer",
    "layer_norm_first": False,
    "attn_type": "",
    "pos_enc_type": "abs",
    "crop_seq_to_multiple": 1,
    **dict.fromkeys(("discrete", "instance_norm_target_layer", "ema_transformer_only", "ema_layers_only"), True),
    **dict.fromkeys(("layer_norm_target_layer", "batch_norm_target_layer", "group_norm_target_layer"), False),
    **dict.fromkeys(("instance_norm_targets", "layer_norm_targets"), False),
}

# Settings of training that this package lacks -> the value at which they do nothing. Outputs do not depend on them.
TRAINING_ONLY = {
    **dict.fromkeys(("dropout_features", "mask_other", "mask_dropout", "mask_channel_prob", "loss_beta"), 0.0),
    "feature_grad_mult": 1.0,
    "mask_selection": "static",
    "no_mask_overlap": False,
    "loss_scale": None,
}

# Settings that `_config` converts, and those that do not change what this model computes: they concern the
# implementation or other models, or depend on settings above.
OTHER_SETTINGS = (
    *("freeze_teacher_step", "freeze_pre_enc_modules", "_name", "final_dim", "logit_temp", "quantize_targets"),
    *("quantize_input", "same_quantizer", "target_glu"),
    *("quantizer_depth", "quantizer_factor", "latent_vars", "latent_groups", "latent_dim", "latent_temp"),
    *("mask_min_space", "require_same_masks", "mask_channel_length", "mask_channel_before", "mask_channel_selection"),
    *("mask_channel_other", "no_mask_channel_overlap", "mask_channel_min_space", "num_negatives"),
    *("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "max_positions"),
    *("checkpoint_activations", "required_seq_len_multiple", "depthwise_conv_kernel_size", "fp16"),
    *("normal_init_codebook", "max_update", "min_target_var", "min_pred_var"),
)
# Settings of fine-tuning, which replace those of pre-training.
FINETUNING_FIELDS = {
    "dropout": "hidden_dropout",
    "dropout_input": "feat_proj_dropout",
    "apply_mask": "apply_spec_augment",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
    **{name: name for name in ("activation_dropout", "attention_dropout", "final_dropout", "layerdrop")},
}

# Their names of weights -> ours. The student's begin with `encoder.`, the teacher's do not.
ENCODER_KEYS = {
    "pos_conv.*.0.*": "pos_conv_embed.layers.*.conv.*",
    "layer_norm.*": "layer_norm.*",
    "layers.*.self_attn.*_proj.*": "layers.*.attention.*_proj.*",
    "layers.*.self_attn_layer_norm.*": "layers.*.layer_norm.*",
    "layers.*.fc1.*": "layers.*.feed_forward.intermediate_dense.*",
    "layers.*.fc2.*": "layers.*.feed_forward.output_dense.*",
    "layers.*.final_layer_norm.*": "layers.*.final_layer_norm.*",
}
STUDENT_KEYS = {
    "mask_emb": "dinosr.masked_spec_embed",
    "feature_extractor.conv_layers.*.0.*": "dinosr.feature_extractor.conv_layers.*.conv.*",
    "feature_extractor.conv_layers.*.2.1.*": "dinosr.feature_extractor.conv_layers.*.layer_norm.*",
    "layer_norm.*": "dinosr.feature_projection.layer_norm.*",
    "post_extract_proj.*": "dinosr.feature_projection.projection.*",
    **{f"encoder.{theirs}": f"dinosr.encoder.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    "heads.*.*": "heads.*.*",
    "_codebook_cnts*": "codebooks.counts.*",
    "_codebook*": "codebooks.sums.*",
}
# Entries of the weights that are dictionaries of tensors.
NESTED = ("_ema", "_pre_encoder_cnn", "_pre_encoder_ln", "_pre_encoder_proj")
PRETRAINING_KEYS = STUDENT_KEYS | {
    **{f"_ema.{theirs}": f"teacher.{ours}" for theirs, ours in ENCODER_KEYS.items()},
    "_pre_encoder_cnn.conv_layers.*.0.*": "teacher.feature_extractor.conv_layers.*.conv.*",
    "_pre_encoder_cnn.conv_layers.*.2.1.*": "teacher.feature_extractor.conv_layers.*.layer_norm.*",
    "_pre_encoder_ln.*": "teacher.feature_projection.layer_norm.*",
    "_pre_encoder_proj.*": "teacher.feature_projection.projection.*",
}
RECOGNISER_KEYS = {
    **{RECOGNISER_PREFIX + theirs: ours for theirs, ours in STUDENT_KEYS.items()},
    "w2v_encoder.proj.*": "lm_head.*",
    "proj.*": "lm_head.*",
}
# Weights of pre-training, which recognisers and data2vec's encoder do not use.
UNUSED_KEYS = re.compile(
    rf"({re.escape(RECOGNISER_PREFIX)})?(_ema|_pre_encoder_\w+|_codebook(_cnts)?\d+|heads\.\d+\.\w+|final_proj\.[\w.]+)"
)

# Entries of the checkpoint beside the weights, and why they are not used.
UNUSED = {
    **dict.fromkeys(("args", "cfg"), "settings; those of the model are in config.json"),
    **dict.fromkeys(("optimizer_history", "task_state", "extra_state", "best_loss"), "state of the training run"),
    "last_optimizer_state": "the optimizer's moments",
    "criterion": "the loss, which has no weights",
}


def model_settings(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """
    Return the model's settings from a fairseq checkpoint, with its name as `_name`; empty if there are none.

    They are under `cfg.model`, or among all other settings in the old flat `args`.
    """
    cfg, args = checkpoint.get("cfg"), checkpoint.get("args")
    if isinstance(cfg, Mapping):
        return cfg["model"] if isinstance(cfg.get("model"), Mapping) else {}
    return {**args, "_name": args.get("arch")} if isinstance(args, Mapping) else {}


def check_inputs(checkpoint: Mapping[str, Any]) -> None:
    """Raise `ConversionError` unless the model was trained on normalised waveforms at 16 kHz, as ours are."""
    cfg = checkpoint.get("cfg")
    places = [cfg.get("task"), cfg.get("model")] if isinstance(cfg, Mapping) else [checkpoint.get("args")]
    for settings in places:
        for name, value in {"normalize": True, "sample_rate": 16_000}.items():
            # A recogniser may refer to its task: "${task.normalize}".
            if isinstance(settings, Mapping) and settings.get(name, value) not in (value, f"${{task.{name}}}"):
                raise ConversionError(
                    f"The checkpoint has {name}={settings[name]!r}: it was trained on waveforms that this package does"
                    f" not make; expected {value!r}."
                )


def settings_notes(checkpoint: Mapping[str, Any]) -> list[str]:
    """Describe the settings of a fairseq checkpoint that the configuration does not keep."""
    settings = model_settings(checkpoint)
    notes = [
        f"{name}: {settings[name]!r} in the file, a setting of training that this package does not have"
        for name, neutral in TRAINING_ONLY.items()
        if settings.get(name, neutral) != neutral
    ]
    if isinstance(checkpoint.get("cfg"), Mapping):
        unknown = settings.keys() - {*FIELDS, *SUPPORTED, *TRAINING_ONLY, *OTHER_SETTINGS}
        notes += [f"{name}: an unknown setting, ignored" for name in sorted(str(name)[:80] for name in unknown)[:20]]
    elif "ema_decay" in settings:
        notes.append(
            f"ema_decay: {settings['ema_decay']!r}, which in a flat list of settings may be fairseq's own and not the"
            " model's; it matters only if you continue pre-training"
        )
    return notes


def _config(settings: Mapping[str, Any], **values: Any) -> DinoSRConfig:
    """Convert the settings of DinoSR or data2vec; `values` are further fields of the configuration."""
    if settings.get("pos_conv_depth") == 1:
        raise ConversionError(
            "The checkpoint has pos_conv_depth=1, a single positional convolution with weight norm, which is not"
            " supported; expected at least 2."
        )
    is_frozen, freeze_step = settings.get("freeze_pre_enc_modules", True), settings.get("freeze_teacher_step", -1)
    if not isinstance(is_frozen, bool):
        raise ConversionError(f"The checkpoint has freeze_pre_enc_modules={is_frozen!r}; expected True or False.")
    values["freeze_mode"] = "frozen" if is_frozen else "copied"
    values["freeze_teacher_step"] = None if freeze_step == -1 else freeze_step
    if settings.get("codebook_end_decay", 0) == settings.get("codebook_init_decay"):
        values |= {"codebook_end_decay": None, "codebook_end_decay_step": 0}
    encoder_only = settings.get("_name") == DATA2VEC
    return convert_settings(settings, FIELDS, SUPPORTED, encoder_only=encoder_only, **values)


def config_from_fairseq(checkpoint: Mapping[str, Any]) -> DinoSRConfig:
    """Convert the configuration of an authors' checkpoint, which must have one of a DinoSR model."""
    settings = model_settings(checkpoint)
    if settings.get("_name") != "dinosr":
        raise ConversionError(
            "The checkpoint has no configuration of a DinoSR model under cfg.model or args."
            f" It has these entries: {', '.join(sorted(map(str, checkpoint)))[:300] or 'none'}."
        )
    return _config(settings)


def _read_weights(
    checkpoint: Mapping[str, Any], names: Mapping[str, str], *, whole: bool = False
) -> tuple[list[Weight], dict[str, str]]:
    """Return the weights, and why each other entry is not used; `whole`: those of pre-training are weights too."""
    state = checkpoint.get("model")
    if not isinstance(state, Mapping):
        raise ConversionError("The checkpoint has no weights under model.")
    weights, unused = [], unused_entries(checkpoint, UNUSED)
    for key, value in state.items():
        if not whole and UNUSED_KEYS.fullmatch(str(key)):
            unused[key] = "of pre-training, not part of the encoder"
        elif key not in NESTED:
            weights.append(Weight(rename(key, names), key, value))
        elif not isinstance(value, Mapping):
            raise ConversionError(f"The checkpoint's {key} is a {type(value).__name__}; expected a dictionary.")
        else:
            inner = {f"{key}.{name}": tensor for name, tensor in value.items()}
            weights += [Weight(rename(name, names), name, tensor) for name, tensor in inner.items()]
    return weights, unused


def read_fairseq(checkpoint: Mapping[str, Any]) -> Layout:
    """Read a checkpoint of the authors: student, teacher (of the last forward pass, D3), codebooks and heads."""
    config, notes = config_from_fairseq(checkpoint), settings_notes(checkpoint)
    weights, unused = _read_weights(checkpoint, PRETRAINING_KEYS, whole=True)
    return Layout("fairseq, DinoSR", config, weights, unused, "none is named", notes)


def read_data2vec(checkpoint: Mapping[str, Any]) -> Layout:
    """Read the encoder of fairseq's data2vec for audio. Its teacher has no codebooks and is not used."""
    config, (weights, unused) = _config(model_settings(checkpoint)), _read_weights(checkpoint, STUDENT_KEYS)
    return Layout("fairseq, data2vec", config, weights, unused, "see its source").encoder_only()


def is_recogniser(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a fairseq checkpoint is a recogniser, judging by the names of its weights."""
    state = checkpoint.get("model")
    return isinstance(state, Mapping) and any(str(key).startswith(RECOGNISER_PREFIX) for key in state)


def read_dictionary(file: str | os.PathLike) -> dict[str, int]:
    """
    Read a fairseq dictionary (`dict.ltr.txt`, a label and its count per line) and put the special labels first.

    fairseq's blank is `<s>`, its label 0; transformers' is `<pad>`. The two exchange their names, not their rows.
    """
    file = Path(file)
    if not file.is_file():
        raise ConversionError(f"{file} is not a file. Give the dictionary of the recogniser (dict.ltr.txt).")
    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    for number, line in enumerate(text_lines(file), start=1):
        label, separator, count = line.rpartition(" ")
        if not separator or not count.isdigit() or label in vocabulary:
            raise ConversionError(f"{file}, line {number}: {line[:80]!r} is not a new label and its count.")
        vocabulary[label] = len(vocabulary)
    return vocabulary


def read_recogniser(checkpoint: Mapping[str, Any], dictionary: str | os.PathLike | None) -> Layout:
    """
    Read a recogniser that fairseq fine-tuned with CTC from DinoSR or data2vec.

    The settings of pre-training are in its `w2v_args`. Without its dictionary, the encoder alone is read.
    """
    settings = model_settings(checkpoint)
    base = settings.get("w2v_args")
    base_settings = model_settings({"cfg": base}) or model_settings({"args": base})
    if base_settings.get("_name") not in ("dinosr", DATA2VEC):
        raise ConversionError(
            "The recogniser's w2v_args do not have the settings of a DinoSR or data2vec model, from which its"
            " configuration is derived."
        )
    values = {ours: settings[name] for name, ours in FINETUNING_FIELDS.items() if settings.get(name) is not None}
    weights, unused = _read_weights(checkpoint, RECOGNISER_KEYS)
    head = [tensor for name, _, tensor in weights if name.startswith("lm_head.") and isinstance(tensor, torch.Tensor)]
    if num_labels := max((len(tensor) for tensor in head if tensor.dim()), default=0):
        values["vocab_size"] = num_labels
    vocabulary = None if dictionary is None else read_dictionary(dictionary)
    if vocabulary is not None and len(vocabulary) != num_labels:
        raise ConversionError(
            f"The dictionary has {len(vocabulary)} labels including the 4 special ones, but the recogniser has"
            f" {num_labels}. Give the dictionary that it was fine-tuned with."
        )
    config, license = _config(base_settings, **values), "that of its pre-trained model and of the data"
    layout = Layout("fairseq, CTC", config, weights, unused, license, architecture="ctc", vocabulary=vocabulary)
    return layout if vocabulary is not None else layout.encoder_only()


def to_fairseq(model: DinoSRForPreTraining) -> dict[str, Any]:
    """
    Convert a model to the content of a checkpoint of the authors. `read_fairseq` restores it bit for bit.

    It has settings under `cfg.model` and weights under `model`, but not the state of a training run, and not the
    anchor's head. Raises `ConversionError` for a model with log-mel frames, or with SpidR's objective.
    """
    config = model.config
    needed: dict[str, Any] = {"feature_encoder": "conv", "head_input": "last_layer", "ema_schedule": "linear"}
    needed |= {"freeze_front_end_step": None, "layer_norm_eps": 1e-5, "feat_extract_activation": "gelu"}
    if config.freeze_mode != "copied":
        needed["freeze_mode"] = "frozen"
    least = {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}
    check_has_place(config, "the authors' layout", needed, least)
    layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True))
    settings = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items() if ours != "conv_layers"}
    settings |= {"_name": "dinosr", "conv_feature_layers": str(layers), **SUPPORTED}
    if config.codebook_end_decay is None:
        settings["codebook_end_decay"] = config.codebook_decay
    settings["conv_pos"] = config.conv_pos_kernel_size * config.num_conv_pos_embeddings
    settings["freeze_teacher_step"] = -1 if config.freeze_teacher_step is None else config.freeze_teacher_step
    settings["freeze_pre_enc_modules"] = config.freeze_mode != "copied"
    names = {ours: theirs for theirs, ours in PRETRAINING_KEYS.items()}
    state: dict[str, Any] = {}
    weights = unstacked_weights(model)
    if not config.qkv_bias:  # there is none without
        for name, tensor in list(weights.items()):
            if re.search(r"\.[qkv]_proj\.weight$", name):
                weights[name.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    for ours, tensor in weights.items():
        theirs = rename(ours, names)
        entry, _, inner = theirs.partition(".")
        if entry in NESTED:
            state.setdefault(entry, {})[inner] = tensor
        else:
            state[theirs] = tensor
    return {"args": None, "cfg": {"_name": None, "model": settings}, "model": state}
