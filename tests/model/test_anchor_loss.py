"""The anchor: its loss by hand, its gradients, sums of micro-batches, its units, and what is refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining
from dinosr_hf.model import modeling_dinosr
from dinosr_hf.model.modeling_dinosr import anchor_losses
from tiny import deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import GRADIENTS, LOSSES

LENGTHS = (801, 390, 241)
NUM_LABELS = 9
NUM_FRAMES = tiny_config().num_frames(801)


def build(**changes):
    torch.manual_seed(0)
    return randomize(DinoSRForPreTraining(deterministic_config(**{"num_anchor_labels": NUM_LABELS, **changes})))


def batch():
    """Waveforms, attention mask, masked frames and labels; a third of the frames has no label, the padding has."""
    generator = torch.Generator().manual_seed(0)
    values, attention_mask = padded([waveforms(1, length, seed=length)[0] for length in LENGTHS])
    mask = torch.rand(3, NUM_FRAMES, generator=generator) < 0.4
    labels = torch.randint(NUM_LABELS, (3, NUM_FRAMES), generator=generator)
    labels[torch.rand(3, NUM_FRAMES, generator=generator) < 0.3] = -100
    return values, attention_mask, mask, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, values, attention_mask, mask, labels):
    """The twin: one frame at a time; losses, frames and hits of masked and of unmasked frames."""
    hidden_states = model.dinosr(values, attention_mask, mask_time_indices=mask).last_hidden_state
    losses, hits = ([], []), ([], [])
    for row, num_samples in enumerate(LENGTHS):
        for frame in range(model.config.num_frames(num_samples)):
            if labels[row, frame] >= 0:
                scores = model.anchor_head(hidden_states[row, frame]).double().softmax(dim=0)
                part = 0 if mask[row, frame] else 1
                losses[part].append(-scores[labels[row, frame]].log())
                hits[part].append(bool(scores.argmax() == labels[row, frame]))
    return [torch.stack(part).mean() for part in losses], [len(part) for part in hits], [sum(part) for part in hits]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("weight", "share"), [(2.0, 0.5), (0.7, 0.2)])
def test_loss_by_hand(training, weight, share):
    model = build().train(training)
    values, attention_mask, mask, labels = batch()
    plain = model(values, attention_mask, mask)
    options = {"anchor_labels": labels, "anchor_weight": weight, "anchor_unmasked_share": share}
    output = model(values, attention_mask, mask, **options)
    (masked, unmasked), num_frames, num_hits = by_hand(model, values, attention_mask, mask, labels)
    assert min(num_frames) > 10 and 0 < sum(num_hits) < sum(num_frames)
    assert output.num_anchor_frames.tolist() == num_frames and output.num_anchor_hits.tolist() == num_hits
    torch.testing.assert_close(output.anchor_losses.double(), torch.stack([masked, unmasked]), **LOSSES)
    assert abs(masked - unmasked) > 1e-3
    assert torch.equal(output.codebook_loss, plain.loss) and torch.equal(plain.loss, plain.codebook_loss)
    expected = (2 * plain.loss + weight * ((1 - share) * masked + share * unmasked)) / (2 + weight)
    torch.testing.assert_close(output.loss.double(), expected, **LOSSES)
    assert plain.anchor_losses is plain.num_anchor_frames is plain.num_anchor_hits is None
    # The control: without the attention mask, labels of the padding count.
    assert model(values, None, mask, **options).num_anchor_frames.sum() > output.num_anchor_frames.sum()


def test_labels_of_ignored_frames_do_not_matter():
    model, (values, attention_mask, mask, labels) = build().eval(), batch()
    wanted = model(values, attention_mask, mask, anchor_labels=labels)
    padding = torch.arange(NUM_FRAMES) >= model.config.num_frames(attention_mask.sum(dim=1))[:, None]
    changed = torch.where(padding, 1, labels).masked_fill(labels == -100, -1)
    assert not torch.equal(changed, labels)
    found = model(values, attention_mask, mask, anchor_labels=changed)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.num_anchor_frames, wanted.num_anchor_frames)
    changed[0, labels[0] >= 0] = 0
    assert model(values, attention_mask, mask, anchor_labels=changed).loss != wanted.loss


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["masked-alone", "unmasked-alone"])
def test_share_chooses_the_frames_that_are_learnt_from(share):
    torch.manual_seed(0)
    logits, mask, labels = (
        torch.randn(2, 11, 5, requires_grad=True),
        torch.rand(2, 11) < 0.5,
        torch.arange(22).view(2, 11) % 5,
    )
    losses, _, _ = anchor_losses(logits, labels, mask)
    ((1 - share) * losses[0] + share * losses[1]).backward()
    assert torch.equal(logits.grad.any(dim=-1), mask if share == 0 else ~mask)
    frames = mask if share == 0 else ~mask
    torch.testing.assert_close(losses[int(share)], functional.cross_entropy(logits[frames], labels[frames]), **LOSSES)
    model, (values, attention_mask, mask, labels) = build().eval(), batch()
    output = model(values, attention_mask, mask, anchor_labels=labels, anchor_unmasked_share=share)
    torch.testing.assert_close(output.loss, (output.codebook_loss + output.anchor_losses[int(share)]) / 2, **LOSSES)


def test_without_a_label_the_loss_has_a_gradient_still():
    model, (values, attention_mask, mask, labels) = build().train(), batch()
    output = model(values, attention_mask, mask, anchor_labels=torch.full_like(labels, -100))
    assert output.anchor_losses.tolist() == [0, 0] and output.num_anchor_frames.tolist() == [0, 0]
    found = gradients(model, output.loss)
    assert not found["anchor_head.weight"].any() and found["heads.0.weight"].any()
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    nothing = model(values, attention_mask, torch.zeros_like(mask), anchor_labels=labels)
    assert nothing.codebook_loss == nothing.anchor_losses[0] == 0 < nothing.anchor_losses[1]
    assert gradients(model, nothing.loss)["anchor_head.weight"].any()


def test_weight_of_zero_is_no_anchor():
    model, (values, attention_mask, mask, labels) = build().train(), batch()
    without = gradients(model, model(values, attention_mask, mask).loss)
    zero = gradients(model, model(values, attention_mask, mask, anchor_labels=labels, anchor_weight=0.0).loss)
    assert zero.keys() - without.keys() == {"anchor_head.weight", "anchor_head.bias"}
    assert not zero["anchor_head.weight"].any()
    torch.testing.assert_close({name: zero[name] for name in without}, without, **GRADIENTS)
    some = gradients(model, model(values, attention_mask, mask, anchor_labels=labels, anchor_weight=0.1).loss)
    assert (
        some["dinosr.feature_projection.projection.weight"] - without["dinosr.feature_projection.projection.weight"]
    ).any()


def test_sums_of_micro_batches_are_those_of_the_whole():
    model, (values, attention_mask, mask, labels) = build().eval(), batch()
    whole = model(values, attention_mask, mask, anchor_labels=labels)
    parts = [
        model(values[rows], attention_mask[rows], mask[rows], anchor_labels=labels[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    frames = sum(part.num_anchor_frames for part in parts)
    assert torch.equal(frames, whole.num_anchor_frames)
    assert torch.equal(sum(part.num_anchor_hits for part in parts), whole.num_anchor_hits)
    sums = sum(part.anchor_losses * part.num_anchor_frames for part in parts)
    torch.testing.assert_close(sums / frames, whole.anchor_losses, **LOSSES)
    means = sum(part.anchor_losses for part in parts) / 2
    assert (means - whole.anchor_losses).abs().max() > 1e-3


def test_it_learns_the_labels():
    torch.manual_seed(0)
    model = DinoSRForPreTraining(deterministic_config(num_anchor_labels=3, num_hidden_layers=2)).train()
    values, mask = waveforms(2, 801), torch.zeros(2, NUM_FRAMES, dtype=torch.bool)
    mask[:, ::4] = True
    labels = torch.arange(2 * NUM_FRAMES).view(2, NUM_FRAMES) // 5 % 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    hits = []
    for step in range(1, 31):
        optimizer.zero_grad()
        output = model(values, mask_time_indices=mask, anchor_labels=labels)
        output.loss.backward()
        optimizer.step()
        model.update_targets(step)
        hits.append((output.num_anchor_hits / output.num_anchor_frames).tolist())
    assert hits[-1][0] > 0.8 > hits[0][0] and hits[-1][1] > 0.8 > hits[0][1]


def test_half_precision_scores_in_float32():
    model, (values, attention_mask, mask, labels) = build().eval(), batch()
    exact = model(values, attention_mask, mask, anchor_labels=labels)
    half = model.to(torch.bfloat16)(values, attention_mask, mask, anchor_labels=labels)
    assert half.anchor_losses.dtype == half.loss.dtype == torch.float32
    torch.testing.assert_close(half.anchor_losses, exact.anchor_losses, atol=0, rtol=0.05)


def test_only_the_check_of_labels_reads_a_number(monkeypatch):
    monkeypatch.setattr(modeling_dinosr, "check_anchor_labels", lambda *_: None)  # it does so on CPUs alone
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DinoSRForPreTraining(tiny_config(num_anchor_labels=4)).train()
        mask, labels = torch.empty(2, 29, dtype=torch.bool), torch.empty(2, 29, dtype=torch.int64)
        frames = torch.empty(9, dtype=torch.int64)
        model(torch.empty(2, 600), mask_time_indices=mask, masked_frames=frames, anchor_labels=labels).loss.backward()


def test_wrong_labels_are_refused():
    values, attention_mask, mask, labels = batch()
    with pytest.raises(
        ValueError, match=r"anchor_labels are given, but num_anchor_labels=0: .*Set num_anchor_labels in"
    ):
        build(num_anchor_labels=0)(values, attention_mask, mask, anchor_labels=labels)
    model = build().eval()
    with pytest.raises(ValueError, match=rf"shape \(3, 9\), but must be \(batch, frames\) = \(3, {NUM_FRAMES}\)"):
        model(values, attention_mask, mask, anchor_labels=labels[:, :9])
    with pytest.raises(ValueError, match=r"has dtype torch\.float32, but labels are integers\. Give them as int64"):
        model(values, attention_mask, mask, anchor_labels=labels.float())
    with pytest.raises(ValueError, match=r"has the value 9, but num_anchor_labels=9. Give labels below it, and -100"):
        model(values, attention_mask, mask, anchor_labels=labels.masked_fill(mask, 9))
    with pytest.raises(ValueError, match=r"anchor_labels are given without mask_time_indices.* Give both, or neither"):
        model(values, attention_mask, anchor_labels=labels)
    assert model.train()(values, attention_mask, anchor_labels=labels).loss.isfinite()  # draws its mask


def test_configuration():
    assert DinoSRConfig().num_anchor_labels == 0
    config = DinoSRConfig(num_anchor_labels=100)
    assert [config.num_units(source) for source in ("student", "teacher", "anchor")] == [256, 256, 100]
    with pytest.raises(ValueError, match="num_anchor_labels=-1 is out of range: it must be at least 0"):
        DinoSRConfig(num_anchor_labels=-1)


def test_a_model_without_an_anchor_is_as_before():
    with_anchor, without = build(), build(num_anchor_labels=0)
    names = set(with_anchor.state_dict()) - set(without.state_dict())
    assert names == {"anchor_head.weight", "anchor_head.bias"} and without.anchor_head is None
    without.load_state_dict({name: tensor for name, tensor in with_anchor.state_dict().items() if name not in names})
    values, attention_mask, mask, _ = batch()
    one, other = (model.eval()(values, attention_mask, mask) for model in (with_anchor, without))
    assert len(one) == len(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"reference_padding": True}], ids=str)
def test_units_of_the_anchor(changes):
    model = build(**changes).eval()
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    codes, lengths = model.encode_units(*padded(waves), layer=3, source="anchor")
    assert codes.shape == (3, NUM_FRAMES) and codes.dtype == torch.int64
    for row, length, wave in zip(codes, lengths, waves, strict=True):
        logits = model.anchor_head(model.dinosr(wave[None]).last_hidden_state[0])
        assert torch.equal(row[:length], logits.argmax(dim=-1)) and (row[length:] == -1).all()
    assert codes.max() < NUM_LABELS and len(codes.unique()) > 3
    several, _ = model.encode_units(*padded(waves), layers=[3], source="anchor")
    assert torch.equal(several, codes[None])
    assert not torch.equal(codes, model.encode_units(*padded(waves), layer=3)[0])


def test_units_of_an_anchor_that_is_not_there():
    model, values = build().eval(), waveforms(1, 400)
    with pytest.raises(
        ValueError, match=r"source='anchor' has units on the last layer alone, but layers=\[2\]. Give 3"
    ):
        model.encode_units(values, layer=2, source="anchor")
    with pytest.raises(ValueError, match=r"but layers=\[2, 3\]. Give 3"):
        model.encode_units(values, layers=[2, 3], source="anchor")
    with pytest.raises(
        ValueError, match=r"source='anchor' is unknown to this model: .*num_anchor_labels=0.*student, teacher"
    ):
        build(num_anchor_labels=0).eval().encode_units(values, layer=3, source="anchor")
    with pytest.raises(ValueError, match=r"source='pupil' is unknown. Choose one of student, teacher, anchor"):
        model.encode_units(values, layer=3, source="pupil")
    with pytest.raises(ValueError, match=r"source='anchor' is unknown. Choose one of student, teacher"):
        model.layer_features(values, layers=[3], source="anchor")
    with pytest.raises(ValueError, match=r"source='teacher' is unknown. Choose one of student, anchor"):
        model.student_units(torch.zeros(1, 36), [3], "teacher")
