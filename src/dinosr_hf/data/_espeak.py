"""
Speak a text with espeak-ng through ctypes: 16-bit samples, and the synthesiser's events.

The library and its data come from the wheel `espeakng-loader`; no system package is needed. espeak-ng is licensed
under the GPL, so it is an optional extra and only `synthesize` loads it, never an import.

espeak-ng is one set of global variables. Pitch flutter, gain control and filter memories continue from one utterance
to the next, and neither a new voice nor `espeak_Terminate` resets them. `synthesize` therefore loads the library, uses
it for one utterance and unloads it again (about a millisecond), so that its result is a function of its arguments.
Each unloading leaks a few kilobytes, which espeak-ng does not free.
"""

import _ctypes
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
_EVENT_END, _EVENT_PHONEME = 0, 7


class Event(NamedTuple):
    """A phone in the synthesiser's waveform."""

    sample: int  # its beginning, in samples at ESPEAK_RATE
    text_position: int  # index of the character of the text where its word begins
    name: str  # IPA, empty for a pause


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

# One utterance at a time. A fork waits for the current utterance, so that no child inherits a half-used library.
_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def require(module: str) -> Any:
    """Import a module of the extra `demo`."""
    return import_extra(module, "demo", "The synthetic corpus")


def _is_loaded(path: str) -> bool:
    """Return whether anything in this process has loaded the library at `path` (unknown on Windows: False)."""
    if sys.platform == "win32":
        return False
    try:
        _ctypes.dlclose(_ctypes.dlopen(path, os.RTLD_NOLOAD | os.RTLD_NOW))
    except OSError:
        return False
    return True


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """Load espeak-ng in its initial state for the duration of the block."""
    loader = require("espeakng_loader")
    path, data_path = loader.get_library_path(), loader.get_data_path()
    with _lock:
        if _is_loaded(path):
            problem = f"{path} is already in use in this process, so utterances would depend on what it spoke before"
            advice = "Make the corpus in a process of its own: pass num_proc=1 or more to to_dataset() or export()."
            raise RuntimeError(f"{problem}. {advice}")
        library = ctypes.CDLL(path)
        try:
            options = _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT
            if library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data_path), options) != ESPEAK_RATE:
                raise RuntimeError(
                    f"espeak-ng cannot read its data in {data_path}. Its paths may have at most 158 bytes (this one "
                    f"has {len(os.fsencode(data_path))}); otherwise, reinstall espeakng-loader."
                )
            yield library
            library.espeak_Terminate()
        finally:
            if sys.platform == "win32":
                _ctypes.FreeLibrary(library._handle)
            else:
                _ctypes.dlclose(library._handle)


def synthesize(
    text: str, *, voice: str, pitch: int, pitch_range: int, rate: int, volume: int, seed: int
) -> tuple[np.ndarray, list[Event]]:
    """
    Speak a text: int16 samples (S,) at `ESPEAK_RATE`, and phones in order of time.

    `voice` is a language and a variant, as "en+m3"; `pitch` 0 to 99 (50 is the variant's own, 0 and 99 an octave below
    and above), as `pitch_range` (0 is monotone); `rate` 80 to 450 words per minute; `volume` 0 to 200 % (from about 50
    on, loud variants reach the 16-bit limit and are attenuated meanwhile); `seed` that of the breath noise.
    """
    chunks: list[bytes] = []
    events: list[Event] = []

    def collect(samples: int | None, num_samples: int, event: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(ctypes.string_at(samples, 2 * num_samples))
        index = 0
        while (item := event[index]).type != _EVENT_END:
            if item.type == _EVENT_PHONEME:
                # Eight bytes, with a zero byte at the end only if the name is shorter.
                name = bytes(item.id.string).split(b"\0")[0].decode("utf-8", errors="ignore")
                events.append(Event(item.sample, item.text_position - 1, name))
            index += 1
        return 0  # continue

    callback = _SynthCallback(collect)
    encoded = text.encode("utf-8") + b"\0"
    with _fresh_library() as library:
        library.espeak_SetSynthCallback(callback)
        if library.espeak_SetVoiceByName(voice.encode("utf-8")) != 0:
            raise RuntimeError(f"espeak-ng has no voice {voice!r}.")
        for parameter, value in ((_RATE, rate), (_VOLUME, volume), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(seed))  # on start it seeds itself with the time of day
        position = (ctypes.c_uint(0), ctypes.c_int(_POSITION_CHARACTER), ctypes.c_uint(0))
        status = library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded)), *position, ctypes.c_uint(_CHARS_UTF8), None, None
        )
        if status != 0:
            raise RuntimeError(f"espeak-ng could not speak {text!r} (status {status}).")
    return np.frombuffer(b"".join(chunks), dtype="<i2"), events
