"""Names of recordings as lines of text, and without repetitions."""

import json

import pytest

from dinosr_hf.utils.files import write_atomically
from dinosr_hf.utils.names import printable_name, unique_names


@pytest.mark.parametrize(
    ("name", "printable"),
    [
        ("Zoë/café 1.wav", "Zoë/café 1.wav"),
        ("caf\udce9.wav", r"caf\xe9.wav"),  # Latin-1
        ("\udcc3\udca9.wav", "é.wav"),  # UTF-8, read where the locale is ASCII
        ("caf\udce9 日.wav", r"caf\xe9 日.wav"),
        ("a\nb\tc\r.wav", r"a\nb\tc\r.wav"),
        ("a\x85b\u2028c\x1b[31m", r"a\x85b\u2028c\x1b[31m"),
        ("\ud800.wav", r"\ud800.wav"),  # from JSON; of no byte
    ],
    ids=ascii,
)
def test_a_printable_name_is_one_line_of_text(name, printable):
    assert printable_name(name) == printable == printable_name(printable)
    assert printable.encode() and len(printable.splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "unique"),
    [
        ("a b c", "a b c"),
        ("a a a", "a a#2 a#3"),
        ("a a a#2 b", "a a#3 a#2 b"),
        ("a#2 a a", "a#2 a a#3"),
        ("a a#2 a#2 a", "a a#2 a#2#2 a#3"),
        ("a a a#2 a#2 a#2#2", "a a#3 a#2 a#2#3 a#2#2"),
        ("a#2#2 a#2 a#2 a a", "a#2#2 a#2 a#2#3 a a#3"),
    ],
)
def test_names_get_numbers_that_no_other_name_has(names, unique):
    assert unique_names(iter(names.split())) == unique.split()
    assert len(set(unique.split())) == len(names.split())


def test_many_equal_names_are_fast():
    names = unique_names([*["a"] * 100_000, *(f"a#{number}" for number in range(2, 100_002))])
    assert len(set(names)) == 200_000


def test_a_file_takes_any_text(tmp_path):
    content = json.dumps({"name": "caf\udce9"}, ensure_ascii=False)
    file = write_atomically(tmp_path / "a.json", content)
    assert json.loads(file.read_text(encoding="utf-8")) == {"name": "caf\udce9"}
