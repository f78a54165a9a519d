"""
Time features and units of a padded batch, compared with models of transformers and the package spidr.

    python benchmarks/extract.py --size base --batch 8 --shortest 2 --longest 12 --repeats 5 --threads 2

Each contestant runs in its own process, in evaluation mode, and they take turns on the same padded batch with its
attention mask. Features: `ours`, `data2vec` and `hubert` (transformers, the same sizes), `spidr` (outputs of all
layers). Units: `ours units` and `spidr units` are those of all codebooks, by the student's heads; `ours teacher` those
of the lowest codebook, by the teacher. `spidr units` is compared with `ours units`, all others with `ours`. Nothing is
timed unless our features equal those of `Data2VecAudioModel` with our weights on each utterance alone.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from contest import (
    SAMPLING_RATE,
    at_least,
    choose_device,
    compete,
    contest_parser,
    headline,
    model_config,
    print_contest,
    require_spidr,
    serve,
)
from transformers import Data2VecAudioConfig, Data2VecAudioModel, HubertConfig, HubertModel

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining

# Outputs of the last layer are about 1. Measured with the base model and 3 utterances of 1 to 4 s: 9e-6.
TOLERANCE = 1e-3
OURS = ("ours", "ours units", "ours teacher")
BASELINES = ("data2vec", "hubert", "spidr", "spidr units")


def parse_lengths(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, shortest: float, longest: float
) -> argparse.Namespace:
    """Add the lengths of a batch to the options, and parse them all."""
    parser.add_argument(
        "--shortest", type=at_least(0.5), default=shortest, help="seconds of the shortest (%(default)s)"
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=longest,
        help="seconds of the longest; lengths are spaced evenly (%(default)s)",
    )
    options = parser.parse_args(argv)
    if not options.shortest <= options.longest:
        parser.error(f"--shortest={options.shortest:g} must be at most --longest={options.longest:g}.")
    return options


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser(__doc__, batch=8, repeats=5)
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=BASELINES,
        default=["data2vec", "hubert"],
        help="baselines to compare with (%(default)s)",
    )
    return parse_lengths(parser, argv, shortest=2.0, longest=12.0)


def num_samples(options: argparse.Namespace) -> torch.Tensor:
    """Return the length of each utterance, int64 (B,)."""
    return (torch.linspace(options.shortest, options.longest, options.batch) * SAMPLING_RATE).long()


def make_batch(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise (B, S), zero in the padding, and the attention mask (B, S)."""
    lengths = num_samples(options)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    waveforms = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return waveforms.to(device), mask.to(device)


def baseline_config(kind: type, config: DinoSRConfig) -> Data2VecAudioConfig | HubertConfig:
    """Return a baseline's configuration with the same sizes."""
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim"]
    names += ["conv_kernel", "conv_stride", "conv_bias", "num_conv_pos_embedding_groups"]
    sizes = {name: getattr(config, name) for name in names}
    if kind is Data2VecAudioConfig:
        sizes |= {name: getattr(config, name) for name in ("num_conv_pos_embeddings", "conv_pos_kernel_size")}
    return kind(**sizes)


def frame_mask(config: DinoSRConfig, mask: torch.Tensor) -> torch.Tensor:
    """Return the frame mask, bool (B, T), for an attention mask (B, S)."""
    num_frames = config.num_frames(mask.sum(dim=1))
    return torch.arange(int(num_frames.max()), device=mask.device) < num_frames[:, None]


def make_contestant(
    name: str, options: argparse.Namespace, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """Return a function that runs the contestant on waveforms and attention mask."""
    torch.manual_seed(0)
    config = model_config(options.size)
    if name in OURS:
        model = DinoSRForPreTraining(config).to(device).eval()
        if name == "ours":
            return lambda waveforms, mask: model.dinosr(waveforms, mask).last_hidden_state
        layers, source = config.codebook_layers, "student"
        if name == "ours teacher":
            layers, source = layers[:1], "teacher"
        return lambda waveforms, mask: model.encode_units(waveforms, mask, layers=layers, source=source)
    if name.startswith("spidr"):
        from spidr.config import DinoSRConfig as SpidrConfig  # type: ignore[import-not-found]
        from spidr.models import DinoSR

        spidr_model = DinoSR(SpidrConfig()).to(device).eval()

        def run_spidr(waveforms: torch.Tensor, mask: torch.Tensor) -> object:
            padding = frame_mask(config, mask)[:, None, None]
            if name == "spidr":
                return spidr_model.get_intermediate_outputs(waveforms, attention_mask=padding)
            found = spidr_model.get_codebooks(waveforms, attention_mask=padding)
            return [probabilities.argmax(dim=-1) for probabilities in found if probabilities is not None]

        return run_spidr
    kind, build = (Data2VecAudioConfig, Data2VecAudioModel) if name == "data2vec" else (HubertConfig, HubertModel)
    baseline = build(baseline_config(kind, config)).to(device).eval()
    return lambda waveforms, mask: baseline(waveforms, attention_mask=mask).last_hidden_state


@torch.no_grad()
def find_errors(options: argparse.Namespace, device: torch.device) -> list[str]:
    """Return what is wrong with our features; an empty list if nothing is."""
    torch.manual_seed(0)
    config = model_config(options.size)
    ours = DinoSRForPreTraining(config).dinosr.to(device).eval()
    theirs = Data2VecAudioModel(baseline_config(Data2VecAudioConfig, config)).to(device).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    if missing or unexpected:
        return [f"Data2VecAudioModel has different weights: missing {missing}, unexpected {unexpected}"]
    waveforms, mask = make_batch(options, device)
    features = ours(waveforms, mask).last_hidden_state
    errors = []
    for row, length in enumerate(num_samples(options).tolist()):
        alone = theirs(waveforms[row : row + 1, :length]).last_hidden_state[0]
        difference = (features[row, : len(alone)] - alone).abs().max().item()
        if not difference <= TOLERANCE:
            errors.append(f"features of utterance {row} differ by {difference:.1e} from those of the utterance alone")
    return errors


def run_contestant(options: argparse.Namespace, device: torch.device) -> None:
    contestant = make_contestant(options.serve, options, device)
    batch = make_batch(options, device)

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            contestant(*batch)

    serve(step, device)


def main(argv: Sequence[str]) -> None:
    options = parse(argv)
    device = choose_device(options.threads)
    if options.serve:
        run_contestant(options, device)
        return
    require_spidr([name.split()[0] for name in options.peers], options.size)
    if errors := find_errors(options, device):
        sys.exit("Nothing was timed: " + "; ".join(errors))
    results = compete(__file__, [*OURS, *options.peers], argv, options.repeats)
    packages = ["transformers", *(["spidr"] if {"spidr", "spidr units"} & {*options.peers} else [])]
    print(headline(device, options.threads, *packages, precision="bf16" if options.bf16 else "float32"))
    seconds = num_samples(options) / SAMPLING_RATE
    audio = seconds.sum().item()
    padding = 1 - audio / (len(seconds) * seconds.max().item())
    print(
        f"{options.size}: {options.batch} utterances of {options.shortest:g} to {options.longest:g} s in a batch,"
        f" {padding:.0%} of it padding; {options.repeats} runs of each in turn\n"
    )
    print_contest(results, audio, compared={"spidr units": "ours units"})


if __name__ == "__main__":
    main(sys.argv[1:])
