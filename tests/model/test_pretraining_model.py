"""Pre-training: the loss worked out by hand, steps of several forward passes, and the teacher against a slow twin."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from dinosr_hf import DinoSRForPreTraining, DinoSRForPreTrainingOutput
from dinosr_hf.pretraining.metrics import MetricSums
from tiny import deterministic_config, every_third, padded, pretraining_model, state_of, tiny_config, waveforms
from tolerances import CODEBOOK_COUNTS, CODEBOOK_SUMS, LOSSES, SAME_ARITHMETIC, WEIGHTS

LENGTHS = (801, 390, 241)


def changed(before, model):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_output_fields_and_shapes():
    model = pretraining_model().train()
    x, attention_mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    mask = every_third(3, model.config.num_frames(801))
    output = model(x, attention_mask, mask, output_hidden_states=True)
    valid = [model.config.num_frames(length) for length in LENGTHS]
    num_masked = sum(int(row[:length].sum()) for row, length in zip(mask, valid, strict=True))
    assert isinstance(output, DinoSRForPreTrainingOutput)
    assert output.loss.shape == () and output.loss.requires_grad
    assert output.codebook_losses.shape == (2,) and not output.codebook_losses.requires_grad
    assert output.num_masked_frames == num_masked
    assert output.codes.shape == (2, num_masked) and output.codes.dtype == torch.int64
    assert output.code_counts.shape == output.prediction_sums.shape == (2, 7)
    assert output.code_counts.sum(dim=1).tolist() == [num_masked] * 2
    assert output.prediction_sums.sum(dim=1).tolist() == pytest.approx([num_masked] * 2)
    for name in ("target_perplexity", "prediction_perplexity"):
        assert getattr(output, name).shape == (2,)
        assert (getattr(output, name) >= 1).all() and (getattr(output, name) <= 7.001).all()
    assert output.num_active_codewords.tolist() == [len(row.unique()) for row in output.codes]
    assert output.last_hidden_state.shape == (3, mask.shape[1], 36)
    assert len(output.hidden_states) == 4
    assert output.loss.item() == pytest.approx(output.codebook_losses.mean().item())


def feed_forward_outputs(model, wave):
    """What the feed-forward network of each of the teacher's layers gives for one utterance, (T, D) each."""
    seen = []
    handles = [
        layer.feed_forward.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
        for layer in model.teacher.layers
    ]
    clean = model.dinosr(wave[None])
    model.teacher(model.dinosr.feature_projection.projection(clean.extract_features))
    for handle in handles:
        handle.remove()
    return seen


def by_hand(model, waves, masks):
    """The twin: one utterance at a time, never padded; sums and distances as in the paper's equations."""
    losses, codes = [], []
    for wave, mask in zip(waves, masks, strict=True):
        seen = feed_forward_outputs(model, wave)
        student = model.dinosr(wave[None], mask_time_indices=mask[None]).last_hidden_state[0]
        for i in range(model.config.num_codebooks):
            target = seen[len(seen) - model.config.num_codebooks + i].double()
            target = (target - target.mean(dim=0)) / (target.var(dim=0, correction=0) + 1e-5).sqrt()
            codewords = (model.codebooks.sums[i] / model.codebooks.counts[i][:, None]).double()
            for frame in torch.nonzero(mask).flatten().tolist():
                code = int((codewords - target[frame]).square().sum(dim=1).argmin())
                prediction = model.heads[i](student[frame]).double().softmax(dim=0)
                losses.append(-prediction[code].log())
                codes.append((i, code))
    return torch.stack(losses).mean(), codes


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_is_not_in_the_loss_nor_in_the_clusters(training):
    model = pretraining_model().train(training)
    waves = [waveforms(1, length, seed=length)[0] for length in LENGTHS]
    x, attention_mask = padded(waves)
    mask = every_third(3, model.config.num_frames(801), offset=1)  # in the padding too
    valid = [model.config.num_frames(length) for length in LENGTHS]
    with torch.no_grad():
        output = model(x, attention_mask, mask)
        loss, codes = by_hand(model, waves, [row[:length] for row, length in zip(mask, valid, strict=True)])
        unaware = model(x, None, mask)
    for i in range(2):
        assert output.codes[i].tolist() == [code for codebook, code in codes if codebook == i]
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    assert output.num_masked_frames < mask.sum()
    # the negative control: without attention mask all of it counts
    assert unaware.num_masked_frames == mask.sum()
    assert abs(unaware.loss - output.loss) > 1e-3


def test_only_frames_of_speech_are_learnt_by_the_codebooks():
    model = pretraining_model(codebook_decay=0.0).train()
    x, attention_mask = padded([waveforms(1, length)[0] for length in LENGTHS])
    everything = torch.ones(3, model.config.num_frames(801), dtype=torch.bool)
    output = model(x, attention_mask, everything)
    model.update_targets(1)
    hit = output.code_counts > 0
    valid = sum(model.config.num_frames(length) for length in LENGTHS)
    assert model.codebooks.counts[hit].sum() == 2 * valid
    assert torch.equal(model.codebooks.counts[hit], output.code_counts[hit].float())


def test_evaluation_changes_no_state():
    model = pretraining_model().eval()
    x = waveforms(2, 500)
    mask = every_third(2, model.config.num_frames(500))
    before = state_of(model)
    evaluated = model(x, mask_time_indices=mask)
    assert evaluated.loss is not None
    assert changed(before, model) == set()
    model.codebooks.commit(0.5)
    assert changed(before, model) == set()
    # the negative control
    model.train()(x, mask_time_indices=mask)
    model.codebooks.commit(0.5)
    assert changed(before, model) == {"codebooks.sums", "codebooks.counts"}


def test_evaluation_without_a_mask_only_encodes():
    model = pretraining_model().eval()
    output = model(waveforms(2, 500))
    assert output.loss is None and output.codes is None
    torch.testing.assert_close(
        output.last_hidden_state, model.dinosr(waveforms(2, 500)).last_hidden_state, **SAME_ARITHMETIC
    )


def test_masks_drawn_in_training_come_from_the_generator():
    model = pretraining_model().train()
    x = waveforms(3, 900)

    def codes(seed):
        return model(x, generator=torch.Generator().manual_seed(seed)).codes

    torch.manual_seed(0)
    first = codes(4)
    torch.manual_seed(1)
    assert torch.equal(codes(4), first)
    assert not torch.equal(codes(5), first)


def test_masks_drawn_in_training_come_from_the_global_generator_else():
    model = pretraining_model().train()
    x = waveforms(3, 900)

    def loss(seed):
        torch.manual_seed(seed)
        return model(x).loss.item()

    assert loss(1) == loss(1) != loss(2)


def test_masks_drawn_in_training_leave_padding_out():
    model = pretraining_model(mask_prob=1.0).train()
    x, attention_mask = padded([waveforms(1, 900)[0], waveforms(1, 141)[0]])
    valid = [model.config.num_frames(900), model.config.num_frames(141)]
    for seed in range(5):
        mask = model._sample_mask(x, attention_mask, torch.Generator().manual_seed(seed))
        assert mask.shape == (2, valid[0])
        assert mask[1, : valid[1]].any() and not mask[1, valid[1] :].any()


def batch(seed):
    return waveforms(2, 700, seed=seed), every_third(2, 34, offset=seed % 3)


def test_two_forward_passes_and_one_update_equal_one_forward_over_both():
    halves = [batch(0), batch(1)]
    x, mask = (torch.cat(parts) for parts in zip(*halves, strict=True))
    whole, accumulated, each = pretraining_model(), pretraining_model(), pretraining_model()
    for model in (whole, accumulated, each):
        model.train()
    whole(x, mask_time_indices=mask)
    whole.update_targets(1)
    for part, part_mask in halves:
        accumulated(part, mask_time_indices=part_mask)
    accumulated.update_targets(1)
    for step, (part, part_mask) in enumerate(halves):
        each(part, mask_time_indices=part_mask)
        each.update_targets(1 + step)
    torch.testing.assert_close(accumulated.codebooks.sums.data, whole.codebooks.sums.data, **CODEBOOK_SUMS)
    torch.testing.assert_close(accumulated.codebooks.counts.data, whole.codebooks.counts.data, **CODEBOOK_COUNTS)
    for name, tensor in whole.teacher.state_dict().items():
        torch.testing.assert_close(accumulated.teacher.state_dict()[name], tensor, **SAME_ARITHMETIC)
    # the negative control: an update after each half is another codebook
    assert (each.codebooks.counts - whole.codebooks.counts).abs().max() > 0.01


def test_gradients_with_checkpointing_count_frames_once():
    plain, checkpointed = pretraining_model().train(), pretraining_model().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    x, mask = batch(0)
    for model in (plain, checkpointed):
        model(x, mask_time_indices=mask).loss.backward()
        model.update_targets(1)
    torch.testing.assert_close(checkpointed.codebooks.counts.data, plain.codebooks.counts.data, **CODEBOOK_COUNTS)


@pytest.mark.parametrize("step", [0, -3])
def test_update_targets_before_the_first_step_is_refused(step):
    with pytest.raises(ValueError, match=rf"step={step} must be at least 1: it is the number of completed"):
        pretraining_model().update_targets(step)


def test_decays_that_were_used():
    model = pretraining_model(
        codebook_decay=0.8,
        codebook_end_decay=1.0,
        codebook_end_decay_step=4,
        ema_decay=0.6,
        ema_end_decay=0.8,
        ema_anneal_steps=4,
        freeze_teacher_step=3,
    )
    used = [model.update_targets(step) for step in (1, 2, 3)]
    # the codebooks' decay is the one of the forward pass, the teacher's the one of the finished step
    assert [decays["codebook_decay"] for decays in used] == pytest.approx([0.8, 0.85, 0.9])
    assert [decays["ema_decay"] for decays in used] == pytest.approx([0.65, 0.7, 1.0])


def test_teacher_moves_towards_the_student_and_copies_its_positions():
    model = pretraining_model(ema_decay=0.75, ema_end_decay=0.75)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    model.update_targets(1)
    student = model.dinosr.encoder.state_dict()
    assert before.keys() == student.keys()
    for name, tensor in model.teacher.state_dict().items():
        if name.startswith("pos_conv_embed."):
            assert torch.equal(tensor, student[name]), name
            assert not torch.equal(tensor, before[name]), name
        else:
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * student[name], **SAME_ARITHMETIC)


FRONT = {"feature_extractor": "dinosr.feature_extractor", "feature_projection": "dinosr.feature_projection"}


class SlowTeacher:
    """The twin of T2 to T8: plain dictionaries, one tensor at a time, and the decays written out."""

    def __init__(self, config, student):
        self.config = config
        self.encoder = {n[len("dinosr.encoder.") :]: t for n, t in student.items() if n.startswith("dinosr.encoder.")}
        self.front = self.front_of(student)

    @staticmethod
    def front_of(student):
        return {n.removeprefix("dinosr."): t for n, t in student.items() if n.startswith(tuple(FRONT.values()))}

    def decay(self, step):
        config = self.config
        end = config.ema_end_decay
        if config.freeze_teacher_step is not None and step >= config.freeze_teacher_step:
            if config.freeze_mode == "frozen":
                return 1.0
            end = 1.0
        if config.ema_decay == end or step >= config.ema_anneal_steps:
            return end
        return end - (end - config.ema_decay) * (1 - step / config.ema_anneal_steps)

    def update(self, step, student):
        decay = self.decay(step)
        if decay < 1:
            for name, old in self.encoder.items():
                new = student[f"dinosr.encoder.{name}"]
                copied = name.startswith("pos_conv_embed.")
                self.encoder[name] = new if copied else decay * old + (1 - decay) * new
        if self.config.freeze_teacher_step is None or step <= self.config.freeze_teacher_step:
            self.front = self.front_of(student)


def trained(model, num_steps, check):
    """Real optimizer steps; check(step, state of the student) after each update of the targets."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for step in range(1, num_steps + 1):
        x, mask = batch(step)
        optimizer.zero_grad()
        model(x, mask_time_indices=mask).loss.backward()
        optimizer.step()
        student = state_of(model)
        model.update_targets(step)
        check(step, student)


@pytest.mark.parametrize("anneal_steps", [2, 5], ids=["annealed-before-freeze", "annealed-after-freeze"])
@pytest.mark.parametrize("freeze_step", [None, 3], ids=["never", "at-3"])
@pytest.mark.parametrize("freeze_mode", ["frozen", "shared", "copied"])
def test_teacher_equals_its_slow_twin_across_the_freeze(freeze_mode, freeze_step, anneal_steps):
    model = pretraining_model(
        ema_decay=0.5,
        ema_end_decay=0.9,
        ema_anneal_steps=anneal_steps,
        freeze_teacher_step=freeze_step,
        freeze_mode=freeze_mode,
    ).train()
    with torch.no_grad():  # T2: the first teacher is the student
        for own, live in model.teacher.parameter_pairs(model.dinosr):
            own.copy_(live)
    twin = SlowTeacher(model.config, state_of(model))
    moved = {}
    last = [state_of(model)]

    def check(step, student):
        twin.update(step, student)
        wanted = {**twin.encoder, **(twin.front if freeze_mode == "copied" else {})}
        teacher = model.teacher.state_dict()
        assert teacher.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(teacher[name], tensor, **WEIGHTS, msg=lambda m, n=name: f"{step} {n}: {m}")
        now = state_of(model)
        moved[step] = {name.rpartition(".")[0] for name in now if not torch.equal(now[name], last[0][name])}
        last[0] = now

    trained(model, 6, check)
    frozen = freeze_step is not None

    def moving(prefix, step):
        return any(name.startswith(prefix) for name in moved[step])

    assert moving("dinosr.encoder.layers", 6) and moving("heads", 6) and moving("codebooks", 6)
    assert moving("teacher.layers", 2)
    assert moving("teacher.layers", 6) == (not frozen)
    # a freeze before the end of annealing: only "frozen" stops at once (T6)
    assert moving("teacher.layers", 4) == (not frozen or (freeze_mode != "frozen" and anneal_steps == 5))
    # the student's front end
    assert moving("dinosr.feature_extractor", 3)
    assert moving("dinosr.feature_extractor", 6) == (not frozen or freeze_mode != "frozen")
    assert moving("dinosr.feature_projection", 6) == (not frozen or freeze_mode != "frozen")
    if freeze_mode == "copied":
        assert moving("teacher.feature_extractor", 3)
        assert moving("teacher.feature_extractor", 6) == (not frozen)


@pytest.mark.parametrize("freeze_mode", ["frozen", "shared", "copied"])
def test_what_the_freeze_stops_training(freeze_mode):
    model = pretraining_model(freeze_mode=freeze_mode, freeze_teacher_step=2, ema_anneal_steps=1).train()
    front = [*model.dinosr.feature_extractor.parameters(), *model.dinosr.feature_projection.parameters()]
    others = [*model.dinosr.encoder.parameters(), *model.heads.parameters(), model.dinosr.masked_spec_embed]
    seen = {}

    def check(step, _student):
        seen[step] = ({p.requires_grad for p in front}, {p.grad is None for p in front})
        assert all(p.requires_grad and p.grad is not None for p in others)

    trained(model, 4, check)
    assert seen[1] == ({True}, {False})
    stopped = ({False}, {True}) if freeze_mode == "frozen" else ({True}, {False})
    assert [seen[step] for step in (2, 3, 4)] == [stopped] * 3


def test_apply_freeze_on_resume():
    model = pretraining_model(freeze_teacher_step=5)
    assert model.apply_freeze(4) is False
    assert all(p.requires_grad for p in model.dinosr.feature_extractor.parameters())
    assert model.apply_freeze(5) is True
    frozen = {name for name, p in model.dinosr.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.dinosr.named_parameters() if n.startswith(tuple(FRONT))}


@pytest.mark.parametrize("freeze_mode", ["shared", "copied"])
def test_apply_freeze_leaves_the_student_alone_in_the_authors_modes(freeze_mode):
    model = pretraining_model(freeze_teacher_step=5, freeze_mode=freeze_mode)
    assert model.apply_freeze(6) is False
    assert all(p.requires_grad for p in model.dinosr.parameters())


def test_freeze_at_step_0_keeps_the_first_teacher():
    model = pretraining_model(freeze_teacher_step=0).train()
    model.apply_freeze(0)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    assert model.update_targets(1)["ema_decay"] == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.teacher.state_dict().items())


@pytest.mark.parametrize("freeze_mode", ["frozen", "shared", "copied"])
def test_whose_convolutions_feed_the_teacher(freeze_mode):
    model = pretraining_model(freeze_mode=freeze_mode).eval()
    in_state = {name for name in model.state_dict() if name.startswith(("teacher.feature_", "teacher.conv"))}
    assert bool(in_state) == (freeze_mode == "copied")
    x = waveforms(1, 400)

    def targets():
        return model.compute_targets(x, model.dinosr(x).extract_features)

    before = targets()
    with torch.no_grad():
        model.dinosr.feature_extractor.conv_layers[1].conv.weight.mul_(-1.5)
    difference = (targets() - before).abs().max()
    assert difference == 0 if freeze_mode == "copied" else difference > 0.01
    if freeze_mode == "copied":
        model.teacher.copy_front_end(model.dinosr.feature_extractor, model.dinosr.feature_projection)
        assert (targets() - before).abs().max() > 0.01


def test_copies_equal_the_student_in_a_new_model():
    model = DinoSRForPreTraining(tiny_config(freeze_mode="copied"))
    state = model.state_dict()
    copies = [name for name in state if name.startswith("teacher.feature_")]
    assert len(copies) == 3 * 3 + 4
    assert all(torch.equal(state[name], state[name.replace("teacher", "dinosr", 1)]) for name in copies)


def test_teacher_is_always_in_evaluation_mode_and_never_trained():
    model = pretraining_model(tiny_config(hidden_dropout=0.5, layerdrop=0.5, feat_proj_dropout=0.5)).train()
    assert model.dinosr.encoder.training
    assert not any(module.training for module in model.teacher.modules())
    model.teacher.train()
    assert not any(module.training for module in model.teacher.modules())
    assert not any(p.requires_grad for p in (*model.teacher.parameters(), *model.codebooks.parameters()))
    x = waveforms(2, 500)
    features = model.dinosr(x).extract_features
    assert torch.equal(model.compute_targets(x, features), model.compute_targets(x, features))
    assert not torch.equal(model.dinosr(x).last_hidden_state, model.dinosr(x).last_hidden_state)


def test_a_copy_of_the_model_keeps_its_teacher_frozen():
    model = copy.deepcopy(pretraining_model()).train()
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any(module.training for module in model.teacher.modules())


@pytest.mark.parametrize("adapted", ["dinosr.encoder", "teacher"])
def test_adapters_must_be_merged_before_the_teacher_moves(adapted):
    peft = pytest.importorskip("peft")
    model = DinoSRForPreTraining(tiny_config())
    targets = rf"{adapted}\.layers\.\d+\.attention\.q_proj"
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets), model)
    with pytest.raises(ValueError, match="Merge the adapters first"):
        model.update_targets(1)


def test_a_teacher_that_cannot_follow_leaves_the_codebooks_as_they_were():
    model = pretraining_model().to(torch.bfloat16).train()
    model(waveforms(2, 801).bfloat16(), mask_time_indices=every_third(2, model.config.num_frames(801)))
    before = {name: value.clone() for name, value in model.codebooks.state_dict().items()}
    with pytest.raises(ValueError, match=r"dtype is torch\.bfloat16, in which steps of .* are rounded away"):
        model.update_targets(1)
    assert all(torch.equal(value, before[name]) for name, value in model.codebooks.state_dict().items())


def test_targets_do_not_depend_on_the_mask():
    model = pretraining_model().eval()
    x = waveforms(1, 600)
    num_frames = model.config.num_frames(600)
    few, many = every_third(1, num_frames), torch.ones(1, num_frames, dtype=torch.bool)
    assert torch.equal(model(x, mask_time_indices=many).codes[:, ::3], model(x, mask_time_indices=few).codes)


def test_a_batch_without_a_masked_frame_has_no_loss():
    model = pretraining_model().train()
    before = state_of(model)
    nothing = torch.zeros(2, model.config.num_frames(500), dtype=torch.bool)
    output = model(waveforms(2, 500), mask_time_indices=nothing)
    assert output.loss == 0 and output.num_masked_frames == 0
    assert output.codes.shape == (2, 0)
    output.loss.backward()
    # every parameter takes part, so that processes with and without masked frames agree on what to reduce
    unused = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == set()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)
    model.codebooks.commit(0.5)
    assert changed(before, model) == set()


def test_every_trainable_parameter_gets_a_gradient_and_moves():
    model = pretraining_model().train()
    before = state_of(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x, mask = batch(0)
    model(x, mask_time_indices=mask).loss.backward()
    without = {n for n in trainable if not model.get_parameter(n).grad.any()}
    assert {n for n in without if not n.endswith("k_proj.bias")} == set()
    optimizer.step()
    assert changed(before, model) == trainable
    assert {name.partition(".")[0] for name in trainable} == {"dinosr", "heads"}
    model.update_targets(1)
    assert {name.partition(".")[0] for name in changed(before, model) - trainable} == {"teacher", "codebooks"}


def test_it_learns():
    torch.manual_seed(0)
    model = DinoSRForPreTraining(deterministic_config(num_hidden_layers=2, ema_decay=0.9, ema_end_decay=0.9)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x = waveforms(3, 700)
    mask = every_third(3, model.config.num_frames(700))
    losses = []
    for step in range(1, 26):
        optimizer.zero_grad()
        output = model(x, mask_time_indices=mask)
        output.loss.backward()
        optimizer.step()
        model.update_targets(step)
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_loss_is_the_same_as_a_tuple():
    model = pretraining_model().eval()
    x, mask = batch(0)
    as_tuple = model(x, mask_time_indices=mask, return_dict=False)
    torch.testing.assert_close(as_tuple[0], model(x, mask_time_indices=mask).loss, **LOSSES)


def test_a_state_dict_without_copies_fills_them_from_its_student():
    source = pretraining_model(freeze_mode="shared").state_dict()
    model = pretraining_model(seed=1, freeze_mode="copied")
    model.load_state_dict(source)
    state = model.state_dict()
    names = [name for name in state if name.startswith(("teacher.feature_extractor.", "teacher.feature_projection."))]
    assert names
    for name in names:
        assert torch.equal(state[name], source[name.replace("teacher.", "dinosr.", 1)])
    assert not any("teacher.feature" in name for name in source)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: tensor for name, tensor in source.items() if not name.startswith("dinosr.")})


def test_no_number_of_a_step_is_read():
    # Fake tensors have no numbers: what a GPU's host would wait for is an error with them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = DinoSRForPreTraining(tiny_config()).train()
        x = torch.empty(2, 600)
        mask = torch.empty(2, model.config.num_frames(600), dtype=torch.bool)
        sums = MetricSums(model.config, x.device)
        output = model(x, mask_time_indices=mask, masked_frames=torch.empty(9, dtype=torch.int64))
        output.loss.backward()
        model.update_targets(1)
        sums.add(output, 1200, 0)
        assert output.codes.shape == (model.config.num_codebooks, 9)
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            model(x, mask_time_indices=mask)  # where the frames must be counted first


def test_masked_frames_are_those_of_the_mask():
    model = pretraining_model().eval()
    x = waveforms(2, 600)
    mask = every_third(2, model.config.num_frames(600))
    counted = model(x, mask_time_indices=mask)
    given = model(x, mask_time_indices=mask, masked_frames=mask.flatten().nonzero()[:, 0])
    assert torch.equal(given.codes, counted.codes) and given.loss == counted.loss
    fewer = model(x, mask_time_indices=mask, masked_frames=torch.tensor([0, 3]))
    assert torch.equal(fewer.codes, counted.codes[:, :2]) and fewer.loss != counted.loss


def test_revival_can_begin_with_a_model_that_was_trained_without_it(tmp_path):
    plain = pretraining_model()
    plain.save_pretrained(tmp_path / "plain")
    model = DinoSRForPreTraining.from_pretrained(tmp_path / "plain", codebook_revival_share=0.25).train()
    for name in ("sums", "counts"):
        assert torch.equal(getattr(model.codebooks, name), getattr(plain.codebooks, name))
    assert torch.equal(model.codebooks.usage, torch.ones_like(model.codebooks.counts))
    model(waveforms(2, 801), mask_time_indices=every_third(2, model.config.num_frames(801)))
    model.update_targets(1)
    usage = model.codebooks.usage.clone()
    assert usage.dtype == torch.float32 and usage.min() == pytest.approx(0.9) and usage.max() > 1
    torch.testing.assert_close(usage.mean(dim=1), torch.ones(len(usage)), **SAME_ARITHMETIC)
    # it is part of the state, and stays float32 where the model around it does not
    model.save_pretrained(tmp_path / "reviving")
    again = DinoSRForPreTraining.from_pretrained(tmp_path / "reviving", dtype=torch.bfloat16)
    assert torch.equal(again.codebooks.usage, usage)
