"""A folder of transcripts, one file for each recording, that a later run can continue."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data import SpeechSource
from ..data.output_folder import OutputFolder, describe_recordings
from ..utils.files import write_atomically
from .subtitles import FORMATS
from .transcription import Transcriber


class TranscriptFiles(OutputFolder):
    """
    A folder with a file for the transcript of each recording, written atomically, that a later run can continue.

    Existing transcripts of the same recogniser, settings and recordings are kept; another file in the place of one is
    refused. Transcripts of other recordings and formats may be in the folder.

    Args:
        folder: Path of the folder; created if it does not exist.
        transcriber: Makes the transcripts.
        recordings: Recordings to transcribe.
        paths: Path of each recording's file in the folder, by id, as `output_paths` returns them.
        form: Format of the files, one of `FORMATS`.
        overwrite: Whether to remove all files at these paths first.
    """

    def __init__(
        self,
        folder: str | Path,
        transcriber: Transcriber,
        recordings: SpeechSource,
        paths: Mapping[str, Path],
        *,
        form: str = "txt",
        overwrite: bool = False,
    ) -> None:
        super().__init__(
            folder,
            recordings,
            transcriber.settings,
            results="transcripts",
            advice="Give --overwrite, or another --output_dir.",
            state_name=f".settings-{form}",  # without a suffix, so it is never the name of a transcript
        )
        self._transcriber, self._paths, self._format, self._overwrite = transcriber, paths, FORMATS[form], overwrite

    def plan(self) -> str:
        """Say what is to do, and what is done already; with `overwrite`, all is to do."""
        if self._overwrite:
            return f"{describe_recordings(self.recordings)} Their transcripts go to {self.folder}, over those there."
        return super().plan()

    def _done(self) -> list[str]:
        return [name for name, path in self._paths.items() if os.path.lexists(path)]

    def _begin(self) -> None:
        if self._overwrite:
            for name in self._done():
                self._paths[name].unlink()
            (self.folder / self._state_name).unlink(missing_ok=True)
        super()._begin()

    def todo(self) -> list[int]:
        """Return the indices of the recordings without a transcript."""
        done = set(self._done())
        return [index for index, (name, _) in enumerate(self.recordings.utterances) if name not in done]

    def write(self, *, on_progress: Callable[[float], Any] | None = None) -> int:
        """Transcribe the recordings that are still to do, and return their number. Raises `ValueError` as `open`."""
        self.open()
        num_written = 0
        indices = self.todo()
        for transcript in self._transcriber.transcribe(self.recordings, indices=indices, on_progress=on_progress):
            path = self._paths[transcript.id]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self._format(transcript))
            num_written += 1
        return num_written
