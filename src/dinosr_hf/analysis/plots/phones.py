"""Classes of phones, and the order of phones in plots and tables."""

from __future__ import annotations

import re
import unicodedata

from ..alignment import SILENCE

PHONE_CLASSES = ("vowels", "approximants", "nasals", "plosives", "affricates", "fricatives", "silence", "other")

# Within a class phones have this order: vowels from front over open to back, consonants from the lips backwards.
_ARPABET_CLASSES = {
    "vowels": "IY IX IH EY EH AE AY AA AO OY OW AW UH UX UW AH AX AXH AX-H ER AXR",
    "approximants": "W WH R L EL Y",
    "nasals": "M EM N EN NX NG ENG",
    "plosives": "P PCL B BCL T TCL D DCL DX K KCL G GCL Q",
    "affricates": "CH JH",
    "fricatives": "F V TH DH S Z SH ZH HH HV",
}
_IPA_CLASSES = {
    "vowels": "iyɪʏeøɛœæaɶɑɒɔoʊuʌɐəɘɵɚɜɞɝɤɯɨʉᵻᵿ",
    "approximants": "ʋwʍɥɹrɾɽʀlɫɭɺʎʟjɰ",
    "nasals": "mɱnɳɲŋɴ",
    "plosives": "pbtdʈɖcɟkɡgqɢʔ",
    "fricatives": "ɸβfvθðszʃʒɕʑʂʐçʝxɣχʁħʕhɦɬɮ",
}
# Phone -> class and place within it. IPA has no affricates: they are a plosive and a fricative.
_ARPABET = {p: (name, n) for name, phones in _ARPABET_CLASSES.items() for n, p in enumerate(phones.split())}
_IPA = {letter: (name, n) for name, letters in _IPA_CLASSES.items() for n, letter in enumerate(letters)}
_SILENCES = ("SIL", "SP", "PAU", "EPI", "H#", "#", "_", "")
_NOISES = ("SPN", "NSN", "LAU", "UNK", "OOV")  # of Kaldi and the Montreal Forced Aligner: no phone


def _ipa_letters(label: str) -> str:
    """The letters of an IPA label that decide its class, without marks of stress, length, tone, tie or accent."""
    letters = [letter for letter in unicodedata.normalize("NFD", label) if unicodedata.category(letter) != "Lm"]
    # The only IPA letter that is decomposed into a letter and an accent.
    text = "".join(letters).replace("c\N{COMBINING CEDILLA}", "ç")
    return "".join(letter for letter in text if unicodedata.category(letter) in ("Ll", "Lo"))


def _is_arpabet(name: str) -> bool:
    """Return whether a name without stress is ARPABET; single small letters are IPA, where "y" is another phone."""
    return name.upper() in _ARPABET and (name.isupper() or len(name) > 1)


def fold_phone(label: str) -> str:
    """
    Return the phone of a label that tells more: "AH" of "AH0", ARPABET with stress, and of Kaldi's "AH_B" and "AH0_I".

    Silence of any name ("sil", "sp", "pau") becomes "SIL". The digits of other labels stay: they may be tones.
    """
    name = re.sub("_[BIES]$", "", label)
    if name.upper() in _SILENCES:
        return SILENCE
    bare = re.sub("[012]$", "", name)
    return bare if _is_arpabet(bare) else name


def phone_position(label: str) -> tuple[int, int, str]:
    """Return a sort key of phones: index of the class, place within it, and the label itself."""
    name = fold_phone(label)
    letters, found, place = _ipa_letters(name), "other", 0
    if name == SILENCE:
        found = "silence"
    elif name.upper() in _NOISES:
        found = "other"
    elif _is_arpabet(name):
        found, place = _ARPABET[name.upper()]
    elif letters:
        found, place = _IPA.get(letters[0], ("other", 0))
        if found == "plosives" and _IPA.get(letters[1:2], ("", 0))[0] == "fricatives":
            found = "affricates"
    return PHONE_CLASSES.index(found), place, label


def phone_class(label: str) -> str:
    """
    Return the class of a phone, one of `PHONE_CLASSES`, for any label that is none of these "other".

    Labels are IPA, with or without marks of stress and length ("ˈɑː", "tʃ"); ARPABET, with or without stress and
    Kaldi's place in the word ("AH0", "T_E", TIMIT's "axr"); or silence ("SIL", "sp", "pau", "h#").
    """
    return PHONE_CLASSES[phone_position(label)[0]]
