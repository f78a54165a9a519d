"""Conversion of spidr's layout: outputs equal those recorded from that package, and what is refused."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.hub.conversion import ConversionError, convert, convert_to_spidr
from dinosr_hf.hub.conversion.spidr import read_spidr
from scripts import FIXTURES
from tolerances import ACTIVATIONS, LOSSES

CASE = FIXTURES / "spidr_tiny"


@pytest.fixture(scope="module")
def original():
    return torch.load(CASE / "checkpoint.pt", weights_only=True)


@pytest.fixture
def checkpoint(original):
    return copy.deepcopy(original)


@pytest.fixture
def settings():
    return json.loads((CASE / "config.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spidr") / "out"
    convert(CASE / "checkpoint.pt", folder, config=CASE / "config.json")
    return DinoSRForPreTraining.from_pretrained(folder).eval()


@torch.no_grad()
def compute_outputs(model):
    """Return this package's values of the tensors that were recorded without padding."""
    inputs = load_file(CASE / "inputs.safetensors")
    source, mask = inputs["nopad.source"], inputs["nopad.mask_indices"]
    got = model.dinosr(source, output_hidden_states=True)
    features = got.extract_features
    targets = model.compute_targets(source, features)[:, mask]
    masked = model(source, None, mask)
    return {
        "x": got.last_hidden_state,
        "layer_out": torch.stack(got.hidden_states[1:]),
        "codebook_probs": torch.stack([head(got.last_hidden_state).softmax(dim=-1) for head in model.heads]),
        "pretrain.targets": targets,
        "pretrain.assign": model.codebooks.assign(targets),
        "pretrain.loss_sum": masked.loss * mask.sum() if masked.loss.ndim == 0 else masked.loss,
    }


@pytest.mark.parametrize("name", ["x", "layer_out", "codebook_probs", "pretrain.targets"])
def test_outputs_equal_the_recorded_ones(model, name):
    wanted = load_file(CASE / "outputs.safetensors")[f"nopad.{name}"]
    torch.testing.assert_close(compute_outputs(model)[name], wanted, **ACTIVATIONS)


def test_codewords_and_loss_equal_the_recorded_ones(model):
    wanted = load_file(CASE / "outputs.safetensors")
    got = compute_outputs(model)
    assert torch.equal(got["pretrain.assign"], wanted["nopad.pretrain.assign"])
    torch.testing.assert_close(got["pretrain.loss_sum"], wanted["nopad.pretrain.loss_sum"], **LOSSES)


@torch.no_grad()
def test_outputs_of_padded_utterances_equal_the_recorded_ones(model):
    # Like this package, spidr zeroes the padding before every positional convolution. Its outputs in the padding are
    # arbitrary; its targets are normalised with them, so targets are not compared.
    inputs, wanted = (load_file(CASE / f"{name}.safetensors") for name in ("inputs", "outputs"))
    source, frames = inputs["pad.source"], ~inputs["pad.frame_padding_mask"]
    lengths = torch.tensor([row.nonzero().max() + 1 for row in source])
    attention_mask = (torch.arange(source.shape[1]) < lengths[:, None]).long()
    assert torch.equal(model.config.num_frames(lengths), frames.sum(dim=1)) and not frames.all()
    got = model.dinosr(source, attention_mask, output_hidden_states=True)
    probabilities = torch.stack([head(got.last_hidden_state).softmax(dim=-1) for head in model.heads])
    pairs = {
        "x": got.last_hidden_state[None],
        "layer_out": torch.stack(got.hidden_states[1:]),
        "codebook_probs": probabilities,
        "pretrain.teacher_layer_ffn": model.layer_features(
            source, attention_mask, model.config.codebook_layers, "teacher"
        ),
    }
    for name, ours in pairs.items():
        recorded = wanted[f"pad.{name}"].view(ours.shape)
        torch.testing.assert_close(ours[:, frames], recorded[:, frames], **ACTIVATIONS)
        assert (ours - recorded).abs().max() > 0.01  # in the padding


def test_another_order_of_queries_keys_and_values_differs(model):
    # negative control
    other = copy.deepcopy(model)
    for layer in other.dinosr.encoder.layers:
        q, k = layer.attention.q_proj, layer.attention.v_proj
        q.weight.data, k.weight.data = k.weight.data, q.weight.data
    wanted = load_file(CASE / "outputs.safetensors")["nopad.x"]
    assert (compute_outputs(other)["x"] - wanted).abs().max() > 0.01


def test_the_configuration_has_the_settings_of_the_file(model, settings):
    wanted = settings["model"]
    config = model.config
    assert config.freeze_mode == "frozen" and not config.reference_padding
    assert config.freeze_teacher_step == wanted["freeze_step"]
    assert config.conv_pos_kernel_size == wanted["encoder_pos_conv_kernel"] // wanted["encoder_pos_conv_depth"]
    assert (config.ema_decay, config.ema_end_decay, config.ema_anneal_steps) == (0.9, 0.99, 3)


def test_without_a_configuration_sizes_come_from_shapes(checkpoint, settings):
    derived = read_spidr(checkpoint, None, num_attention_heads=4, objective="dinosr")
    wanted = read_spidr(checkpoint, settings).config
    assert len(derived.notes) == 3 and "attention heads: 4, as given" in derived.notes[1]
    for name in (
        *("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "num_conv_pos_embeddings", "conv_pos_kernel_size"),
        *("num_conv_pos_embedding_groups", "codebook_size", "num_codebooks"),
    ):
        assert list(map(str, [getattr(derived.config, name)])) == list(map(str, [getattr(wanted, name)])), name


def test_the_error_asks_for_heads_that_shapes_do_not_tell(checkpoint):
    with pytest.raises(ConversionError, match=r"do not tell the number of attention heads.*--num_attention_heads"):
        read_spidr(checkpoint, None)


def test_the_error_asks_for_strides_that_shapes_do_not_tell(checkpoint):
    key = "feature_extractor.conv_layers.0.conv.weight"
    checkpoint["model"][key] = torch.zeros(16, 1, 9)
    with pytest.raises(ConversionError, match=r"kernels \[9, 3.*shapes do not tell their strides.*--config"):
        read_spidr(checkpoint, None, num_attention_heads=4)


def test_shapes_of_other_dimensions_are_refused(checkpoint):
    checkpoint["model"]["student.pos_conv_embed.convs.0.weight"] = torch.zeros(3)
    with pytest.raises(ConversionError, match=r"convs\.0\.weight has shape \(3,\); expected 3 dimensions"):
        read_spidr(checkpoint, None, num_attention_heads=4)


def test_biases_of_the_fused_matrix_are_split(checkpoint, settings, tmp_path):
    for side in ("student", "teacher"):
        for layer in range(4):
            checkpoint["model"][f"{side}.layers.{layer}.attention.qkv.bias"] = torch.arange(96.0)
    settings["model"]["encoder_qkv_bias"] = True
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save(checkpoint, tmp_path / "biased.pt")
    model = convert(tmp_path / "biased.pt", tmp_path / "out", config=tmp_path / "config.json")
    attention = model.dinosr.encoder.layers[3].attention
    assert torch.equal(attention.q_proj.bias, torch.arange(32.0))
    assert torch.equal(attention.v_proj.bias, torch.arange(64.0, 96.0))


OBJECTIVE = FIXTURES / "spidr_objective"


@pytest.fixture
def spidr():
    return torch.load(OBJECTIVE / "checkpoint.pt", weights_only=True)


def test_a_checkpoint_of_the_spidr_objective_is_a_whole_model(tmp_path):
    # By the config.json beside the file. tests/model/test_parity_spidr.py compares its outputs.
    model = convert(OBJECTIVE / "checkpoint.pt", tmp_path / "out")
    assert type(model) is DinoSRForPreTraining
    config = DinoSRForPreTraining.from_pretrained(tmp_path / "out").config
    assert (config.head_input, config.ema_schedule, config.qkv_bias) == ("own_layer", "exponential", False)
    assert (config.ema_timescale, config.ema_threshold, config.freeze_front_end_step) == (2.5, 0.03, 7)
    assert config.freeze_teacher_step is None


def test_an_objective_that_nothing_tells_is_asked_for(spidr):
    with pytest.raises(ConversionError, match=r"does not tell whether .*--config.* --objective dinosr .*spidr_base"):
        read_spidr(spidr, None, num_attention_heads=4)
    layout = read_spidr(spidr, None, num_attention_heads=4, objective="spidr")
    assert (layout.config.head_input, layout.config.freeze_front_end_step) == ("own_layer", 200_000)
    assert read_spidr(spidr, None, num_attention_heads=4, objective="dinosr").config.head_input == "last_layer"


def test_a_norm_that_was_never_trained_tells_the_objective(spidr):
    spidr["model"]["student.layers.3.final_layer_norm.weight"] = torch.ones(32)
    spidr["model"]["student.layers.3.final_layer_norm.bias"] = torch.zeros(32)
    assert read_spidr(spidr, None, num_attention_heads=4).config.head_input == "own_layer"
    with pytest.raises(ConversionError, match=r"is of the objective spidr, not dinosr\. Leave --objective out"):
        read_spidr(spidr, None, num_attention_heads=4, objective="dinosr")


def test_a_flat_state_dict_is_read_as_a_checkpoint(spidr, tmp_path):
    torch.save(spidr["model"], tmp_path / "final.pt")
    (tmp_path / "config.json").write_bytes((OBJECTIVE / "config.json").read_bytes())
    flat = convert(tmp_path / "final.pt", tmp_path / "flat").state_dict()
    whole = convert(OBJECTIVE / "checkpoint.pt", tmp_path / "whole").state_dict()
    assert all(torch.equal(flat[name], tensor) for name, tensor in whole.items())


def test_what_the_configuration_tells_is_not_taken_from_the_command_line(tmp_path):
    message = r"num_attention_heads=8 is for a checkpoint without config\.json, and \S+/config\.json tells the number"
    with pytest.raises(ValueError, match=message):
        convert(OBJECTIVE / "checkpoint.pt", tmp_path / "out", num_attention_heads=8)


def test_a_folder_with_a_checkpoint_is_asked_for_the_file(tmp_path):
    shutil.copy(OBJECTIVE / "config.json", tmp_path)
    shutil.copy(OBJECTIVE / "checkpoint.pt", tmp_path / "final.pt")
    with pytest.raises(ConversionError, match=r"is not a model's folder .* Give the checkpoint in it: \S+/final\.pt"):
        convert(tmp_path, tmp_path / "out")


def test_classifiers_of_labelled_frames_are_named_and_left(spidr, tmp_path, caplog):
    spidr["model"]["supervised_classifiers.de.output_layer.weight"] = torch.zeros(40, 32)
    torch.save(spidr | {"supervised_epoch": 3}, tmp_path / "step_200000.pt")
    convert(tmp_path / "step_200000.pt", tmp_path / "out", config=OBJECTIVE / "config.json")
    assert "supervised_classifiers.de.output_layer.weight (a classifier of labelled frames)" in caplog.text
    assert "supervised_epoch (state of the training run)" in caplog.text


@pytest.mark.parametrize("case", [CASE, OBJECTIVE], ids=["dinosr", "spidr"])
def test_there_and_back_is_bit_for_bit(case, tmp_path):
    convert(case / "checkpoint.pt", tmp_path / "out", config=case / "config.json")
    file = convert_to_spidr(tmp_path / "out", tmp_path / "back.pt")
    state, original = (torch.load(f, weights_only=True)["model"] for f in (file, case / "checkpoint.pt"))
    assert state.keys() == original.keys()
    assert [name for name, tensor in original.items() if not torch.equal(state[name], tensor)] == []
    settings, wanted = (json.loads((f / "config.json").read_text())["model"] for f in (tmp_path, case))
    unused = {"ema_final_decay", "ema_final_step"} if case == OBJECTIVE else set()
    assert {name: settings[name] for name in settings.keys() - unused} == {
        n: wanted[n] for n in wanted.keys() - unused
    }


def test_what_has_no_place_in_the_layout_is_refused(model, tmp_path):
    for change in ({"ema_schedule": "exponential"}, {"freeze_front_end_step": 5}, {"freeze_mode": "shared"}):
        model.save_pretrained(tmp_path / "changed")
        config = model.config.__class__.from_pretrained(tmp_path / "changed", **change)
        config.save_pretrained(tmp_path / "changed")
        with pytest.raises(ConversionError, match=f"{next(iter(change))}=.* has no place in spidr's layout"):
            convert_to_spidr(tmp_path / "changed", tmp_path / "x.pt")


def test_a_failed_attempt_can_be_repeated(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space"):
            convert_to_spidr(tmp_path / "model", tmp_path / "back" / "x.pt")
    assert convert_to_spidr(tmp_path / "model", tmp_path / "back" / "x.pt").exists()


def test_an_existing_configuration_is_not_replaced(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json exists, and .*x\.pt needs one of its own"):
        convert_to_spidr(tmp_path, tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"encoder_layer_norm_first": True}, "encoder_layer_norm_first=True, which is not supported", id="pre-norm"
        ),
        pytest.param({"extractor_mode": "group_norm"}, "extractor_mode='group_norm'", id="group-norm"),
        pytest.param({"extractor_conv_layer_config": [[1, 2]]}, "is not a list of convolutions", id="convs"),
        pytest.param({"encoder_num_layers": "x"}, "encoder_num_layers='x'; expected a positive number", id="no-count"),
        pytest.param({"codebook_size": "x"}, "configuration is not valid: (?s:.)*codebook_size", id="type"),
        pytest.param({"new": 1}, "unknown setting: new=1", id="unknown"),
    ],
)
def test_unsupported_settings_are_refused(checkpoint, settings, change, message):
    settings["model"].update(change)
    with pytest.raises(ConversionError, match=message):
        read_spidr(checkpoint, settings)


@pytest.mark.parametrize("inner", ["spidr", [1], None], ids=repr)
def test_a_configuration_of_another_form_is_refused_by_name(checkpoint, inner):
    with pytest.raises(ConversionError, match="The configuration has an unknown setting: model="):
        read_spidr(checkpoint, {"model": inner})


@pytest.mark.parametrize("step", [float("inf"), float("nan")])
def test_a_step_that_is_no_number_is_left_out(checkpoint, settings, step):
    state = {**checkpoint["model"], "current_step": torch.tensor([step])}
    assert not hasattr(read_spidr({"model": state}, settings).config, "current_step")


def test_missing_settings_are_refused(checkpoint, settings):
    del settings["model"]["encoder_num_heads"]
    with pytest.raises(ConversionError, match="configuration lacks encoder_num_heads"):
        read_spidr(checkpoint, settings)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("student.extra", torch.zeros(1), "has an unknown weight: student.extra"),
        ("student.layers.0.attention.qkv.weight", torch.zeros(95, 32), r"shape \(95, 32\); expected three parts"),
        ("heads.0.0.bias", torch.zeros(7), r"heads.0.0.bias has shape \(7,\); expected \(16,\)"),
    ],
)
def test_unknown_and_misshapen_weights_are_refused(checkpoint, tmp_path, key, value, message):
    checkpoint["model"][key] = value
    torch.save(checkpoint, tmp_path / "edited.pt")
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "edited.pt", tmp_path / "out", config=CASE / "config.json")
    assert not (tmp_path / "out").exists()
