"""What is wrong with files that do not open: pointers, web pages, cut files; and nothing about whole ones."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dinosr_hf.utils.damaged_files import count_weights, explain_damage, safetensors_shapes
from dinosr_hf.utils.text_files import read_lines

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5\n"
TENSORS = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}


@pytest.fixture
def whole(tmp_path):
    """Return files that nothing is wrong with, by suffix."""
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.bin")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "x.npz", **TENSORS)
    (tmp_path / "x.json").write_text(json.dumps({"a": "x" * 50}))
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    return {path.suffix: path for path in tmp_path.iterdir()}


def test_nothing_is_said_of_whole_files(whole):
    assert {suffix: explain_damage(path) for suffix, path in whole.items()} == dict.fromkeys(whole)
    assert safetensors_shapes(whole[".safetensors"]) == {"a": (3, 4), "b": (5,)}
    assert count_weights([whole[".safetensors"], whole[".safetensors"]]) == 34


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".npz", ".json", ".parquet"])
@pytest.mark.parametrize("num_lost", [1, 40, 10_000])
def test_a_cut_file_is_named_with_its_size(whole, suffix, num_lost):
    path = whole[suffix]
    content = path.read_bytes()
    path.write_bytes(content[: max(8, len(content) - num_lost)])
    problem = explain_damage(path)
    assert problem is not None and problem.startswith(str(path)) and problem.endswith("Download it again.")
    assert f"{path.stat().st_size:,}" in problem or "(0 bytes)" in problem


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.json", "x.wav", "x"])
def test_what_lies_in_the_place_of_a_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    assert explain_damage(path) == (
        f"{path} is a Git LFS pointer of 66 bytes, not the file itself. Run `git lfs pull` in its repository, or"
        " download the file."
    )
    path.write_text("\n<!DOCTYPE html><html>404</html>")
    assert explain_damage(path) == f"{path} is a web page of 32 bytes, not the file itself. Download it again."
    path.write_text("")
    assert explain_damage(path) == f"{path} is empty (0 bytes). Download it again."
    path.unlink()
    assert explain_damage(path) == f"{path} cannot be read: No such file or directory."


@pytest.mark.parametrize(
    "header", [b"[]", b'{"a": 5}', b'{"a": {"shape": [2], "data_offsets": [0]}}', b"[" * 3000, b"\xff\xfe"]
)
def test_a_header_that_is_none_is_said(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{path} is damaged: Error while deserializing header" in explain_damage(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert (
        explain_damage(tmp_path / "model.safetensors")
        == f"{tmp_path / 'model.safetensors'} is not a regular file. Give a regular file."
    )


def test_a_weight_file_that_torch_did_not_write_is_said(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\xff\xfejunk")
    assert "pytorch_model.bin is not what torch.save writes (6 bytes)" in explain_damage(
        tmp_path / "pytorch_model.bin"
    )


@pytest.mark.parametrize("name", ["labels.jsonl", "train.csv", "4-gram.arpa", "lexicon.txt", "phones.ctm"])
def test_a_text_file_that_is_a_pointer_is_not_read_as_text(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a Git LFS pointer of 66 bytes.* `git lfs pull`"):
        read_lines(tmp_path / name)


def tensor(shape, end=4):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


HOSTILE_HEADERS = {
    "long-numbers": {"a": tensor([10**4000] * 400)},
    "large-numbers": {"a": tensor([2**62, 2**62])},
    "negative": {"a": tensor([-1])},
    "text": {"a": tensor("111")},
    "beyond-the-end": {"a": tensor([1], 2**70)},
    "more-than-there-is": {"a": tensor([2], 8)},
    "less-than-there-is": {"a": tensor([0], 0)},
    "overlap": {"a": tensor([1]), "b": tensor([1])},
    "line-breaks": {"a\n\x1b[2J" * 10_000: tensor([2])},
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_a_hostile_header_is_refused_in_a_line(tmp_path, name):
    header = json.dumps(HOSTILE_HEADERS[name]).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    line = r"[^\n\x1b]{9,200} \([\d,]+ bytes\)\. Download it again\.$"
    with pytest.raises(ValueError, match=rf"x\.safetensors is damaged: {line}"):
        count_weights([path])
