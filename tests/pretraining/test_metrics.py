"""Metric sums: any grouping of utterances gives the numbers of one big batch; and the variation over time."""

import pytest
import torch

from dinosr_hf import DinoSRForPreTraining
from dinosr_hf.model.modeling_dinosr import energy_sums
from dinosr_hf.pretraining.metrics import MetricSums
from tiny import deterministic_config, every_third, padded, pretraining_model, tiny_config, waveforms

SMALL = tiny_config(codebook_size=7)

LENGTHS = (801, 390, 241)
EXACT = {"masked_frames", "seconds", "padded_share", "active_codewords", "codebook_active_codewords"}


def variation_by_hand(utterances) -> float:
    """Compute the variation plainly, one utterance and channel at a time."""
    changing = energy = 0.0
    for utterance in utterances:
        for channel in utterance.double().T:
            changing += sum((value - channel.mean()).square().item() for value in channel)
            energy += sum(value.square().item() for value in channel)
    return changing / energy


def share(energies):
    return (energies[..., 0] / energies[..., 1]).tolist()


def test_variation_equals_its_definition():
    features = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.7
    expected = [variation_by_hand(layer) for layer in features]
    assert share(energy_sums(features, None)) == pytest.approx(expected, rel=1e-5)
    assert not energy_sums(features.requires_grad_(), None).requires_grad


def test_padding_is_ignored_in_the_variation():
    features = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) + 0.7
    frame_mask = torch.arange(7) < torch.tensor([[4], [7]])
    expected = variation_by_hand([features[0, :4], features[1]])
    assert share(energy_sums(features, frame_mask)) == pytest.approx(expected, rel=1e-5)
    assert share(energy_sums(features, None)) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (torch.arange(4.0)[:, None, None].expand(4, 6, 5), 0.0),
        (torch.tensor([1.0, -1.0]).repeat(3)[None, :, None].expand(4, 6, 5), 1.0),
        (torch.tensor([2.0, 0.0]).repeat(3)[None, :, None].expand(4, 6, 5), 0.5),
    ],
    ids=["utterances-differ-frames-do-not", "no-mean", "half"],
)
def test_variation_of_simple_features(features, expected):
    assert share(energy_sums(features, None)) == pytest.approx(expected, abs=1e-6)


def teacher_layers(model, features, frame_mask=None):
    """Return the feed-forward outputs of the teacher's layers that have a codebook: (N, B, T, D)."""
    projected = model.dinosr.feature_projection.projection(features)
    _, layers = model.teacher(projected, frame_mask, return_layers=model.config.codebook_layers)
    return torch.stack([layer.feed_forward for layer in layers.values()])


def test_energies_are_those_of_teacher_and_convolutions():
    model = pretraining_model().eval()
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    x, attention_mask = padded(waves)
    output = model(x, attention_mask, every_third(3, model.config.num_frames(801)))
    layers, convolutions = [], []
    for wave in waves:
        features = model.dinosr(wave[None]).extract_features
        layers.append(teacher_layers(model, features)[:, 0])
        convolutions.append(features[0])
    for number in range(2):
        expected = variation_by_hand([layer[number].detach() for layer in layers])
        assert share(output.target_energies[number]) == pytest.approx(expected, rel=1e-4)
    expected = variation_by_hand([features.detach() for features in convolutions])
    assert share(output.feature_energies) == pytest.approx(expected, rel=1e-4)
    assert output.target_energies.dtype == output.feature_energies.dtype == torch.float32


def test_padding_is_ignored_with_reference_padding_too():
    model = pretraining_model(reference_padding=True).eval()
    x, attention_mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    num_frames = [model.config.num_frames(length) for length in LENGTHS]
    frame_mask = torch.arange(num_frames[0]) < torch.tensor(num_frames)[:, None]
    with torch.no_grad():
        energies = model(x, attention_mask, every_third(3, num_frames[0])).target_energies
        features = model.dinosr(x, attention_mask).extract_features
        layers = teacher_layers(model, features, frame_mask)
    for layer, energy in zip(layers, energies, strict=True):
        utterances = [row[:length] for row, length in zip(layer, num_frames, strict=True)]
        assert share(energy) == pytest.approx(variation_by_hand(utterances), rel=1e-4)
        assert share(energy) != pytest.approx(variation_by_hand(layer), rel=1e-4)


def test_without_a_mask_there_are_no_energies():
    output = DinoSRForPreTraining(tiny_config()).eval()(waveforms(1, 400))
    assert output.target_energies is None and output.feature_energies is None


def anchor_labels_of(waves, num_frames):
    """Label every other frame, with a number that depends on the waveform and the frame."""
    labels = torch.full((len(waves), num_frames), -100)
    for row, wave in zip(labels, waves, strict=True):
        row[::2] = torch.arange(len(row[::2])) * len(wave) % 5
    return labels


def sums_of(model, groups):
    """Return the sums over groups of waveforms, each group padded into one batch, every third frame masked."""
    config, has_anchor = model.config, model.config.num_anchor_labels > 0
    sums = MetricSums(config, torch.device("cpu"), has_anchor=has_anchor)
    for waves in groups:
        x, attention_mask = padded(waves)
        num_samples, num_frames = sum(map(len, waves)), config.num_frames(x.shape[1])
        labels = anchor_labels_of(waves, num_frames) if has_anchor else None
        with torch.no_grad():
            output = model(x, attention_mask, every_third(len(waves), num_frames), anchor_labels=labels)
        sums.add(output, num_samples, x.numel() - num_samples)
    return sums


def identity(tensor):
    return tensor


@pytest.mark.parametrize("num_anchor_labels", [0, 5], ids=["plain", "anchored"])
def test_any_grouping_gives_the_numbers_of_one_batch(num_anchor_labels):
    model = pretraining_model(num_anchor_labels=num_anchor_labels).eval()
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    together = sums_of(model, [waves]).compute(identity)
    apart = sums_of(model, [[wave] for wave in waves])
    merged = sums_of(model, [waves[:1]])
    merged.merge(sums_of(model, [waves[1:]]))
    for figures in (apart.compute(identity), merged.compute(identity)):
        assert figures.keys() == together.keys()
        for name in together.keys() - {"padded_share"}:
            tolerance = 0 if name in EXACT | {"anchor_frames", "anchor_accuracies"} else 1e-5
            assert figures[name] == pytest.approx(together[name], rel=tolerance), name
    assert together["padded_share"] == pytest.approx(1 - sum(LENGTHS) / (3 * 801))
    assert apart.compute(identity)["padded_share"] == 0
    # negative control: means of means differ
    means = [sums_of(model, [[wave]]).compute(identity) for wave in waves]
    for name in ("loss", "target_variation", "feature_variation", "target_perplexity"):
        assert sum(mean[name] for mean in means) / 3 != pytest.approx(together[name], rel=1e-4), name


def test_an_anchor_s_losses_and_accuracies_are_of_labelled_frames():
    model = pretraining_model(num_anchor_labels=5).eval()
    wave, num_frames = waveforms(1, 801)[0], model.config.num_frames(801)
    figures = sums_of(model, [[wave]]).compute(identity)
    mask, labels = every_third(1, num_frames)[0], anchor_labels_of([wave], num_frames)[0]
    with torch.no_grad():
        hidden_states = model(wave[None], mask_time_indices=mask[None]).last_hidden_state[0]
        log_probs = model.anchor_head(hidden_states).log_softmax(dim=-1)
    for part, frames in enumerate((mask & (labels >= 0), ~mask & (labels >= 0))):
        assert figures["anchor_frames"][part] == frames.sum() > 0
        loss = torch.nn.functional.nll_loss(log_probs[frames], labels[frames])
        assert figures["anchor_losses"][part] == pytest.approx(loss.item(), rel=1e-5)
        hits = (log_probs[frames].argmax(dim=-1) == labels[frames]).float().mean()
        assert figures["anchor_accuracies"][part] == pytest.approx(hits.item())


def test_processes_are_summed_before_dividing():
    model = pretraining_model().eval()
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    here, there = sums_of(model, [waves[:1]]), sums_of(model, [waves[1:]])
    figures = here.compute(lambda sums: sums + there.state_dict())
    expected = sums_of(model, [waves[:1], waves[1:]]).compute(identity)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value), name


def test_means_are_means_over_codebooks():
    figures = sums_of(pretraining_model().eval(), [[waveforms(1, 801)[0]]]).compute(identity)
    for mean, each in [
        ("loss", "codebook_losses"),
        ("target_perplexity", "target_perplexities"),
        ("prediction_perplexity", "prediction_perplexities"),
        ("active_codewords", "codebook_active_codewords"),
        ("target_variation", "target_variations"),
    ]:
        assert len(figures[each]) == 2
        assert figures[mean] == pytest.approx(sum(figures[each]) / 2), mean
    assert 0 < figures["target_variation"] < 1 and 0 < figures["feature_variation"] < 1


def test_a_silent_batch_without_masks_does_not_count():
    model = pretraining_model().eval()
    sums = sums_of(model, [[waveforms(1, 801)[0]]])
    expected = sums.compute(identity)
    with torch.no_grad():
        silent = model(torch.zeros(1, 801), mask_time_indices=torch.zeros(1, model.config.num_frames(801)).bool())
    assert silent.target_energies.sum() > 0
    sums.add(silent, 0, 0)
    assert sums.compute(identity) == expected


def test_an_empty_interval_gives_zeros():
    figures = MetricSums(SMALL, torch.device("cpu")).compute(identity)
    assert figures["loss"] == figures["target_variation"] == figures["masked_frames"] == figures["padded_share"] == 0


def test_sums_go_on_from_a_state_dict():
    model = pretraining_model().eval()
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    first = sums_of(model, [waves[:2]])
    resumed = MetricSums(SMALL, torch.device("cpu"))
    resumed.load_state_dict(first.state_dict())
    for sums in (first, resumed):
        sums.merge(sums_of(model, [waves[2:]]))
    assert resumed.compute(identity) == first.compute(identity)


def test_the_state_of_another_model_is_refused():
    state = MetricSums(tiny_config(num_codebooks=3, codebook_size=7), torch.device("cpu")).state_dict()
    with pytest.raises(ValueError, match=r"has 56 sums, but 2 codebooks of 7 codewords have 39\. Give the state of"):
        MetricSums(SMALL, torch.device("cpu")).load_state_dict(state)
    with pytest.raises(ValueError, match=r"2 codebooks of 7 codewords and an anchor have 45\. Give the state of"):
        MetricSums(SMALL, torch.device("cpu"), has_anchor=True).load_state_dict(state)


def test_energies_in_half_precision_are_summed_in_float32():
    features = 30 + torch.randn(2, 4000, 64, generator=torch.Generator().manual_seed(0))
    expected = share(energy_sums(features.bfloat16().double().float(), None))
    assert share(energy_sums(features.bfloat16(), None)) == pytest.approx(expected, rel=1e-5)


def test_energies_have_no_gradient():
    model = pretraining_model(deterministic_config()).train()
    output = model(waveforms(2, 801), mask_time_indices=every_third(2, model.config.num_frames(801)))
    assert not output.target_energies.requires_grad and not output.feature_energies.requires_grad
    assert output.loss.requires_grad
