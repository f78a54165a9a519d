"""fairseq's recognisers on a DinoSR encoder (`Wav2VecCtc`), and its data2vec, whose encoder is the same."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...model.configuration_dinosr import DinoSRConfig
from ...recognition.text import SPECIAL_TOKENS
from .checkpoint_file import CheckpointError
from .fairseq import SAME_MEANING, config_from_settings, left_of, model_settings, renamed, weights_of
from .layout import Layout, Weight

ENCODER_PREFIX = "w2v_encoder.w2v_model."
HEAD_KEYS = {
    f"{prefix}proj.{kind}": f"lm_head.{kind}" for prefix in ("w2v_encoder.", "") for kind in ("weight", "bias")
}
# Of pre-training: a recogniser has none of it, whether the file has or not.
PRETRAINING_KEYS = r"(_ema|_pre_encoder_\w+|_codebook(_cnts)?\d+|heads\.\d+\.\w+|final_proj\.\w+(\.\w+)?)"

# Settings of fine-tuning, which replace those of pre-training.
FINETUNING = {
    "dropout": "hidden_dropout",
    "activation_dropout": "activation_dropout",
    "attention_dropout": "attention_dropout",
    "dropout_input": "feat_proj_dropout",
    "final_dropout": "final_dropout",
    "layerdrop": "layerdrop",
    "apply_mask": "apply_spec_augment",
    "mask_prob": "mask_time_prob",
    "mask_length": "mask_time_length",
    "mask_channel_prob": "mask_feature_prob",
    "mask_channel_length": "mask_feature_length",
}
OF_AN_ENCODER = {
    theirs: ours for theirs, ours in SAME_MEANING.items() if not re.match(r"codebook|ema_|average_top_k", theirs)
}
DATA2VEC = ("data2vec_audio",)


def read_dictionary(file: str | os.PathLike) -> dict[str, int]:
    """
    The labels of a fairseq dictionary (`dict.ltr.txt`: a label and its count a line), with its special ones in front.

    fairseq's blank is `<s>`, its label 0, and transformers' is `<pad>`: these two exchange their names, not rows.

    Raises:
        CheckpointError: If it is no such file, or has a label twice.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file. Give the dictionary of the recogniser (dict.ltr.txt).")
    vocabulary = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.rsplit(" ", 1)
        if len(words) != 2 or not words[1].isdigit() or words[0] in vocabulary:
            raise CheckpointError(f"{file}, line {number}: {line[:80]!r} is not a new label and its count.")
        vocabulary[words[0]] = len(vocabulary)
    return vocabulary


def is_finetuned(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a fairseq checkpoint is a recogniser's, by the names of its weights."""
    state = checkpoint.get("model")
    return isinstance(state, Mapping) and any(str(key).startswith(ENCODER_PREFIX) for key in state)


def read_data2vec(checkpoint: Mapping[str, Any]) -> Layout:
    """
    fairseq's data2vec for audio: its encoder. The teacher has no codebooks and is left.

    Raises:
        CheckpointError: As `config_from_settings`, and for weights that are not known.
    """
    settings = model_settings(checkpoint) or {}
    config = _encoder_config(settings)
    state = weights_of(checkpoint)
    left = {key: "of data2vec's pre-training" for key in state if re.fullmatch(PRETRAINING_KEYS, str(key))}
    kept = {key: tensor for key, tensor in state.items() if key not in left}
    return Layout(
        "fairseq, data2vec", config, list(renamed(kept)), {**left_of(checkpoint), **left}, licence="see its source"
    ).encoder_alone()


# Settings of DinoSR's targets: data2vec has others, and an encoder none.
NOT_OF_AN_ENCODER = (
    *("discrete", "instance_norm_target_layer", "layer_norm_target_layer", "batch_norm_target_layer"),
    *("group_norm_target_layer", "instance_norm_targets", "layer_norm_targets", "ema_transformer_only"),
    "ema_layers_only",
)


def _encoder_config(settings: Mapping[str, Any]) -> DinoSRConfig:
    if settings.get("_name") == "dinosr":
        return config_from_settings(settings)
    own = {name: value for name, value in settings.items() if name not in NOT_OF_AN_ENCODER}
    return config_from_settings(own, OF_AN_ENCODER)


def read_finetuned(checkpoint: Mapping[str, Any], dictionary: str | os.PathLike | None) -> Layout:
    """
    A recogniser that fairseq fine-tuned with CTC from DinoSR or data2vec.

    Args:
        checkpoint: The file's content; the settings of pre-training are in its `w2v_args`.
        dictionary: Its `dict.ltr.txt`; without, there is only the encoder.

    Raises:
        CheckpointError: For settings and weights that are not known, and a dictionary of another number of labels.
    """
    settings = model_settings(checkpoint) or {}
    base = settings.get("w2v_args")
    base_settings = None
    if isinstance(base, Mapping):
        base_settings = model_settings({"cfg": base} if isinstance(base.get("model"), Mapping) else {"args": base})
    if base_settings is None or base_settings.get("_name") not in ("dinosr", *DATA2VEC):
        raise CheckpointError(
            "The recogniser's w2v_args do not have the settings of a DinoSR or data2vec model, from which its"
            " configuration is derived."
        )
    config = _encoder_config(base_settings)
    state = weights_of(checkpoint)
    left, encoder, head = left_of(checkpoint), {}, []
    for key, tensor in state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"The checkpoint has a weight whose name is no name: {key}.")
        inner = key.removeprefix(ENCODER_PREFIX)
        if key in HEAD_KEYS:
            head.append(Weight(HEAD_KEYS[key], key, tensor))
        elif key.startswith(ENCODER_PREFIX) and not re.fullmatch(PRETRAINING_KEYS, inner):
            encoder[inner] = tensor
        elif key.startswith(ENCODER_PREFIX):
            left[key] = "of pre-training, which a recogniser has not"
        else:
            raise CheckpointError(f"The checkpoint has a weight that this model has not: {key}.")
    weights = [Weight(w.ours, ENCODER_PREFIX + w.theirs, w.tensor) for w in renamed(encoder)]
    vocabulary = None if dictionary is None else read_dictionary(dictionary)
    num_labels = next((len(w.tensor) for w in head if isinstance(w.tensor, torch.Tensor) and w.tensor.dim()), 0)
    if vocabulary is not None and len(vocabulary) != num_labels:
        raise CheckpointError(
            f"The dictionary has {len(vocabulary)} labels with the 4 special ones, but the recogniser has"
            f" {num_labels}. Give the dictionary that it was fine-tuned with."
        )
    values = {**config.to_dict(), "vocab_size": num_labels or config.vocab_size}
    values |= {ours: settings[theirs] for theirs, ours in FINETUNING.items() if settings.get(theirs) is not None}
    values.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    layout = Layout(
        *("fairseq, CTC", type(config).from_dict(values), [*weights, *head], left),
        architecture="ctc",
        licence="that of its pre-trained model and of the data",
        vocabulary=vocabulary,
    )
    return layout if vocabulary is not None else layout.encoder_alone()
