"""espeak-ng through ctypes: one text in, 16-bit samples and the synthesiser's own events out.

The library and its data come from the wheel `espeakng-loader`; no system package is needed. espeak-ng is licensed
under the GPL, so it is an optional extra and is loaded by `synthesize` only, never by an import.

espeak-ng is one set of global variables. Pitch flutter, gain control and filter memories run on from one utterance
into the next, and neither a new voice nor `espeak_Terminate` puts them back. `synthesize` therefore loads the library,
uses it for one utterance and unloads it again (about a millisecond), which is what makes its result a function of its
arguments alone. A few kilobytes an utterance are lost with each unloading (espeak-ng frees not all it takes).
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..utils.extras import import_extra

ESPEAK_RATE = 22_050  # samples a second of every voice that is not an MBROLA voice

# From espeak-ng's public header speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 0x0001, 0x0002, 0x8000
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_EVENT_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7


class Event(NamedTuple):
    """Something the synthesiser said about its waveform, in the order in which it said it."""

    kind: str  # "word" or "phone"
    sample: int  # where it begins, in samples at ESPEAK_RATE
    text_position: int  # the character of the text where its word begins, counted from 0
    name: str  # IPA, empty for a pause and for a word


class _EventId(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_void_p), ("string", ctypes.c_ubyte * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_SynthCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))

# One utterance at a time. A fork waits for the utterance under way, so that no child inherits a half-used library.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def _loader() -> Any:
    return import_extra("espeakng_loader", "demo", "The synthetic corpus")


def _is_loaded(path: str) -> bool:
    """Whether this process holds the library at `path`, ours or anybody's. (Windows keeps no such query in ctypes.)"""
    if sys.platform == "win32":
        return False
    try:
        handle = _ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    _ctypes.dlclose(handle)
    return True


def _unload(library: ctypes.CDLL) -> None:
    if sys.platform == "win32":
        _ctypes.FreeLibrary(library._handle)
    else:
        _ctypes.dlclose(library._handle)


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """espeak-ng as after the start of a process, for the length of a `with` block."""
    loader = _loader()
    path, data_path = loader.get_library_path(), loader.get_data_path()
    with _lock:
        if _is_loaded(path):
            raise RuntimeError(
                f"{path} is in use in this process already, so utterances would depend on what it spoke before. "
                "Make the corpus in a process of its own: pass num_proc=1 or more to to_dataset() or export()."
            )
        library = ctypes.CDLL(path)
        try:
            options = _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT
            if library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data_path), options) != ESPEAK_RATE:
                raise RuntimeError(
                    f"espeak-ng cannot read its data in {data_path}. It takes paths of at most 158 bytes (this one "
                    f"has {len(os.fsencode(data_path))}); if that is not it, reinstall espeakng-loader."
                )
            yield library
            library.espeak_Terminate()
        finally:
            _unload(library)


def _phone_name(event: _Event) -> str:
    # Eight bytes, ended by a zero byte only where the name is shorter.
    return bytes(event.id.string).split(b"\0")[0].decode("utf-8", errors="ignore")


def _collector(chunks: list[bytes], events: list[Event]) -> Callable[[int | None, int, Any], int]:
    def collect(samples: int | None, num_samples: int, event: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while event[index].type != _EVENT_END:
            item = event[index]
            if item.type == _EVENT_PHONEME:
                events.append(Event("phone", item.sample, item.text_position - 1, _phone_name(item)))
            elif item.type == _EVENT_WORD:
                events.append(Event("word", item.sample, item.text_position - 1, ""))
            index += 1
        return 0  # go on

    return collect


def synthesize(
    text: str, *, voice: str, pitch: int, pitch_range: int, rate: int, volume: int, seed: int
) -> tuple[np.ndarray, list[Event]]:
    """Speak one text. The result depends on the arguments alone (and on the build of espeak-ng).

    Args:
        text: What to say, in the voice's language.
        voice: A language and a variant, as "en+m3".
        pitch: 0 to 99; 50 is the variant's own, 0 and 99 are an octave below and above.
        pitch_range: 0 to 99; 0 is monotone.
        rate: Words a minute, 80 to 450.
        volume: 0 to 200, in percent; from about 50 on, loud variants reach 16 bits and are turned down as they speak.
        seed: Of the synthesiser's breath noise, 0 to 2**31 - 1.

    Returns:
        int16 samples (S,) at `ESPEAK_RATE`, and the words and phones in order of time.

    Raises:
        ImportError: espeakng-loader is not installed.
        RuntimeError: espeak-ng does not start, does not know the voice, or cannot be had fresh.
    """
    chunks: list[bytes] = []
    events: list[Event] = []
    callback = _SynthCallback(_collector(chunks, events))
    encoded = text.encode("utf-8") + b"\0"
    with _fresh_library() as library:
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.encode("utf-8")) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}.")
        for parameter, value in ((_RATE, rate), (_VOLUME, volume), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        # It seeds itself with the time of day when it starts.
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        position = (ctypes.c_uint(0), ctypes.c_int(_POSITION_CHARACTER), ctypes.c_uint(0))
        status = library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), *position, ctypes.c_uint(_CHARS_UTF8), None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak-ng could not say {text!r} (status {status}).")
    return np.frombuffer(b"".join(chunks), dtype="<i2"), events


def voice_variants() -> dict[str, dict[str, list[str]]]:
    """The voice variants in espeak-ng's data folder, sorted by name: the settings in each file, a list of words each.

    Raises:
        ImportError: espeakng-loader is not installed.
    """
    variants = {}
    for file in sorted(Path(_loader().get_data_path(), "voices", "!v").iterdir()):
        lines = [line.split() for line in file.read_text(encoding="utf-8", errors="replace").lower().splitlines()]
        # "formant 2 110 80 80" is the setting "formant 2".
        variants[file.name] = {
            " ".join(words[: 2 if words[0] == "formant" else 1]): words[2 if words[0] == "formant" else 1 :]
            for words in lines
            if words and not words[0].startswith(("#", "//"))
        }
    return variants
