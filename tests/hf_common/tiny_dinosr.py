"""What a tiny DinoSR is: its configuration, inputs and labels for each head, its processor, a checkpoint folder."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor, set_seed

import dinosr_hf
from dinosr_hf import DinoSRConfig

BASE = "DinoSRModel"

# The automatic class of each model class, and the name table by which the mixins recognise such heads.
HEADS = {
    BASE: ("AutoModel", "MODEL_MAPPING_NAMES"),
    "DinoSRForPreTraining": ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    "DinoSRForCTC": ("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "DinoSRForSequenceClassification": (
        "AutoModelForAudioClassification",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    ),
    "DinoSRForAudioFrameClassification": (
        "AutoModelForAudioFrameClassification",
        "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    ),
    "DinoSRForXVector": ("AutoModelForAudioXVector", "MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES"),
}
MODELS = {name: getattr(dinosr_hf, name) for name in HEADS}

TINY_VALUES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.1,
    "layerdrop": 0.0,
    "initializer_range": 0.02,
    "feat_extract_activation": "gelu",
    "conv_dim": (32, 32, 32),
    "conv_stride": (4, 4, 4),
    "conv_kernel": (8, 8, 8),
    "conv_bias": False,
    "num_conv_pos_embeddings": 2,
    "conv_pos_kernel_size": 19,
    "num_conv_pos_embedding_groups": 2,
    "num_codebooks": 2,
    "codebook_size": 12,
    "codebook_decay": 0.9,
    "ema_decay": 0.999,
    "ema_end_decay": 0.9999,
    "mask_prob": 0.5,
    "mask_length": 2,
    "mask_min_spans": 2,
    "mask_time_prob": 0.5,
    "mask_time_length": 2,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "ctc_loss_reduction": "mean",
    "ctc_zero_infinity": True,
    "classifier_proj_size": 24,
    "tdnn_dim": (32, 32),
    "tdnn_kernel": (3, 1),
    "tdnn_dilation": (1, 1),
    "xvector_output_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The model as the paper has it, and with both departures from it that change its modules.
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "LogMel": {"feature_encoder": "log_mel", "num_anchor_labels": 6}}
DETERMINISTIC_VALUES = {
    name: 0.0 for name in TINY_VALUES if name.endswith("dropout") or name in ("layerdrop", "mask_time_prob")
}

LETTERS = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"])}


def tiny_config(**overrides: Any) -> DinoSRConfig:
    return DinoSRConfig(**{**TINY_VALUES, **overrides})


def num_frames(num_samples: int, variant: str = "") -> int:
    """Frames of the tiny model, by the textbook's formula rather than by the code under test."""
    conv = zip(TINY_VALUES["conv_kernel"], TINY_VALUES["conv_stride"], strict=True)
    for kernel, stride in [(400, 160), (2, 2)] if variant == "LogMel" else conv:
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


class DinoSRModelTester:
    """What the mixins ask about the model under test."""

    is_training = True

    def __init__(self, parent, batch_size=5, variant=""):
        self.parent = parent
        self.batch_size = batch_size
        self.variant = variant
        self.seq_length = 5120 if variant == "LogMel" else 1024
        self.encoder_seq_length = self.key_length = num_frames(self.seq_length, variant)
        self.hidden_size = TINY_VALUES["hidden_size"]
        self.num_hidden_layers = TINY_VALUES["num_hidden_layers"]
        self.num_attention_heads = TINY_VALUES["num_attention_heads"]
        self.num_labels = 2

    def get_config(self, **overrides):
        return tiny_config(**{**VARIANTS[self.variant], **overrides})

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(1)
        waveforms = torch.randn(self.batch_size, self.seq_length, generator=generator)
        attention_mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        for row in range(1, self.batch_size):  # right-padded, each row shorter than the one before
            attention_mask[row, self.seq_length - (self.get_config().inputs_to_logits_ratio + 6) * row :] = 0
        return self.get_config(), {"input_values": waveforms * attention_mask, "attention_mask": attention_mask}

    def labels_for(self, model_class):
        """The keyword arguments that make `model_class` return a loss; the same on every call."""
        batch_size, length = self.batch_size, self.encoder_seq_length
        generator = torch.Generator().manual_seed(2)
        match model_class.__name__:
            case "DinoSRModel":
                return {}
            case "DinoSRForPreTraining":
                mask = torch.zeros(batch_size, length, dtype=torch.bool)
                mask[:, 1:4] = True
                mask[:, 6] = True
                labels = {"mask_time_indices": mask}
                if num_labels := self.get_config().num_anchor_labels:
                    labels["anchor_labels"] = torch.randint(num_labels, (batch_size, length), generator=generator)
                return labels
            case "DinoSRForCTC":
                return {"labels": torch.randint(3, TINY_VALUES["vocab_size"], (batch_size, 3), generator=generator)}
            case "DinoSRForAudioFrameClassification":
                classes = torch.randint(0, self.num_labels, (batch_size, length), generator=generator)
                return {"labels": torch.nn.functional.one_hot(classes, self.num_labels)}
            case _:
                return {"labels": torch.zeros(batch_size, dtype=torch.long)}


def make_processor() -> Wav2Vec2Processor:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps(LETTERS))
        tokenizer = Wav2Vec2CTCTokenizer(str(vocabulary))
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=16_000, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )
    return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def write_checkpoint(folder: str | Path, name: str) -> None:
    """Model, tokenizer and feature extractor of the class `name` in one folder, as a user would publish it."""
    set_seed(0)
    MODELS[name](tiny_config()).eval().save_pretrained(folder)
    processor = make_processor()
    if name == "DinoSRForCTC":
        processor.save_pretrained(folder)
    else:
        processor.feature_extractor.save_pretrained(folder)
