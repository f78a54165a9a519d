"""Compare the units of a recording with published figures, which shows a wrong conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...analysis.model_units import frame_units
from ...analysis.quality import code_perplexity, num_active_codes
from ...data import load_audio
from ...model.modeling_dinosr import DinoSRForPreTraining
from ...utils.model_folder import feature_extractor

# Target perplexity and number of active codewords of layers 5 to 12 on LibriSpeech dev-clean after 400,000 updates, in
# the logs that the SpidR paper (arXiv 2512.20308) published of its reproduction of DinoSR.
PUBLISHED_PERPLEXITIES = (186, 170, 156, 140, 144, 178, 144, 155)
PUBLISHED_ACTIVE = (215, 200, 213, 215, 209, 223, 195, 215)


def unit_statistics(model: DinoSRForPreTraining, file: str | Path) -> list[tuple[int, float, int]]:
    """
    Return the layer of each codebook, counted from 1, the perplexity of its codewords and the number in use.

    Args:
        model: Model in evaluation mode.
        file: Path of a recording. Minutes of speech come near the published figures; seconds stay below them.
    """
    inputs = feature_extractor()(load_audio(file), sampling_rate=16_000, return_tensors="np")["input_values"][0]
    units = frame_units(model, np.ascontiguousarray(inputs, dtype=np.float32))
    counts = [np.bincount(codes) for codes in units]
    layers = model.config.codebook_layers
    return [(layer, code_perplexity(c), num_active_codes(c)) for layer, c in zip(layers, counts, strict=True)]


def statistics_table(model: DinoSRForPreTraining, file: str | Path) -> str:
    """Format `unit_statistics` as a table, beside the published figures if the model has the published size."""
    config = model.config
    is_published_size = (config.num_hidden_layers, config.num_codebooks, config.codebook_size) == (12, 8, 256)
    lines = ["layer  perplexity  active" + ("   published: perplexity  active" if is_published_size else "")]
    for row, (layer, perplexity, active) in enumerate(unit_statistics(model, file)):
        line = f"{layer:5}  {perplexity:10.1f}  {active:6}"
        if is_published_size:
            line += f"   {PUBLISHED_PERPLEXITIES[row]:21}  {PUBLISHED_ACTIVE[row]:6}"
        lines.append(line)
    return "\n".join(lines)
