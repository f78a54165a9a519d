"""
Parity of `head_input="own_layer"` and its like with SpidR: a tiny checkpoint, its tensors and an 8-step training run.

`tests/fixtures/spidr_objective` was made by running package spidr unmodified; docs/parity.md says what the tensors
are.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinosr_hf import DinoSRForPreTraining, sample_span_mask
from dinosr_hf.hub.conversion import convert
from dinosr_hf.hub.conversion.spidr import read_spidr
from dinosr_hf.model.masking_dinosr import TorchDraws
from scripts import FIXTURES
from tolerances import ACTIVATIONS, CODEBOOK_COUNTS, CODEBOOK_SUMS, GRADIENTS, LOSSES, WEIGHTS

CASE = FIXTURES / "spidr_objective"
SETTINGS = json.loads((CASE / "config.json").read_text())["model"]
CASES = pytest.mark.parametrize("case", ["nopad", "pad"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("spidr") / "tiny"
    convert(CASE / "checkpoint.pt", out_dir, config=CASE / "config.json")
    return out_dir


@pytest.fixture(scope="module")
def inputs():
    return load_file(CASE / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs():
    return load_file(CASE / "outputs.safetensors")


@pytest.fixture(scope="module")
def trajectory():
    return load_file(CASE / "trajectory.safetensors")


def attention_mask_of(inputs, case):
    if case == "nopad":
        return None
    return (torch.arange(inputs["pad.source"].shape[1]) < inputs["pad.lengths"][:, None]).long()


def mask_of(frames, num_frames):
    """Masked frame numbers (B, M) to bool (B, T)."""
    mask = torch.zeros(len(frames), num_frames, dtype=torch.bool, device=frames.device)
    return mask.scatter_(1, frames.long(), True)


@torch.no_grad()
@CASES
def test_every_layer_matches_the_reference(folder, inputs, outputs, case):
    model = DinoSRForPreTraining.from_pretrained(folder, reference_padding=True)
    layers = range(1, model.config.num_hidden_layers + 1)
    got = model.dinosr(
        inputs[f"{case}.source"],
        attention_mask_of(inputs, case),
        feed_forward_layers=layers,
        output_hidden_states=True,
    )
    for ours, name in (
        (got.extract_features, "features_ln"),
        (torch.stack(got.hidden_states[1:]), "layer_out"),
        (torch.stack(got.feed_forward_outputs), "layer_ffn"),
    ):
        torch.testing.assert_close(ours, outputs[f"{case}.{name}"], **ACTIVATIONS)


@torch.no_grad()
def test_valid_frames_do_not_depend_on_the_padding_in_either_way(folder, inputs, outputs):
    model = DinoSRForPreTraining.from_pretrained(folder)
    got = model.dinosr(inputs["pad.source"], attention_mask_of(inputs, "pad"), feed_forward_layers=[1, 4])
    valid = ~inputs["pad.frame_padding_mask"]
    for ours, layer in zip(got.feed_forward_outputs, (0, 3), strict=True):
        recorded = outputs["pad.layer_ffn"][layer]
        torch.testing.assert_close(ours[valid], recorded[valid], **ACTIVATIONS)
        assert (ours - recorded)[~valid].abs().max() > 0.1


@torch.no_grad()
@CASES
def test_targets_codes_and_losses_match_the_reference(folder, inputs, outputs, case):
    model = DinoSRForPreTraining.from_pretrained(folder, reference_padding=True)
    source, attention_mask = inputs[f"{case}.source"], attention_mask_of(inputs, case)
    mask = mask_of(inputs[f"{case}.mask_indices"], model.config.num_frames(source.shape[1]))
    sums = model.codebooks.sums.clone()
    got = model(source, attention_mask, mask)
    want = {name.partition(".pretrain.")[2]: tensor for name, tensor in outputs.items() if name.startswith(case)}
    targets = model.compute_targets(source, model.dinosr(source, attention_mask).extract_features, attention_mask)
    torch.testing.assert_close(targets[:, mask], want["targets"], **ACTIVATIONS)
    num_masked = int(want["sample_size"])
    assert torch.equal(got.codes, want["assign"].long()) and got.num_masked_frames == num_masked
    torch.testing.assert_close(got.codebook_losses * num_masked, want["loss_per_codebook"], **LOSSES)
    torch.testing.assert_close(got.loss * num_masked, want["loss"], **LOSSES)
    perplexities = torch.stack([got.target_perplexity, got.prediction_perplexity])
    torch.testing.assert_close(perplexities, want["ppl_per_codebook"], **LOSSES)
    assert torch.equal(model.codebooks.sums, sums)  # evaluation moves nothing


@torch.no_grad()
def test_by_default_targets_do_not_depend_on_the_padding(folder, inputs, outputs):
    model = DinoSRForPreTraining.from_pretrained(folder)
    source, attention_mask = inputs["pad.source"], attention_mask_of(inputs, "pad")
    features = model.dinosr(source, attention_mask).extract_features
    mask = mask_of(inputs["pad.mask_indices"], features.shape[1])
    targets = model.compute_targets(source, features, attention_mask)
    assert (targets[:, mask] - outputs["pad.pretrain.targets"]).abs().max() > 1
    row = int(inputs["pad.lengths"].argmin())
    alone = source[row : row + 1, : inputs["pad.lengths"][row]]
    expected = model.compute_targets(alone, model.dinosr(alone).extract_features)
    torch.testing.assert_close(targets[:, row : row + 1, : expected.shape[2]], expected, **ACTIVATIONS)


@torch.no_grad()
@CASES
def test_units_are_the_heads_most_probable_codewords_of_their_own_layers(folder, inputs, outputs, case):
    model = DinoSRForPreTraining.from_pretrained(folder)
    source, attention_mask = inputs[f"{case}.source"], attention_mask_of(inputs, case)
    codes, lengths = model.encode_units(source, attention_mask, layers=[2, 3, 4])
    wanted = outputs[f"{case}.codebook_probs"].argmax(dim=-1)
    valid = torch.arange(codes.shape[2]) < lengths[:, None]
    assert torch.equal(codes[:, valid], wanted[:, valid])
    features = model.layer_features(source, attention_mask, [2, 4], "student_feed_forward")
    assert torch.equal(model.student_units(features, [2, 4])[:, valid], wanted[[0, 2]][:, valid])


@torch.no_grad()
def test_heads_on_the_last_layer_would_differ(folder, inputs, outputs):
    # negative control
    model = DinoSRForPreTraining.from_pretrained(folder, head_input="last_layer")
    probabilities = [head(model.dinosr(inputs["nopad.source"]).last_hidden_state).softmax(-1) for head in model.heads]
    assert (torch.stack(probabilities) - outputs["nopad.codebook_probs"]).abs().max() > 0.1


def start_of_trajectory(folder, trajectory, **changes):
    model = DinoSRForPreTraining.from_pretrained(folder, **changes)
    model.load_state_dict(weights_of(trajectory, "init"))
    return model.train()


def weights_of(trajectory, when):
    """Return the weights of the trajectory at a time, or its gradients, under our names."""
    parts = ("mask_embedding", "feature_", "student.", "teacher.", "heads.", "codebooks.")
    state = {name[len(when) + 1 :]: tensor for name, tensor in trajectory.items() if name.startswith(f"{when}.")}
    state = {name: tensor for name, tensor in state.items() if name.startswith(parts)}
    weights = read_spidr({"model": state}, SETTINGS).weights
    found = {weight.name: weight.tensor for weight in weights}
    for name in ("codebooks.sums", "codebooks.counts"):
        rows = [found.pop(f"{name}.{number}") for number in range(3) if f"{name}.{number}" in found]
        found |= {name: torch.stack(rows)} if rows else {}
    return found


def assert_weights_match(model, trajectory, when):
    state = model.state_dict()
    wanted = weights_of(trajectory, when)
    assert wanted.keys() == state.keys()
    for name, tensor in wanted.items():
        tolerance = WEIGHTS
        if name.startswith("codebooks."):
            tolerance = CODEBOOK_SUMS if name.endswith("sums") else CODEBOOK_COUNTS
        torch.testing.assert_close(state[name], tensor, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def run_trajectory(model, trajectory):
    plan = json.loads((CASE / "trajectory.json").read_text())
    options = plan["optimizer"]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        **{name: options[name] for name in ("lr", "betas", "eps", "weight_decay")},
    )
    for step in plan["steps"]:
        number, source = step["step"], trajectory[f"batch{step['batch']}.source"]
        frames = trajectory[f"step{number}.mask_indices"]
        output = model(source, None, mask_of(frames, model.config.num_frames(source.shape[1])))
        assert torch.equal(output.codes, trajectory[f"step{number}.assign"].long())
        losses = trajectory[f"step{number}.loss_per_codebook"]
        torch.testing.assert_close(output.codebook_losses * step["frames"], losses, **LOSSES)
        torch.testing.assert_close(output.loss.item(), step["loss_mean"], **LOSSES)
        assert output.target_perplexity.mean().item() == pytest.approx(step["target_ppl"], rel=1e-5)
        assert output.prediction_perplexity.mean().item() == pytest.approx(step["pred_ppl"], rel=1e-5)
        optimizer.zero_grad()
        output.loss.backward()
        if number == 1:
            assert_gradients_match(model, trajectory)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["max_norm"])
        assert norm.item() == pytest.approx(step["grad_norm_before_clip"], rel=1e-4)
        for group in optimizer.param_groups:
            group["lr"] = step["lr_used"][0]
        optimizer.step()
        assert model.update_targets(number)["ema_decay"] == pytest.approx(step["ema_decay"], abs=1e-12)
        if number == 1:
            assert_weights_match(model, trajectory, "step1")
    assert_weights_match(model, trajectory, "final")


def assert_gradients_match(model, trajectory):
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = weights_of(trajectory, "step1.grad")
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, **GRADIENTS, msg=lambda m, n=name: f"{n}: {m}")


def test_training_follows_the_reference_across_teacher_stop_and_freeze(folder, trajectory):
    model = start_of_trajectory(folder, trajectory)
    run_trajectory(model, trajectory)
    assert not any(p.requires_grad for p in model.dinosr.feature_extractor.parameters())


@pytest.mark.parametrize("changes", [{"freeze_front_end_step": None}, {"ema_threshold": 0.0}], ids=str)
def test_without_freeze_or_threshold_training_differs(folder, trajectory, changes):
    # negative controls
    model = start_of_trajectory(folder, trajectory, **changes)
    with pytest.raises(AssertionError):
        run_trajectory(model, trajectory)


@pytest.mark.parametrize("case", json.loads((CASE / "masks.json").read_text())["cases"], ids=lambda c: str(c["seed"]))
def test_span_masks_are_those_of_the_reference_sampler(case):
    generator = torch.Generator().manual_seed(case["seed"])
    lengths = [case["frames"] - padded for padded in case["padded_frames"]]
    mask = sample_span_mask(
        (len(lengths), case["frames"]),
        case["mask_prob"],
        case["mask_length"],
        min_spans=case["min_masks"],
        lengths=lengths,
        require_same_masks=True,
        generator=TorchDraws(generator),
    )
    assert [np.flatnonzero(row).tolist() for row in mask] == case["mask_indices"]
    assert float(torch.rand((), generator=generator)) == case["next_rand_after_call"]
