"""
Time a CTC fine-tuning step, compared with `Data2VecAudioForCTC` of transformers.

    python benchmarks/ctc.py --size base --batch 4 --shortest 3 --longest 8 --repeats 5 --threads 2

A step is forward, CTC loss, backward and AdamW on a padded batch with random labels. Both models have the same dropout
and masks; the convolutions are frozen, as in the paper's protocol, unless `--train_convolutions`. Each contestant runs
in its own process, and they take turns. Nothing is timed unless our loss and gradients without dropout equal those of
the baseline on each utterance alone.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from contest import choose_device, compete, contest_parser, headline, model_config, print_contest, serve
from extract import SAMPLING_RATE, baseline_config, make_batch, num_samples, parse_lengths
from transformers import Data2VecAudioConfig, Data2VecAudioForCTC

from dinosr_hf import DinoSRForCTC

VOCABULARY = 32
CHARACTERS_PER_SECOND = 14  # of LibriSpeech
# Relative to the loss. Measured with the base model and 3 utterances of 1 to 4 s: 5e-8.
LOSS_TOLERANCE = 1e-4
# Relative to the norm of each parameter's gradient. Measured in the same way: 2e-5.
GRADIENT_TOLERANCE = 1e-3

DROPOUTS = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")

Recogniser = DinoSRForCTC | Data2VecAudioForCTC


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser(__doc__, batch=4, repeats=5)
    parser.add_argument("--train_convolutions", action="store_true", help="train the convolutions too")
    return parse_lengths(parser, argv, shortest=3.0, longest=8.0)


def make_recogniser(name: str, options: argparse.Namespace, device: torch.device, **changes: float) -> Recogniser:
    """Build one of the two models, with the same dropout, masks, layerdrop and loss reduction for both."""
    torch.manual_seed(0)
    config = model_config(options.size)
    names = [*DROPOUTS, "layerdrop", "mask_time_prob", "mask_time_length", "apply_spec_augment"]
    both = {name: getattr(config, name) for name in names} | changes
    both |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    ours = DinoSRForCTC(type(config)(**{**config.to_diff_dict(), **both}))
    if name == "ours":
        model: Recogniser = ours
    else:
        theirs = baseline_config(Data2VecAudioConfig, config).to_diff_dict()
        model = Data2VecAudioForCTC(Data2VecAudioConfig(**{**theirs, **both}))
        weights = {key.replace("dinosr.", "data2vec_audio."): value for key, value in ours.state_dict().items()}
        model.load_state_dict(weights)
    if not options.train_convolutions:
        model.freeze_feature_encoder()
    return model.to(device).train()


def make_labels(options: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """Return random labels (B, L) without blanks, at the rate of speech, padded with -100."""
    lengths = (num_samples(options) / SAMPLING_RATE * CHARACTERS_PER_SECOND).long()
    labels = torch.randint(
        1, VOCABULARY, (len(lengths), int(lengths.max())), generator=torch.Generator().manual_seed(0)
    )
    is_padding = torch.arange(labels.shape[1]) >= lengths[:, None]
    return labels.masked_fill(is_padding, -100).to(device)


def find_errors(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Compare our loss and gradients with the baseline's; return what differs."""
    without_dropout = {**dict.fromkeys([*DROPOUTS, "layerdrop"], 0.0), "apply_spec_augment": False}
    ours, theirs = (make_recogniser(name, options, device, **without_dropout) for name in ("ours", "data2vec"))
    waveforms, mask = make_batch(options, device)
    labels = make_labels(options, device)
    loss = ours(waveforms, attention_mask=mask, labels=labels).loss
    loss.backward()
    alone = []
    for row, length in enumerate(num_samples(options).tolist()):
        one = theirs(waveforms[row : row + 1, :length], labels=labels[row : row + 1]).loss / options.batch
        one.backward()
        alone.append(one.item())
    found = []
    if not abs(loss.item() - sum(alone)) <= LOSS_TOLERANCE * sum(alone):
        found.append(f"the losses are {loss.item()} and {sum(alone)}")
    gradients = {name.replace("data2vec_audio.", "dinosr."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        right = gradients[name]
        if right is None or parameter.grad is None:
            if right is not parameter.grad:
                found.append(f"only one of the models has a gradient of {name}")
        # The bias of the keys adds the same to all scores of a query: its gradient is zero but for rounding.
        elif not name.endswith("k_proj.bias"):
            difference = ((parameter.grad - right).norm() / right.norm()).item()
            if not difference <= GRADIENT_TOLERANCE:
                found.append(f"gradients of {name} differ by {difference:.1e}")
    return found


def run_contestant(options: argparse.Namespace, device: torch.device) -> None:
    model = make_recogniser(options.serve, options, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    waveforms, mask = make_batch(options, device)
    labels = make_labels(options, device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = model(waveforms, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    serve(step, device)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(options.threads)
    if options.serve:
        run_contestant(options, device)
        return
    if errors := find_errors(options, device):
        sys.exit("Nothing was timed: " + "; ".join(errors))
    found = compete(__file__, ["ours", "data2vec"], argv, options.repeats)
    print(headline(device, options.threads, "transformers", precision="bf16" if options.bf16 else "float32"))
    audio = num_samples(options).sum().item() / SAMPLING_RATE
    print(
        f"{options.size}: {options.batch} utterances of {options.shortest:g} to {options.longest:g} s, convolutions"
        f" {'trained' if options.train_convolutions else 'frozen'}; {options.repeats} steps of each in turn\n"
    )
    print_contest(found, audio)


if __name__ == "__main__":
    main(sys.argv[1:])
