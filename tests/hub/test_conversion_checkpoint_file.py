"""Opening a checkpoint: its containers become plain data, and hostile files are refused in less than a second."""

import argparse
import os
import pickle
import struct
import tarfile
import time
import zipfile

import pytest
import torch

from dinosr_hf import DinoSRModel
from dinosr_hf.hub.conversion import ConversionError, convert
from dinosr_hf.hub.conversion.checkpoint_file import open_checkpoint
from dinosr_hf.hub.conversion.fairseq import config_from_fairseq
from dinosr_hf.utils.model_folder import open_weights
from scripts import FIXTURES
from tiny import tiny_config

CASE = FIXTURES / "dev_tiny"
CHECKPOINT = CASE / "checkpoint.pt"


def write_zip(file, pickled, data=bytes(16)):
    """Write a file like torch.save's with any pickle, and one storage of four numbers."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", data)


def write_legacy(file, pickled):
    """The same in the format from before torch 1.6."""
    pickled = pickled.replace(b"tQ", b"NtQ")  # storages have one more item there
    magic, version, system = (pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = pickle.dumps(["0"] if b"storage" in pickled else [], protocol=2)
    file.write_bytes(magic + version + system + pickled + keys + struct.pack("<q", 4) + bytes(16))


FORMATS = {"zip": write_zip, "legacy": write_legacy}

# Parts of pickles, in the order in which a pickle has them. The value of each is on the stack after it.
EMPTY = b"\x80\x02}"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"
NAMESPACE = b"cargparse\nNamespace\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value):
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def storage_of(size):
    identifier = (text("storage"), b"ctorch\nFloatStorage\n", text("0"), text("cpu"), integer(size))
    return tuple_of(*identifier) + b"Q"


def arguments_of(shape, stride, size=4):
    return tuple_of(storage_of(size), b"K\x00", shape, stride, b"\x89", HOOKS)


def tensor_of(length, step, size):
    """A tensor of one dimension in a storage of some size."""
    return REBUILD + arguments_of(integer(length) + b"\x85", integer(step) + b"\x85", size) + b"R"


def holding(value):
    """A checkpoint with one entry."""
    return EMPTY + text("model") + value + b"s."


def repeated(value, again, times):
    """A checkpoint whose entry is a list: a value, and something that is made of it over and over."""
    return holding(b"](" + value + again * times + b"e")


def keyed(keys):
    return EMPTY + b"(" + b"".join(key + b"N" for key in keys) + b"u."


def call(module, name, argument):
    """A pickle that calls a function with a text."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + text(argument) + b"\x85R."


NESTED = b")" + b"q\x00h\x00\x86" * 40  # a tuple of itself twice, 40 times: 2 ** 40 steps to hash or to print
ONES = b"(" + b"K\x01" * 100_000 + b"tq\x05"
MANY_DIMENSIONS = REBUILD + arguments_of(ONES, b"h\x05")
LARGE_KEYS = r"more than 2,000 large or fractional numbers as keys"

HOSTILE = {
    "system": (call("os", "system", "touch WITNESS"), "asks for os.system"),
    "posix": (call("posix", "system", "touch WITNESS"), "asks for posix.system"),
    "eval": (call("__builtin__", "eval", "open('WITNESS', 'w')"), "asks for builtins.eval"),
    "allowed-module": (call("torch.utils._import_utils", "_device", "x"), "asks for torch.utils._import_utils"),
    "allowed-package": (call("torch._utils", "_import_dotted_name", "antigravity"), "asks for torch._utils._import"),
    "argparse": (call("argparse", "FileType", "w"), "asks for argparse.FileType"),
    "call-of-a-value": (holding(NESTED + b")R"), "is damaged"),
    "call-of-a-storage-type": (holding(b"ctorch\nFloatStorage\n)R"), "a call that no checkpoint needs"),
    "nested-keys": (EMPTY + NESTED + b"K\x01s.", "keys are not text or numbers"),
    "tuple-keys": (keyed(integer(i) + b"\x85" for i in range(20_000)), "keys are not text or numbers"),
    "integer-keys": (keyed(integer(i * (2**61 - 1)) for i in range(30_000)), LARGE_KEYS),
    "float-keys": (keyed(b"G" + struct.pack(">d", 2.0 ** (61 * (i % 17)) * i) for i in range(30_000)), LARGE_KEYS),
    "memo-keys": (
        EMPTY + b"".join(b"r" + struct.pack("<I", (i << 16) % 2**32) for i in range(30_000)) + b".",
        "numbers its values so that they may collide",
    ),
    "ordered-keys": (
        holding(b"ccollections\nOrderedDict\n](" + (integer(2**61 - 1) + b"N\x86") * 9 + b"e\x85R"),
        "a call that no checkpoint needs",
    ),
    "nested-values": (holding(b"]" + NESTED + b"a"), "more than 100,000 values"),
    "deep": (b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", "more than 50 deep"),
    "deep-tuples": (holding(b"N" + b"\x85" * 40_000), "more than 50 deep"),
    "deeper-tuples": (holding(b"N" + b"\x85" * 200_000), "more than 60,000 tuples"),
    "deep-dictionaries": (b"\x80\x02" + b"}" + b"K\x01}" * 20_000 + b"s" * 20_000 + b".", "more than 50 deep"),
    "in-itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "deep, or in themselves"),
    "long": (b"\x80\x02" + b"N" * 400_000 + b".", "more than 250,000 steps"),
    "many-calls": (repeated(NAMESPACE + b"q\x00)R", b"h\x00)R", 40_000), "more than 20,000 calls"),
    "many-arguments": (
        repeated(NAMESPACE + b"q\x00(" + b"N" * 90_000 + b"tq\x01R", b"h\x00h\x01R", 10_000),
        "a call that no checkpoint needs",
    ),
    "large-metadata": (
        holding(HOOKS + b"}(" + b"".join(text(str(i)) + b"N" for i in range(40_000)) + b"ub"),
        "fills in what is no object",
    ),
    "state-of-a-tensor": (holding(tensor_of(2, 1, 4) + arguments_of(ONES, b"h\x05") + b"b"), "fills in what is no"),
    "dimensions": (holding(MANY_DIMENSIONS + b"R"), "a tensor of 100,000 dimensions"),
    "dimensions-repeated": (
        repeated(MANY_DIMENSIONS.replace(b"_v2\n", b"_v2\nq\x00") + b"q\x01R", b"h\x00h\x01R", 10_000),
        "a tensor of 100,000 dimensions",
    ),
    "dimensions-in-a-list": (
        holding(REBUILD + arguments_of(b"](" + b"K\x01" * 100_000 + b"eq\x05", b"h\x05") + b"R"),
        "a call that no checkpoint needs",
    ),
    "size-of-a-list": (holding(b"ctorch\nSize\n](" + b"K\x01" * 100_000 + b"e\x85R"), "a call that no checkpoint"),
    "ten-gigabytes": (
        holding(tensor_of(2_500_000_000, 1, 2_500_000_000)),
        "claims a tensor of 10,000,000,000 bytes",
    ),
    "two-claims": (
        holding(b"](" + tensor_of(1, 1, 1) + tensor_of(4, 1, 4) + b"e"),
        "describes a storage in two ways",
    ),
    "more-than-storage": (
        holding(tensor_of(2_500_000_000, 1, 4)),
        r"claims a tensor of shape \(2500000000,\) in 4 numbers",
    ),
    "spread": (holding(tensor_of(2_500_000_000, 0, 4)), r"claims a tensor of shape \(2500000000,\) in 4 numbers"),
    "negative": (holding(tensor_of(2, -1, 4)), "describes a tensor that cannot be"),
    "long-text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "is damaged"),
    "empty-stack": (b"\x80\x02s.", "is damaged"),
    "no-end": (b"\x80\x02}", "is damaged"),
    "text-steps": (b"I1\n.", "has the step INT"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_less_than_a_second(tmp_path, monkeypatch, name, form):
    pickled, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.pt"
    FORMATS[form](file, pickled)
    start = time.process_time()  # the processor's, whatever else runs beside
    with pytest.raises(ConversionError, match=f"without running code from it: .*({message})"):
        convert(file, tmp_path / "out")
    seconds = time.process_time() - start
    assert seconds < 1
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]


def test_the_hostile_pickles_would_do_harm(tmp_path, monkeypatch):
    # negative control: Python's own reader runs them
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["system"][0])
    assert (tmp_path / "WITNESS").exists()


@pytest.mark.parametrize("form", FORMATS)
def test_the_parts_of_the_hostile_pickles_make_a_checkpoint(tmp_path, form):
    # negative control: within the limits the same steps are fine
    many = repeated(NAMESPACE + b"q\x00)R", b"h\x00)R", 1000)
    keys = keyed(integer(i * (2**61 - 1)) for i in range(1500))
    for pickled in (holding(tensor_of(2, 2, 4)), holding(HOOKS + b"}b"), holding(b"N" + b"\x85" * 40), many, keys):
        FORMATS[form](tmp_path / "fine.pt", pickled)
        assert open_checkpoint(tmp_path / "fine.pt")
    FORMATS[form](tmp_path / "fine.pt", holding(tensor_of(2, 2, 4)))
    assert torch.equal(open_checkpoint(tmp_path / "fine.pt")["model"], torch.zeros(2))


@pytest.mark.parametrize("length", [0, 15])
def test_a_storage_that_the_file_does_not_have_is_refused(tmp_path, length):
    write_zip(tmp_path / "short.pt", holding(tensor_of(4, 1, 4)), data=bytes(length))
    with pytest.raises(ConversionError, match=f"claims a tensor of 16 bytes, but has {length} for it"):
        open_checkpoint(tmp_path / "short.pt")


def test_a_legacy_file_that_does_not_list_its_storages_is_refused(tmp_path):
    write_legacy(tmp_path / "unlisted.pt", holding(tensor_of(4, 1, 4)))
    content = (tmp_path / "unlisted.pt").read_bytes()
    without = content.replace(pickle.dumps(["0"], protocol=2), pickle.dumps([], protocol=2))
    assert without != content
    (tmp_path / "unlisted.pt").write_bytes(without)
    with pytest.raises(ConversionError, match="lacks storages that it describes"):
        open_checkpoint(tmp_path / "unlisted.pt")


class Harm:
    def __reduce__(self):
        return os.system, ("touch WITNESS",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_an_object_that_reduces_to_a_call_is_refused(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "cfg": Harm()}, "harm.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        ConversionError, match=r"opened as a checkpoint without running code from it: .*asks for (posix|nt)\.system"
    ):
        convert("harm.pt", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["harm.pt"]


def repack(file, change):
    """Rewrite the archive of the fixture, with something changed about it."""
    with zipfile.ZipFile(CHECKPOINT) as source, zipfile.ZipFile(file, "w") as archive:
        entries = {entry.filename: source.read(entry) for entry in source.infolist()}
        pickled = next(name for name in entries if name.endswith("/data.pkl"))
        for name, content in entries.items():
            is_bomb = change == "compressed" and name == pickled
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if is_bomb else zipfile.ZIP_STORED)
        if change == "twice":
            archive.writestr(pickled.upper(), call("os", "system", "x"))
    if change == "later":
        file.write_bytes(b"PK\x03\x04" + file.read_bytes())


def test_a_repacked_archive_is_read(tmp_path, original):
    # negative control of the next test
    repack(tmp_path / "same.pt", change=None)
    same(open_checkpoint(tmp_path / "same.pt"), original)


@pytest.mark.parametrize("change", ["compressed", "twice", "later"])
def test_archives_that_torch_does_not_write_are_refused(tmp_path, change):
    # one pickle for the check and another for torch
    repack(tmp_path / "other.pt", change)
    with pytest.raises(ConversionError, match=r"not one that torch\.save writes"):
        open_checkpoint(tmp_path / "other.pt")


def write_many_entries(file):
    write_zip(file, holding(tensor_of(2, 2, 4)))
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(1, 50_000):
            archive.writestr(f"x/data/{number}", b"")


def write_overlap(file):
    """Write a directory in which a second storage has the bytes of the first one."""
    write_zip(file, holding(tensor_of(2, 2, 4)))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x/data/1", bytes(16))
        archive.getinfo("x/data/1").header_offset = archive.getinfo("x/data/0").header_offset


def write_long_storage(file):
    write_zip(file, holding(tensor_of(2, 2, 4)))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("x/end", b"")
        entry = archive.getinfo("x/data/0")
        entry.file_size = entry.compress_size = 2**31


def write_comment(file):
    # torch and Python may find two directories
    write_zip(file, holding(tensor_of(2, 2, 4)))
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"x" * 100


def write_also_tar(file):
    """Write pickles of the older format that begin with the header of an archive: torch would open that first."""
    before = b"".join(pickle.dumps(item, protocol=2) for item in (0x1950A86A20F9469CFC6C, 1001)) + EMPTY + b"X"
    block = bytearray(tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT))
    before += struct.pack("<I", len(block) - len(before) - 4)
    block[: len(before)] = before
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    content = holding(tensor_of(2, 2, 4)).replace(b"tQ", b"NtQ")
    rest = b"q\x00K\x01s." + content + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16)
    file.write_bytes(block + rest)


HOSTILE_FILES = {
    "many-entries": (write_many_entries, "the directory of its archive has more than 2,097,152 bytes"),
    "overlap": (write_overlap, "parts of its archive overlap"),
    "long-storage": (write_long_storage, "parts of its archive overlap"),
    "comment": (write_comment, r"not one that torch\.save writes"),
    "also-tar": (write_also_tar, "can be read as a tar archive too"),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_a_hostile_archive_around_a_pickle_is_refused_in_less_than_a_second(tmp_path, name):
    write, message = HOSTILE_FILES[name]
    write(tmp_path / "hostile.pt")
    start = time.process_time()
    with pytest.raises(ConversionError, match=rf"hostile\.pt cannot be opened .*({message})"):
        convert(tmp_path / "hostile.pt", tmp_path / "out")
    assert time.process_time() - start < 1


def test_a_hostile_pickle_of_weights_is_refused_by_all_that_opens_models(tmp_path):
    folder = tmp_path / "model"
    model = DinoSRModel(tiny_config())
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert open_weights(DinoSRModel, folder).dtype == torch.float32  # negative control
    write_zip(folder / "pytorch_model.bin", holding(MANY_DIMENSIONS + b"R"))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be opened .*a tensor of 100,000 dimensions"):
        open_weights(DinoSRModel, folder)


def test_truncated_archives_are_refused(tmp_path):
    whole = CHECKPOINT.read_bytes()
    for share in (0.002, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(
            ConversionError, match=r"cut\.pt was cut: it begins as an archive of [\d,]+ bytes, but has no end"
        ):
            convert(tmp_path / "cut.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.pt"]


def same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(scope="module")
def original():
    return torch.load(CHECKPOINT, weights_only=True)


def test_a_plain_checkpoint_is_read_as_torch_reads_it(original):
    same(open_checkpoint(CHECKPOINT), original)


def test_a_dictconfig_becomes_a_dictionary(original):
    opened = open_checkpoint(CASE / "checkpoint_dictconfig.pt")
    same(opened["model"], original["model"])
    same(opened["cfg"]["model"], original["cfg"]["model"])
    assert type(opened["cfg"]) is dict and type(opened["cfg"]["model"]["latent_temp"]) is list


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["plain", "namespace"])
def test_both_formats_of_torch_and_a_namespace_are_read(original, tmp_path, kind, is_zip):
    content = dict(original)
    if kind == "namespace":
        settings = {**original["cfg"]["model"], "arch": "dinosr"}
        del settings["_name"]
        content.update(args=argparse.Namespace(**settings), cfg=None)
    torch.save(content, tmp_path / "other.pt", _use_new_zipfile_serialization=is_zip)
    opened = open_checkpoint(tmp_path / "other.pt")
    same(opened["model"], original["model"])
    assert config_from_fairseq(opened).to_dict() == config_from_fairseq(original).to_dict()


def test_writing_to_the_tensors_does_not_change_the_file(tmp_path):
    content = {
        "args": argparse.Namespace(a=1),
        "model": {"half": torch.arange(6).half()[1:5], "empty": torch.zeros(0)},
    }
    content["model"]["transposed"] = torch.arange(6.0).view(2, 3).T
    torch.save(content, tmp_path / "views.pt")
    opened = open_checkpoint(tmp_path / "views.pt")
    same(opened["model"], content["model"])
    opened["model"]["half"].zero_()
    same(open_checkpoint(tmp_path / "views.pt")["model"], content["model"])
