"""
How long do units and features of a batch of unequal lengths take, beside models of transformers and package spidr?

    python benchmarks/extract.py --size base --batch 8 --shortest 2 --longest 12 --repeats 5 --threads 2

Contestants are processes of their own that take turns, in evaluation mode, on the same padded batch with its
attention mask. Features: `ours`, `data2vec` and `hubert` (transformers, the same sizes), `spidr` (the outputs of all
layers). Units of layer 5 by the student's head: `ours units`, `spidr units`; by the teacher: `ours teacher`. Before,
our features must be those of `Data2VecAudioModel` with our weights on each utterance alone, or nothing is timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from contest import (
    SAMPLING_RATE,
    choose_device,
    compete,
    contest_parser,
    headline,
    model_config,
    parse_contest,
    print_times,
    require_spidr,
    serve,
)
from transformers import Data2VecAudioConfig, Data2VecAudioModel, HubertConfig, HubertModel

from dinosr_hf import DinoSRConfig, DinoSRForPreTraining

# Outputs of the last layer are about 1; measured with base, 3 x 1 to 4 s: 9e-6.
TOLERANCE = 1e-3
OURS = ("ours", "ours units", "ours teacher")
BASELINES = ("data2vec", "hubert", "spidr", "spidr units")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = contest_parser("Time features and units of a padded batch.", batch=8, repeats=5)
    parser.add_argument("--shortest", type=float, default=2.0, help="seconds of the shortest, at least 0.5")
    parser.add_argument("--longest", type=float, default=12.0, help="seconds; the lengths are spread evenly")
    parser.add_argument("--peers", nargs="+", choices=BASELINES, default=["data2vec", "hubert"])
    options = parse_contest(parser, argv, smallest_batch=1)
    if not 0.5 <= options.shortest <= options.longest:
        parser.error("--shortest must be at least 0.5 and at most --longest.")
    return options


def num_samples(options: argparse.Namespace) -> torch.Tensor:
    """Of each utterance, int64 (B,)."""
    return (torch.linspace(options.shortest, options.longest, options.batch) * SAMPLING_RATE).long()


def make_batch(options: argparse.Namespace, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, S), zero where the attention mask (B, S) is."""
    lengths = num_samples(options)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    waveforms = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return waveforms.to(device), mask.to(device)


def peer_config(kind: type, config: DinoSRConfig) -> Data2VecAudioConfig | HubertConfig:
    """Of the same sizes."""
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "conv_dim"]
    names += ["conv_kernel", "conv_stride", "conv_bias", "num_conv_pos_embedding_groups"]
    sizes = {name: getattr(config, name) for name in names}
    if kind is Data2VecAudioConfig:
        sizes |= {name: getattr(config, name) for name in ("num_conv_pos_embeddings", "conv_pos_kernel_size")}
    return kind(**sizes)


def frames_of(config: DinoSRConfig, mask: torch.Tensor) -> torch.Tensor:
    """attention_mask (B, S) to bool (B, T)."""
    num_frames = config.num_frames(mask.sum(dim=1))
    return torch.arange(int(num_frames.max()), device=mask.device) < num_frames[:, None]


def make_contestant(
    name: str, options: argparse.Namespace, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """A function of waveforms and attention mask."""
    torch.manual_seed(0)
    config = model_config(options.size)
    if name in OURS:
        model = DinoSRForPreTraining(config).to(device).eval()
        layer = config.codebook_layers[0]
        if name == "ours":
            return lambda waveforms, mask: model.dinosr(waveforms, mask).last_hidden_state
        source = "student" if name == "ours units" else "teacher"
        return lambda waveforms, mask: model.encode_units(waveforms, mask, layer=layer, source=source)
    if name.startswith("spidr"):
        from spidr.config import DinoSRConfig as PeerConfig  # type: ignore[import-not-found]
        from spidr.models import DinoSR

        peer = DinoSR(PeerConfig()).to(device).eval()
        get = peer.get_codebooks if name == "spidr units" else peer.get_intermediate_outputs
        return lambda waveforms, mask: get(waveforms, attention_mask=frames_of(config, mask)[:, None, None])
    kind, build = (Data2VecAudioConfig, Data2VecAudioModel) if name == "data2vec" else (HubertConfig, HubertModel)
    other = build(peer_config(kind, config)).to(device).eval()
    return lambda waveforms, mask: other(waveforms, attention_mask=mask).last_hidden_state


@torch.no_grad()
def complaints(options: argparse.Namespace, device: torch.device) -> list[str]:
    """What is wrong with our features: nothing, it is hoped."""
    torch.manual_seed(0)
    config = model_config(options.size)
    ours = DinoSRForPreTraining(config).dinosr.to(device).eval()
    theirs = Data2VecAudioModel(peer_config(Data2VecAudioConfig, config)).to(device).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    if missing or unexpected:
        return [f"the peer has other weights: {missing}, {unexpected}"]
    waveforms, mask = make_batch(options, device)
    features = ours(waveforms, mask).last_hidden_state
    found = []
    for row, length in enumerate(num_samples(options).tolist()):
        alone = theirs(waveforms[row : row + 1, :length]).last_hidden_state[0]
        difference = (features[row, : len(alone)] - alone).abs().max().item()
        if not difference <= TOLERANCE:
            found.append(f"features of utterance {row} differ by {difference:.1e} from those of it alone")
    return found


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
    require_spidr([peer.split()[0] for peer in options.peers], options.size)
    if found := complaints(options, device):
        sys.exit("Not timed, because it is wrong: " + "; ".join(found))
    found = compete(__file__, [*OURS, *options.peers], argv, options.repeats)
    packages = ["transformers", *(["spidr"] if {"spidr", "spidr units"} & {*options.peers} else [])]
    print(headline(device, options.threads, *packages, precision="bf16" if options.bf16 else "float32"))
    seconds = num_samples(options) / SAMPLING_RATE
    audio = seconds.sum().item()
    padding = 1 - audio / (len(seconds) * seconds.max().item())
    print(
        f"{options.size}: {options.batch} utterances of {options.shortest:g} to {options.longest:g} s in a batch,"
        f" {padding:.0%} of it padding; {options.repeats} runs of each in turn\n"
    )
    print_times(found, audio)


if __name__ == "__main__":
    main(sys.argv[1:])
