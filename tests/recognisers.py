"""Tiny models in folders as runs write them, the record of a run, and the scripts that open such a model."""

import json
from pathlib import Path

import torch
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

from dinosr_hf import DinoSRForCTC, DinoSRForPreTraining, DinoSRForSequenceClassification
from dinosr_hf.training.run_record import RunRecord
from dinosr_hf.utils.model_folder import feature_extractor, save_folder
from tiny import randomize, tiny_config, waveforms

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
LABELS = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "D"]
RECORD = RunRecord(
    task="automatic-speech-recognition",
    arguments={"learning_rate": 5e-5, "data": ["/home/jo/corpus/train"], "output_dir": "/home/jo/runs/asr"},
    base_model="/home/jo/runs/base",
    data=[{"name": "/home/jo/corpus/train", "split": None, "hours": 9.81, "utterances": 2763}],
    steps=20_000,
    evaluation=[
        {"dataset": "/home/jo/corpus/test", "split": None, "wer": 0.0823, "cer": 0.0217, "num_utterances": 410}
    ],
    versions={"dinosr_hf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    started="2026-11-25T09:00:00+00:00",
    finished="2026-11-25T15:30:00+00:00",
    hardware="1 x NVIDIA H100",
)
# Scripts that open one of the models: its name, and what follows its folder.
MODEL_SCRIPTS = {
    "extract_units": ("pretrained", "{data} --output_dir {out} --layers 3"),
    "fit_kmeans": ("pretrained", "{data} --output {out}.safetensors --layer 2"),
    "inspect_units": ("pretrained", "{data} --output {out}.html --layer 3"),
    "convert_checkpoint": ("pretrained", "{out} --to fairseq"),
    "transcribe": ("recogniser", "{data}"),
    "tune_decoding": ("recogniser", "{data} {out}.arpa"),
    "export_onnx": ("recogniser", "{out}"),
}


def tiny_processor(work: Path) -> Wav2Vec2Processor:
    path = Path(work) / "vocab.json"
    path.write_text(json.dumps({label: number for number, label in enumerate(LABELS)}))
    return Wav2Vec2Processor(feature_extractor=feature_extractor(), tokenizer=Wav2Vec2CTCTokenizer(str(path)))


def vary_labels(recogniser: DinoSRForCTC, seed: int = 2) -> None:
    """Centre the output on that of noise, so that the best label changes over time and is never special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        features = recogniser.eval().dinosr(waveforms(1, 4_000)).last_hidden_state[0]
        head = recogniser.lm_head
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
        head.bias.copy_(-head.weight @ features.mean(dim=0))
        head.bias[1:4] -= 1e3


def save_models(folder: Path) -> dict[str, torch.nn.Module]:
    """Write `recogniser`, `classifier` and `pretrained` into a folder, and return them by these names."""
    torch.manual_seed(0)
    models = {
        "recogniser": DinoSRForCTC(
            tiny_config(vocab_size=len(LABELS), pad_token_id=0, num_hidden_layers=1, num_codebooks=1)
        ),
        "classifier": DinoSRForSequenceClassification(tiny_config(num_labels=3)),
        "pretrained": DinoSRForPreTraining(tiny_config()),
    }
    for name, model in models.items():
        randomize(model.eval())
        if isinstance(model, DinoSRForCTC):
            vary_labels(model)
        save_folder(model, folder / name)
    tiny_processor(folder).save_pretrained(folder / "recogniser")
    (folder / "vocab.json").unlink()
    return models


def letters_processor(folder: Path) -> Wav2Vec2Processor:
    """Save a processor of `VOCABULARY` to the folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({label: number for number, label in enumerate(VOCABULARY)}))
    processor = Wav2Vec2Processor(feature_extractor(), Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))
    processor.save_pretrained(folder)
    return processor


def save_recogniser(folder: Path, **changes) -> DinoSRForCTC:
    """
    Save a recogniser and its processor; `changes` are of its configuration.

    Its weights are random but far from zero, so its output is nonsense that depends on the speech.
    """
    letters_processor(folder)
    model = randomize(DinoSRForCTC(tiny_config(**{"vocab_size": len(VOCABULARY), **changes}))).eval()
    model.save_pretrained(folder)
    return model
