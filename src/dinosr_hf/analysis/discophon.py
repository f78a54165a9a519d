"""
DiscoPhon: how well units stand for the phonemes of twelve languages (Poli et al., Interspeech 2026, arXiv 2603.18612).

The benchmark's own package `discophon`, an extra for Python 3.12 and newer, computes the metrics. Here are the names
and forms of its files, and the figures that it publishes. `L` layers, `T` frames.
"""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data import SAMPLING_RATE, SpeechSource, open_recordings
from ..data.sources import FolderSource
from ..utils.extras import import_extra
from .alignment import FIELD
from .alignment_files import read_discophon
from .reports import LayerReport, Metric

# The development languages, then the test languages.
LANGUAGES = ("deu", "swa", "tam", "tha", "tur", "ukr", "cmn", "eng", "eus", "fra", "jpn", "wol")
SPLITS = ("test", "dev")  # those with phones
TRAINING_SPLITS = ("train-10min", "train-1h", "train-10h")
NUM_UNITS = 256  # of its published systems, and the most that its command takes
STEP_MILLISECONDS = 10  # of its phones

REPORT = LayerReport(
    names={"model": "model", "layer": "layer", "units": "units", "data": "data"},
    metrics={
        "num_units": Metric("number of units", digits=0, is_plotted=False),
        "pnmi": Metric("PNMI"),
        "per": Metric("PER"),
        "f1": Metric("boundary F1"),
        "r_value": Metric("R-value"),
    },
)
ABX_METRIC = {"abx": Metric("ABX, %", digits=2, scale=100)}


class LanguageSplit(NamedTuple):
    """A split of a language."""

    language: str
    split: str

    @property
    def units_file(self) -> str:
        """Name of the file of its units."""
        return f"units-{self.language}-{self.split}.jsonl"


def import_discophon(module: str = "discophon.evaluate") -> Any:
    """Import a module of DiscoPhon; if it is not installed, `ImportError` says how to install it."""
    return import_extra(module, "discophon", "DiscoPhon (with Python 3.12 or newer)")


def parts_of(recordings: SpeechSource) -> dict[str, tuple[LanguageSplit, str]]:
    """
    Return the part of each recording, and its name there, by id: they are in folders such as `audio/eng/test`.

    Raises `ValueError` if a recording is in no such folder.
    """
    found = {}
    splits = (*SPLITS, *TRAINING_SPLITS)
    for index, (name, _) in enumerate(recordings.utterances):
        path = Path(os.path.abspath(recordings.path(index))) if isinstance(recordings, FolderSource) else Path(name)
        folders = path.parts[-3:-1]
        part = LanguageSplit(*folders) if len(folders) == 2 else LanguageSplit("", "")
        if part.language not in LANGUAGES or part.split not in splits:
            raise ValueError(
                f"{path} is not in a folder of DiscoPhon, audio/LANGUAGE/SPLIT, which tells its language and split."
                f" Languages are {', '.join(LANGUAGES)}; splits are {', '.join(splits)}."
            )
        found[name] = part, path.stem
    return found


def units_line(name: str, units: Sequence[int]) -> str:
    """Return the line of a recording in DiscoPhon's files of units."""
    return json.dumps({"file": name, "units": list(units)}) + "\n"


def pad_units(units: NDArray, num_samples: int, stride: int) -> NDArray:
    """
    Repeat the last of the units (..., T) of a recording if convolutions of the paper's field have a frame more.

    Log-mel frames see 560 samples instead of 400, so their last one may end more than a frame before the phones, which
    is the most that DiscoPhon allows.
    """
    missing = (num_samples - FIELD) // stride + 1 - units.shape[-1]
    return np.concatenate([units, units[..., -1:]], axis=-1) if missing == 1 else units


def published_rows(languages: Iterable[str], *, with_abx: bool = False) -> list[dict[str, Any]]:
    """
    Return rows of `REPORT` of DiscoPhon's baselines, 256 units each, on the test splits of languages.

    They are those of its leaderboard; ABX, the mean of within and across speakers, is that of the units.
    """
    with open(Path(__file__).with_name("discophon_baselines.csv"), encoding="utf-8", newline="") as file:
        figures = list(csv.DictReader(file))
    metrics = [name for name in (*REPORT.metrics, *ABX_METRIC) if name != "num_units" and (with_abx or name != "abx")]
    rows, wanted = [], set(languages)
    for row in figures:
        if row["language"] in wanted:
            adapted = f", adapted on {row['hours']} h" if row["hours"] != "0" else ""
            names = {"model": row["model"], "layer": int(row["layer"]), "units": f"published{adapted}"}
            values = {name: round(float(row[name]) / 100, 4) for name in metrics}
            rows.append({**names, "data": f"{row['language']}-test", "num_units": NUM_UNITS, **values})
    return rows


def add_means(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Group rows of `REPORT` by what they evaluate, and add to each group of several languages their mean."""
    groups = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for row in rows:
        groups[row["model"], row["layer"], row["units"]].append(dict(row))
    for own in groups.values():
        if len(own) > 1:
            numbers = [name for name, value in own[0].items() if isinstance(value, float)]
            means = {name: mean(row[name] for row in own) for name in numbers}
            own.append({**own[0], "data": f"mean of {len(own)}", **means})
    return [row for own in groups.values() for row in own]


class DiscoPhon:
    """
    DiscoPhon's recordings and phones, and its evaluation of units.

    Args:
        folder: Path to its data, which `python -m discophon.prepare download FOLDER` writes.
        languages: Languages to evaluate, of `LANGUAGES`; empty: all whose recordings are there.
        split: Split to evaluate, of `SPLITS`.

    Raises `ValueError` if a language or split is unknown, there are no recordings, or they are not those with phones.

    Attributes:
        source: Recordings of all languages.
        languages: Their languages.
    """

    def __init__(self, folder: str | Path, languages: Sequence[str] = (), split: str = "test") -> None:
        for name, values, choices in (("language", languages, LANGUAGES), ("split", [split], SPLITS)):
            if unknown := [value for value in values if value not in choices]:
                raise ValueError(f"DiscoPhon has no {name} {unknown[0]!r}. Choose among {', '.join(choices)}.")
        self.folder, self.split = Path(folder), split
        here = [language for language in LANGUAGES if self._has(language)]
        missing = [language for language in languages if language not in here]
        if missing or not here:
            language = missing[0] if missing else "LANGUAGE"
            raise ValueError(
                f"{folder} lacks recordings in audio/{language}/{split} or their phones,"
                f" alignment/alignment-{language}-{split}.txt. Give the folder of `python -m discophon.prepare`."
            )
        self.languages = [language for language in here if not languages or language in languages]
        self.source = open_recordings([self.folder / "audio" / language / split for language in self.languages])
        self._parts = parts_of(self.source)
        for language in self.languages:
            self._check(language, {name for part, name in self._parts.values() if part.language == language}, "lacks")

    def _alignment(self, language: str) -> Path:
        return self.folder / "alignment" / f"alignment-{language}-{self.split}.txt"

    def _has(self, language: str) -> bool:
        """Return whether there are phones and recordings, which for Common Voice may be links that lead nowhere."""
        audio = self.folder / "audio" / language / self.split
        return self._alignment(language).is_file() and any(file.is_file() for file in audio.glob("*.wav"))

    def _check(self, language: str, found: set[str], problem: str) -> None:
        """Raise `ValueError` unless these recordings are those with phones."""
        wanted = set(read_discophon(self._alignment(language)))
        for names, what in ((wanted - found, problem), (found - wanted, "has too many recordings:")):
            if names:
                advice = "DiscoPhon evaluates all recordings with phones, and no others."
                folder = self.folder / "audio" / language / self.split
                raise ValueError(f"{folder} {what} {len(names):,} of {len(wanted):,}, such as {min(names)}. {advice}")

    def evaluate(
        self,
        units: Iterable[tuple[str, NDArray[np.integer]]],
        *,
        num_units: int,
        stride: int,
        with_abx: bool = False,
    ) -> list[list[dict[str, Any]]]:
        """
        Evaluate units by DiscoPhon's own functions: for each of L layers a row of figures for each language.

        Each unit stands for its most frequent phoneme (many-to-one).

        Args:
            units: Id and codes (L, T) of each recording.
            num_units: Number of units; the codes are below it.
            stride: Samples per frame, at 16 kHz.
            with_abx: Whether to compute the ABX error of the units too, by fastabx.

        Raises `ValueError` if frames are not a multiple of 10 ms, a recording has no units, or DiscoPhon refuses them,
        and `ImportError` without DiscoPhon or fastabx.
        """
        evaluation, reader = import_discophon(), import_discophon("discophon.data")
        abx = import_discophon("discophon.abx").discrete_abx if with_abx else None
        step, rest = divmod(stride * 1_000, SAMPLING_RATE)
        if rest or step % STEP_MILLISECONDS:
            raise ValueError(
                f"A frame has {stride} samples, {1_000 * stride / SAMPLING_RATE:g} ms, but DiscoPhon takes frames of a"
                f" multiple of {STEP_MILLISECONDS} ms, such as 320 samples."
            )
        codes, lengths = defaultdict[str, dict[str, NDArray[np.int32]]](dict), dict(self.source.utterances)
        for name, found in units:
            part, file = self._parts[name]
            codes[part.language][file] = pad_units(found, lengths[name], stride).astype(np.int32)
        columns = []
        for language in self.languages:
            self._check(language, {*codes[language]}, "has recordings that could not be read:")
            phones = reader.read_gold_annotations(self._alignment(language))
            for name, found in codes[language].items():
                lasting = (found.shape[1] * step, len(phones[name]) * STEP_MILLISECONDS)
                if abs(lasting[0] - lasting[1]) > step:
                    raise ValueError(
                        f"{language}-{self.split}, {name}: its units last {lasting[0]:,} ms and its phones"
                        f" {lasting[1]:,} ms, but DiscoPhon allows a difference of {step} ms. Is it that recording?"
                    )
            column = []
            for rows in zip(*codes[language].values(), strict=True):  # of a layer
                own = {name: row.tolist() for name, row in zip(codes[language], rows, strict=True)}
                try:
                    scores = evaluation.phoneme_discovery(
                        own, phones, kind="many-to-one", n_units=num_units, step_units=step, language=language
                    )
                except (ValueError, LookupError, ZeroDivisionError) as error:
                    raise ValueError(f"DiscoPhon refuses the units of {language}-{self.split}: {error}") from error
                scores["r_value"] = scores.pop("r_val")
                if abx is not None:
                    scores |= self._abx(abx, language, own, step)
                column.append({"data": f"{language}-{self.split}", "num_units": num_units, **scores})
            columns.append(column)
        return [list(rows) for rows in zip(*columns, strict=True)]

    def _abx(self, discrete_abx: Any, language: str, units: Mapping[str, list[int]], step: int) -> dict[str, float]:
        """Compute the ABX error of units, as DiscoPhon does; its leaderboard has the mean of both."""
        items = self.folder / "item" / f"triphone-{language}-{self.split}.item"
        with TemporaryDirectory() as folder:
            file = Path(folder, LanguageSplit(language, self.split).units_file)
            file.write_text("".join(units_line(name, own) for name, own in units.items()), encoding="utf-8")
            errors = discrete_abx(items, file, frequency=Decimal(1_000) / step)
        within, across = errors["within_speaker"], errors["across_speaker"]
        return {"abx": (within + across) / 2, "abx_within": within, "abx_across": across}
