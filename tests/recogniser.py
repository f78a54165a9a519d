"""A recogniser with its processor, for all that needs a folder of one: letters, tiny, with weights drawn at random."""

import json
from pathlib import Path

from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from dinosr_hf import DinoSRForCTC
from dinosr_hf.folders import feature_extractor
from tiny import randomize, tiny_config

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]


def letters_processor(folder: Path) -> Wav2Vec2Processor:
    """Of `VOCABULARY`; its files are in the folder then."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({label: number for number, label in enumerate(VOCABULARY)}))
    processor = Wav2Vec2Processor(feature_extractor(), Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))
    processor.save_pretrained(folder)
    return processor


def save_recogniser(folder: Path, **changes) -> DinoSRForCTC:
    """
    Write a recogniser and its processor; `changes` are of its configuration.

    Its weights are random, but far from zero: what it says is nonsense, different for different speech.
    """
    letters_processor(folder)
    model = randomize(DinoSRForCTC(tiny_config(**{"vocab_size": len(VOCABULARY), **changes}))).eval()
    model.save_pretrained(folder)
    return model
