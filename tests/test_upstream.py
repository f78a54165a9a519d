"""The model in the form of docs/upstream.md, for transformers itself: same weights in, same numbers out as ours."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import PreTrainedConfig

import dinosr_hf
from dinosr_hf import DinoSRConfig
from scripts import ROOT
from tiny import SIZES, deterministic_config, padded, randomize, tiny_config, waveforms
from tolerances import CODEBOOK_COUNTS, CODEBOOK_SUMS, GRADIENTS, LOSSES, SAME_ARITHMETIC, WEIGHTS

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="a new model goes into the newest transformers"
)

MODULAR = ROOT / "docs" / "upstream" / "modular_dinosr.py"
MODELS = (
    "DinoSRModel",
    "DinoSRForPreTraining",
    "DinoSRForCTC",
    "DinoSRForSequenceClassification",
    "DinoSRForAudioFrameClassification",
    "DinoSRForXVector",
)
CLASSIFIERS = MODELS[3:]
WITHOUT_EFFECT = {"ema_timescale", "ema_threshold"}  # of the exponential schedule, which is refused
LENGTHS = (801, 390, 501)


def load(file):
    """Import the modular file from where it would be in transformers; return it and what it printed."""
    name = "transformers.models.dinosr.modular_dinosr"
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        spec.loader.exec_module(module)
    return module, printed.getvalue()


@pytest.fixture(scope="module")
def loaded():
    return load(MODULAR)


@pytest.fixture
def upstream(loaded):
    return loaded[0]


def pair(upstream, name, config=None, **changes):
    """Our model and the upstream one, with the same random weights."""
    config = config or deterministic_config(**changes)
    torch.manual_seed(0)
    ours = randomize(getattr(dinosr_hf, name)(config))
    theirs = getattr(upstream, name)(upstream.DinoSRConfig(**config.to_dict()))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def batch():
    return padded([waveforms(1, length, seed=length)[0] for length in LENGTHS])


def mask_of(config, offset=1):
    mask = torch.zeros(len(LENGTHS), config.num_frames(max(LENGTHS)), dtype=torch.bool)
    mask[:, offset::3] = True
    return mask


def both(models, *args, seed=5, **kwargs):
    """Outputs of both models for the same inputs, from the same state of torch's generator."""
    outputs = []
    for model in models:
        torch.manual_seed(seed)
        outputs.append(model(*args, **kwargs))
    return outputs


def assert_same_gradients(ours, theirs):
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            scale = max(1.0, gradients[name].abs().max().item())  # a sum is rounded by its largest terms
            torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, msg=name, **GRADIENTS)


def fields_of(config_class):
    """Names and defaults of the fields that a configuration does not share with every other."""
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name: field.default for field in dataclasses.fields(config_class) if field.name not in shared}


def test_every_argument_is_documented(loaded):
    assert loaded[1] == ""  # where `@auto_docstring` reports what is not


def test_fields_are_ours_with_the_same_defaults(upstream):
    theirs, ours = fields_of(upstream.DinoSRConfig), fields_of(DinoSRConfig)
    assert theirs == {name: ours.get(name) for name in theirs}
    fixed = upstream.DinoSRConfig._fixed_options
    assert set(ours) - set(theirs) == set(fixed) | WITHOUT_EFFECT
    assert fixed == {name: ours[name] for name in fixed}
    assert upstream.DinoSRConfig.model_type == DinoSRConfig.model_type


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("attention_init", "xavier"),
        ("codebook_revival_share", 0.1),
        ("codebook_update_steps", 4),
        ("ema_schedule", "exponential"),
        ("feature_encoder", "log_mel"),
        ("freeze_front_end_step", 7),
        ("freeze_mode", "shared"),
        ("head_input", "own_layer"),
        ("num_anchor_labels", 6),
        ("qkv_bias", False),
        ("reference_padding", True),
        ("teacher_init", "random"),
    ],
)
def test_options_that_it_lacks_are_refused(upstream, option, value, tmp_path):
    DinoSRConfig(**{option: value}).save_pretrained(tmp_path)
    expected = upstream.DinoSRConfig._fixed_options[option]
    message = re.escape(f"`{option}={value!r}` is not supported; expected {expected!r}.")
    with pytest.raises(ValueError, match=message):
        upstream.DinoSRConfig.from_pretrained(tmp_path)


def test_several_labels_at_once_are_refused(upstream):
    config = upstream.DinoSRConfig
    for problem, num_labels in (("multi_label_classification", 3), ("regression", 2)):
        with pytest.raises(ValueError, match=f"problem_type='{problem}'` is not supported"):
            config(problem_type=problem, num_labels=num_labels)
    assert config(problem_type="regression", num_labels=1).num_labels == 1


def test_every_option_that_it_lacks_is_tested(upstream):
    tested = {option for option, _ in test_options_that_it_lacks_are_refused.pytestmark[0].args[1]}
    assert tested == set(upstream.DinoSRConfig._fixed_options)


def test_impossible_sizes_are_refused(upstream):
    with pytest.raises(StrictDataclassError, match="`num_codebooks=8` must not exceed `num_hidden_layers=4`"):
        upstream.DinoSRConfig(num_hidden_layers=4)
    with pytest.raises(StrictDataclassError, match="`conv_kernel` must have the same length"):
        upstream.DinoSRConfig(conv_dim=(32, 32), conv_stride=(4, 4), conv_kernel=(8,))


@pytest.mark.parametrize("name", MODELS)
def test_our_folders_open(upstream, name, tmp_path):
    ours = randomize(getattr(dinosr_hf, name)(tiny_config(use_weighted_layer_sum=True)))
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(upstream, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    written = json.loads((tmp_path / "config.json").read_text())
    for field in fields_of(upstream.DinoSRConfig):
        assert getattr(theirs.config, field) == getattr(ours.config, field) == written[field], field
    assert {n: t.shape for n, t in theirs.state_dict().items()} == {n: t.shape for n, t in ours.state_dict().items()}
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in theirs.named_parameters() if parameter.requires_grad} == trained


def test_heads_load_a_pretraining_checkpoint(upstream, tmp_path):
    pretrained = randomize(dinosr_hf.DinoSRForPreTraining(tiny_config()))
    pretrained.save_pretrained(tmp_path)
    head, report = upstream.DinoSRForCTC.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight", "lm_head.bias"} and not report["unexpected_keys"]
    assert torch.equal(head.dinosr.masked_spec_embed, pretrained.dinosr.masked_spec_embed)


def test_initial_weights(upstream):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=96, num_attention_heads=4, codebook_size=40)
    ours = dinosr_hf.DinoSRForPreTraining(config)
    theirs = upstream.DinoSRForPreTraining(upstream.DinoSRConfig(**config.to_dict()))
    for name, parameter in theirs.named_parameters():
        expected = ours.get_parameter(name)
        if parameter.numel() > 300:  # of fewer, the estimate is too rough
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.2), name
            assert parameter.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.4), name
    for own, student in zip(theirs.teacher.parameters(), theirs.dinosr.encoder.parameters(), strict=True):
        assert torch.equal(own, student)
    assert theirs.codebooks.sums.mean(dim=1).abs().max() < 1e-6 and (theirs.codebooks.counts == 1).all()
    weighted = upstream.DinoSRForXVector(upstream.DinoSRConfig(**SIZES, use_weighted_layer_sum=True))
    assert torch.equal(weighted.layer_weights.data, torch.full((4,), 0.25))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_features(upstream, attention):
    models = pair(upstream, "DinoSRModel")
    for model in models:
        model.eval().set_attn_implementation(attention)
    values, attention_mask = batch()
    for inputs in ((values[:1], None), (values, attention_mask)):
        ours, theirs = both(models, *inputs, output_hidden_states=True)
        assert len(ours.hidden_states) == len(theirs.hidden_states) == 4
        for own, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(other, own, **SAME_ARITHMETIC)
        torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **SAME_ARITHMETIC)
    valid = models[0]._frame_mask(attention_mask, ours.extract_features.shape[1])
    torch.testing.assert_close(theirs.extract_features[valid], ours.extract_features[valid], **SAME_ARITHMETIC)
    # the negative control: without the attention mask the padding is part of the utterance
    unaware = models[1](values).last_hidden_state
    assert (unaware - theirs.last_hidden_state)[valid].abs().max() > 1e-3


def test_attention_weights(upstream):
    models = pair(upstream, "DinoSRModel")
    for model in models:
        model.eval().set_attn_implementation("eager")
    ours, theirs = both(models, *batch(), output_attentions=True)
    for own, other in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(other, own, **SAME_ARITHMETIC)


@pytest.mark.parametrize("layerdrop", [0.0, 0.5])
@pytest.mark.parametrize("over_channels", [0.0, 0.3])
def test_fine_tuning_draws_the_same_masks(upstream, over_channels, layerdrop):
    settings = {"mask_time_prob": 0.4, "mask_time_length": 4, "mask_feature_length": 5, "layerdrop": layerdrop}
    models = pair(upstream, "DinoSRModel", apply_spec_augment=True, mask_feature_prob=over_channels, **settings)
    for model in models:
        model.train()
    ours, theirs = both(models, *batch())
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **SAME_ARITHMETIC)
    other_seed, _ = both(models, *batch(), seed=6)
    assert (other_seed.last_hidden_state - ours.last_hidden_state).abs().max() > 1e-3


def assert_same_output(ours, theirs):
    torch.testing.assert_close(theirs.loss, ours.loss, **LOSSES)
    torch.testing.assert_close(theirs.codebook_losses, ours.codebook_losses, **LOSSES)
    torch.testing.assert_close(theirs.target_perplexity, ours.target_perplexity, **LOSSES)
    torch.testing.assert_close(theirs.prediction_perplexity, ours.prediction_perplexity, **LOSSES)
    assert torch.equal(theirs.codes, ours.codes)
    assert theirs.num_masked_frames == ours.num_masked_frames > 0


def assert_same_state(ours, theirs):
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        tolerance = {"sums": CODEBOOK_SUMS, "counts": CODEBOOK_COUNTS}.get(name.rpartition(".")[2], WEIGHTS)
        torch.testing.assert_close(tensor, ours.state_dict()[name], msg=name, **tolerance)


def train(models, num_steps=3, seed=11):
    """Train both in steps of two micro-batches, with the masks that each draws, and compare all that comes out."""
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in models]
    for step in range(1, num_steps + 1):
        for half in range(2):
            values, attention_mask = batch()
            outputs = [
                model.train()(
                    values.roll(half * 7 + step, dims=1) * attention_mask,
                    attention_mask,
                    generator=torch.Generator().manual_seed(seed + 10 * step + half),
                )
                for model in models
            ]
            for output in outputs:
                output.loss.backward()
            assert_same_output(*outputs)
        assert_same_gradients(*models)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert models[0].update_targets(step) == models[1].update_targets(step)
    assert_same_state(*models)


SCHEDULES = {
    "paper": {},
    "annealed": {"ema_decay": 0.5, "ema_end_decay": 0.9, "ema_anneal_steps": 2, "codebook_end_decay": 0.5}
    | {"codebook_end_decay_step": 2},
    "frozen": {"ema_decay": 0.7, "freeze_teacher_step": 2},
    "never-frozen": {"ema_decay": 0.7, "ema_anneal_steps": 0, "freeze_teacher_step": None},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pretraining_steps(upstream, schedule):
    models = pair(upstream, "DinoSRForPreTraining", **SCHEDULES[schedule])
    before = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    train(models)
    theirs = models[1].state_dict()
    for name in ("codebooks.sums", "teacher.layers.0.attention.q_proj.weight"):
        assert not torch.equal(theirs[name], before[name])
    trains_front_end = models[1].dinosr.feature_projection.projection.weight.requires_grad
    assert trains_front_end is (schedule != "frozen")
    assert models[0].apply_freeze(3) is models[1].apply_freeze(3)


def test_pretraining_in_evaluation_mode(upstream):
    models = pair(upstream, "DinoSRForPreTraining")
    for model in models:
        model.eval()
    assert_same_output(*both(models, *batch(), mask_of(models[0].config)))
    ours, theirs = both(models, *batch(), output_hidden_states=True)
    assert theirs.loss is None and theirs.codes is None and len(theirs.hidden_states) == 4
    torch.testing.assert_close(theirs.last_hidden_state, ours.last_hidden_state, **SAME_ARITHMETIC)
    assert models[1].codebooks._pending is None


def test_pretraining_without_a_masked_frame(upstream):
    _, theirs = pair(upstream, "DinoSRForPreTraining")
    output = theirs.train()(*batch(), mask_time_indices=torch.zeros_like(mask_of(tiny_config())))
    output.loss.backward()
    assert output.loss == 0 and output.num_masked_frames == 0
    assert theirs.heads[0].weight.grad is not None


@pytest.mark.parametrize("source", ["student", "teacher"])
def test_units(upstream, source):
    ours, theirs = pair(upstream, "DinoSRForPreTraining")
    train((ours, theirs), num_steps=1)
    found = []
    for layer in ours.config.codebook_layers:
        codes, lengths = ours.eval().encode_units(*batch(), layer=layer, source=source)
        same, same_lengths = theirs.eval().encode_units(*batch(), layer=layer, source=source)
        assert torch.equal(same, codes) and torch.equal(same_lengths, lengths)
        alone, _ = theirs.encode_units(batch()[0][1:2, : LENGTHS[1]], layer=layer, source=source)
        assert torch.equal(alone[0], codes[1, : lengths[1]])
        found.append(codes)
    assert not torch.equal(*found)


def test_units_of_an_unknown_layer_or_source_are_refused(upstream):
    _, theirs = pair(upstream, "DinoSRForPreTraining")
    for changes in ({"layer": 1}, {"layer": 2, "source": "anchor"}):
        with pytest.raises(ValueError, match=r"There are no units of `layer=.* Choose one of \(2, 3\)"):
            theirs.eval().encode_units(*batch(), **changes)


LABELS = torch.tensor([[3, 3, 7, 10], [1, -100, -100, -100], [4, 2, -100, -100]])


@pytest.mark.parametrize("changes", [{}, {"ctc_loss_reduction": "sum", "pad_token_id": 5}], ids=["mean", "sum"])
def test_ctc(upstream, changes):
    models = pair(upstream, "DinoSRForCTC", **changes)
    ours, theirs = both([model.train() for model in models], *batch(), labels=LABELS)
    torch.testing.assert_close(theirs.loss, ours.loss, **LOSSES)
    torch.testing.assert_close(theirs.logits, ours.logits, **SAME_ARITHMETIC)
    for output in (ours, theirs):
        output.loss.backward()
    assert_same_gradients(*models)
    ours, theirs = both([model.eval() for model in models], *batch())
    torch.testing.assert_close(theirs.logits, ours.logits, **SAME_ARITHMETIC)
    with pytest.raises(ValueError, match="Label values must be < vocab_size: 11"):
        models[1](*batch(), labels=LABELS + 1)


@pytest.mark.parametrize("weighted", [False, True], ids=["last-layer", "weighted-layers"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(upstream, name, weighted):
    models = pair(upstream, name, use_weighted_layer_sum=weighted)
    labels = torch.tensor([4, 0, 2])
    if name == "DinoSRForAudioFrameClassification":
        labels = labels[:, None].expand(-1, models[0].config.num_frames(max(LENGTHS))).clone()
        labels[:, ::4] = -100
    ours, theirs = both([model.train() for model in models], *batch(), labels=labels)
    torch.testing.assert_close(theirs.loss, ours.loss, **LOSSES)
    torch.testing.assert_close(theirs.logits, ours.logits, **SAME_ARITHMETIC)
    assert theirs.hidden_states is None
    for output in (ours, theirs):
        output.loss.backward()
    assert_same_gradients(*models)
    if labels.dim() == 2:
        one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 5)
        ours, theirs = both(models, *batch(), labels=one_hot)
        torch.testing.assert_close(theirs.loss, ours.loss, **LOSSES)
    ours, theirs = both([model.eval() for model in models], batch()[0], output_hidden_states=True)
    torch.testing.assert_close(theirs.logits, ours.logits, **SAME_ARITHMETIC)
    assert len(theirs.hidden_states) == 4


def test_regression(upstream):
    models = pair(upstream, "DinoSRForSequenceClassification", num_labels=1)
    ours, theirs = both(models, *batch(), labels=torch.tensor([0.3, -1.0, 2.0]))
    torch.testing.assert_close(theirs.loss, ours.loss, **LOSSES)


def test_freezing(upstream):
    for name in MODELS:
        model = getattr(upstream, name)(upstream.DinoSRConfig(**SIZES))
        model.freeze_feature_encoder()
        assert not any(p.requires_grad for p in model.base_model.feature_extractor.parameters())
        assert model.base_model.masked_spec_embed.requires_grad
        model.freeze_base_model()
        assert not any(p.requires_grad for p in model.base_model.parameters())


def test_the_page_for_transformers_runs(upstream, tmp_path, monkeypatch, capsys):
    page = MODULAR.with_name("dinosr.md").read_text()
    paper = DinoSRConfig()
    config = tiny_config(
        num_hidden_layers=5, conv_dim=[9] * 7, conv_stride=paper.conv_stride, conv_kernel=paper.conv_kernel
    )
    dinosr_hf.DinoSRForPreTraining(config).save_pretrained(tmp_path / "path" / "to" / "dinosr")
    monkeypatch.chdir(tmp_path)
    code = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    code = code.replace("from transformers import DinoSRForPreTraining, ", "from transformers import ")
    exec(code, {"DinoSRForPreTraining": upstream.DinoSRForPreTraining})
    assert capsys.readouterr().out == "torch.Size([2, 99]) [99, 74]\ntorch.Size([2, 99, 36])\n"
    documented = set(re.findall(r"\[\[autodoc\]\] (\w+)", page))
    assert documented == set(upstream.__all__) - {"DinoSRPreTrainedModel"}


def test_the_guide_names_what_there_is(upstream):
    guide = (MODULAR.parents[1] / "upstream.md").read_text()
    for option in upstream.DinoSRConfig._fixed_options:
        assert f"`{option}`" in guide
    rows = re.findall(r'^\| (?:`src/(\S+)` )?\| `(\w+)` \| `\("dinosr", "(\w+)"\),` \|$', guide, re.MULTILINE)
    file = ""
    for path, table, value in rows:
        file = path or file
        assert f"{table} = OrderedDict" in (Path(transformers.__file__).parents[1] / file).read_text()
        assert hasattr(upstream, value) or hasattr(transformers, value)
    assert len(rows) == 10


MUTATIONS = {
    "padding leaks between positional convolutions": ("masked_fill(~frame_mask[:, None], 0.0)", "clone()"),
    "no instance norm": (
        "return _normalize_over_time(torch.stack(outputs), frame_mask)",
        "return torch.stack(outputs)",
    ),
    "teacher moves too fast": ("else 1 - decay)", "else 1 - decay / 2)"),
    "positional convolutions are averaged": ('1.0 if name.startswith("pos_conv_embed.") else ', ""),
    "codewords without frames decay": (
        "torch.where(pending[..., -1] > 0, 1.0 - decay, 0.0)",
        "torch.full_like(pending[..., -1], 1.0 - decay)",
    ),
    "the last frame may be masked": ("size - mask_length if size", "size - mask_length + 1 if size"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_model_is_noticed(mutation, tmp_path):
    before, after = MUTATIONS[mutation]
    modular = MODULAR.read_text()
    assert modular.count(before) == 1
    (tmp_path / MODULAR.name).write_text(modular.replace(before, after))
    mutant, _ = load(tmp_path / MODULAR.name)
    models = pair(mutant, "DinoSRForPreTraining", ema_decay=0.5, ema_end_decay=0.5)
    with pytest.raises(AssertionError):
        train(models)
