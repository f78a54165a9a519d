"""Phones, their classes, and the order in which they stand in pictures and tables."""

from __future__ import annotations

import unicodedata

PHONE_CLASSES = (
    "vowels",
    "approximants",
    "nasals",
    "plosives",
    "affricates",
    "fricatives",
    "silence",
    "other",
)

# Within a class phones stand in this order: vowels from the front of the mouth over its open ones to the back, and
# consonants from the lips backwards.
_ARPABET = {
    "vowels": "IY IX IH EY EH AE AY AA AO OY OW AW UH UX UW AH AX AXH AX-H ER AXR",
    "approximants": "W WH R L EL Y",
    "nasals": "M EM N EN NX NG ENG",
    "plosives": "P PCL B BCL T TCL D DCL DX K KCL G GCL Q",
    "affricates": "CH JH",
    "fricatives": "F V TH DH S Z SH ZH HH HV",
}
_IPA = {
    "vowels": "iyɪʏeøɛœæaɶɑɒɔoʊuʌɐəɘɵɚɜɞɝɤɯɨʉᵻᵿ",
    "approximants": "ʋwʍɥɹrɾɽʀlɫɭɺʎʟjɰ",
    "nasals": "mɱnɳɲŋɴ",
    "plosives": "pbtdʈɖcɟkɡgqɢʔ",
    "affricates": "",  # a plosive, then a fricative
    "fricatives": "ɸβfvθðszʃʒɕʑʂʐçʝxɣχʁħʕhɦɬɮ",
}
_SILENCES = ("SIL", "SP", "PAU", "EPI", "H#", "#", "_", "")


def _arpabet_name(label: str) -> str | None:
    """The label in capitals, if it is an ARPABET phone: in capitals ("AH0"), or in more than one letter ("ah")."""
    name = label.rstrip("012")
    is_arpabet = any(name.upper() in phones.split() for phones in _ARPABET.values())
    # Single small letters are IPA, where "y" and "r" are other phones.
    return name.upper() if is_arpabet and (name.isupper() or len(name) > 1) else None


def _ipa_letters(label: str) -> str:
    """The letters of an IPA label that decide its class: no marks of stress, length, tone, tie or accent."""
    letters = [letter for letter in unicodedata.normalize("NFD", label) if unicodedata.category(letter) != "Lm"]
    # The one letter of the alphabet that is made with an accent.
    text = "".join(letters).replace("c\N{COMBINING CEDILLA}", "ç")
    return "".join(letter for letter in text if unicodedata.category(letter) in ("Ll", "Lo"))


def phone_position(label: str) -> tuple[int, int, str]:
    """Where a phone stands in a picture or table: index of its class, place within it, and the label itself."""
    found, place = "other", 0
    arpabet, letters = _arpabet_name(label), _ipa_letters(label)
    if label.upper() in _SILENCES:
        found = "silence"
    elif arpabet is not None:
        found = next(name for name, phones in _ARPABET.items() if arpabet in phones.split())
        place = _ARPABET[found].split().index(arpabet)
    elif letters:
        for name, phones in _IPA.items():
            if letters[0] in phones:
                found, place = name, phones.index(letters[0])
        if found == "plosives" and letters[1:2] and letters[1] in _IPA["fricatives"]:
            found = "affricates"
    return PHONE_CLASSES.index(found), place, label


def phone_class(label: str) -> str:
    """
    Name the class of sounds that a phone belongs to.

    Args:
        label: A phone in IPA, with or without marks of stress and length ("ˈɑː", "tʃ"); in ARPABET, with or without
            stress ("AH0", TIMIT's "axr"); or a label of silence ("SIL", "sp", "pau", "h#").

    Returns:
        One of `PHONE_CLASSES`, "other" for what is none of these.
    """
    return PHONE_CLASSES[phone_position(label)[0]]
