"""Files that beam search reads: n-gram language models, by KenLM, and lexicons."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..utils.extras import import_extra

SPECIAL_WORDS = ("<s>", "</s>", "<unk>")


def flashlight(module: str) -> Any:
    """A module of flashlight-text. Raises `ImportError` that says how to install it."""
    return import_extra(f"flashlight.lib.text.{module}", "lm", "Beam search")


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    file: IO[str] = gzip.open(path, "rt", encoding="utf-8") if compressed else open(path, encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}. Write it anew in UTF-8.") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error} Copy it again.") from error


def _is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(64).startswith(b"mmap lm http://kheafield.com/code format version")


def _is_arpa(path: Path) -> bool:
    """Whether the first line that is not empty is that of ARPA files."""
    try:
        return next((line.strip() for line in _lines(path) if line.strip()), "") == "\\data\\"
    except ValueError:
        return False


def arpa_words(path: str | Path) -> list[str]:
    """
    The words of a language model: unigrams of an ARPA file without `<s>`, `</s>` and `<unk>`.

    Args:
        path: The file, which may be compressed by gzip.

    Raises:
        ValueError: If there is no such file, or it is not an ARPA file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file.")
    if not _is_arpa(path):
        raise ValueError(f"{path} is not an ARPA file, which begins with \\data\\. A KenLM binary lists no words.")
    words, inside = [], False
    for line in map(str.strip, _lines(path)):
        if inside and line.startswith("\\"):
            break
        if inside and line:
            words.append(line.split()[1])
        inside = inside or line == "\\1-grams:"
    return [word for word in words if word.lower() not in SPECIAL_WORDS]


def read_lexicon(path: str | Path) -> list[tuple[str, list[str] | None]]:
    """
    Words that may come out, from a file.

    Args:
        path: A word a line; or a word, a tab or space, and its labels with spaces between them, as flashlight and
            fairseq have it; or an ARPA file.

    Returns:
        (word, labels), labels None where the file has none. A word may come several times, with different labels.

    Raises:
        ValueError: If there is no such file, or nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The lexicon {path} is not a file. Give a word a line, `word<TAB>labels`, or an ARPA file.")
    if _is_binary(path):
        raise ValueError(
            f"The lexicon {path} is a KenLM binary, which lists no words. Give a file with a word a line."
        )
    if _is_arpa(path):
        entries: list[tuple[str, list[str] | None]] = [(word, None) for word in arpa_words(path)]
    else:
        fields = [line.split() for line in _lines(path) if line.strip()]
        entries = [(word, labels or None) for word, *labels in fields]
    if not entries:
        raise ValueError(f"The lexicon {path} is empty. Give a word a line, `word<TAB>labels`, or an ARPA file.")
    return entries


def check_language_model_file(path: str | Path) -> None:
    """
    See to it that nothing but a language model goes to KenLM.

    Raises:
        ValueError: If there is no such file, or it begins neither as an ARPA file nor as a KenLM binary.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The language model {path} is not a file. Give an ARPA file or a KenLM binary.")
    if not _is_binary(path) and not _is_arpa(path):
        raise ValueError(
            f"{path} is no language model: it begins neither with \\data\\, as an ARPA file does, nor as a KenLM"
            " binary does. Make one with KenLM's lmplz."
        )


def load_language_model(path: str, words: Sequence[str]) -> tuple[Any, NDArray[np.bool_]]:
    """
    Open a language model.

    Args:
        path: ARPA or KenLM binary.
        words: What is scored, by its index here.

    Returns:
        The model, and which words it knows (len(words),). KenLM does not say so: a word counts as known if its
        probability differs from that of `<unk>`, by itself or at the beginning of a sentence.

    Raises:
        ValueError: If there is no such file, or it is no language model that KenLM can read.
    """
    check_language_model_file(path)
    dictionary = flashlight("dictionary").Dictionary([*words, "<unk>"])
    try:
        model = flashlight("decoder.kenlm").KenLM(str(path), dictionary)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a language model. KenLM says: {error}") from error
    known = np.zeros(len(words), dtype=bool)
    for state in (model.start(True), model.start(False)):
        _, unknown_score = model.score(state, len(words))
        known |= np.array([model.score(state, index)[1] != unknown_score for index in range(len(words))], dtype=bool)
    return model, known
