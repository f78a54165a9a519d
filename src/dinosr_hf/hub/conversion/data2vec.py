"""Read folders of transformers' data2vec for audio, which has the same encoder under nearly the same names."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from ...model.configuration_dinosr import SAMPLING_RATE, DinoSRConfig
from ...utils.command_line import argument_errors
from ...utils.damaged_files import explain_damage
from .checkpoint_file import ConversionError, open_checkpoint
from .layout import Layout, Weight, check_settings, make_config, read_settings

PREFIX = "data2vec_audio."
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim", "conv_stride")
FIELDS = (
    *(*REQUIRED, "hidden_act", "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout"),
    *("final_dropout", "layerdrop", "layer_norm_eps", "initializer_range", "feat_extract_activation", "conv_kernel"),
    *("conv_bias", "num_conv_pos_embedding_groups", "conv_pos_kernel_size", "num_conv_pos_embeddings"),
)


def read_data2vec_folder(folder: Path) -> Layout:
    """
    Read the encoder from a transformers folder whose model_type is data2vec-audio. A head on it is not used.

    wav2vec 2.0, HuBERT and WavLM do not fit: they have one positional convolution with weight norm.
    """
    settings = read_settings(folder / "config.json")
    if "model_type" not in settings and (files := sorted(folder.glob("*.pt"))):
        raise ConversionError(
            f"{folder} is not a model's folder of transformers. Give the checkpoint in it: {files[0]}."
        )
    if (kind := settings.get("model_type")) != "data2vec-audio":
        raise ConversionError(
            f"{folder} is a model of type {kind!r}, whose encoder is different. Of transformers' models, only"
            " data2vec-audio can be converted."
        )
    check_settings(settings, REQUIRED, {"add_adapter": False})
    if (inputs := folder / "preprocessor_config.json").is_file():
        check_settings(read_settings(inputs), (), {"do_normalize": True, "sampling_rate": SAMPLING_RATE})
    values = {name: settings[name] for name in FIELDS if name in settings}
    with argument_errors("The checkpoint's configuration is not valid: ", (TypeError,)):
        values["num_codebooks"] = min(DinoSRConfig().num_codebooks, settings["num_hidden_layers"])
    file = folder / "model.safetensors"
    if file.is_file() and (damage := explain_damage(file)) is not None:
        raise ConversionError(damage)
    try:
        state = load_file(file) if file.is_file() else open_checkpoint(folder / "pytorch_model.bin")
    except SafetensorError as error:
        raise ConversionError(f"{file} is damaged: {error}. Download it again.") from error
    has_head = any(key.startswith(PREFIX) for key in state)
    unused = {key: "a head" for key in state if has_head and not key.startswith(PREFIX)}
    weights = [Weight(key.removeprefix(PREFIX), key, tensor) for key, tensor in state.items() if key not in unused]
    config = make_config(**values)
    return Layout("transformers, data2vec", config, weights, unused, "see the folder's card", architecture="model")
