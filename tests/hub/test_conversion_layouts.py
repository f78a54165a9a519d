"""Other layouts of checkpoints, the conversion back to the authors' layout, and the script."""

import argparse
import copy
import json
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub import ModelCard
from transformers import AutoProcessor, Data2VecAudioConfig, Data2VecAudioForCTC, Wav2Vec2Config, Wav2Vec2Model

from dinosr_hf import DinoSRConfig, DinoSRForCTC, DinoSRForPreTraining, DinoSRModel
from dinosr_hf.hub.conversion import (
    ConversionError,
    _text_normalization,
    convert,
    convert_to_fairseq,
    convert_to_spidr,
    statistics_table,
    unit_statistics,
)
from dinosr_hf.hub.conversion.fairseq import config_from_fairseq, settings_notes
from dinosr_hf.recognition.text import SPECIAL_TOKENS, TextNormalization
from dinosr_hf.utils.model_folder import save_folder
from scripts import FIXTURES, load_command
from tiny import tiny_config
from tolerances import SAME_ARITHMETIC

CASE = FIXTURES / "dev_tiny"
CHECKPOINT = CASE / "checkpoint.pt"


@pytest.fixture(scope="module")
def original():
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture
def checkpoint(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("layouts") / "out"
    convert(CHECKPOINT, out)
    return out


def save(content, tmp_path, name="edited.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_dictconfig_converts_to_the_same_model(folder, tmp_path):
    model = convert(CASE / "checkpoint_dictconfig.pt", tmp_path / "out")
    plain = DinoSRForPreTraining.from_pretrained(folder)
    assert equal_states(model, plain)
    assert model.config.to_diff_dict() == plain.config.to_diff_dict()
    model.codebooks.sums.data.zero_()
    assert not equal_states(model, plain)


def test_a_namespace_converts_to_the_same_model(checkpoint, folder, tmp_path):
    settings = {**checkpoint["cfg"]["model"], "arch": "dinosr"}
    checkpoint.update(args=argparse.Namespace(**settings), cfg=None)
    model = convert(save(checkpoint, tmp_path), tmp_path / "out")
    assert equal_states(model, DinoSRForPreTraining.from_pretrained(folder))


def test_every_setting_of_the_file_is_known(checkpoint):
    assert settings_notes(checkpoint) == []


def test_dropped_settings_are_reported(checkpoint, tmp_path, caplog):
    checkpoint["cfg"]["model"].update(mask_other=0.5, a_new_setting=1)
    convert(save(checkpoint, tmp_path), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for note in ("mask_other: 0.5 in the file, a setting of training", "a_new_setting: an unknown setting"):
        assert note in caplog.text and note in card


def test_a_decay_that_may_be_fairseq_s_is_reported(checkpoint, caplog, tmp_path):
    settings = {**checkpoint["cfg"]["model"], "arch": "dinosr", "ema_decay": 0.9999, "num_workers": 1}
    checkpoint.update(args=argparse.Namespace(**settings), cfg=None)
    convert(save(checkpoint, tmp_path), tmp_path / "out")
    assert "num_workers" not in caplog.text
    assert "ema_decay: 0.9999, which in a flat list of settings may be fairseq's own" in caplog.text


def test_the_state_of_the_optimizer_is_not_used_and_reported(checkpoint, folder, tmp_path, caplog):
    checkpoint["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    model = convert(save(checkpoint, tmp_path), tmp_path / "out")
    assert equal_states(model, DinoSRForPreTraining.from_pretrained(folder))
    assert "last_optimizer_state (the optimizer's moments" in caplog.text
    assert "`last_optimizer_state` | the optimizer" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("place", "name", "value"), [("task", "normalize", False), ("task", "sample_rate", 8_000)])
def test_models_of_other_waveforms_are_refused(checkpoint, tmp_path, place, name, value):
    checkpoint["cfg"][place] = {name: value}
    with pytest.raises(ConversionError, match=f"The checkpoint has {name}={value}: it was trained on waveforms that"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")
    checkpoint.update(args=argparse.Namespace(**checkpoint["cfg"]["model"], arch="dinosr", **{name: value}), cfg=None)
    with pytest.raises(ConversionError, match=f"The checkpoint has {name}={value}"):
        convert(save(checkpoint, tmp_path, "flat.pt"), tmp_path / "out")


def test_recognisers_of_other_waveforms_are_refused(recogniser, tmp_path):
    recogniser["cfg"]["model"]["normalize"] = "${task.normalize}"
    convert(save(recogniser, tmp_path), tmp_path / "of the task")
    recogniser["cfg"]["model"]["normalize"] = False
    with pytest.raises(ConversionError, match="The checkpoint has normalize=False"):
        convert(save(recogniser, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("layout", ["fairseq", "spidr"])
def test_settings_without_a_place_in_the_layout_are_named(layout, tmp_path, caplog):
    write = {"fairseq": convert_to_fairseq, "spidr": convert_to_spidr}[layout]
    plain = {"conv_pos_kernel_size": 3} | ({"mask_length": 10} if layout == "spidr" else {})
    save_folder(DinoSRForPreTraining(tiny_config(**plain)), tmp_path / "plain")
    write(tmp_path / "plain", tmp_path / "a" / "plain.pt")
    assert "no place" not in caplog.text
    changed = tiny_config(**plain, mask_min_spans=2, codebook_update_steps=4, reference_padding=True)
    save_folder(DinoSRForPreTraining(changed), tmp_path / "changed")
    write(tmp_path / "changed", tmp_path / "b" / "changed.pt")
    message = (
        "codebook_update_steps=4 (read back as 1), mask_min_spans=2 (read back as 1), reference_padding=True (read"
    )
    assert f"The file has no place for {message}" in caplog.text


def test_unknown_entries_are_refused(checkpoint, tmp_path):
    checkpoint["another"] = 1
    with pytest.raises(ConversionError, match="unknown entries: another"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")


def test_weights_in_half_precision_become_float32(checkpoint, tmp_path):
    checkpoint["model"]["mask_emb"] = checkpoint["model"]["mask_emb"].half()
    model = convert(save(checkpoint, tmp_path), tmp_path / "out")
    assert model.dinosr.masked_spec_embed.dtype == torch.float32


def test_weights_that_share_memory_in_the_file_are_separate(checkpoint, tmp_path):
    weights = checkpoint["model"]
    weights["encoder.layers.0.fc2.bias"] = weights["encoder.layers.1.fc2.bias"]
    turned = weights["encoder.layers.0.fc1.weight"]
    weights["encoder.layers.0.fc1.weight"] = turned.T.contiguous().T
    convert(save(checkpoint, tmp_path), tmp_path / "out")
    layers = DinoSRForPreTraining.from_pretrained(tmp_path / "out").dinosr.encoder.layers
    biases = [layers[i].feed_forward.output_dense.bias for i in range(2)]
    assert torch.equal(*biases) and biases[0].data_ptr() != biases[1].data_ptr()
    assert torch.equal(layers[0].feed_forward.intermediate_dense.weight, turned)


def test_weights_of_integers_are_refused(checkpoint, tmp_path):
    checkpoint["model"]["mask_emb"] = checkpoint["model"]["mask_emb"].long()
    with pytest.raises(ConversionError, match=r"mask_emb has dtype torch.int64"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder_layers", 10**9, "is not valid: num_hidden_layers=1000000000 is out of range: .* at most 1000"),
        ("pos_conv_depth", 10**9, "is not valid: num_conv_pos_embeddings=1000000000 is out of range: .* at most 100"),
        ("encoder_layers", 900, r"900 layers and .* but there are \d+ weights"),
    ],
)
def test_a_configuration_of_a_huge_model_is_refused(checkpoint, tmp_path, name, value, message):
    checkpoint["cfg"]["model"][name] = value
    with pytest.raises(ConversionError, match=message):
        convert(save(checkpoint, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("key", [3, "_codebook" + "9" * 5000], ids=["number", "long"])
def test_invalid_names_of_weights_are_refused(checkpoint, tmp_path, key):
    checkpoint["model"][key] = torch.zeros(2)
    with pytest.raises(ConversionError, match="a weight with an invalid name"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")


def test_a_freeze_that_is_not_a_boolean_is_refused(checkpoint, tmp_path):
    checkpoint["cfg"]["model"]["freeze_pre_enc_modules"] = "x"
    with pytest.raises(ConversionError, match="freeze_pre_enc_modules='x'; expected True or False"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")


def test_settings_of_another_type_are_refused(checkpoint, tmp_path):
    checkpoint["cfg"]["model"]["encoder_ffn_embed_dim"] = 4.5
    with pytest.raises(ConversionError, match=r"configuration is not valid: (?s:.)*intermediate_size"):
        convert(save(checkpoint, tmp_path), tmp_path / "out")
    for value in (None, 4.5, 0):
        checkpoint["cfg"]["model"]["encoder_layers"] = value
        with pytest.raises(ConversionError, match=f"encoder_layers={value}; expected a positive number"):
            convert(save(checkpoint, tmp_path), tmp_path / "out")


def test_only_the_encoder_can_be_converted(folder, tmp_path, caplog):
    model = convert(CHECKPOINT, tmp_path / "out", as_="model")
    assert type(model) is DinoSRModel
    assert equal_states(DinoSRModel.from_pretrained(tmp_path / "out"), DinoSRModel.from_pretrained(folder))
    assert "_codebook0 (not part of the encoder)" in caplog.text


def test_an_architecture_that_the_checkpoint_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"as_='ctc' does not apply to this.*pretraining or model"):
        convert(CHECKPOINT, tmp_path / "out", as_="ctc")


@pytest.mark.parametrize("name", ["dictionary", "config", "num_attention_heads"])
def test_arguments_of_other_layouts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}='4' does not apply to this checkpoint"):
        convert(CHECKPOINT, tmp_path / "out", **{name: 4})
    with pytest.raises(ValueError, match="objective='x' is unknown"):
        convert(CHECKPOINT, tmp_path / "out", objective="x")


def test_the_card_has_the_given_licence_or_asks_for_it(folder, tmp_path):
    assert ModelCard.load(folder / "README.md").data.get("license") is None
    assert "**To be filled in**" in (folder / "README.md").read_text()
    convert(CHECKPOINT, tmp_path / "out", license="cc-by-4.0")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0" and "To be filled in" not in card.text


# Back to the authors' layout


@pytest.mark.parametrize("copied", [False, True], ids=["frozen", "copied"])
def test_converting_there_and_back_is_bit_exact(checkpoint, tmp_path, copied):
    if copied:
        checkpoint["cfg"]["model"]["freeze_pre_enc_modules"] = False
        weights = checkpoint["model"]
        for name, prefix in (("cnn", "feature_extractor."), ("ln", "layer_norm."), ("proj", "post_extract_proj.")):
            own = {n.removeprefix(prefix): t + 0.5 for n, t in weights.items() if n.startswith(prefix)}
            weights[f"_pre_encoder_{name}"] = own
    convert(save(checkpoint, tmp_path), tmp_path / "out")
    back = torch.load(convert_to_fairseq(tmp_path / "out", tmp_path / "back.pt"), weights_only=True)
    assert back["model"].keys() == checkpoint["model"].keys()
    for name, value in checkpoint["model"].items():
        if isinstance(value, dict):
            assert value.keys() == back["model"][name].keys()
            pairs = [(value[key], back["model"][name][key]) for key in value]
        else:
            pairs = [(value, back["model"][name])]
        assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs), name
    assert config_from_fairseq(back).to_dict() == config_from_fairseq(checkpoint).to_dict()
    settings = checkpoint["cfg"]["model"]
    assert all(
        settings[name] == value for name, value in back["cfg"]["model"].items() if name != "conv_feature_layers"
    )
    again = convert(tmp_path / "back.pt", tmp_path / "again")
    assert equal_states(again, DinoSRForPreTraining.from_pretrained(tmp_path / "out"))


def test_the_authors_layout_has_no_usage_of_codewords_and_no_anchor(checkpoint, tmp_path):
    model = convert(save(checkpoint, tmp_path), tmp_path / "out")
    added = {"codebook_revival_share": 0.1, "num_anchor_labels": 5}
    reviving = DinoSRForPreTraining.from_pretrained(tmp_path / "out", **added)
    assert {"codebooks.usage", "anchor_head.weight"} <= set(reviving.state_dict())
    reviving.save_pretrained(tmp_path / "reviving")
    again = convert(convert_to_fairseq(tmp_path / "reviving", tmp_path / "back.pt"), tmp_path / "again")
    assert equal_states(again, model) and again.config.codebook_revival_share == 0


def test_a_model_without_convolutions_has_no_authors_layout(tmp_path):
    DinoSRForPreTraining(tiny_config(feature_encoder="log_mel")).save_pretrained(tmp_path / "mel")
    with pytest.raises(ConversionError, match=r"feature_encoder='log_mel' has no place in the authors' layout"):
        convert_to_fairseq(tmp_path / "mel", tmp_path / "back.pt")
    assert not (tmp_path / "back.pt").exists()


NO_PLACE = [
    ("fairseq", {"layer_norm_eps": 1e-2}),
    ("fairseq", {"freeze_mode": "shared"}),
    ("fairseq", {"num_conv_pos_embeddings": 1}),
    ("spidr", {"hidden_act": "relu"}),
    *((layout, {"feat_extract_activation": "relu"}) for layout in ("fairseq", "spidr")),
    *((layout, {"conv_pos_kernel_size": 2}) for layout in ("fairseq", "spidr")),
]


@pytest.mark.parametrize(("layout", "change"), NO_PLACE, ids=str)
def test_what_another_layout_cannot_say_is_refused(tmp_path, layout, change):
    DinoSRForPreTraining(tiny_config(**change)).save_pretrained(tmp_path / "model")
    write = convert_to_fairseq if layout == "fairseq" else convert_to_spidr
    with pytest.raises(ConversionError, match=rf"{next(iter(change))}=.* has no place in .* layout"):
        write(tmp_path / "model", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_an_encoder_has_no_authors_layout(tmp_path):
    convert(CHECKPOINT, tmp_path / "encoder", as_="model")
    with pytest.raises(ValueError, match=r"is a DinoSRModel\. The authors' layout needs"):
        convert_to_fairseq(tmp_path / "encoder", tmp_path / "back.pt")
    (tmp_path / "mine.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.pt exists"):
        convert_to_fairseq(tmp_path / "encoder", tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_text() == "mine"


# Recognisers

LETTERS = "|ETAOINSHR"


class Dictionary:
    """As fairseq's fine-tuning tasks keep it in their state."""

    def __init__(self):
        self.symbols, self.count, self.indices = ["<s>", "A"], [1, 9], {"<s>": 0, "A": 1}
        self.bos_word, self.extra_special_symbols = "<s>", None


Dictionary.__module__ = "fairseq.data.dictionary"


@pytest.fixture
def recogniser(checkpoint, monkeypatch):
    weights = {f"w2v_encoder.w2v_model.{n}": t for n, t in checkpoint["model"].items() if not n.startswith("heads")}
    torch.manual_seed(0)
    weights["w2v_encoder.proj.weight"] = torch.randn(4 + len(LETTERS), 32)
    weights["w2v_encoder.proj.bias"] = torch.randn(4 + len(LETTERS))
    settings = {"_name": "wav2vec_ctc", "w2v_args": checkpoint["cfg"], "mask_prob": 0.65, "layerdrop": 0.1}
    settings |= {"final_dropout": 0.2, "mask_channel_prob": 0.25, "apply_mask": True, "mask_channel_length": 8}
    for name in ("fairseq", "fairseq.data", "fairseq.data.dictionary"):  # for pickle
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["fairseq.data.dictionary"], "Dictionary", Dictionary, raising=False)
    state = {"task_state": {"target_dictionary": Dictionary()}}
    return {**checkpoint, **state, "cfg": {"model": settings}, "model": weights}


@pytest.fixture
def dictionary(tmp_path):
    (tmp_path / "dict.ltr.txt").write_text("".join(f"{letter} {9 - i}\n" for i, letter in enumerate(LETTERS)))
    return tmp_path / "dict.ltr.txt"


def test_a_recogniser_of_fairseq_is_converted(recogniser, dictionary, folder, tmp_path):
    with pytest.raises(ValueError, match=r"as_='ctc' needs the recogniser's labels\. Give its dictionary too"):
        convert(save(recogniser, tmp_path), tmp_path / "out", as_="ctc")
    model = convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=dictionary)
    assert type(model) is DinoSRForCTC
    assert equal_states(model.dinosr, DinoSRModel.from_pretrained(folder))
    assert torch.equal(model.lm_head.weight, recogniser["model"]["w2v_encoder.proj.weight"])
    config = model.config
    assert (config.mask_time_prob, config.layerdrop, config.final_dropout) == (0.65, 0.1, 0.2)
    assert (config.mask_feature_prob, config.mask_feature_length, config.vocab_size) == (0.25, 8, 14)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    # fairseq: 0 is its blank, 4 the first letter of the file
    assert tokenizer.decode([0, 5, 5, 0, 5, 4, 6, 0]) == "EE T"
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    assert TextNormalization.load(tmp_path / "out") == TextNormalization(case="upper", keep="")


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (["|", "A", "'", "É", "-"], TextNormalization(case="upper", keep="'-")),
        (["|", "a", "b"], TextNormalization(case="lower", keep="")),
        (["|", "a", "B"], None),
        (["|", "AA", "B"], None),
        (["|", "好", "不"], None),
        (["|", "I", "İ"], None),
    ],
)
def test_the_letters_of_a_dictionary_tell_the_text_normalisation(labels, rule):
    assert _text_normalization({label: number for number, label in enumerate([*SPECIAL_TOKENS, *labels])}) == rule


def test_a_recogniser_with_an_unprefixed_head_is_converted(recogniser, dictionary, tmp_path):
    weights = recogniser["model"]
    for kind in ("weight", "bias"):
        weights[f"proj.{kind}"] = weights.pop(f"w2v_encoder.proj.{kind}")
    model = convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=dictionary)
    assert torch.equal(model.lm_head.bias, weights["proj.bias"])


def test_a_recogniser_without_a_dictionary_gives_its_encoder(recogniser, tmp_path, caplog):
    assert type(convert(save(recogniser, tmp_path), tmp_path / "out")) is DinoSRModel
    assert "w2v_encoder.proj.weight (not part of the encoder)" in caplog.text
    assert "w2v_encoder.w2v_model._ema (of pre-training" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("E 5\nT 4\n", "has 6 labels including the 4 special ones, but the recogniser has 14"),
        ("E\n", "line 1: 'E' is not a new label and its count"),
        ("E 5\nE 4\n", "line 2: 'E 4' is not a new label"),
    ],
)
def test_wrong_dictionaries_are_refused(recogniser, tmp_path, text, message):
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(ConversionError, match=message):
        convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=tmp_path / "dict.txt")
    with pytest.raises(ConversionError, match=r"is not a file\. Give the dictionary"):
        convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=tmp_path / "none.txt")


def test_recognisers_with_another_encoder_or_unknown_weights_are_refused(recogniser, dictionary, tmp_path):
    recogniser["model"]["w2v_encoder.extra"] = torch.zeros(1)
    with pytest.raises(ConversionError, match=r"unknown weight: w2v_encoder\.extra"):
        convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=dictionary)
    recogniser["cfg"]["model"]["w2v_args"]["model"]["_name"] = "wav2vec2"
    with pytest.raises(ConversionError, match="w2v_args do not have the settings of a DinoSR or data2vec"):
        convert(save(recogniser, tmp_path), tmp_path / "out", dictionary=dictionary)


# data2vec


def test_data2vec_of_fairseq_gives_its_encoder(checkpoint, folder, tmp_path, caplog):
    settings = checkpoint["cfg"]["model"]
    settings.update(_name="data2vec_audio", discrete=None, instance_norm_target_layer=False)
    for name in [name for name in settings if name.startswith("codebook") or name == "discrete"]:
        del settings[name]
    weights = {n: t for n, t in checkpoint["model"].items() if not n.startswith(("heads", "_codebook"))}
    weights["final_proj.weight"] = torch.zeros(32, 32)
    model = convert(save({**checkpoint, "model": weights}, tmp_path), tmp_path / "out")
    assert equal_states(model, DinoSRModel.from_pretrained(folder))
    assert "final_proj.weight (of pre-training, not part of the encoder)" in caplog.text


def data2vec_folder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    convs = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "conv_pos_kernel_size": 5}
    torch.manual_seed(0)
    other = Data2VecAudioForCTC(
        Data2VecAudioConfig(**sizes, **convs, num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=4)
    )
    other.save_pretrained(tmp_path / "data2vec")
    return other.eval()


def test_data2vec_with_overlapping_weights_is_refused(tmp_path):
    data2vec_folder(tmp_path)
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "data2vec" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConversionError, match=r"model\.safetensors is damaged: .*Download it again"):
        convert(tmp_path / "data2vec", tmp_path / "out")


@pytest.mark.parametrize(("name", "value"), [("do_normalize", False), ("sampling_rate", 8_000)])
def test_data2vec_of_other_waveforms_is_refused(tmp_path, name, value):
    data2vec_folder(tmp_path)
    settings = {"do_normalize": True, "sampling_rate": 16_000, name: value}
    (tmp_path / "data2vec" / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConversionError, match=f"has {name}={value}, which is not supported; expected"):
        convert(tmp_path / "data2vec", tmp_path / "out")


def test_data2vec_of_transformers_gives_the_same_features(tmp_path, caplog):
    other = data2vec_folder(tmp_path)
    model = convert(tmp_path / "data2vec", tmp_path / "out")
    waveform = torch.randn(2, 700)
    with torch.no_grad():
        wanted = other.data2vec_audio(waveform).last_hidden_state
        torch.testing.assert_close(model(waveform).last_hidden_state, wanted, **SAME_ARITHMETIC)
    assert "lm_head.weight (a head)" in caplog.text


def test_other_folders_are_refused(tmp_path):
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    Wav2Vec2Model(config).save_pretrained(tmp_path / "wav2vec2")
    with pytest.raises(ConversionError, match="is a model of type 'wav2vec2', whose encoder is different"):
        convert(tmp_path / "wav2vec2", tmp_path / "out")
    (tmp_path / "wav2vec2" / "config.json").write_text('{"model_type": "data2vec-audio"}')
    with pytest.raises(ConversionError, match="lacks hidden_size"):
        convert(tmp_path / "wav2vec2", tmp_path / "out")


# The script


def test_the_script_converts_verifies_and_goes_back(tmp_path, make_audio, capsys):
    script = load_command("convert_checkpoint")
    with pytest.raises(SystemExit, match=r"convert_checkpoint\.py: none\.wav is not a file"):  # before the work
        script.main([str(CHECKPOINT), str(tmp_path / "out"), "--verify", "none.wav"])
    assert not (tmp_path / "out").exists()
    script.main([str(CHECKPOINT), str(tmp_path / "out"), "--verify", str(make_audio)])
    output = capsys.readouterr().out
    assert "a DinoSRForPreTraining" in output
    model = DinoSRForPreTraining.from_pretrained(tmp_path / "out").eval()
    rows = unit_statistics(model, make_audio)
    assert [layer for layer, _, _ in rows] == [2, 3, 4]
    for layer, perplexity, active in rows:
        assert 1 <= perplexity <= active <= 16
        assert f"{layer:5}  {perplexity:10.1f}  {active:6}" in output
    script.main([str(tmp_path / "out"), str(tmp_path / "back.pt"), "--to", "fairseq"])
    with pytest.raises(SystemExit, match="--to takes only a folder and a file"):
        script.main([str(tmp_path / "out"), str(tmp_path / "x.pt"), "--to", "spidr", "--num_attention_heads", "3"])
    assert (tmp_path / "back.pt").is_file()


def test_the_script_reports_errors(tmp_path):
    script = load_command("convert_checkpoint")
    with pytest.raises(SystemExit, match=r"convert_checkpoint\.py: .* is not a file"):
        script.main([str(tmp_path / "none.pt"), str(tmp_path / "out")])
    (tmp_path / "bad.json").write_text("{")
    spidr = str(FIXTURES / "spidr_tiny" / "checkpoint.pt")
    with pytest.raises(SystemExit, match="is not a configuration in JSON"):
        script.main([spidr, str(tmp_path / "out"), "--config", str(tmp_path / "bad.json")])


@pytest.fixture
def make_audio(tmp_path):
    noise = np.random.default_rng(0).standard_normal(16_000) * 0.1
    soundfile.write(tmp_path / "speech.wav", noise, 16_000)
    return tmp_path / "speech.wav"


def test_a_configuration_that_is_not_a_dictionary_is_refused(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(ConversionError, match="holds a list; expected a dictionary"):
        convert(FIXTURES / "spidr_tiny" / "checkpoint.pt", tmp_path / "out", config=tmp_path / "list.json")


@pytest.mark.parametrize("num_codebooks", [8, 7], ids=["published-size", "another-size"])
def test_published_figures_are_shown_only_for_the_published_size(make_audio, num_codebooks):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8, "conv_dim": [8] * 7}
    model = DinoSRForPreTraining(DinoSRConfig(**sizes, num_codebooks=num_codebooks)).eval()
    lines = statistics_table(model, make_audio).splitlines()
    assert len(lines) == 1 + num_codebooks
    assert ("published" in lines[0]) == (num_codebooks == 8)
    assert lines[1].split()[0] == str(13 - num_codebooks)
    assert lines[-1].split()[3:] == (["155", "215"] if num_codebooks == 8 else [])
