"""Conversion of the authors' checkpoints: what is converted, and what is refused with which error."""

import ast
import copy

import pytest
import torch
from transformers import AutoFeatureExtractor

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion import ConversionError, convert
from dinosr_hf.hub.conversion.fairseq import config_from_fairseq
from dinosr_hf.hub.conversion.layout import parse_conv_layers
from scripts import FIXTURES

CHECKPOINT = FIXTURES / "dev_tiny" / "checkpoint.pt"


@pytest.fixture(scope="module")
def original():
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture
def checkpoint(original):
    return copy.deepcopy(original)


def refused(checkpoint, tmp_path, message):
    """Check that converting raises this error and leaves nothing behind."""
    file = tmp_path / "edited.pt"
    torch.save(checkpoint, file)
    with pytest.raises(ConversionError, match=message):
        convert(file, tmp_path / "out" / "folder")
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"edited.pt"}


@pytest.mark.parametrize(
    "text",
    [
        "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "[(8, 3, 2)]",
        " [(8, 3, 2), (9, 2, 1)] * 2 ",
        "[[8, 3, 2], [9, 2, 1]]",
        "([(4, 3, 2)] + [(5, 3, 2)]) * 3",
        "[(4, 3, 2)] * 0 + [(5, 3, 2)]",
    ],
)
def test_convolution_sizes_are_parsed_as_python_evaluates_them(text):
    assert parse_conv_layers(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("[]", id="no-layer"),
        pytest.param("[(1, 2, 3)] * 0", id="no-layer-left"),
        pytest.param("[(512, 10)]", id="pair"),
        pytest.param("[(512, 10, 5, 1)]", id="four-numbers"),
        pytest.param("[(512, 10, '5')]", id="text-for-a-number"),
        pytest.param("[(512, 10, 5.0)]", id="float"),
        pytest.param("[512, 10, 5]", id="flat"),
        pytest.param("(512, 10, 5)", id="no-list"),
        pytest.param("[(512, 10, 5)", id="open-bracket"),
        pytest.param("print('run')", id="call"),
        pytest.param("[(512, 10, 5)] + __import__('os').listdir()", id="call-added"),
        pytest.param("[(512, print(1), 5)]", id="call-inside"),
        pytest.param("[].__class__", id="attribute"),
        pytest.param("[(i, 1, 1) for i in range(3)]", id="comprehension"),
        pytest.param("[*[(1, 1, 1)]]", id="star"),
        pytest.param("[(1, 1, 1)] * 99999999999", id="huge-repeat"),
        pytest.param("[(1, 1, 1)] * 64 * 64 * 64 * 64 * 64", id="huge-repeats-multiplied"),
        pytest.param("[(1, 1, 1)] * 65", id="65-layers"),
        pytest.param("[(1, 1, 1)] * -1", id="negative-repeat"),
        pytest.param("[(1, 1, 1)] * 2.0", id="float-repeat"),
        pytest.param("[(1, 1, 1)] - [(1, 1, 1)]", id="minus"),
        pytest.param("(" * 300 + "[(1, 1, 1)]" + ")" * 300, id="deep"),
        pytest.param("[(1, 1, 1)]" + " + [(1, 1, 1)]" * 5000, id="long"),
        pytest.param("[(1, 1, 1)]\x00", id="null-byte"),
    ],
)
def test_other_expressions_are_refused(text):
    with pytest.raises(ConversionError, match=r"conv_feature_layers=.* is not a list of convolutions"):
        parse_conv_layers(text)


def test_a_call_in_the_configuration_is_never_run(checkpoint, tmp_path):
    witness = tmp_path / "witness"
    text = f"open({str(witness)!r}, 'w') or [(1, 1, 1)]"
    assert ast.parse(text)
    checkpoint["cfg"]["model"]["conv_feature_layers"] = text
    refused(checkpoint, tmp_path, "conv_feature_layers=")
    assert not witness.exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("layer_norm_first", True, "layer_norm_first=True, which is not supported; expected False"),
        ("extractor_mode", "default", "extractor_mode='default', which is not supported; expected 'layer_norm'"),
        ("layer_type", "conformer", "layer_type='conformer'"),
        ("discrete", False, "discrete=False"),
        ("crop_seq_to_multiple", 2, "crop_seq_to_multiple=2"),
        ("instance_norm_target_layer", False, "instance_norm_target_layer=False"),
        ("pos_conv_depth", 1, "pos_conv_depth=1, a single positional convolution"),
        ("conv_feature_layers", "x", "conv_feature_layers='x' is not a list"),
        ("_name", "wav2vec2", "has no configuration of a DinoSR model"),
    ],
)
def test_unsupported_settings_are_refused(checkpoint, tmp_path, setting, value, message):
    checkpoint["cfg"]["model"][setting] = value
    refused(checkpoint, tmp_path, message)


@pytest.mark.parametrize("setting", ["encoder_layers", "conv_feature_layers", "conv_pos", "codebook_size"])
def test_missing_settings_are_refused(checkpoint, tmp_path, setting):
    del checkpoint["cfg"]["model"][setting]
    refused(checkpoint, tmp_path, f"configuration lacks {setting}")


def test_invalid_settings_are_refused(checkpoint, tmp_path):
    checkpoint["cfg"]["model"]["encoder_attention_heads"] = 7
    file = tmp_path / "edited.pt"
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match="num_attention_heads=7 does not divide"):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WEIGHT = "encoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("mask_emb", "dinosr.masked_spec_embed"),
        (WEIGHT, "dinosr.encoder.layers.1.feed_forward.intermediate_dense.weight"),
        ("heads.0.bias", "heads.0.bias"),
        ("_codebook1", "codebooks.sums.1"),
        ("_codebook_cnts0", "codebooks.counts.0"),
        ("_ema", "teacher.layer_norm.bias"),
    ],
)
def test_missing_weights_are_refused(checkpoint, tmp_path, key, ours):
    del checkpoint["model"][key]
    refused(checkpoint, tmp_path, rf"lacks the weights for .*{ours}")


@pytest.mark.parametrize("key", ["encoder.layers.0.extra.weight", "target_glu.weight", "_codebook9"])
def test_unknown_weights_are_refused(checkpoint, tmp_path, key):
    checkpoint["model"][key] = torch.zeros(3)
    refused(checkpoint, tmp_path, rf"(unknown weight:|has no weight) {key}")


def test_an_unknown_weight_of_the_teacher_is_refused(checkpoint, tmp_path):
    checkpoint["model"]["_ema"]["layers.0.extra"] = torch.zeros(3)
    refused(checkpoint, tmp_path, r"unknown weight: _ema\.layers\.0\.extra")


def test_a_weight_of_a_layer_beyond_the_last_is_refused(checkpoint, tmp_path):
    key = "encoder.layers.99.fc1.bias"
    checkpoint["model"][key] = torch.zeros(3)
    refused(checkpoint, tmp_path, f"has no weight {key}")


def test_weights_of_another_shape_are_refused(checkpoint, tmp_path):
    rows, columns = checkpoint["model"][WEIGHT].shape
    checkpoint["model"][WEIGHT] = torch.zeros(rows, columns + 1)
    refused(checkpoint, tmp_path, rf"{WEIGHT} has shape \({rows}, {columns + 1}\); expected \({rows}, ")


def test_a_weight_that_is_not_a_tensor_is_refused(checkpoint, tmp_path):
    checkpoint["model"][WEIGHT] = [1.0, 2.0]
    refused(checkpoint, tmp_path, f"{WEIGHT} has shape list")


def test_a_nested_entry_that_is_not_a_dictionary_is_refused(checkpoint, tmp_path):
    checkpoint["model"]["_ema"] = torch.zeros(3)
    refused(checkpoint, tmp_path, "_ema is a Tensor; expected a dictionary")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({}, "has these entries: none", id="empty"),
        pytest.param({"weights": 1, "epoch": 2}, "has these entries: epoch, weights", id="another-dictionary"),
        pytest.param({"cfg": None, "model": {}}, "has no configuration", id="no-cfg"),
        pytest.param([1, 2], "holds a list, not a checkpoint's dictionary", id="list"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path, content, message):
    refused(content, tmp_path, message)


def test_a_checkpoint_without_weights_is_refused(checkpoint, tmp_path):
    del checkpoint["model"]
    refused(checkpoint, tmp_path, "has no weights under model")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", r"is empty \(0 bytes\)\. Download it again\.$"),
        (b"-1.5 the cat", r"is not a checkpoint that torch\.save wrote\.$"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer of 43 bytes.*git lfs pull"),
    ],
    ids=["empty", "text", "pointer"],
)
def test_other_files_are_no_checkpoints(tmp_path, content, problem):
    (tmp_path / "words.arpa").write_bytes(content)
    with pytest.raises(ConversionError, match=rf"words\.arpa {problem}"):
        convert(tmp_path / "words.arpa", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.pt", "."])
def test_a_path_that_is_not_a_file_is_refused(tmp_path, name):
    with pytest.raises(ConversionError, match="is not a file"):
        convert(tmp_path / name, tmp_path / "out")


def test_a_folder_with_files_is_refused_and_unchanged(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(CHECKPOINT, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ValueError, match="exists and is not empty"):
        convert(CHECKPOINT, tmp_path / "mine.txt")


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, folder, **kwargs):
        (folder / "half.txt").write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(DinoSRForPreTraining, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(CHECKPOINT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_folder_is_complete(tmp_path):
    (tmp_path / "out").mkdir()  # empty is fine
    model = convert(CHECKPOINT, tmp_path / "out")
    assert not model.training
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_dinosr.py"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    loaded = DinoSRForPreTraining.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.do_normalize and extractor.return_attention_mask and extractor.sampling_rate == 16_000


def test_the_configuration_has_the_settings_of_the_checkpoint(original):
    settings = original["cfg"]["model"]
    config = config_from_fairseq(original)
    assert config.hidden_size == settings["encoder_embed_dim"]
    assert config.num_hidden_layers == settings["encoder_layers"]
    assert config.num_codebooks == settings["average_top_k_layers"]
    assert config.conv_pos_kernel_size == max(3, settings["conv_pos"] // settings["pos_conv_depth"])
    layers = eval(settings["conv_feature_layers"])
    assert list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)) == layers
    assert config.freeze_teacher_step == settings["freeze_teacher_step"]


def test_a_checkpoint_without_a_freeze(checkpoint):
    checkpoint["cfg"]["model"]["freeze_teacher_step"] = -1
    assert config_from_fairseq(checkpoint).freeze_teacher_step is None


@pytest.mark.parametrize(("same_end", "wanted"), [(True, (None, 0)), (False, (0.5, 7))])
def test_annealing_of_the_codebooks(checkpoint, same_end, wanted):
    settings = checkpoint["cfg"]["model"]
    settings.update(codebook_init_decay=0.9, codebook_end_decay=0.9 if same_end else 0.5, codebook_end_decay_step=7)
    config = config_from_fairseq(checkpoint)
    assert (config.codebook_end_decay, config.codebook_end_decay_step) == wanted


def test_before_the_freeze_the_front_end_is_copied_from_the_student(checkpoint, tmp_path):
    checkpoint["cfg"]["model"]["freeze_pre_enc_modules"] = False
    torch.save(checkpoint, tmp_path / "edited.pt")
    model = convert(tmp_path / "edited.pt", tmp_path / "out")
    assert model.config.freeze_mode == "copied"
    state = model.state_dict()
    copies = [name for name in state if name.startswith("teacher.feature_")]
    assert copies
    assert all(torch.equal(state[name], state[name.replace("teacher", "dinosr", 1)]) for name in copies)


def test_after_the_freeze_the_front_end_is_read_from_the_checkpoint(checkpoint, tmp_path):
    checkpoint["cfg"]["model"]["freeze_pre_enc_modules"] = False
    weights = checkpoint["model"]
    for ours, theirs in (
        ("_pre_encoder_cnn", "feature_extractor."),
        ("_pre_encoder_ln", "layer_norm."),
        ("_pre_encoder_proj", "post_extract_proj."),
    ):
        weights[ours] = {n.removeprefix(theirs): t + 0.5 for n, t in weights.items() if n.startswith(theirs)}
        assert weights[ours]
    torch.save(checkpoint, tmp_path / "edited.pt")
    model = convert(tmp_path / "edited.pt", tmp_path / "out")
    state = model.state_dict()
    copies = [name for name in state if name.startswith("teacher.feature_")]
    assert copies
    for name in copies:
        assert torch.equal(state[name], state[name.replace("teacher", "dinosr", 1)] + 0.5), name


def test_copies_of_the_front_end_in_frozen_mode_are_refused(checkpoint, tmp_path):
    checkpoint["model"]["_pre_encoder_ln"] = {"weight": torch.zeros(3)}
    refused(checkpoint, tmp_path, r"has no weight _pre_encoder_ln\.weight")
