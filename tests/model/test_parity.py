"""
Parity with the paper's code: a tiny checkpoint written by it, its intermediate tensors and an 8-step training run.

`tests/fixtures/dev_tiny` was made by running the authors' code unmodified; docs/parity.md says what the tensors are.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dinosr_hf import DinoSRForPreTraining, DinoSRModel, sample_span_mask
from dinosr_hf.hub.conversion import convert
from dinosr_hf.hub.conversion.fairseq import ENCODER_KEYS, STUDENT_KEYS
from dinosr_hf.hub.conversion.layout import rename
from scripts import FIXTURES
from tolerances import ACTIVATIONS, CODEBOOK_COUNTS, CODEBOOK_SUMS, GRADIENTS, KEY_BIASES, LOSSES, WEIGHTS

CASE = FIXTURES / "dev_tiny"
CASES = pytest.mark.parametrize("case", ["nopad", "pad"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("parity") / "dev-tiny"
    convert(CASE / "checkpoint.pt", out_dir)
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


def attention_mask_of(tensors, name):
    padding = tensors.get(f"{name}.padding_mask")
    return None if padding is None else (~padding).long()


def record(modules):
    """Keep what each module returns, in order."""
    seen = []
    for module in modules:
        module.register_forward_hook(lambda _module, _args, output: seen.append(output.detach().clone()))
    return seen


def by_our_names(tensors, prefix):
    """Fixture tensors under a prefix, by the names of our state dict; codebooks stay apart."""
    keys = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {rename(key, STUDENT_KEYS, prefix): tensor for key, tensor in keys.items()}


def tolerance_of(name):
    return KEY_BIASES if name.endswith("k_proj.bias") else WEIGHTS


@CASES
def test_encoder_matches_the_reference_at_every_layer(folder, inputs, outputs, case):
    model = DinoSRModel.from_pretrained(folder, reference_padding=True).eval()
    conv = record([model.feature_extractor])
    normalised = record([model.feature_projection.layer_norm])
    projected = record([model.feature_projection.projection])
    positions = record([model.encoder.pos_conv_embed])
    fed_forward = record([layer.feed_forward for layer in model.encoder.layers])
    with torch.no_grad():
        got = model(inputs[f"{case}.source"], attention_mask_of(inputs, case), output_hidden_states=True)

    def close(tensor, name):
        torch.testing.assert_close(tensor, outputs[f"{case}.{name}"], **ACTIVATIONS)

    close(conv[0].transpose(1, 2), "conv_features")
    close(normalised[0], "features_ln")
    close(got.extract_features, "features_ln")
    close(projected[0], "features_proj")
    close(positions[0], "pos_conv_out")
    close(got.hidden_states[0], "encoder_in")
    close(torch.stack(got.hidden_states[1:]), "layer_out")
    close(torch.stack(fed_forward), "layer_ffn")
    close(got.last_hidden_state, "x")


def test_padded_encoder_differs_from_the_reference_by_default(folder, inputs, outputs):
    # the negative control: without reference_padding the reference's leak of padding is not there
    model = DinoSRModel.from_pretrained(folder).eval()
    with torch.no_grad():
        got = model(inputs["pad.source"], attention_mask_of(inputs, "pad")).last_hidden_state
    assert (got - outputs["pad.x"]).abs().max() > 0.1


@CASES
def test_pretraining_forward_matches_the_reference(folder, inputs, outputs, case):
    model = DinoSRForPreTraining.from_pretrained(folder, reference_padding=True).eval()
    sums, counts = model.codebooks.sums.clone(), model.codebooks.counts.clone()
    teacher_ffn = record([layer.feed_forward for layer in model.teacher.layers])
    student_ffn = record([layer.feed_forward for layer in model.dinosr.encoder.layers])
    logits = record(model.heads)
    mask = inputs[f"{case}.mask_indices"]
    attention_mask = attention_mask_of(inputs, case)
    with torch.no_grad():
        got = model(inputs[f"{case}.source"], attention_mask, mask, output_hidden_states=True)
        features = model.dinosr(inputs[f"{case}.source"], attention_mask).extract_features
        targets = model.compute_targets(inputs[f"{case}.source"], features, attention_mask)[:, mask]
    want = {name.removeprefix(f"{case}.pretrain."): tensor for name, tensor in outputs.items() if case in name}

    num_codebooks, num_masked = want["assign"].shape
    torch.testing.assert_close(torch.stack(got.hidden_states[1:]), want["student_layer_out"], **ACTIVATIONS)
    torch.testing.assert_close(torch.stack(student_ffn[:4]), want["student_layer_ffn"], **ACTIVATIONS)
    torch.testing.assert_close(
        torch.stack(teacher_ffn[4 - num_codebooks : 4]), want["teacher_layer_ffn"], **ACTIVATIONS
    )
    torch.testing.assert_close(targets, want["targets"], **ACTIVATIONS)
    torch.testing.assert_close(torch.stack(logits).log_softmax(dim=-1), want["log_probs"], **ACTIVATIONS)
    assert torch.equal(got.codes, want["assign"])
    assert got.num_masked_frames == want["sample_size"] == num_masked
    torch.testing.assert_close(got.codebook_losses, want["loss_per_codebook"] / num_masked, **LOSSES)
    torch.testing.assert_close(got.loss, want["loss"] / num_masked, **LOSSES)
    torch.testing.assert_close(got.target_perplexity.mean(), want["target_ppl"], **LOSSES)
    torch.testing.assert_close(got.prediction_perplexity.mean(), want["pred_ppl"], **LOSSES)
    assert torch.equal(model.codebooks.sums, sums) and torch.equal(model.codebooks.counts, counts)


class FairseqAdam(torch.optim.AdamW):
    """AdamW with epsilon added before the bias correction, as in the optimizer that made the trajectory (T10)."""

    def step(self, closure=None):
        for group in self.param_groups:
            steps = [int(state["step"]) for state in self.state.values() if "step" in state]
            group["eps"] = 1e-6 / (1 - group["betas"][1] ** (max(steps, default=0) + 1)) ** 0.5
        return super().step(closure)


def start_of_trajectory(folder, trajectory, freeze_mode):
    model = DinoSRForPreTraining.from_pretrained(folder, reference_padding=True, freeze_mode=freeze_mode)
    state = model.state_dict()
    state.update(by_our_names(trajectory, "init.student."))
    for name in encoder_names(model):
        state[f"teacher.{name}"] = state[f"dinosr.encoder.{name}"]
    num_codebooks = model.config.num_codebooks
    state["codebooks.sums"] = torch.stack([trajectory[f"init.codebook.{i}"] for i in range(num_codebooks)])
    state["codebooks.counts"] = torch.stack([trajectory[f"init.codebook_cnts.{i}"] for i in range(num_codebooks)])
    model.load_state_dict(state)
    return model.train()


def encoder_names(model):
    return [name for name, _ in model.dinosr.encoder.named_parameters()]


def assert_codebooks_match(model, trajectory, when):
    for i in range(model.config.num_codebooks):
        torch.testing.assert_close(model.codebooks.sums[i], trajectory[f"{when}.codebook.{i}"], **CODEBOOK_SUMS)
        torch.testing.assert_close(
            model.codebooks.counts[i], trajectory[f"{when}.codebook_cnts.{i}"], **CODEBOOK_COUNTS
        )


def assert_weights_match(model, trajectory, when):
    state = model.state_dict()
    student = by_our_names(trajectory, f"{when}.student.")
    assert student
    for name, tensor in student.items():
        torch.testing.assert_close(state[name], tensor, **tolerance_of(name), msg=lambda m, n=name: f"{n}: {m}")


def assert_teacher_matches(model, trajectory, name):
    prefix = f"{name}."
    keys = {key[len(prefix) :]: tensor for key, tensor in trajectory.items() if key.startswith(prefix)}
    assert keys
    teacher = model.teacher.state_dict()
    for key, tensor in keys.items():
        ours = rename(key, ENCODER_KEYS, prefix)
        torch.testing.assert_close(teacher[ours], tensor, **tolerance_of(ours), msg=lambda m, n=ours: f"{n}: {m}")


def plan_of_trajectory(model):
    plan = json.loads((CASE / "trajectory.json").read_text())
    optimizer = FairseqAdam(
        [p for p in model.parameters() if p.requires_grad],
        lr=plan["optimizer"]["lr"],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    return plan, optimizer


def run_trajectory(model, trajectory, check_first_step=False):
    plan, optimizer = plan_of_trajectory(model)
    for step in plan["steps"]:
        number = step["step"]
        batch = f"batch{step['batch']}"
        mask = trajectory[f"step{number}.mask_indices"]
        output = model(trajectory[f"{batch}.source"], attention_mask_of(trajectory, batch), mask)
        assert torch.equal(output.codes, trajectory[f"step{number}.assign"].long())
        per_frame = trajectory[f"step{number}.loss_per_codebook"] / step["sample_size"]
        torch.testing.assert_close(output.codebook_losses, per_frame, **LOSSES)
        assert output.num_masked_frames == step["sample_size"]
        assert output.target_perplexity.mean().item() == pytest.approx(step["target_ppl"], rel=1e-5)
        assert output.prediction_perplexity.mean().item() == pytest.approx(step["pred_ppl"], rel=1e-5)
        optimizer.zero_grad()
        output.loss.backward()
        if number == 1 and check_first_step:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            wanted = by_our_names(trajectory, "step1.grad.")
            assert gradients.keys() == wanted.keys()
            for name, gradient in wanted.items():
                torch.testing.assert_close(gradients[name], gradient, **GRADIENTS)
        optimizer.step()
        decays = model.update_targets(number)
        assert decays["codebook_decay"] == pytest.approx(step["codebook_decay_used"])
        if number == 1 and check_first_step:
            assert_codebooks_match(model, trajectory, "step1")
            assert_weights_match(model, trajectory, "step1")
            assert_teacher_matches(model, trajectory, "step1.teacher")
        if number < len(plan["steps"]):
            assert decays["ema_decay"] == pytest.approx(plan["steps"][number]["ema_decay"])


def test_training_follows_the_reference_across_the_freeze(folder, trajectory):
    model = start_of_trajectory(folder, trajectory, freeze_mode="shared")
    run_trajectory(model, trajectory, check_first_step=True)
    assert_codebooks_match(model, trajectory, "final")
    assert_weights_match(model, trajectory, "final")
    assert_teacher_matches(model, trajectory, "final.teacher_next")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_follows_the_reference(folder, trajectory, dtype):
    # The bounds that docs/parity.md states; what is rounded otherwise moves single frames to other codewords.
    model = start_of_trajectory(folder, trajectory, freeze_mode="shared")
    plan, optimizer = plan_of_trajectory(model)
    for step in plan["steps"]:
        number, batch = step["step"], f"batch{step['batch']}"
        mask = trajectory[f"step{number}.mask_indices"]
        with torch.autocast("cpu", dtype):
            output = model(trajectory[f"{batch}.source"], attention_mask_of(trajectory, batch), mask)
        assert (output.codes == trajectory[f"step{number}.assign"]).float().mean() > 0.8
        wanted = trajectory[f"step{number}.loss_per_codebook"] / step["sample_size"]
        torch.testing.assert_close(output.codebook_losses, wanted, atol=0, rtol=0.25)
        assert not torch.equal(output.codebook_losses, wanted)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.update_targets(number)
    state = model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    final, start = (by_our_names(trajectory, f"{when}.student.") for when in ("final", "init"))
    error = sum((state[name] - tensor).square().sum() for name, tensor in final.items()) ** 0.5
    moved = sum((start[name] - tensor).square().sum() for name, tensor in final.items()) ** 0.5
    assert error < 0.25 * moved


def test_frozen_mode_stops_what_the_reference_goes_on_training(folder, trajectory):
    # the negative control of the freeze boundary: the authors meant to freeze the convolutions, their code does not
    model = start_of_trajectory(folder, trajectory, freeze_mode="frozen")
    with pytest.raises(AssertionError):
        run_trajectory(model, trajectory)
    assert not any(p.requires_grad for p in model.dinosr.feature_extractor.parameters())


def test_span_masks_are_the_reference_sampler_s():
    masks = json.loads((FIXTURES / "masks.json").read_text())
    arguments = masks["args"]
    for case in masks["cases"]:
        generator = np.random.RandomState(case["seed"])
        mask = sample_span_mask(
            tuple(case["shape"]),
            arguments["mask_prob"],
            arguments["mask_length"],
            min_spans=arguments["min_masks"],
            lengths=case["valid_lengths"],
            require_same_masks=arguments["require_same_masks"],
            generator=generator,
        )
        assert [np.flatnonzero(row).tolist() for row in mask] == case["masked"], case["seed"]
        assert generator.random() == case["next_rand_after_call"], case["seed"]
