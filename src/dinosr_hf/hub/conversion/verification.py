"""Units of a recording beside published figures: a wrong conversion shows in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ...analysis.model_units import frame_units
from ...data import load_audio
from ...model.modeling_dinosr import DinoSRForPreTraining
from ...utils.model_folder import feature_extractor

# Target perplexity and active codewords of layers 5 to 12 on LibriSpeech dev-clean after 400,000 updates, from the
# logs that the SpidR paper (arXiv 2512.20308) published of its reproduction of DinoSR.
PUBLISHED_PERPLEXITIES = (186, 170, 156, 140, 144, 178, 144, 155)
PUBLISHED_ACTIVE = (215, 200, 213, 215, 209, 223, 195, 215)


def unit_statistics(model: DinoSRForPreTraining, file: str | Path) -> list[tuple[int, float, int]]:
    """
    How a recording spreads over the codewords of each layer.

    Args:
        model: In evaluation mode.
        file: A recording; minutes of speech come near the published figures, seconds stay below.

    Returns:
        (layer, counted from 1; perplexity of its codewords; codewords in use) of each codebook.
    """
    waveform = load_audio(file)
    inputs = feature_extractor()(waveform, sampling_rate=16_000, return_tensors="np")["input_values"][0]
    units = frame_units(model, np.ascontiguousarray(inputs, dtype=np.float32))
    first = model.config.num_hidden_layers - model.config.num_codebooks + 1
    rows = []
    for layer, codes in enumerate(units, start=first):
        share = torch.bincount(codes).double() / len(codes)
        share = share[share > 0]
        rows.append((layer, float(torch.exp(-(share * share.log()).sum())), len(share)))
    return rows


def statistics_table(model: DinoSRForPreTraining, file: str | Path) -> str:
    """`unit_statistics` as lines to print; beside the published figures where the model has the published size."""
    config = model.config
    published = (config.num_hidden_layers, config.num_codebooks, config.codebook_size) == (12, 8, 256)
    lines = ["layer  perplexity  active" + ("   published: perplexity  active" if published else "")]
    for row, (layer, perplexity, active) in enumerate(unit_statistics(model, file)):
        line = f"{layer:5}  {perplexity:10.1f}  {active:6}"
        if published:
            line += f"   {PUBLISHED_PERPLEXITIES[row]:21}  {PUBLISHED_ACTIVE[row]:6}"
        lines.append(line)
    return "\n".join(lines)
