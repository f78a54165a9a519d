"""Which names belong to which recordings: paths, ends of paths, bare names, and nobody else's."""

import unicodedata

import pytest

from dinosr_hf.data.name_matching import match_names, without_suffix

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("recordings", "names", "found"),
    [
        (["84/1/a.flac"], ["84/1/a"], ["84/1/a"]),
        (["84/1/a.flac"], ["84/1/a.flac", "84/1/a", "a"], ["84/1/a.flac"]),
        (["84/1/a.flac"], ["a"], ["a"]),
        (["84/1/a.flac"], ["a.flac"], ["a.flac"]),
        (["a.flac"], ["84/1/a"], ["84/1/a"]),
        (["audio/a.flac"], ["text/a"], ["text/a"]),
        (["train/ann/1.wav", "train/bob/1.wav"], ["bob/1", "ann/1"], ["ann/1", "bob/1"]),
        (["/data/ann/1.wav"], ["ann/1"], ["ann/1"]),
        (["a/1.wav", "a/1.flac"], ["a/1"], ["a/1", "a/1"]),
        (["v1.5", "take.2.wav"], ["v1.5", "take.2"], ["v1.5", "take.2"]),
        ([f"x/{NFC}.wav"], [NFD], [NFD]),
        ([f"x/{NFD}.wav"], [f"./x//{NFC}"], [f"./x//{NFC}"]),
        ([f"{NFC}.wav", f"{NFD}.wav"], [NFC, NFD], [NFC, NFD]),
        (["1.wav"], ["\ufeff1"], ["\ufeff1"]),
    ],
)
def test_names_of_recordings(recordings, names, found):
    assert match_names(recordings, names) == (dict(zip(recordings, found, strict=True)), {})


@pytest.mark.parametrize(
    ("recordings", "names", "found"),
    [
        (["ann/1.wav", "bob/1.wav"], ["ann/1"], {"ann/1.wav": "ann/1"}),
        (["1.wav", "bob/1.wav"], ["1"], {"1.wav": "1"}),
        (["ann/1.wav", "bob/2.wav"], ["bob/1", "bob/2"], {"bob/2.wav": "bob/2"}),  # bob's 1.wav is lost
        (["ann/1.wav"], ["ann/2", "bob/1"], {}),  # ann has lines, but none for it
        (["audio/ann/1.wav"], ["text/ann/2", "text/bob/1"], {}),
        (["audio/ann/1.wav", "audio/cy/3.wav"], ["text/bob/1", "text/cy/3"], {"audio/cy/3.wav": "text/cy/3"}),
        (["a/train/1/1.wav", "a/train/1/2.wav"], ["b/train/1/1", "b/dev/1/2"], {"a/train/1/1.wav": "b/train/1/1"}),
        ([f"{NFC}.wav", f"{NFD}.wav"], [NFC], {f"{NFC}.wav": NFC}),
        (["a.wav", "a\u200e.wav"], ["a"], {"a.wav": "a"}),
        (["a.wav"], ["b"], {}),
    ],
)
def test_a_name_of_another_is_not_taken(recordings, names, found):
    assert match_names(recordings, names) == (found, {})


@pytest.mark.parametrize(
    ("recordings", "names", "ambiguous"),
    [
        (["ann/1.wav", "bob/1.wav"], ["1"], {"ann/1.wav": ["1"], "bob/1.wav": ["1"]}),
        (["ann/1.wav", "bob/1.wav"], ["text/1"], {"ann/1.wav": ["text/1"], "bob/1.wav": ["text/1"]}),
        (["1.wav"], ["ann/1", "bob/1"], {"1.wav": ["ann/1", "bob/1"]}),
        (["x/1.wav", "x/1.flac"], ["1"], {"x/1.wav": ["1"], "x/1.flac": ["1"]}),
        ([f"{NFC}.wav"], [NFD, f"\u200e{NFC}"], {f"{NFC}.wav": [NFD, f"\u200e{NFC}"]}),
    ],
)
def test_names_that_are_not_unique_are_left_out(recordings, names, ambiguous):
    assert match_names(recordings, names) == ({}, ambiguous)


def test_suffixes():
    paths = ["a.wav", "x.y/a", "a.b.FLAC", "v1.5", "x/.wav", "a."]
    assert [*map(without_suffix, paths)] == ["a", "x.y/a", "a.b", "v1.5", "x/.wav", "a."]
