"""Opening a checkpoint: its containers become plain data, and hostile files are refused at once."""

import argparse
import io
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch

from conftest import FIXTURES
from dinosr_hf.hub.conversion import CheckpointError, convert
from dinosr_hf.hub.conversion.checkpoint_file import open_checkpoint
from dinosr_hf.hub.conversion.fairseq import config_from_fairseq

CASE = FIXTURES / "dev_tiny"
CHECKPOINT = CASE / "checkpoint.pt"


def write_zip(file, steps, data=None):
    """A file like torch.save's with a pickle of our own, and one storage."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", steps)
        archive.writestr("x/version", "3\n")
        archive.writestr("x/byteorder", "little")
        if data is not None:
            archive.writestr("x/data/0", data)


def call(module, name, argument):
    """Steps of a pickle that calls a function with a text."""
    text = argument.encode()
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R."


def tensor_of(size, stride, storage_size):
    class Steps(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", storage_size) if value == "numbers" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("numbers", 0, (size,), (stride,), False, {})

    stream = io.BytesIO()
    Steps(stream, protocol=2).dump({"model": Tensor()})
    return stream.getvalue()


def nested_keys():
    # a tuple of itself twice, 40 times: 2 ** 40 steps to hash
    return b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 40 + b"K\x01s."


def nested_values():
    return b"\x80\x02}X\x01\x00\x00\x00a]" + b"q\x00h\x00\x86" * 40 + b"s."


HOSTILE = {
    "system": (call("os", "system", "touch WITNESS"), "asks for os.system"),
    "posix": (call("posix", "system", "touch WITNESS"), "asks for posix.system"),
    "eval": (call("__builtin__", "eval", "open('WITNESS', 'w')"), "asks for builtins.eval"),
    "allowed-module": (call("torch.utils._import_utils", "_device", "x"), "asks for torch.utils._import_utils"),
    "allowed-package": (call("torch._utils", "_import_dotted_name", "antigravity"), "asks for torch._utils._import"),
    "argparse": (call("argparse", "FileType", "w"), "asks for argparse.FileType"),
    "nested-keys": (nested_keys(), "keys are not text or numbers"),
    "nested-values": (nested_values(), "refers to its own parts so often"),
    "deep": (b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", "more than 50 deep"),
    "in-itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "deep, or in themselves"),
    "long": (b"\x80\x02" + b"N" * 400_000 + b".", "more than 250,000 steps"),
    "ten-gigabytes": (tensor_of(2_500_000_000, 1, 2_500_000_000), "claims a tensor of 10,000,000,000 bytes"),
    "more-than-storage": (tensor_of(2_500_000_000, 1, 4), r"claims a tensor of shape \(2500000000,\) in 4 numbers"),
    "spread": (tensor_of(2_500_000_000, 0, 4), r"claims a tensor of shape \(2500000000,\) in 4 numbers"),
    "long-text": (b"\x80\x02X\xff\xff\xff\x7fabc.", "no pickle, or a damaged one"),
    "empty-stack": (b"\x80\x02s.", "no pickle, or a damaged one|no dictionary"),
    "no-end": (b"\x80\x02}", "no pickle|does not end"),
    "text-steps": (b"I1\n.", "has the step INT"),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path, monkeypatch, name, form):
    steps, message = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.pt"
    if form == "zip":
        write_zip(file, steps, data=bytes(16))
    else:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
        head = magic + pickle.dumps(1001, protocol=2) + pickle.dumps({}, protocol=2)
        file.write_bytes(head + steps + pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16))
    start = time.process_time()  # not the clock, which runs on while neighbours have the cores
    with pytest.raises(CheckpointError, match=f"without running code from it: .*({message})"):
        convert(file, tmp_path / "out")
    assert time.process_time() - start < 1
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pt"]


def test_the_hostile_pickles_would_do_harm(tmp_path, monkeypatch):
    # the control: another reader follows them
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["system"][0])
    assert (tmp_path / "WITNESS").exists()


class Harm:
    def __reduce__(self):
        return os.system, ("touch WITNESS",)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_an_object_that_reduces_to_a_call_is_refused(tmp_path, monkeypatch, is_zip):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "cfg": Harm()}, "harm.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system"):
        convert("harm.pt", "out")
    assert [path.name for path in tmp_path.iterdir()] == ["harm.pt"]


def test_compressed_archives_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"N" * 50_000_000)
    with pytest.raises(CheckpointError, match=r"not one that torch\.save writes"):
        open_checkpoint(tmp_path / "bomb.pt")


def test_truncated_archives_are_refused(tmp_path):
    whole = CHECKPOINT.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match="cannot be opened as a checkpoint"):
            open_checkpoint(tmp_path / "cut.pt")


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


def test_a_plain_checkpoint_is_read_as_by_torch(original):
    same(open_checkpoint(CHECKPOINT), original)


def test_a_dictconfig_becomes_a_dictionary(original):
    opened = open_checkpoint(CASE / "checkpoint_dictconfig.pt")
    same(opened["model"], original["model"])
    same(opened["cfg"]["model"], original["cfg"]["model"])
    assert type(opened["cfg"]) is dict and type(opened["cfg"]["model"]["latent_temp"]) is list


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", ["plain", "namespace"])
def test_both_formats_of_torch_and_a_namespace(original, tmp_path, kind, is_zip):
    content = dict(original)
    if kind == "namespace":
        settings = {**original["cfg"]["model"], "arch": "dinosr"}
        del settings["_name"]
        content.update(args=argparse.Namespace(**settings), cfg=None)
    torch.save(content, tmp_path / "other.pt", _use_new_zipfile_serialization=is_zip)
    opened = open_checkpoint(tmp_path / "other.pt")
    same(opened["model"], original["model"])
    assert config_from_fairseq(opened).to_dict() == config_from_fairseq(original).to_dict()


def test_tensors_of_the_restricted_reader_are_their_own(tmp_path):
    content = {
        "args": argparse.Namespace(a=1),
        "model": {"half": torch.arange(6).half()[1:5], "empty": torch.zeros(0)},
    }
    content["model"]["turned"] = torch.arange(6.0).view(2, 3).T
    torch.save(content, tmp_path / "views.pt")
    opened = open_checkpoint(tmp_path / "views.pt")
    same(opened["model"], content["model"])
    opened["model"]["half"].zero_()
    same(open_checkpoint(tmp_path / "views.pt")["model"], content["model"])
