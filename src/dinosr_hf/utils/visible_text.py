"""
What of a text its readers can see: one spelling for texts that look alike.

The facts are Unicode's: Default_Ignorable_Code_Point for what shows nothing, and for the joiners that carry meaning
the contexts A1, A2 and B of Standard Annex 31, section 2.3.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from functools import lru_cache

import regex

from .names import printable_name

_JOINERS = "\u200b-\u200d\u180e"  # kept where they carry meaning: zero-width space, both joiners, Mongolian separator

# Direction and other format marks, variation selectors, tags, fillers, control characters and non-characters. Marks
# that enclose digits (Arabic, Kaithi) are seen, and control characters between words and lines are spaces.
_INVISIBLE = regex.compile(
    r"(?V1)[[\p{Default_Ignorable_Code_Point}\p{Cc}\p{Cf}\p{Noncharacter_Code_Point}]"
    rf"--[\p{{Prepended_Concatenation_Mark}}{_JOINERS}\t-\r\x1c-\x1f\x85]]"
)

_RUN, _TRANSPARENT, _VIRAMA = f"[{_JOINERS}]*+", r"\p{Joining_Type=T}*", r"[\p{ccc=9}--\p{lb=SA}]"
_UNSPACED = r"[\p{lb=SA}\p{Javanese}\p{Balinese}]"


def _run_with(mark: str) -> str:
    return f"(?=[{_JOINERS}]*{mark}){_RUN}"


_MEANINGFUL = regex.compile(
    "(?V1)"
    # Words of Thai, Lao, Khmer, Burmese, Javanese and their like, which have no other space between them.
    rf"(?P<space>(?<={_UNSPACED}){_run_with(chr(0x200B))}|{_run_with(chr(0x200B))}(?={_UNSPACED}))"
    # Between letters that would join (Persian, Urdu, Kurdish), and in Indic scripts where it prevents a conjunct.
    rf"|(?P<non_joiner>(?<=[\p{{jt=D}}\p{{jt=L}}]{_TRANSPARENT}){_run_with(chr(0x200C))}"
    rf"(?={_TRANSPARENT}[\p{{jt=D}}\p{{jt=R}}])|(?<={_VIRAMA}){_run_with(chr(0x200C))}(?=\p{{L}}))"
    # In Indic scripts beside a virama, on either side: Bengali has it before, the other scripts behind.
    rf"|(?P<joiner>(?<={_VIRAMA}){_run_with(chr(0x200D))}|{_run_with(chr(0x200D))}(?={_VIRAMA}))"
    rf"|(?P<separator>(?<=\p{{Mongolian}}){_run_with(chr(0x180E))}(?=\p{{Mongolian}}))"
    rf"|[{_JOINERS}]++"
)
_MEANING = {"space": " ", "non_joiner": "\u200c", "joiner": "\u200d", "separator": "\u180e"}

# A line is not to end behind, or begin with, one of these: signs written before the vowel that they follow in speech,
# stacked consonants, dependent vowels, small kana, long-vowel, opening and closing marks.
_UNIT = regex.compile(
    r"(?V1)[\p{Logical_Order_Exception}\p{lb=OP}]*\X"
    r"(?:(?<=\p{InSC=Invisible_Stacker})\X|[[\p{lb=SA}&&\p{InSC=Vowel_Dependent}]--\p{Logical_Order_Exception}]\p{M}*"
    r"|[\p{lb=CJ}\p{lb=NS}\p{lb=CL}\p{lb=CP}\p{lb=EX}]\p{M}*)*"
)
# Written without spaces between words: Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan, Javanese, ... Korean has
# spaces, but its lines may end anywhere.
_SPACELESS = regex.compile(r"[\p{lb=H2}\p{lb=H3}\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=SA}\p{lb=AK}\p{lb=AS}\p{Tibetan}]")


def remove_invisible(text: str) -> str:
    """
    Remove the characters that show nothing and tell no words apart.

    ZERO WIDTH NON-JOINER stays between letters that would join (Persian) and JOINER beside a virama (Indic scripts);
    ZERO WIDTH SPACE becomes a space beside letters of scripts without other spaces (Thai, Lao, Khmer, Burmese,
    Javanese).
    """
    if text.isascii() and text.isprintable():
        return text
    text = _INVISIBLE.sub("", text.replace("\u2800", " "))  # a Braille pattern without dots
    return _MEANINGFUL.sub(lambda found: _MEANING.get(found.lastgroup, ""), text)


@lru_cache(maxsize=2**12)
def visible_text(text: str) -> str:
    """Return a text in Unicode form NFC, without invisible characters, with single spaces between words."""
    text = remove_invisible(unicodedata.normalize("NFC", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def is_spaceless(text: str) -> bool:
    """Return whether most letters of a text are of scripts that are written without spaces between words."""
    letters = regex.findall(r"[\p{L}\p{M}]", text)
    spaceless = sum(_SPACELESS.match(letter) is not None for letter in letters)
    hangul = len(regex.findall(r"\p{Hangul}", text))  # breaks anywhere, and has spaces
    return 2 * (spaceless - hangul) > len(letters)


def name_key(name: str) -> str:
    """Return what names of one file have in common: macOS decomposes names, and people copy invisible characters."""
    name = remove_invisible(unicodedata.normalize("NFC", printable_name(name)))  # ids are printable
    return posixpath.normpath(unicodedata.normalize("NFC", name))


def path_on_disk(path: str | os.PathLike) -> str:
    """Return a path as the file system has it, if only its Unicode form or encoding differs; any other as it is."""
    name = os.fsdecode(os.fspath(path).encode("utf-8", "surrogateescape"))  # UTF-8, whatever the locale
    if name.isascii() or os.path.exists(name):
        return name
    folder, file = os.path.split(name)
    folder = path_on_disk(folder) if folder != name else folder
    spellings = (os.path.join(folder, unicodedata.normalize(form, file)) for form in ("NFC", "NFD"))
    return next(filter(os.path.exists, spellings), name)


def line_units(text: str) -> list[str]:
    """Split a text where a line may end without a space: around the characters of scripts that have none."""
    units: list[str] = []
    is_open = False
    for unit in _UNIT.findall(text):
        is_spaceless = _SPACELESS.search(unit) is not None
        if is_open and not is_spaceless:
            units[-1] += unit
        else:
            units.append(unit)
        is_open = not is_spaceless
    return units


def graphemes(text: str) -> list[str]:
    """Split a text into what its readers take for characters: a letter with its combining marks is one."""
    return regex.findall(r"\X", text)


def num_columns(text: str) -> int:
    """Return the width of a text: wide characters (Chinese, Japanese, Korean) count as two, combining marks as 0."""
    if text.isascii():
        return len(text)
    seen = [character for character in text if unicodedata.category(character) not in ("Mn", "Me", "Cf")]
    return len(seen) + sum(unicodedata.east_asian_width(character) in "WF" for character in seen)
