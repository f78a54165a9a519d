"""
Word and character error rates, as sums of edits over all utterances; what was said for what.

Rates follow jiwer's alignments, the least number of substitutions, deletions and insertions over the length of the
reference. They can be more than 1.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.audio import require


class UtteranceErrors(NamedTuple):
    """Edits between a reference and a prediction, and the reference's length."""

    id: str
    reference: str
    prediction: str
    word_errors: int
    num_words: int
    character_errors: int
    num_characters: int


class ErrorReport(NamedTuple):
    """
    What a recogniser got wrong.

    Attributes:
        utterances: Each with its own edits.
        confusions: (reference, prediction) -> count of words; "" stands for nothing, so ("a", "") is a deletion.
        wer: Word errors over words, of all utterances together.
        cer: Character errors over characters, spaces counted, of all utterances together.
    """

    utterances: list[UtteranceErrors]
    confusions: Counter[tuple[str, str]]
    wer: float
    cer: float

    def save(self, folder: str | os.PathLike, name: str) -> None:
        """
        Write `predictions-<name>.jsonl`, an utterance a line, worst first, and `errors-<name>.md`, tables to read.

        Args:
            folder: Where to.
            name: Of the data.
        """
        lines = sorted(self.utterances, key=lambda row: (-row.word_errors, row.id))
        with open(Path(folder, f"predictions-{name}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in lines)
        Path(folder, f"errors-{name}.md").write_text(self.to_markdown(name), encoding="utf-8")

    def to_markdown(self, name: str, num_confusions: int = 30) -> str:
        """Rates, and the most frequent confusions of words, as tables."""
        total = sum(row.word_errors for row in self.utterances)
        text = (
            f"# Errors on {name}\n\n| utterances | words | word errors | WER | CER |\n|---|---|---|---|---|\n"
            f"| {len(self.utterances):,} | {sum(row.num_words for row in self.utterances):,} | {total:,} |"
            f" {self.wer:.2%} | {self.cer:.2%} |\n\n| count | reference | prediction |\n|---|---|---|\n"
        )
        for (reference, prediction), count in self.confusions.most_common(num_confusions):
            shown = [word.replace("|", "\\|") or "(nothing)" for word in (reference, prediction)]
            text += f"| {count:,} | {shown[0]} | {shown[1]} |\n"
        return text


def _count(output: Any) -> int:
    return int(output.substitutions + output.deletions + output.insertions)


def score(references: Sequence[str], predictions: Sequence[str], ids: Sequence[str] | None = None) -> ErrorReport:
    """
    Compare predictions with references, both normalised alike.

    Args:
        references: What was said.
        predictions: What was recognised.
        ids: Name of each utterance; None: its number.

    Raises:
        ValueError: If their numbers differ, there are none, or no reference has a word.
        ImportError: Without jiwer.
    """
    jiwer = require("jiwer")
    names = list(map(str, range(len(references)))) if ids is None else list(ids)
    if not len(references) == len(predictions) == len(names):
        raise ValueError(
            f"{len(references)} references, {len(predictions)} predictions, {len(names)} ids: give one each."
        )
    rows: list[UtteranceErrors] = []
    confusions: Counter[tuple[str, str]] = Counter()
    for name, reference, prediction in zip(names, references, predictions, strict=True):
        words = jiwer.process_words(reference, prediction) if reference else None
        characters = jiwer.process_characters(reference, prediction) if reference else None
        rows.append(
            UtteranceErrors(
                *(name, reference, prediction),
                *(_count(words) if words else len(prediction.split()), len(reference.split())),
                *(_count(characters) if characters else len(prediction), len(reference)),
            )
        )
        if words:
            confusions.update(_confused(words, reference.split(), prediction.split()))
        else:
            confusions.update(("", word) for word in prediction.split())
    num_words = sum(row.num_words for row in rows)
    if num_words == 0:
        raise ValueError("None of the references has a word, so that there is no error rate.")
    return ErrorReport(
        rows,
        confusions,
        sum(row.word_errors for row in rows) / num_words,
        sum(row.character_errors for row in rows) / sum(row.num_characters for row in rows),
    )


def _confused(output: Any, reference: list[str], prediction: list[str]) -> list[tuple[str, str]]:
    """Pairs of words that were substituted, left out or put in."""
    pairs: list[tuple[str, str]] = []
    for chunk in output.alignments[0]:
        left = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        right = prediction[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "substitute":
            pairs += zip(left, right, strict=True)
        elif chunk.type != "equal":
            pairs += [(word, "") for word in left] + [("", word) for word in right]
    return pairs


def speech_errors_metric() -> Any:
    """
    An `evaluate.Metric` of word and character error rate, without a download.

    Its `compute(predictions=..., references=...)` gives "wer", "cer", "word_errors", "num_words", "character_errors"
    and "num_characters"; `add_batch` gathers utterances of any number of batches, whose edits are added up.

    Raises:
        ImportError: Without evaluate, datasets or jiwer.
    """
    evaluate: Any = require("evaluate")
    datasets = require("datasets")

    class SpeechErrors(evaluate.Metric):
        """Edits over lengths, of words and of characters."""

        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description="Word and character error rate, by jiwer, over all utterances together.",
                citation="",
                inputs_description="predictions and references: one text an utterance, normalised alike.",
                features=datasets.Features(
                    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
                ),
            )

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
            report = score(references, predictions)
            names = ("word_errors", "num_words", "character_errors", "num_characters")
            sums = {name: sum(getattr(row, name) for row in report.utterances) for name in names}
            return {"wer": report.wer, "cer": report.cer, **sums}

    return SpeechErrors(keep_in_memory=True)


def texts_of(predictions: Any, tokenizer: Any) -> list[str]:
    """
    The transcripts of best labels, frame by frame: repeats joined, blanks and special tokens left out.

    Args:
        predictions: A sequence of int64 (T,), one an utterance, without frames of padding; None: it could not be read.
        tokenizer: With the vocabulary.
    """
    # Not `all_special_ids`, which has the word delimiter too.
    tokens = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    specials = np.array([tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None])
    texts = []
    for labels in predictions:
        labels = np.zeros(0, dtype=np.int64) if labels is None else labels
        # Repeats are joined before blanks go; the tokenizer, told to skip blanks, would lose double letters.
        kept = labels[np.append(True, labels[1:] != labels[:-1])[: len(labels)]]
        kept = kept[~np.isin(kept, specials)].tolist()
        texts.append(tokenizer.decode(kept, group_tokens=False).strip() if kept else "")
    return texts
