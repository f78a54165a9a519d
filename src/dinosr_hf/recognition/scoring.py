"""
Word and character error rates, and the words that were confused.

Rates follow jiwer's alignments: the least number of substitutions, deletions and insertions, over the length of the
reference, both summed over all utterances. They can exceed 1.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.extras import import_extra
from ..utils.files import write_atomically
from ..utils.tables import markdown_table
from ..utils.visible_text import is_spaceless, visible_text


class UtteranceErrors(NamedTuple):
    """Edits between a reference and a prediction, and the length of the reference."""

    id: str
    reference: str
    prediction: str
    word_errors: int
    num_words: int
    character_errors: int
    num_characters: int


class ErrorReport(NamedTuple):
    """Errors of a recogniser; rates are of all utterances together."""

    utterances: list[UtteranceErrors]
    confusions: Counter[tuple[str, str]]  # (reference, prediction) -> count; "" is no word: ("a", "") is a deletion
    wer: float  # word errors over words
    cer: float  # character errors over characters, spaces included

    @property
    def totals(self) -> dict[str, int]:
        """Sums over all utterances: "word_errors", "num_words", "character_errors" and "num_characters"."""
        return {name: sum(getattr(row, name) for row in self.utterances) for name in UtteranceErrors._fields[3:]}

    @property
    def ranking(self) -> float:
        """
        A number that is lower for a better recogniser: by its word errors and, among equals, its character error rate.

        By the latter alone if references have less than two words on average, or a script without spaces.
        """
        num_words, texts = self.totals["num_words"], "".join(row.reference for row in self.utterances)
        if num_words < 2 * len(self.utterances) or is_spaceless(texts):
            return self.cer
        return self.wer + self.cer / (1 + self.cer) / num_words

    def save(self, folder: str | os.PathLike, name: str) -> None:
        """Write `predictions-<name>.jsonl`, an utterance per line, worst first, and tables, `errors-<name>.md`."""
        rows = sorted(self.utterances, key=lambda row: (-row.word_errors, -row.character_errors, row.id))
        lines = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
        write_atomically(Path(folder, f"predictions-{name}.jsonl"), lines)
        write_atomically(Path(folder, f"errors-{name}.md"), self.to_markdown(name))

    def to_markdown(self, name: str, num_confusions: int = 30) -> str:
        """Format rates and the most frequent confusions of words as tables."""
        words, errors = self.totals["num_words"], self.totals["word_errors"]
        total = [f"{len(self.utterances):,}", f"{words:,}", f"{errors:,}", f"{self.wer:.2%}", f"{self.cer:.2%}"]
        rates = markdown_table(["utterances", "words", "word errors", "WER", "CER"], [total])
        rows = [
            (f"{count:,}", reference or "(nothing)", prediction or "(nothing)")
            for (reference, prediction), count in self.confusions.most_common(num_confusions)
        ]
        return f"# Errors on {name}\n\n{rates}\n{markdown_table(['count', 'reference', 'prediction'], rows)}"


def _word_edits(jiwer: Any, reference: str, prediction: str) -> list[tuple[str, str]]:
    """Return the pairs of words that were substituted, or deleted or inserted, with "" for no word."""
    expected, found = reference.split(), prediction.split()
    if not expected:
        return [("", word) for word in found]
    pairs: list[tuple[str, str]] = []
    for chunk in jiwer.process_words(reference, prediction).alignments[0]:
        if chunk.type != "equal":
            left = expected[chunk.ref_start_idx : chunk.ref_end_idx]
            right = found[chunk.hyp_start_idx : chunk.hyp_end_idx]
            pairs += itertools.zip_longest(left, right, fillvalue="")
    return pairs


def _num_character_edits(jiwer: Any, reference: str, prediction: str) -> int:
    if not reference:
        return len(prediction)
    output = jiwer.process_characters(reference, prediction)
    return int(output.substitutions + output.deletions + output.insertions)


def score(references: Sequence[str], predictions: Sequence[str], ids: Sequence[str] | None = None) -> ErrorReport:
    """
    Compare predictions with references, both normalised in the same way; `ids` default to indices.

    Unicode forms, invisible characters and the number of spaces are no errors: texts are compared as `visible_text`
    spells them. Raises `ValueError` if the lengths differ or no reference has a word, and `ImportError` if jiwer is
    not installed.
    """
    jiwer = import_extra("jiwer", "asr", "Scoring")
    names = list(map(str, range(len(references)))) if ids is None else list(ids)
    if not len(references) == len(predictions) == len(names):
        counts = f"{len(references)} references, {len(predictions)} predictions and {len(names)} ids"
        raise ValueError(f"There are {counts}. Give one of each per utterance.")
    rows: list[UtteranceErrors] = []
    confusions: Counter[tuple[str, str]] = Counter()
    spelled = (map(visible_text, texts) for texts in (references, predictions))
    for name, reference, prediction in zip(names, *spelled, strict=True):
        edits = _word_edits(jiwer, reference, prediction)
        confusions.update(edits)
        word_counts = (len(edits), len(reference.split()))
        character_counts = (_num_character_edits(jiwer, reference, prediction), len(reference))
        rows.append(UtteranceErrors(name, reference, prediction, *word_counts, *character_counts))
    num_words = sum(row.num_words for row in rows)
    if num_words == 0:
        raise ValueError("None of the references has a word, so there is no error rate.")
    wer = sum(row.word_errors for row in rows) / num_words
    cer = sum(row.character_errors for row in rows) / sum(row.num_characters for row in rows)
    return ErrorReport(rows, confusions, wer, cer)


def speech_errors_metric() -> Any:
    """
    Return an `evaluate.Metric` of word and character error rate; nothing is downloaded.

    Its `compute(predictions=..., references=...)` returns "wer" and "cer", and the sums that these are ratios of:
    "word_errors", "num_words", "character_errors" and "num_characters". Raises `ImportError` if evaluate, datasets or
    jiwer is not installed.
    """
    evaluate, datasets, _ = (import_extra(name, "asr", "Scoring") for name in ("evaluate", "datasets", "jiwer"))

    class SpeechErrors(evaluate.Metric):  # type: ignore[name-defined]
        """Word and character error rate."""

        def _info(self) -> Any:
            text = datasets.Value("string")
            return evaluate.MetricInfo(
                description="Word and character error rate by jiwer, over all utterances together.",
                citation="",
                inputs_description="predictions and references: one text per utterance, normalised in the same way.",
                features=datasets.Features({"predictions": text, "references": text}),
                reference_urls=["https://github.com/jitsi/jiwer"],
            )

        def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
            report = score(references, predictions)
            return {"wer": report.wer, "cer": report.cer, **report.totals}

    return SpeechErrors(keep_in_memory=True)


def texts_of(predictions: Any, tokenizer: Any) -> list[str]:
    """
    Read transcripts from the best label of each frame: merge repetitions, then drop blanks and special tokens.

    `predictions` has int64 (T,) per utterance, without padding, or None for one that was not read.
    """
    # Not `all_special_ids`, which includes the word delimiter.
    tokens = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    specials = {tokenizer.convert_tokens_to_ids(token) for token in tokens if token is not None}
    texts = []
    for path in predictions:
        # Not `skip_special_tokens`, with which the tokenizer drops blanks before it merges, and loses double letters.
        runs = itertools.groupby([] if path is None else path.tolist())
        kept = [label for label, _ in runs if label not in specials]
        texts.append(tokenizer.decode(kept, group_tokens=False).strip() if kept else "")
    return texts
