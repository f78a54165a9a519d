"""
Features and k-means units of other speech models of transformers, to compare with: HuBERT, wav2vec 2.0, data2vec.

`T` frames, `L` layers, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedConfig, PreTrainedModel

from ..inference.windowed import DTYPES, WindowedInference
from ..model.configuration_dinosr import DinoSRConfig
from ..utils.model_folder import open_config
from .extraction import UnitExtractor

BASELINES = ("hubert", "wav2vec2", "data2vec-audio", "wavlm", DinoSRConfig.model_type)


def frame_config(config: PreTrainedConfig) -> DinoSRConfig:
    """A configuration with the same frames, width and number of layers, for what asks for these alone."""
    return DinoSRConfig(
        conv_dim=list(config.conv_dim),
        conv_kernel=list(config.conv_kernel),
        conv_stride=list(config.conv_stride),
        hidden_size=config.hidden_size,
        num_attention_heads=1,
        num_hidden_layers=config.num_hidden_layers,
        num_codebooks=1,
    )


class BaselineExtractor(UnitExtractor):
    """
    As `UnitExtractor`, for any model of transformers with convolutions in front and hidden states.

    It has no codebooks: its units are those of k-means (`fit_kmeans`). Recordings go through it one by one, since of
    some peers padding changes what comes out.

    Args:
        model: In evaluation mode from now on.
        layers: Of which the features are; 1 to `num_hidden_layers`.
        normalizes: Whether it expects zero mean and unit variance (`do_normalize` of its feature extractor).
        window_seconds: As for `UnitExtractor`.
        context_seconds: As for `UnitExtractor`.

    Raises:
        ValueError: If there is no such layer, or a number of seconds cannot be.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        layers: Sequence[int],
        normalizes: bool = True,
        window_seconds: float = 30.0,
        context_seconds: float = 5.0,
    ) -> None:
        self.peer = model.eval()
        self.config = frame_config(model.config)
        wrong = [layer for layer in layers if not 1 <= layer <= self.config.num_hidden_layers]
        if wrong or not layers:
            raise ValueError(
                f"layers={list(layers)}: this model has the layers 1 to {self.config.num_hidden_layers}. Choose among"
                " these."
            )
        self.layers = list(layers)
        self.source = "student"
        self._runner = WindowedInference(
            self.config,
            normalizes=normalizes,
            window_seconds=window_seconds,
            context_seconds=context_seconds,
            batch_seconds=2 * self.config.inputs_to_logits_ratio / 16_000,  # one recording at a time
        )

    @torch.inference_mode()
    def _layer_features(self, waves: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        (wave,) = waves
        values = torch.from_numpy(wave)[None].to(self.peer.device, self.peer.dtype)
        hidden = self.peer(values, output_hidden_states=True).hidden_states
        found = torch.stack([hidden[layer] for layer in self.layers])
        return found.permute(1, 2, 0, 3).float(), [found.shape[2]]


def load_baseline(
    name: str | Path, *, layers: Sequence[int], device: str | torch.device = "cpu", dtype: str = "float32"
) -> BaselineExtractor:
    """
    Open an encoder: one of `BASELINES`, as `AutoModel` opens it, a DinoSR among them.

    Args:
        name: Folder, or name on the Hub; its feature extractor says whether it expects normalised samples.
        layers: Of which the features are.
        device: Where the model runs.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: If it is no such model, or has no such layer.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown. Choose one of {', '.join(DTYPES)}.")
    config = open_config(name, "Give a folder with model and feature extractor.")
    try:
        extractor: Any = AutoFeatureExtractor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be opened ({error}). Give a folder with model and feature extractor."
        ) from error
    if config.model_type not in BASELINES:
        raise ValueError(f"{name} is a {config.model_type}, which is none of {', '.join(BASELINES)}.")
    model = AutoModel.from_pretrained(name, dtype=DTYPES[dtype]).to(device)
    return BaselineExtractor(model, layers=layers, normalizes=bool(extractor.do_normalize))
