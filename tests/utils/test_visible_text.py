"""Invisible characters, Unicode forms, and where a text without spaces may be cut."""

import os
import unicodedata

import pytest

from dinosr_hf.utils.visible_text import graphemes, line_units, name_key, num_columns, path_on_disk, visible_text

ZWSP, ZWNJ, ZWJ = "\u200b", "\u200c", "\u200d"
# Characters that change nothing that a reader of Latin script sees.
INVISIBLE = [
    *("\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u061c"),  # directions
    *("\ufeff", "\u2060", ZWSP, ZWNJ, ZWJ, "\u00ad", "\u034f", "\u180e", "\u2061"),
    *("\ufe00", "\ufe0e", "\ufe0f", "\U000e0100", "\U000e01ef", "\u180b"),  # variation selectors
    *("\U000e0001", "\U000e0067", "\U000e007f", "\x00", "\x08", "\x7f", "\x9f", "\ufff9", "\ufffb", "\uffff"),
    *("\u115f", "\u1160", "\u3164", "\uffa0", "\u17b4", "\U0001d173"),
]


@pytest.mark.parametrize("character", INVISIBLE, ids=lambda character: f"U+{ord(character):04X}")
def test_invisible_characters_are_removed(character):
    assert visible_text(f"{character}ab{character}c{character * 2} d{character}") == "abc d"
    assert visible_text(f"e{character}\u0301") == "é"


@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u202f", "\u2028", "\t", "\n", "\x85", "\x1f", "\u2800"])
def test_spaces_are_one_space(space):
    assert visible_text(f"{space}a{space}{space}b ") == "a b"


@pytest.mark.parametrize(
    "text",
    [
        f"می{ZWNJ}روم",
        f"خانه{ZWNJ}های کتاب{ZWNJ}ها",
        f"क्{ZWJ}ष",
        f"क्{ZWNJ}ष",
        f"র{ZWJ}\u09cd\u09afাব",  # Bengali has the joiner before the virama
        f"ශ්{ZWJ}රී",
        f"ന്{ZWJ}",  # a Malayalam chillu ends a word
        "\u1828\u1820\u180e\u1820",  # Mongolian
        "\u0661\u06dd",  # an Arabic mark around digits
    ],
)
def test_what_carries_meaning_stays(text):
    assert visible_text(text) == unicodedata.normalize("NFC", text)
    assert visible_text(visible_text(f"\u200f{text}\ufeff")) == visible_text(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (f"کار{ZWNJ}ها", "کارها"),  # the letter before it joins nothing, so both look alike
        (f"کتاب{ZWNJ} ها{ZWNJ}", "کتاب ها"),
        (f"می\u200e{ZWNJ}{ZWNJ}روم", f"می{ZWNJ}روم"),
        (f"क{ZWJ}ष", "कष"),
        (f"ന്{ZWNJ}", "ന്"),
        (f"👨{ZWJ}👩", "👨👩"),
    ],
)
def test_joiners_without_effect_are_removed(text, wanted):
    assert visible_text(text) == wanted


@pytest.mark.parametrize("text", ["สวัสดี|ครับ", "ສະບາຍ|ດີ", "សួស្តី|បង", "မင်္ဂလာ|ပါ", "ใช้|Windows|ได้", "ꦲꦤ|ꦕꦫ"])
def test_zero_width_spaces_between_words_are_spaces(text):
    assert visible_text(text.replace("|", ZWSP)) == unicodedata.normalize("NFC", text.replace("|", " "))


def test_names_in_other_forms_have_one_key():
    names = ["x/é.wav", "x/e\u0301.wav", "./x//é.wav", "x/\u200eé.wav"]
    assert {*map(name_key, names)} == {"x/é.wav"}
    assert name_key("x/e.wav") != name_key("x/é.wav")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_paths_are_found_in_either_form(tmp_path, form):
    path = tmp_path / unicodedata.normalize(form, "é") / unicodedata.normalize("NFC", "ü.wav")
    path.parent.mkdir()
    path.touch()
    for given in ("NFC", "NFD"):
        assert path_on_disk(tmp_path / unicodedata.normalize(given, "é/ü.wav")) == str(path)
    assert path_on_disk(tmp_path / "é" / "o.wav") == str(tmp_path / "é" / "o.wav")


def test_paths_on_the_disk_are_utf8_where_the_locale_is_ascii(tmp_path, monkeypatch):
    (tmp_path / "é.wav").touch()
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    for given in ("é.wav", "\udcc3\udca9.wav"):  # from a table, and as Python lists the folder there
        found = path_on_disk(tmp_path / given)
        assert found == str(tmp_path / "\udcc3\udca9.wav") and os.path.exists(found)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("こんにちは", ["こ", "ん", "に", "ち", "は"]),
        ("ファーっと。", ["ファーっ", "と。"]),
        ("Windowsを2つ", ["Windows", "を", "2", "つ"]),
        ("น้ำเปล่าแก้ว", ["น้ำ", "เป", "ล่า", "แก้", "ว"]),
        (unicodedata.normalize("NFKC", "น้ำ"), [unicodedata.normalize("NFKC", "น้ำ")]),
        ("កម្ពុជា", ["ក", "ម្ពុ", "ជា"]),
        ("हिन्दी", ["हिन्दी"]),
        ("は（「明日」）", ["は", "（「明", "日」）"]),
        ("word's", ["word's"]),
        ("", []),
    ],
)
def test_units_of_lines(text, units):
    assert line_units(text) == units


def test_widths():
    assert [num_columns(text) for text in ("ab", "漢字", "カ", "ｶ", "é", "한")] == [2, 4, 2, 1, 1, 2]
    marked = ("e\u0301", "カ\u309a", "น้ำ", "हिन्दी", f"می{ZWNJ}روم", "1\u20e3")
    assert [num_columns(text) for text in marked] == [1, 2, 2, 5, 5, 1]
    assert graphemes("e\u0301x") == ["e\u0301", "x"]
