"""Continuous features on disk, one array per recording and layer, in the files that ABX and ZeroSpeech tools read."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..data import SpeechSource
from ..data.output_names import output_path, output_paths
from ..utils.command_line import check_choice
from ..utils.files import atomic_file
from .corpus import ExtractionFolder
from .extraction import LayerExtractor, Progress

FEATURE_FORMATS = ("npy", "safetensors")


class FeatureFiles(ExtractionFolder):
    """
    A folder with the features of each recording and layer, float32 (frames, hidden size), in a file of its own, such
    as `layer-5/speaker/recording.npy` (see `output_path`); in a safetensors file under the name "features".

    Files are written atomically, several processes can write together, and a later run can continue: existing files
    of the same model, settings and recordings are not computed again. Other layers and formats may be added.

    `form` is one of `FEATURE_FORMATS`; the other arguments, `open` and `write` are those of `UnitCorpus`. Raises
    `ValueError` if the format is unknown, or as `output_paths`, such as for two recordings with the same file.
    """

    def __init__(
        self,
        folder: str | Path,
        extractor: LayerExtractor,
        recordings: SpeechSource,
        *,
        form: str = "npy",
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        check_choice("form", form, FEATURE_FORMATS)
        extractor.check_features()
        place = {"process": process, "num_processes": num_processes}
        super().__init__(folder, extractor, recordings, {}, results="features", **place)
        self._form = form
        first, *others = (self.folder / f"layer-{layer}" for layer in extractor.layers)
        checked = output_paths(first, (name for name, _ in recordings.utterances), form)
        self._files = {
            name: [path, *(output_path(folder, name, form) for folder in others)] for name, path in checked.items()
        }

    def _done(self) -> list[str]:
        return [name for name, paths in self._files.items() if any(path.exists() for path in paths)]

    def _complete(self) -> list[str]:
        return [name for name, paths in self._files.items() if all(path.exists() for path in paths)]

    @property
    def num_complete(self) -> int:
        """Number of recordings that have all their files."""
        return len(self._complete())

    def write(self, *, on_progress: Progress = None) -> int:
        """Extract this process's recordings that are still to do, and return their number."""
        self.open()
        indices = self.todo()
        for name, features in self.extractor.features(self.recordings, indices=indices, on_progress=on_progress):
            for position, path in enumerate(self._files[name]):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write_file(path, np.ascontiguousarray(features[:, position]))
        self.write_left_out()
        return len(indices) - len(self.extractor.unreadable)

    def _write_file(self, path: Path, rows: np.ndarray) -> None:
        with atomic_file(path) as temporary:
            if self._form == "npy":
                with open(temporary, "wb") as file:  # given a path, numpy.save appends a suffix
                    np.save(file, rows)
                return
            try:
                save_file({"features": rows}, temporary)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{path} cannot be written: {error}") from error
