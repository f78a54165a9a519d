"""Small n-gram language models for tests: write an ARPA file from sentences, and score with it."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"


def write_arpa(path: str | Path, sentences: Iterable[str], order: int = 3, add_k: float = 0.5) -> Path:
    """
    Write a back-off n-gram model that KenLM reads.

    P(w | h) = (c(h w) + k) / (c(h) + k V) for n-grams that occur; the remaining mass goes to the other words in
    proportion to the shorter context. All prefixes and suffixes of an n-gram exist, and each context sums to one.

    Args:
        path: Path of the file to write, which is returned.
        sentences: Words separated by spaces; for a model over characters, their labels.
        order: Length of the longest n-gram.
        add_k: Added to each count.
    """
    counts = [Counter() for _ in range(order + 1)]
    for sentence in sentences:
        words = [BEGIN, *sentence.split(), END]
        for length in range(1, order + 1):
            counts[length].update(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    counts[1][(UNKNOWN,)] = 0
    num_words = len(counts[1]) - 1  # <s> is never predicted
    followed = Counter()  # number of times that a context is followed by a word
    for length in range(1, order + 1):
        for ngram, count in counts[length].items():
            followed[ngram[:-1]] += count * (ngram != (BEGIN,))

    def probability(ngram):
        if ngram == (BEGIN,):
            return 0.0
        context = ngram[:-1]
        return (counts[len(ngram)][ngram] + add_k) / (followed[context] + add_k * num_words)

    def backed_off(ngram):
        """P of the last word, also of n-grams that do not occur."""
        if ngram in counts[len(ngram)]:
            return probability(ngram)
        return back_off[ngram[:-1]] * backed_off(ngram[1:]) if ngram[:-1] in back_off else backed_off(ngram[1:])

    back_off: dict[tuple[str, ...], float] = {}
    for length in range(2, order + 1):
        seen: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for ngram in counts[length]:
            seen.setdefault(ngram[:-1], []).append(ngram)
        for context, ngrams in seen.items():
            left = 1 - sum(map(probability, ngrams))
            back_off[context] = left / (1 - sum(backed_off(ngram[1:]) for ngram in ngrams))

    lines = ["\\data\\", *(f"ngram {length}={len(counts[length])}" for length in range(1, order + 1))]
    for length in range(1, order + 1):
        lines += ["", f"\\{length}-grams:"]
        for ngram in sorted(counts[length]):
            logarithm = math.log10(probability(ngram)) if ngram != (BEGIN,) else -99
            tail = f"\t{math.log10(back_off[ngram]):.7f}" if ngram in back_off else ""
            lines.append(f"{logarithm:.7f}\t{' '.join(ngram)}{tail}")
    Path(path).write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")
    return Path(path)


class ArpaScorer:
    """A plain scorer of ARPA files, by the definition of back-off: log10 P of a sentence."""

    def __init__(self, path: str | Path) -> None:
        self.probability: dict[tuple[str, ...], float] = {}
        self.back_off: dict[tuple[str, ...], float] = {}
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            fields = line.split("\t")
            if len(fields) > 1:
                ngram = tuple(fields[1].split())
                self.probability[ngram] = float(fields[0])
                self.back_off[ngram] = float(fields[2]) if len(fields) > 2 else 0.0
        self.order = max(map(len, self.probability))

    def word(self, context: tuple[str, ...], word: str) -> float:
        ngram = (*context, word)
        if ngram in self.probability:
            return self.probability[ngram]
        return self.back_off.get(context, 0.0) + self.word(context[1:], word)

    def sentence(self, words: Iterable[str]) -> float:
        known = [word if (word,) in self.probability else UNKNOWN for word in words]
        history, total = [BEGIN], 0.0
        for word in [*known, END]:
            total += self.word(tuple(history[max(0, len(history) - self.order + 1) :]), word)
            history.append(word)
        return total
