"""A DinoSR of a few thousand weights, with odd sizes, and waveforms for it: 20 samples a frame, 40 in the first."""

import copy

import numpy as np
import torch

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining

SIZES = {
    "vocab_size": 11,
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "conv_dim": [11, 13, 15],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embedding_groups": 4,
    "conv_pos_kernel_size": 5,
    "num_conv_pos_embeddings": 3,
    "num_codebooks": 2,
    "codebook_size": 7,
    "mask_length": 3,
    "tdnn_dim": [9, 7, 10],
    "tdnn_kernel": [5, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 8,
    "classifier_proj_size": 13,
    "num_labels": 5,
}
NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}


def tiny_config(**changes) -> DinoSRConfig:
    return DinoSRConfig(**{**SIZES, **changes})


def deterministic_config(**changes) -> DinoSRConfig:
    """Nothing random in training."""
    return tiny_config(**{**NO_DROPOUT, "apply_spec_augment": False, **changes})


def waveforms(batch_size: int, num_samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(seed))


def white_noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


def padded(waves: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Utterances (S,) of different lengths to input_values and attention_mask, each (B, S)."""
    ones = [torch.ones(len(wave), dtype=torch.long) for wave in waves]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(waves, batch_first=True), pad(ones, batch_first=True)


def randomize(model: torch.nn.Module, seed: int = 1, scale: float = 0.2) -> torch.nn.Module:
    """Move every weight, so that norms are not ones and biases not zeros, and nothing equals by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "codebooks." not in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def vary_anchor(model: DinoSRForPreTraining) -> DinoSRForPreTraining:
    """Centre the scores of the anchor's head on those of noise, so that its most probable label changes over time."""
    with torch.no_grad():
        features = model.eval().dinosr(waveforms(1, 9_000, seed=3)).last_hidden_state[0]
        model.anchor_head.bias.copy_(-model.anchor_head.weight @ features.mean(dim=0))
    return model


def without_attention(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model, in which a frame depends on its neighbours only."""
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name.endswith("attention.out_proj.weight"):
                parameter.zero_()
    return copied


def pretraining_model(config: DinoSRConfig | None = None, seed: int = 0, **changes) -> DinoSRForPreTraining:
    """Return a model whose teacher is not its student."""
    torch.manual_seed(seed)
    return randomize(DinoSRForPreTraining(config or deterministic_config(**changes)))


def every_third(batch_size: int, num_frames: int, offset: int = 0) -> torch.Tensor:
    """Return a mask (B, T) of every third frame."""
    mask = torch.zeros(batch_size, num_frames, dtype=torch.bool)
    mask[:, offset::3] = True
    return mask


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
