"""Emissions of CTC that are nearly certain of a path, the labels they are of, and a tokenizer of labels."""

import json

import numpy as np
from transformers import Wav2Vec2CTCTokenizer

# Blank and delimiter are not in the usual places.
LABELS = ["a", "<pad>", "b", "|", "<unk>"]
NAMED = {"blank_id": 1, "word_delimiter_id": 3, "special_ids": [4]}
# "ab a", whose words are in frames 2 to 5 and 9.
PATH = ["<pad>", "<pad>", "a", "a", "<pad>", "b", "|", "|", "<pad>", "a", "<pad>", "<pad>"]
TIMES = {"frame_seconds": 0.02, "first_center": 0.0125}


def of_path(path, labels=LABELS):
    """Emissions (T, V) that are nearly certain of a path with one label per frame."""
    logits = np.full((len(path), len(labels)), -9.0)
    logits[np.arange(len(path)), [labels.index(label) for label in path]] = 0
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def tokenizer_of(folder, labels, **options):
    (folder / "vocab.json").write_text(json.dumps({label: index for index, label in enumerate(labels)}))
    return Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), **options)
