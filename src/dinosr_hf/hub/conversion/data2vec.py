"""Folders of transformers' data2vec for audio: the same encoder, by nearly the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ...model.configuration_dinosr import DinoSRConfig
from .checkpoint_file import CheckpointError, open_checkpoint
from .layout import Layout, Weight, make_config

MODEL_TYPE = "data2vec-audio"
PREFIX = "data2vec_audio."
SAME_NAME = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "hidden_dropout"),
    *("activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "layerdrop", "layer_norm_eps"),
    *("initializer_range", "feat_extract_activation", "conv_dim", "conv_stride", "conv_kernel", "conv_bias"),
    *("num_conv_pos_embedding_groups", "conv_pos_kernel_size", "num_conv_pos_embeddings"),
)
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim", "conv_stride")


def read_data2vec_folder(folder: Path) -> Layout:
    """
    The encoder of a transformers folder whose model_type is data2vec-audio; a head on it is left.

    Raises:
        CheckpointError: If it is another model's folder, or lacks its configuration or weights. wav2vec 2.0, HuBERT
            and WavLM have one positional convolution with weight norm, and do not fit.
    """
    file = folder / "config.json"
    try:
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no config.json that can be read ({error}).") from error
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{folder} is a model of type {kind!r}, whose encoder is another. Of transformers' folders, {MODEL_TYPE}"
            " can be converted."
        )
    if missing := [name for name in NEEDED if name not in settings]:
        raise CheckpointError(f"{file} lacks {', '.join(missing)}.")
    if settings.get("add_adapter"):
        raise CheckpointError(f"{file} has add_adapter=true, which this model has not: it has False.")
    values = {name: settings[name] for name in SAME_NAME if name in settings}
    values["num_codebooks"] = min(DinoSRConfig().num_codebooks, settings["num_hidden_layers"])
    safe = folder / "model.safetensors"
    state = load_file(safe) if safe.is_file() else open_checkpoint(folder / "pytorch_model.bin")
    is_bare = not any(key.startswith(PREFIX) for key in state)
    left = {} if is_bare else {key: "a head" for key in state if not key.startswith(PREFIX)}
    weights = [Weight(key.removeprefix(PREFIX), key, tensor) for key, tensor in state.items() if key not in left]
    return Layout(
        *("transformers, data2vec", make_config(**values), weights, left),
        architecture="model",
        licence="see the folder's card",
    )
