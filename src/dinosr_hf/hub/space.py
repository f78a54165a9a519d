"""
A page to try models in a browser, on this machine or as a Space of the Hub: speech in, words with times and units out.

A Space's `app.py` is `build_page(Listener(["organisation/recogniser"])).launch()`. `S` samples at 16 kHz, `T` frames.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..analysis._figures import png_uri
from ..analysis.alignment import Segment
from ..analysis.plots import unit_strip_figure
from ..data import SAMPLING_RATE, SpeechSource, load_audio
from ..data.audio import audio_info
from ..data.sources import Utterance
from ..model.modeling_dinosr import DinoSRForPreTraining
from ..recognition import Transcriber
from ..recognition.decoding import TimedWord
from ..units import UnitExtractor, load_model
from ..utils.command_line import check_ranges
from ..utils.extras import import_extra
from ..utils.model_folder import open_dinosr_config

_KINDS = ("DinoSRForCTC", "DinoSRForPreTraining")

# Peak to peak: a muted microphone stays below this, the quietest room above.
_SILENCE = 1e-4
# Size of the picture: wide enough to print the numbers of a slow phone's units.
_INCHES_PER_SECOND, _MIN_INCHES = 2.5, 3.4
_PIXELS_PER_INCH = 96  # on the page


class Heard(NamedTuple):
    """What models heard in a recording."""

    samples: NDArray[np.float32]  # (S,)
    words: list[TimedWord] | None  # None: there is no recogniser
    units: NDArray[np.int64] | None  # (T,); None: there is no pre-trained model


class _HeardSource(SpeechSource):
    """A recording in memory."""

    def __init__(self, samples: NDArray[np.float32]) -> None:
        self.utterances, self.skipped, self._samples = [Utterance("recording", len(samples))], {}, samples

    def load(self, index: int, start: int = 0, num_samples: int | None = None) -> np.ndarray:
        return self._samples[start:][:num_samples]


class Listener:
    """
    A recogniser, a pre-trained model, or one of each, that listens to recordings.

    Args:
        models: Their folders or names on the Hub.
        device: Device of the models.
        greedy: Whether the recogniser leaves beam search out, which its `decoding.json` may ask for.
        max_seconds: Length of the longest recording to accept.

    Attributes:
        layers: Layers that have units; none without a pre-trained model.

    Raises `ValueError` if a model is of another kind or two are of the same kind, or `max_seconds` is not positive.
    """

    def __init__(
        self,
        models: Sequence[str | Path],
        *,
        device: str | torch.device = "cpu",
        greedy: bool = False,
        max_seconds: float = 30.0,
    ) -> None:
        check_ranges([(max_seconds > 0, "max_seconds", max_seconds, "more than 0")])
        self.max_seconds = max_seconds
        self._recogniser: Transcriber | None = None
        self._pretrained: DinoSRForPreTraining | None = None
        for name in models:
            (kind,) = open_dinosr_config(name).architectures or ["model of no kind"]
            if kind == "DinoSRForCTC" and self._recogniser is None:
                self._recogniser = Transcriber.from_folder(name, greedy=greedy, device=device)
            elif kind == "DinoSRForPreTraining" and self._pretrained is None:
                self._pretrained = load_model(name, device=device)
            else:
                found = f"{name} is a {'second ' * (kind in _KINDS)}{kind}"
                allowed = f"a recogniser ({_KINDS[0]}), a pre-trained model ({_KINDS[1]}), or one of each"
                raise ValueError(f"{found}. Give {allowed}.")
        self.layers = [] if self._pretrained is None else list(self._pretrained.config.codebook_layers)
        configs = [part.config for part in (self._pretrained, getattr(self._recogniser, "model", None)) if part]
        if not configs:
            raise ValueError("There is no model. Give the folder of a recogniser or of a pre-trained model, or both.")
        self._min_samples = max(config.receptive_field for config in configs)
        self._frames: dict[str, Any] = {
            "stride": configs[0].inputs_to_logits_ratio,
            "field": configs[0].receptive_field,
        }

    def _load(self, file: str | Path | None) -> NDArray[np.float32]:
        if file is None:
            raise ValueError("There is no recording. Record one, or choose a file.")
        with open(file, "rb") as opened:  # without its path, which is a temporary one and would be in messages
            seconds = audio_info(opened).num_samples / SAMPLING_RATE
            if seconds > self.max_seconds:
                raise ValueError(f"The recording has {seconds:.2f} s, but may have {self.max_seconds:g}. Cut it.")
            samples = load_audio(opened)
        if len(samples) < self._min_samples:
            least = self._min_samples / SAMPLING_RATE
            raise ValueError(f"The recording has {seconds:.3f} s, but a frame takes {least:.3f} s. Record for longer.")
        if np.ptp(samples) < _SILENCE:
            raise ValueError("The recording is silent. Check that the microphone is on, or choose another file.")
        return samples

    @property
    def is_recogniser(self) -> bool:
        """Whether there are words."""
        return self._recogniser is not None

    def hear(self, file: str | Path | None, layer: int | None = None) -> Heard:
        """
        Listen to a recording, with units of a layer; None: of the lowest layer that has units.

        Raises `ValueError` if there is no file, or it is not audio, silent, too short or too long.
        """
        samples = self._load(file)
        source, words, units = _HeardSource(samples), None, None
        if self._recogniser is not None:
            (transcript,) = self._recogniser.transcribe(source)
            words = transcript.words
        if self._pretrained is not None:
            extractor = UnitExtractor(self._pretrained, layers=[self.layers[0] if layer is None else layer])
            ((_, codes),) = extractor.units(source)
            units = codes[0]
        return Heard(samples, words, units)

    def picture(self, heard: Heard) -> str:
        """Draw what was heard below the spectrogram, as HTML that scrolls sideways; nothing if nothing was heard."""
        if heard.units is None and not heard.words:
            return ""
        seconds = len(heard.samples) / SAMPLING_RATE
        width = max(_MIN_INCHES, _INCHES_PER_SECOND * seconds)
        words = [Segment(*word) for word in heard.words or ()]
        strips = {} if heard.units is None else {"units": heard.units}
        figure = unit_strip_figure(heard.samples, strips, words=words, width=width, **self._frames)
        figure.axes[-1].set_xticks(np.arange(0, seconds, 0.5))
        image = png_uri(figure, dpi=1.5 * _PIXELS_PER_INCH)
        shown = " and ".join([*["words"] * bool(words), *["units"] * (heard.units is not None)])
        alt = f"Spectrogram of {seconds:.1f} s with {shown} as boxes below."
        size = f"width: {width * _PIXELS_PER_INCH:.0f}px; max-width: none"
        return f'<div tabindex="0" style="overflow-x: auto"><img style="{size}" alt="{alt}" src="{image}"></div>'


def build_page(listener: Listener, title: str = "DinoSR") -> Any:
    """
    Build the page of a listener, a `gradio.Blocks`; its `launch` serves it.

    Recordings are deleted from the disk within two hours, and Gradio's statistics are off. Raises `ImportError` if
    gradio is not installed.
    """
    gr = import_extra("gradio", "app", "The page")

    def hear(file: str | None, layer: int | None = None) -> Iterator[list[Any]]:
        try:
            heard = listener.hear(file, layer)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        found: list[Any] = []
        if heard.words is not None:
            times = [[word, f"{start:.2f}", f"{end:.2f}"] for word, start, end in heard.words]
            found += [" ".join(word.word for word in heard.words), times]
        if heard.units is not None:
            found.append(" ".join(map(str, heard.units)))
        yield ["", *found]  # a long picture takes seconds to draw
        yield [listener.picture(heard), *found]

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        most = f"up to {listener.max_seconds:g} seconds of speech"
        gr.Markdown(f"# {html.escape(title)}\n\nRecord {most}, or choose a file.")
        inputs = [gr.Audio(sources=["microphone", "upload"], type="filepath", label="Recording", buttons=["download"])]
        if listener.layers:
            inputs.append(gr.Dropdown(listener.layers, value=listener.layers[0], label="Layer of the units"))
        button = gr.Button("Listen", variant="primary")
        outputs = []
        if listener.is_recogniser:
            outputs.append(gr.Textbox(label="Transcript", buttons=["copy"]))
        picture = gr.HTML()
        if listener.is_recogniser:
            outputs.append(gr.Dataframe(headers=["word", "start (s)", "end (s)"], label="Times of the words"))
        if listener.layers:
            outputs.append(gr.Textbox(label="Units, one per frame", lines=3, max_lines=6, buttons=["copy"]))
        button.click(hear, inputs, [picture, *outputs], show_progress_on=picture, api_name="hear")
    return page
