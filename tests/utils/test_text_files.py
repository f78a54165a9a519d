"""Text files: what is read, whatever wrote it, and errors that name file and line."""

import gzip
import os
import time
from decimal import Decimal

import pytest

from dinosr_hf.utils.text_files import csv_rows, json_lines, load_yaml, read_json, read_lines, read_text
from scripts import load_command

MARK = b"\xef\xbb\xbf"


@pytest.fixture
def file(tmp_path):
    def write(content, name="some.file"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def rows(path):
    return [list(row.values()) for _, row in csv_rows(path)]


# -- lines


@pytest.mark.parametrize(
    "content",
    [
        b"one\n\ntw\xc3\xb6\n",
        b"one\n\ntw\xc3\xb6",
        MARK + b"one\r\n\r\ntw\xc3\xb6\r\n",
        b"one\r\rtw\xc3\xb6\r",
        MARK + b"one\n" + MARK + b"\n" + MARK + b"tw\xc3\xb6\n",
    ],
    ids=["unix", "no end", "windows", "old mac", "joined by cat"],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_lines_are_the_same_whoever_wrote_them(file, content, pack):
    assert read_lines(file(pack(content))) == ["one", "", "twö"]
    assert read_text(file(pack(content))) == "one\n\ntwö\n"


def test_only_line_ends_end_lines(file):
    assert read_lines(file("a\u2028b\x0bc\x85d\n")) == ["a\u2028b\x0bc\x85d"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("naïf\n".encode("utf-16"), r"some\.file is not UTF-8, but UTF-16\. Save the file as UTF-8"),
        ("one\nnaïf\n".encode("utf-16-le"), r"some\.file, line 1: it has a NUL byte, as UTF-16"),
        ("one\nnaïf\n".encode("latin-1"), r"some\.file, line 2: it is not UTF-8 \(byte 3 of the line is 0xef\)"),
        ("one\n“two”\n".encode("cp1252"), r"some\.file, line 2: it is not UTF-8 \(byte 1 of the line is 0x93\)"),
        (b"one\n\0\n", r"some\.file, line 2: it has a NUL byte"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer of 56 bytes"),
    ],
    ids=["utf-16", "utf-16 without mark", "latin-1", "cp1252", "NUL", "pointer"],
)
def test_other_encodings_are_refused_by_file_and_line(file, content, message):
    with pytest.raises(ValueError, match=message):
        read_lines(file(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-12], "damaged .Compressed file ended before the end"),
        (lambda data: data[:20] + b"\0\1\2" + data[23:], "damaged .Error -3 while decompressing"),
        (lambda data: data + b"rest", "damaged .Not a gzipped file"),
    ],
    ids=["cut", "changed", "appended"],
)
def test_a_damaged_gzip_is_one_line(file, change, message):
    with pytest.raises(ValueError, match=rf"some\.file, line \d+: the gzip file is {message}.*Copy it again\."):
        read_lines(file(change(gzip.compress(os.urandom(99).hex().encode() * 99))))


@pytest.mark.parametrize("block", [b"\0" * 2**20, b'{"id": "a"}\n' * 2**16], ids=["zeros", "lines"])
def test_a_file_that_unpacks_to_gigabytes_is_refused_at_once(file, block):
    packed = gzip.compress(block * 4, 1)  # members of a gzip file can be joined
    path, start = file(packed * 1_300), time.perf_counter()
    with pytest.raises(ValueError, match=r"some\.file unpacks to over 100 times its size"):
        next(json_lines(path))
    assert time.perf_counter() - start < 5  # a fraction of a second where nothing else runs


def test_lines_without_an_end_are_refused(file, monkeypatch):
    monkeypatch.setattr("dinosr_hf.utils.text_files.MAX_LINE_BYTES", 9)
    assert read_lines(file("a\n12345678\n")) == ["a", "12345678"]
    with pytest.raises(ValueError, match=r"line 2: it is longer than 9 bytes"):
        read_lines(file("a\n" + "1" * 99))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a named pipe"), ("/dev/zero", "a device")):
        with pytest.raises(ValueError, match=f"{path} is {kind}, not a file"):
            read_lines(path)
    with pytest.raises(OSError, match="nowhere"):
        read_lines(tmp_path / "nowhere")


# -- CSV


@pytest.mark.parametrize(
    "content",
    [
        'path,text\na.wav,"one, ""two"""\n\n,\nb.wav,\n',
        '\ufeffpath,text\r\na.wav,"one, ""two"""\r\nb.wav,\r\n',
        'path;text\na.wav;"one, ""two"""\nb.wav;\n',
        'path\ttext\na.wav\t"one, ""two"""\nb.wav\t\n',
        'sep=;\npath;text\na.wav;"one, ""two"""\nb.wav;\n',
        'path, text\na.wav, "one, ""two"""\nb.wav, \n',
        'path,text,,\na.wav,"one, ""two"""\nb.wav,,,\n',
        'path\u200b,\u00a0text\na.wav,"one, ""two""",\nb.wav,\n',
    ],
    ids=["commas", "excel", "semicolons", "tabs", "declared", "spaces", "more columns", "invisible"],
)
def test_csv_of_several_kinds(file, content):
    assert rows(file(content)) == [["a.wav", 'one, "two"'], ["b.wav", ""]]


def test_quotes_of_a_file_without_quoting_are_text(file):
    text = 'path\ttext\na.wav\t"Yes," she said.\nb.wav\t"no\n'
    found = csv_rows(file(text), has_quotes=False)
    assert [list(row.values()) for _, row in found] == [["a.wav", '"Yes," she said.'], ["b.wav", '"no']]
    with pytest.raises(ValueError, match=r"line 2: the row has 3 instead of 2 .*'\\t', which no text may have in it"):
        list(csv_rows(file("path\ttext\na.wav\tx\ty\n"), has_quotes=False))


def test_csv_numbers_its_rows_by_line(file):
    found = list(csv_rows(file('path,text\n\na,"one\ntwo"\nb,five\n')))
    assert found == [(3, {"path": "a", "text": "one\ntwo"}), (5, {"path": "b", "text": "five"})]


def test_csv_with_the_index_of_pandas(file):
    assert rows(file(",path,text\n0,a.wav,one\n")) == [["0", "a.wav", "one"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('a,"one\nb,two\nc,three\n', "line 2: a quote is not closed"),
        ('a,"one\nb,two\nc,"three"\n', "line 2: a quote has text behind it, or one before it is not closed"),
        ('a,"one\nb,two\nc,three"\nd,four\n', "line 2: text reaches to line 4. Close its quote"),
        ('a,"one\nb,two"\n', "line 2: text reaches to line 3"),
        ('a,one\nb,"two" three\n', "line 3: a quote has text behind it"),
        ("a,one, two\n", r"line 2: the row has 3 instead of 2 fields \(path, text\). Put quotes"),
        ("a,one\nb\n", "line 3: the row has 1 instead of 2 fields"),
        (f"a,one\nb,{'x' * 131_073}\n", r"line 3: field larger than field limit"),
    ],
    ids=["open", "text behind", "swallowed", "one row", "stray", "comma", "short", "huge"],
)
def test_rows_that_do_not_fit_the_header_are_refused(file, lines, message):
    with pytest.raises(ValueError, match=rf"table\.csv, {message}"):
        rows(file(f"path,text\n{lines}", "table.csv"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,text,path", "line 1: the column name 'path' occurs twice"),
        ("LJ-1|He, she, she", r"line 1: .* 'she' .*The first line must name the columns, but has 'LJ-1|He', 'she'"),
        ("path,,text", "line 1: a column has no name"),
        ("\n\npath,text, text", "line 3: the column name 'text' occurs twice"),
        ("\u200b,\u00a0,\ufeff", r"line 1: no column has a name\. Name them in the first line\."),
    ],
)
def test_repeated_and_empty_column_names_are_refused(file, header, message):
    with pytest.raises(ValueError, match=message):
        rows(file(f"{header}\na,b,c\n"))


# -- JSON and YAML


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 200_000, "its brackets are nested too deeply"),
        ('{"a": ' * 200_000, "its brackets are nested too deeply"),
        ('{"a": 1, "a": 2}', "an object has the key 'a' twice"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 1e999999999}', "the number 1e999999999 is too large"),
        ('{"a": 1e99999999999999999999}', "the number 1e99999999999999999999 is too large"),
        (f'{{"a": {"9" * 5000}}}', r"the number 9{24}\.\.\. is too large"),
        ('{"a": 1', "is not valid JSON: Expecting ',' delimiter at character"),
    ],
    ids=["lists", "objects", "twice", "float", "decimal", "exponent", "integer", "cut"],
)
def test_json_that_cannot_be_is_one_line(file, line, message):
    for decimals in (False, True):
        with pytest.raises(ValueError, match=rf"some\.file, line 2: .*{message}"):
            list(json_lines(file(f'{{"b": 1}}\n{line}\n'), decimals=decimals))
    with pytest.raises(ValueError, match=rf"some\.file: .*{message}"):
        read_json(file(line))


def test_json_lines_are_objects(file):
    path = file('\ufeff{"a": 0.10}\n\n{"a": 5}\n')
    assert list(json_lines(path)) == [(1, {"a": 0.1}), (3, {"a": 5})]
    assert str(next(json_lines(path, decimals=True))[1]["a"]) == str(Decimal("0.10"))
    with pytest.raises(ValueError, match=r"line 1: '\[1\]' is not a JSON object"):
        list(json_lines(file("[1]")))
    with pytest.raises(ValueError, match=r"line 1: '\[' is not valid JSON: .*\. Each line must be a JSON object\."):
        list(json_lines(file('[\n{"a": 1}\n]\n')))


def test_yaml(file):
    assert load_yaml(file("\ufeffa: [1, é]\n")) == {"a": [1, "é"]}
    for content in (
        "a: [",
        "[" * 5_000,
        "a: !!timestamp 2001-99-99",
        f"a: {'9' * 5000}",
        "a: !!python/name:os.system",
    ):
        with pytest.raises(ValueError, match=r"some\.file is not valid YAML: "):
            load_yaml(file(content))
    with pytest.raises(ValueError, match=r"line 1: it is not UTF-8"):
        load_yaml(file("a: é".encode("latin-1")))


@pytest.mark.parametrize("word", ["no", "yes", "off", "010", "1:30", "2001-01-02", "1.2.3", "5e", "0x1F"])
def test_words_of_yaml_stay_as_they_are_written(file, word):
    assert load_yaml(file(f"a: {word}\nb: [{word}]\n")) == {"a": word, "b": [word]}


def test_numbers_and_constants_of_yaml(file):
    text = "[true, False, null, ~, 0, -5, +3, 1_000, 0.5, -.5, 5., 1.0e-3, 1.5E3, .inf]"
    values = [True, False, None, None, 0, -5, 3, 1000, 0.5, -0.5, 5.0, 1e-3, 1500.0, float("inf")]
    found = load_yaml(file(text))
    assert [*map(repr, found)] == [*map(repr, values)]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 7)
)


def test_aliases_of_yaml(file):
    assert load_yaml(file("a: &a [x, no]\nb: *a\n")) == {"a": ["x", "no"], "b": ["x", "no"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "a is set in line 1 and in line 3. Leave one."),
        ('a: 1\n"a": 1\n', "a is set in line 1 and in line 2"),
        ("a: {b: 1, b: 2}\n", "b is set in line 1 and in line 1"),
        (BOMB, r"its aliases \(\*name\) make 6,\d{3},\d{3} values of it"),
        ("a: &a [*a]\n", r"maximum recursion depth"),
    ],
    ids=["twice", "quoted", "nested", "bomb", "loop"],
)
def test_keys_that_repeat_and_aliases_that_multiply_are_refused(file, text, message):
    with pytest.raises(ValueError, match=rf"some\.file is not valid YAML: {message}"):
        load_yaml(file(text))


# -- scripts


@pytest.mark.parametrize("script", ["pretrain", "finetune_ctc", "finetune_classification"])
def test_scripts_name_a_file_of_arguments_in_one_line(file, script):
    module = load_command(script)
    for content, message in ((b"seed: \xe9", "line 1: it is not UTF-8"), ("[" * 5_000, "is not valid YAML")):
        with pytest.raises(SystemExit, match=rf"^{script}\.py: .*a\.yaml.* ?{message}") as end:
            module.main([str(file(content, "a.yaml"))])
        assert "\n" not in str(end.value)


def test_scripts_name_a_table_that_cannot_be_read_in_one_line(file, tmp_path):
    module = load_command("pretrain")
    table = file('path,text\na.wav,"one\nb.wav,two\n', "table.csv")
    with pytest.raises(SystemExit, match=r"^pretrain\.py: .*table\.csv, line 2: a quote is not closed\. .*"):
        module.main(["--data", str(table), "--output_dir", str(tmp_path / "out")])
