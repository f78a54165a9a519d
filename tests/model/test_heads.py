"""The task heads: losses by hand, and results that do not depend on the padding of a batch."""

import pytest
import torch
from torch.nn import functional

from dinosr_hf import (
    DinoSRForAudioFrameClassification,
    DinoSRForCTC,
    DinoSRForSequenceClassification,
    DinoSRForXVector,
)
from dinosr_hf.model.modeling_dinosr import (
    DinoSRMarginLoss,
    classification_loss,
    mean_and_deviation_over_time,
    mean_over_time,
)
from tiny import deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import LOSSES, SAME_ARITHMETIC

LENGTHS = (801, 390, 501)
CLASSIFIERS = [DinoSRForSequenceClassification, DinoSRForAudioFrameClassification, DinoSRForXVector]


def head(model_class, **changes):
    torch.manual_seed(0)
    return randomize(model_class(deterministic_config(**changes))).eval()


def utterances():
    return [waveforms(1, length, seed=length)[0] for length in LENGTHS]


LABELS = torch.tensor([[3, 3, 7, 10], [1, -100, -100, -100], [4, 2, -100, -100]])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_loss_by_hand(reduction):
    model = head(DinoSRForCTC, ctc_loss_reduction=reduction)
    batch = model(*padded(utterances()), labels=LABELS)
    losses = []
    for wave, row in zip(utterances(), LABELS, strict=True):
        labels = row[row >= 0]
        log_probs = model(wave[None]).logits[0].log_softmax(dim=-1)
        loss = functional.ctc_loss(log_probs, labels, [len(log_probs)], [len(labels)], blank=0, reduction="sum")
        losses.append(loss / len(labels) if reduction == "mean" else loss)
    wanted = torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses).sum()
    torch.testing.assert_close(batch.loss, wanted, atol=0.0, rtol=1e-4)
    other = head(DinoSRForCTC, ctc_loss_reduction=reduction, pad_token_id=5)(*padded(utterances()), labels=LABELS)
    assert abs(other.loss - wanted) > 1e-3
    assert batch.logits.shape == (3, model.config.num_frames(801), 11)


def test_ctc_labels_may_stand_anywhere_in_their_row():
    model, batch, none = head(DinoSRForCTC), padded(utterances()), -100
    loss = model(*batch, labels=LABELS).loss
    moved = [[none, 3, 3, 7, 10, none], [none, none, none, none, none, 1], [4, none, none, 2, none, none]]
    assert torch.equal(model(*batch, labels=torch.tensor(moved)).loss, loss)
    moved[2] = [2, none, none, 4, none, none]
    assert not torch.equal(model(*batch, labels=torch.tensor(moved)).loss, loss)


def test_ctc_labels_may_be_padded_with_the_blank():  # as `ForCTCLoss` of transformers, and tokenizers
    for blank in (0, 5):
        model = head(DinoSRForCTC, pad_token_id=blank)
        loss = model(*padded(utterances()), labels=LABELS).loss
        assert torch.equal(model(*padded(utterances()), labels=LABELS.where(LABELS >= 0, blank)).loss, loss)


def test_ctc_logits_do_not_depend_on_padding():
    model = head(DinoSRForCTC)
    batch = model(*padded(utterances())).logits
    for row, wave in zip(batch, utterances(), strict=True):
        alone = model(wave[None]).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone, **SAME_ARITHMETIC)


def test_ctc_reads_blanks_in_padding():
    # The best label of a frame would otherwise be another here.
    model = head(DinoSRForCTC, pad_token_id=5)
    values, mask = padded(utterances())
    logits = model(values, mask).logits
    for row, wave in zip(logits, utterances(), strict=True):
        assert (row[model.config.num_frames(len(wave)) :].softmax(dim=-1)[:, 5] == 1).all()
    unmasked = model.lm_head(model.dinosr(values, mask).last_hidden_state)
    assert (unmasked.argmax(dim=-1) != logits.argmax(dim=-1)).any()


def test_ctc_logits_are_as_wide_as_a_replaced_head():
    model = head(DinoSRForCTC)
    model.lm_head = torch.nn.Linear(36, 13)
    values, mask = padded(utterances())
    logits = model(values, mask).logits
    assert logits.shape == (3, model.config.num_frames(801), 13)
    for row, length in zip(logits, LENGTHS, strict=True):
        is_blank = row.softmax(dim=-1)[:, 0] == 1
        num_frames = model.config.num_frames(length)
        assert is_blank[num_frames:].all() and not is_blank[:num_frames].any()


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_the_loss_of_many_frames_fits_into_float16(problem_type):
    config = tiny_config(num_labels=40, problem_type=problem_type)
    logits = torch.randn(16, 1500, 40, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(16, 1500, 40) if problem_type else torch.zeros(16, 1500, dtype=torch.int64)
    loss = classification_loss(config, logits.half(), labels)
    torch.testing.assert_close(loss, classification_loss(config, logits, labels), atol=0.0, rtol=1e-3)


def test_ctc_loss_has_a_gradient_everywhere():
    model = head(DinoSRForCTC).train()
    model(*padded(utterances()), labels=LABELS).loss.backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None}
    assert missing == {"dinosr.masked_spec_embed"}  # nothing is masked here


@pytest.mark.parametrize("zero_infinity", [True, False])
def test_utterances_too_short_for_their_labels(zero_infinity):
    model = head(DinoSRForCTC, ctc_zero_infinity=zero_infinity).train()
    x, mask = padded([waveforms(1, 600)[0], waveforms(1, 60)[0]])
    labels = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    loss = model(x, mask, labels=labels).loss
    if not zero_infinity:
        assert torch.isinf(loss)
        return
    alone = model(x[:1], labels=labels[:1]).loss
    torch.testing.assert_close(loss, alone / 2, **LOSSES)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_label_outside_of_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="labels has the value 11, but vocab_size=11"):
        head(DinoSRForCTC)(waveforms(1, 400), labels=torch.tensor([[1, 11]]))


@pytest.mark.parametrize("blank", [None, 11, -1])
def test_blank_outside_of_the_vocabulary_is_refused(blank):
    with pytest.raises(ValueError, match=f"pad_token_id={blank} is the blank of CTC.*vocab_size=11"):
        DinoSRForCTC(tiny_config(pad_token_id=blank))


def results(model, *inputs):
    output = model(*inputs)
    return output.embeddings if hasattr(output, "embeddings") else output.logits


@pytest.mark.parametrize("weighted", [False, True], ids=["last-layer", "weighted-layers"])
@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_classifiers_do_not_depend_on_padding(model_class, weighted):
    model = head(model_class, use_weighted_layer_sum=weighted)
    batch = results(model, *padded(utterances()))
    unaware = results(model, padded(utterances())[0])
    for i, wave in enumerate(utterances()):
        alone = results(model, wave[None])[0]
        same = batch[i] if alone.dim() == 1 else batch[i, : len(alone)]
        torch.testing.assert_close(same, alone, **SAME_ARITHMETIC)
    # the negative control: without the attention mask the padding is part of the utterance
    assert (unaware[1] - batch[1]).abs().max() > 1e-3


@pytest.mark.parametrize("model_class", CLASSIFIERS)
def test_weighted_layer_sum(model_class):
    torch.manual_seed(0)
    model = model_class(deterministic_config(use_weighted_layer_sum=True)).eval()
    assert torch.equal(model.layer_weights.data, torch.full((4,), 0.25))
    randomize(model)
    with torch.no_grad():
        model.layer_weights.fill_(0.0)
    x = waveforms(2, 500)
    before = results(model, x)
    (before * torch.randn(before.shape)).sum().backward()
    assert model.layer_weights.grad.abs().min() > 0
    with torch.no_grad():
        model.layer_weights[-1] = 50.0  # all weight on the last layer
    after = results(model, x)
    assert (after - before).abs().max() > 1e-3
    plain = model_class(deterministic_config()).eval()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n != "layer_weights"})
    torch.testing.assert_close(after, results(plain, x), **SAME_ARITHMETIC)
    assert plain.layer_weights is None


@pytest.mark.parametrize("model_class", CLASSIFIERS)
@pytest.mark.parametrize("weighted", [False, True], ids=["last-layer", "weighted-layers"])
def test_hidden_states_are_given_when_asked_for(model_class, weighted):
    model = head(model_class, use_weighted_layer_sum=weighted)
    x = waveforms(1, 500)
    assert model(x).hidden_states is None
    assert len(model(x, output_hidden_states=True).hidden_states) == 4
    assert len(model(x, return_dict=False)) == len(model(x).to_tuple())


def test_sequence_labels_are_classes():
    model = head(DinoSRForSequenceClassification)
    labels = torch.tensor([4, 0, 2])
    output = model(*padded(utterances()), labels=labels)
    assert output.logits.shape == (3, 5)
    torch.testing.assert_close(output.loss, functional.cross_entropy(output.logits, labels), **LOSSES)
    column = model(*padded(utterances()), labels=labels[:, None])
    torch.testing.assert_close(column.loss, output.loss, **LOSSES)


def test_one_label_is_a_regression():
    model = head(DinoSRForSequenceClassification, num_labels=1)
    labels = torch.tensor([0.5, -1.0, 2.0])
    output = model(*padded(utterances()), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean(), **LOSSES)


def test_several_labels_an_utterance_or_a_frame():
    labels = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).float()
    batch = padded(utterances())
    model = head(DinoSRForSequenceClassification, problem_type="multi_label_classification")
    output = model(*batch, labels=labels)
    wanted = functional.binary_cross_entropy_with_logits(output.logits, labels)
    torch.testing.assert_close(output.loss, wanted, **LOSSES)

    model = head(DinoSRForAudioFrameClassification, problem_type="multi_label_classification")
    valid = [model.config.num_frames(length) for length in LENGTHS]
    frames = torch.randint(0, 2, (3, valid[0], 5), generator=torch.Generator().manual_seed(0))
    frames[0, 0] = -100
    output = model(*batch, labels=frames)
    pairs = [(output.logits[k, int(k == 0) : valid[k]], frames[k, int(k == 0) : valid[k]]) for k in range(3)]
    logits, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    wanted = functional.binary_cross_entropy_with_logits(logits, targets.float())
    torch.testing.assert_close(output.loss, wanted, **LOSSES)


def test_regression_of_several_numbers():
    model = head(DinoSRForSequenceClassification, problem_type="regression", num_labels=3)
    labels = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    output = model(*padded(utterances()), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits - labels).square().mean(), **LOSSES)


def test_frames_with_no_or_several_labels_need_another_loss():
    model = head(DinoSRForAudioFrameClassification)
    x, mask = padded(utterances())
    labels = functional.one_hot(torch.zeros(3, model.config.num_frames(LENGTHS[0]), dtype=torch.long), 5)
    labels[1, -1] = 0  # padding
    model(x, mask, labels=labels)
    for row, count in (([0, 0, 0, 0, 0], 0), ([1, 1, 0, 0, 0], 2)):
        labels[0, 1] = torch.tensor(row)
        with pytest.raises(ValueError, match=rf"has {count} ones in a frame.*problem_type='multi_label"):
            model(x, mask, labels=labels)


def test_a_single_class_of_frames_is_no_regression():
    model = head(DinoSRForAudioFrameClassification, num_labels=1)
    x, mask = padded(utterances())
    assert model(x, mask, labels=torch.zeros(3, model.config.num_frames(LENGTHS[0]), dtype=torch.long)).loss == 0


def test_a_batch_without_labelled_frames_has_no_loss_but_a_gradient():
    model = head(DinoSRForAudioFrameClassification)
    x = waveforms(2, 500)
    loss = model(x, labels=torch.full((2, model.config.num_frames(500)), -100)).loss
    loss.backward()
    assert loss == 0 and torch.equal(model.classifier.weight.grad, torch.zeros_like(model.classifier.weight))


@pytest.mark.parametrize("model_class", [DinoSRForCTC, *CLASSIFIERS])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_configuration_may_ask_for_tuples(model_class, weighted):
    model = head(model_class, use_weighted_layer_sum=weighted)
    x = waveforms(1, 1_500)
    wanted = model(x).logits
    model.config.return_dict = False
    output = model(x)
    assert isinstance(output, tuple) and torch.equal(output[0], wanted)


def test_sequence_pooling_is_the_mean_over_frames():
    model = head(DinoSRForSequenceClassification)
    wave = utterances()[1][None]
    hidden = model.dinosr(wave).last_hidden_state
    wanted = model.classifier(model.projector(hidden).mean(dim=1))
    torch.testing.assert_close(model(wave).logits, wanted, **SAME_ARITHMETIC)


def test_frame_labels_are_classes_or_one_hot_and_never_in_padding():
    model = head(DinoSRForAudioFrameClassification)
    x, mask = padded(utterances())
    valid = [model.config.num_frames(length) for length in LENGTHS]
    classes = torch.randint(0, 5, (3, valid[0]), generator=torch.Generator().manual_seed(0))
    classes[0, :7] = -100
    output = model(x, mask, labels=classes)
    rows = zip(output.logits, classes, valid, strict=True)
    pairs = [(logits[:length], labels[:length]) for logits, labels, length in rows]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    torch.testing.assert_close(output.loss, functional.cross_entropy(logits, labels), **LOSSES)
    assert abs(model(x, labels=classes).loss - output.loss) > 1e-4
    counted = classes.clamp(min=0)
    one_hot = functional.one_hot(counted, 5)
    torch.testing.assert_close(model(x, mask, labels=one_hot).loss, model(x, mask, labels=counted).loss, **LOSSES)


def test_x_vector_shapes_and_loss():
    model = head(DinoSRForXVector)
    labels = torch.tensor([4, 0, 2])
    output = model(*padded(utterances()), labels=labels)
    assert output.embeddings.shape == output.logits.shape == (3, 8)
    output.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "masked_spec_embed" not in n)


def test_margin_loss_by_hand():
    torch.manual_seed(0)
    objective = DinoSRMarginLoss(6, 4)
    torch.nn.init.normal_(objective.weight)
    embeddings, labels = torch.randn(5, 6), torch.tensor([0, 3, 2, 2, 1])
    losses = []
    for embedding, label in zip(embeddings, labels, strict=True):
        cosines = [torch.cosine_similarity(embedding, objective.weight[:, k], dim=0) for k in range(4)]
        scores = torch.stack([30 * (c - 0.4 * (k == label)) for k, c in enumerate(cosines)])
        losses.append(-scores.log_softmax(dim=0)[label])
    torch.testing.assert_close(objective(embeddings, labels), torch.stack(losses).mean(), **LOSSES)
    without_margin = DinoSRMarginLoss(6, 4, margin=0.0)
    without_margin.load_state_dict(objective.state_dict())
    assert objective(embeddings, labels) > without_margin(embeddings, labels) + 1.0


def test_too_short_for_the_time_delay_layers_is_refused():
    model = head(DinoSRForXVector)  # they lose 4 + 4 frames
    shortest = next(n for n in range(400) if model.config.num_frames(n) == 9)
    assert model(waveforms(1, shortest)).embeddings.shape == (1, 8)
    with pytest.raises(ValueError, match="input_values makes 8 frames, but the time-delay layers need 9"):
        model(waveforms(1, shortest - 20))


def test_an_utterance_of_a_batch_that_is_too_short_is_refused():
    model = head(DinoSRForXVector)
    shortest = next(n for n in range(400) if model.config.num_frames(n) == 9)
    model(*padded([waveforms(1, length)[0] for length in (801, shortest)]))
    with pytest.raises(ValueError, match="input_values makes 8 frames, but the time-delay layers need 9"):
        model(*padded([waveforms(1, length)[0] for length in (801, shortest - 20)]))


def test_pooling_does_not_overflow_in_half_precision():
    features = (torch.randn(2, 4_000, 3, generator=torch.Generator().manual_seed(0)) * 6 + 22).half()
    mask = torch.arange(4_000) < torch.tensor([[4_000], [3_900]])
    for pool in (mean_over_time, mean_and_deviation_over_time):
        found = pool(features, mask)
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), pool(features.float(), mask), atol=2e-2, rtol=0)


def test_mean_and_deviation_of_valid_frames():
    features = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    pooled = mean_and_deviation_over_time(features, mask)
    for row, length in enumerate([9, 4]):
        valid = features[row, :length]
        wanted = torch.cat([valid.mean(dim=0), valid.std(dim=0)])
        torch.testing.assert_close(pooled[row], wanted, **SAME_ARITHMETIC)
    torch.testing.assert_close(mean_and_deviation_over_time(features[:1], None), pooled[:1], **SAME_ARITHMETIC)
