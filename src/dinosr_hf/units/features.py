"""
Continuous features on disk, one array a recording and layer, as tools for ABX and the ZeroSpeech benchmarks read them.

`T` frames, `D` hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..data import SpeechSource
from ..inference.windowed import output_path
from .corpus import rename_whole, share_of, write_left_out
from .extraction import Progress, UnitExtractor


def _save_npy(file: Path, features: NDArray[np.float32]) -> None:
    with open(file, "wb") as opened:  # a name would get a suffix of its own
        np.save(opened, features)


def _save_safetensors(file: Path, features: NDArray[np.float32]) -> None:
    save_file({"features": features}, file)


FEATURE_FORMATS: dict[str, Callable[[Path, NDArray[np.float32]], None]] = {
    "npy": _save_npy,
    "safetensors": _save_safetensors,
}
"""Suffix -> function that writes a file."""


class FeatureFiles:
    """
    A folder with the features float32 (T, D) of each recording and layer in a file of its own, which several processes
    write together: `layer-5/recording.npy` and so on, under the recording's own folders, without its suffix.

    A file is whole or not there, and what is there is not computed again.

    Args:
        folder: Made if it does not exist.
        extractor: Its layers are written.
        recordings: All of them, for every process.
        form: One of `FEATURE_FORMATS`.
        process: Number of this process.
        num_processes: How many write.

    Raises:
        ValueError: For another format, or if two recordings would be in the same file.
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
        self.folder = Path(folder)
        self._extractor, self._recordings, self._form, self._process = extractor, recordings, form, process
        self._files = {
            name: [output_path(self.folder / f"layer-{layer}", name, form) for layer in extractor.layers]
            for name, _ in recordings.utterances
        }
        file, count = Counter(paths[0] for paths in self._files.values()).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} recordings would all be written to {file}. Give them names of their own.")
        self._mine = share_of(recordings, process, num_processes)

    def todo(self) -> list[int]:
        """Indices of this process's recordings that have not all their files yet."""
        names = [utterance.id for utterance in self._recordings.utterances]
        return [index for index in self._mine if not all(path.exists() for path in self._files[names[index]])]

    def write(self, *, on_progress: Progress = None) -> int:
        """
        Extract what is still to do of this process's share. What cannot be read is listed in `left_out-000.json`.

        Args:
            on_progress: As for `UnitExtractor.features`.

        Returns:
            Recordings written.
        """
        num_written = 0
        extractor, save = self._extractor, FEATURE_FORMATS[self._form]
        for name, features in extractor.features(self._recordings, indices=self.todo(), on_progress=on_progress):
            for layer, path in enumerate(self._files[name]):
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_name(f".unfinished-{path.name}")
                save(aside, np.ascontiguousarray(features[:, layer]))
                rename_whole(aside, path)
            num_written += 1
        write_left_out(self.folder, self._process, extractor.unreadable)
        return num_written
