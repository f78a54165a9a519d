"""The files of beam search: n-gram language models, which KenLM reads, and lexicons."""

import codecs
import gzip
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.command_line import argument_errors
from ..utils.extras import import_extra
from ..utils.names import one_line
from ..utils.text_files import text_lines

# As KenLM does: a no-break space is part of a word.
_FIELD = re.compile(r"[^ \t\r\v\f]+")

SPECIAL_WORDS = ("<s>", "</s>", "<unk>")


def flashlight(module: str) -> Any:
    """Import a module of flashlight-text. Raises `ImportError` with the command that installs it."""
    return import_extra(f"flashlight.lib.text.{module}", "lm", "Beam search")


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).startswith(b"mmap lm http://kheafield.com/code format version")


def _is_arpa(path: Path) -> bool:
    return next(filter(None, map(str.strip, text_lines(path))), "") == "\\data\\"


def _arpa_words(path: Path) -> list[str]:
    """Return the unigrams of an ARPA file, without `<s>`, `</s>` and `<unk>`."""
    lines = dropwhile(lambda line: line != "\\1-grams:", map(str.strip, text_lines(path)))
    next(lines, None)
    unigrams = takewhile(lambda line: not line.startswith("\\"), lines)
    words = []
    for line in filter(None, unigrams):
        fields = _FIELD.findall(line)
        if len(fields) < 2:
            raise ValueError(f"{path}: {line[:80]!r} below \\1-grams: has no word. Is the file cut short?")
        words.append(fields[1])
    return [word for word in words if word.lower() not in SPECIAL_WORDS]


def read_lexicon(path: str | Path) -> list[tuple[str, list[str] | None]]:
    """
    Read a lexicon, the words that beam search may output, as (word, labels or None); a word may occur several times.

    The file has one word per line; or a word, a tab or space, and its labels separated by spaces, as in flashlight and
    fairseq; or it is an ARPA file. Raises `ValueError` if it is missing, empty or a KenLM binary.
    """
    path, advice = Path(path), "Give a file with one word or `word<TAB>labels` per line, or an ARPA file."
    if not path.is_file():
        raise ValueError(f"The lexicon {path} is not a file. {advice}")
    if _is_binary(path):
        raise ValueError(f"The lexicon {path} is a KenLM binary, which lists no words. {advice}")
    fields = [[word] for word in _arpa_words(path)] if _is_arpa(path) else map(_FIELD.findall, text_lines(path))
    entries = [(word, labels or None) for word, *labels in filter(None, fields)]
    if not entries:
        raise ValueError(f"The lexicon {path} is empty. {advice}")
    return entries


def check_language_model_file(path: str | Path) -> None:
    """Raise `ValueError` unless a file begins as an ARPA file or a KenLM binary does."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The language model {path} is not a file. Give an ARPA file or a KenLM binary.")
    if _is_binary(path):
        return
    with argument_errors(f"{path} is not a language model: "):
        if is_arpa := _is_arpa(path):
            _arpa_words(path)  # KenLM would take words of another encoding for unknown ones
    if not is_arpa:
        raise ValueError(
            f"{path} is not a language model: it begins neither with \\data\\, as an ARPA file does, nor as a KenLM"
            " binary does. Create one with KenLM's lmplz."
        )


@contextmanager
def _without_byte_order_mark(path: str | Path) -> Iterator[str | Path]:
    """Yield the path of a language model that KenLM reads: a temporary copy if it is an ARPA file with such a mark."""
    with open(path, "rb") as raw:
        start = raw.read(3)
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(path) as file:
            start = file.read(3)
    if start != codecs.BOM_UTF8:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "model.arpa")
        with open(copy, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in text_lines(path))
        yield copy


def load_language_model(path: str, words: Sequence[str]) -> tuple[Any, NDArray[np.bool_]]:
    """
    Load a language model with KenLM, to score `words` (or labels) by their index.

    Returns the model, and whether it knows each word (len(words),). KenLM does not tell: a word counts as known if its
    probability differs from that of `<unk>`, by itself or at the beginning of a sentence. Raises `ValueError` if KenLM
    cannot read the file.
    """
    dictionary = flashlight("dictionary").Dictionary([*words, "<unk>"])
    with _without_byte_order_mark(path) as file:
        try:
            model = flashlight("decoder.kenlm").KenLM(str(file), dictionary)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a language model. KenLM says: {one_line(error)}.") from error
    known = np.zeros(len(words), dtype=bool)
    for state in (model.start(True), model.start(False)):
        _, unknown_score = model.score(state, len(words))
        known |= np.array([model.score(state, index)[1] != unknown_score for index in range(len(words))], dtype=bool)
    return model, known
