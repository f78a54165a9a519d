"""Continuous features on disk, one array per recording and layer, in the files that ABX and ZeroSpeech tools read."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..data import SpeechSource
from ..data.output_names import output_path, output_paths
from ..utils.files import atomic_file
from .corpus import share_of, write_left_out
from .extraction import Progress, UnitExtractor

FEATURE_FORMATS = ("npy", "safetensors")


class FeatureFiles:
    """
    A folder with the features of each recording and layer, float32 (frames, hidden size), in a file of its own, such
    as `layer-5/speaker/recording.npy` (see `output_path`); in a safetensors file under the name "features".

    Files are written atomically, several processes can write together, and existing files are not computed again.

    `form` is one of `FEATURE_FORMATS`; the other arguments are those of `UnitCorpus`. Raises `ValueError` if the
    format is unknown, or as `output_paths`, such as for two recordings with the same file.
    """

    def __init__(
        self,
        folder: str | Path,
        extractor: UnitExtractor,
        recordings: SpeechSource,
        *,
        form: str = "npy",
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        if form not in FEATURE_FORMATS:
            raise ValueError(f"form={form!r} is unknown. Choose one of {', '.join(FEATURE_FORMATS)}.")
        if extractor.source == "anchor":
            raise ValueError("source=anchor has units, but no features. Give student or teacher.")
        self.folder = Path(folder)
        self._extractor, self._recordings, self._form, self._process = extractor, recordings, form, process
        first, *others = (self.folder / f"layer-{layer}" for layer in extractor.layers)
        checked = output_paths(first, (name for name, _ in recordings.utterances), form)
        self._files = {
            name: [path, *(output_path(folder, name, form) for folder in others)] for name, path in checked.items()
        }
        self._share = share_of(recordings, process, num_processes)

    def todo(self) -> list[int]:
        """Return the indices of this process's recordings that still lack a file."""
        names = [utterance.id for utterance in self._recordings.utterances]
        return [index for index in self._share if not all(path.exists() for path in self._files[names[index]])]

    def write(self, *, on_progress: Progress = None) -> int:
        """Extract this process's recordings that are still to do, and return their number; see `write_left_out`."""
        indices = self.todo()
        for name, features in self._extractor.features(self._recordings, indices=indices, on_progress=on_progress):
            for position, path in enumerate(self._files[name]):
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = np.ascontiguousarray(features[:, position])
                with atomic_file(path) as temporary:
                    if self._form == "npy":
                        with open(temporary, "wb") as file:  # given a path, numpy.save appends a suffix
                            np.save(file, rows)
                    else:
                        save_file({"features": rows}, temporary)
        write_left_out(self.folder, self._process, self._extractor.unreadable)
        return len(indices) - len(self._extractor.unreadable)
