"""Features and k-means units of other speech models of transformers to compare with: HuBERT, wav2vec 2.0, data2vec."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel

from ..model.configuration_dinosr import DinoSRConfig
from ..model.modeling_dinosr import check_layers
from ..utils.model_folder import has_codebooks, open_config, open_weights, opening, torch_dtype
from .extraction import LayerExtractor, UnitExtractor, load_model

BASELINES = ("hubert", "wav2vec2", "data2vec-audio", "wavlm", DinoSRConfig.model_type)
_ADVICE = "Give a folder with a model and its feature extractor."


def _frames_config(config: Any) -> DinoSRConfig:
    """Return a configuration with the layers, sizes and frames of another model."""
    shape = ("conv_dim", "conv_kernel", "conv_stride", "hidden_size", "num_hidden_layers", "intermediate_size")
    values: dict[str, Any] = {name: getattr(config, name) for name in shape}
    values["feature_encoder"] = getattr(config, "feature_encoder", "conv")  # only a DinoSR has another
    return DinoSRConfig(**values, num_attention_heads=1, num_codebooks=1)


def baseline_config(name: str | Path) -> DinoSRConfig:
    """
    Return a configuration with the layers, sizes and frames of a model of one of the types in `BASELINES`.

    `name` is its folder or its name on the Hub. Raises `ValueError` for a model of another type.
    """
    config = open_config(name, _ADVICE)
    if config.model_type not in BASELINES:
        raise ValueError(f"{name} is a {config.model_type}; supported are {', '.join(BASELINES)}.")
    return _frames_config(config)


def open_feature_extractor(name: str | Path) -> Any:
    """Return the feature extractor of a model, from a folder or the Hub; `ValueError` if it has none."""
    with opening(name, _ADVICE):
        return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)


class BaselineExtractor(LayerExtractor):
    """
    A `LayerExtractor` for any model of transformers with a convolutional front end and hidden states.

    It has no codebooks, so its units need k-means (`fit_layer_kmeans`). Recordings go through the model one by one,
    since some baseline models give other features for padded input.

    Args:
        model: The model; it is put into evaluation mode.
        layers: Numbers of the transformer layers to take features from, from 1; `ValueError` if there is no such one.
        normalizes: Whether the model expects zero mean and unit variance (`do_normalize` of its feature extractor).
        is_smoothed: As for `LayerExtractor`.
    """

    def __init__(
        self, model: PreTrainedModel, *, layers: Sequence[int], normalizes: bool = True, is_smoothed: bool = False
    ) -> None:
        config = _frames_config(model.config)
        super().__init__(
            model,
            config,
            layers=check_layers(config, layers, with_codebooks=False),
            source="student",
            is_smoothed=is_smoothed,
            normalizes=normalizes,
            is_padding_safe=False,
        )

    @torch.inference_mode()
    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        (wave,) = waves
        values = torch.from_numpy(wave)[None].to(self.model.device, self.model.dtype)
        hidden_states = self.model(values, output_hidden_states=True).hidden_states
        found = torch.stack([hidden_states[layer] for layer in self.layers])
        return found.permute(1, 2, 0, 3).float(), [found.shape[2]]


def load_baseline(
    name: str | Path,
    *,
    layers: Sequence[int],
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    is_smoothed: bool = False,
) -> BaselineExtractor:
    """
    Load an encoder of one of the types in `BASELINES`, with its feature extractor, from a folder or the Hub.

    `layers`, `dtype` and `is_smoothed` are those of `LayerExtractor` and `load_model`. Raises `ValueError` for a
    model of another type, without such a layer or without a feature extractor.
    """
    options: dict[str, Any] = {"device": device, "dtype": torch_dtype(dtype), "advice": _ADVICE}
    baseline_config(name)  # before memory is taken for a model that cannot be
    normalizes = bool(open_feature_extractor(name).do_normalize)
    # Released encoders lack what only masks need.
    model = open_weights(AutoModel, name, may_lack="masked_spec_embed$", **options)
    return BaselineExtractor(model, layers=layers, normalizes=normalizes, is_smoothed=is_smoothed)


def open_extractors(
    name: str | Path,
    *,
    layers: Sequence[int],
    sources: Sequence[str] = ("student",),
    is_smoothed: bool = False,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
) -> Iterator[LayerExtractor]:
    """
    Yield an extractor for each source of a pre-training checkpoint, or that of another encoder in `BASELINES`.

    Raises `ValueError` as `load_model`, `UnitExtractor` and `load_baseline`, which have the arguments.
    """
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    if not has_codebooks(open_config(name)):
        yield load_baseline(name, layers=layers, is_smoothed=is_smoothed, **where)
        return
    model = load_model(name, **where)
    for source in sources:
        yield UnitExtractor(model, layers=layers, source=source, is_smoothed=is_smoothed)
