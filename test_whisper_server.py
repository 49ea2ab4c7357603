"""Tests of the server as its users meet it: the real program, the real `base` model, real speech.

    ./run.sh test                     all of them
    ./run.sh test -k subtitle         some of them

Nearly all share one server, started by the first test that needs it. The words of a transcript
are checked, so that none of these tests can pass without the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jiwer
import pytest
import pytest_audioeval

HERE = Path(__file__).parent
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


class Served:
    """A running server: where it listens, what it logs, how to ask it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log_file = process, log
        self.port = self.wait_for(r"http://[^ ]*:(\d+)", 20)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """The first group (or all) of a pattern as soon as the log shows it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, self.log()):
                return found[found.lastindex or 0]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the log never showed {pattern!r}:\n{self.log()}")

    def post(
        self, path: str = AZURE, sound: bytes | Clip | None = ENGLISH, name: str = "a.wav", **fields: Any
    ) -> httpx.Response:
        """Send sound and form fields; a list repeats a field, `granularities` stands for its long name."""
        if "granularities" in fields:
            fields["timestamp_granularities[]"] = fields.pop("granularities")
        sound = sound.bytes if isinstance(sound, Clip) else sound
        files = {"file": (name, sound)} if sound is not None else {"none": (None, b"")}
        return self.http.post(path, data=fields, files=files)

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

    def child(self) -> int | None:
        """Process id of the worker, if there is one."""
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                pid, parent = path.parent.name, path.read_text().rsplit(")", 1)[1].split()[1]
                command = (path.parent / "cmdline").read_bytes()
                if int(parent) == self.process.pid and b"spawn_main" in command:
                    return int(pid)
        return None


@contextlib.contextmanager
def serving(directory: Path, *arguments: str, **settings: str) -> Iterator[Served]:
    """A server with `WHISPER_*` settings of its own (`serving(tmp_path, STRICT="1")`); killed at the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WHISPER_")}
    environment |= {"WHISPER_MODEL": "base", "WHISPER_PORT": "0"}
    environment |= {k if k.isupper() and k.startswith("HF_") else "WHISPER_" + k: v for k, v in settings.items()}
    log = directory / "server.log"
    with log.open("w") as stderr:
        command = [sys.executable, str(HERE / "whisper_server.py"), *arguments]
        process = subprocess.Popen(command, env=environment, stderr=stderr, text=True)
    try:
        yield Served(process, log)
    finally:
        process.send_signal(signal.SIGKILL)
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


# ------------------------------------------------------------------------------------------------
# a first transcript
# ------------------------------------------------------------------------------------------------


def test_english_speech_is_heard(server: Served) -> None:
    answer = server.post()
    assert answer.status_code == 200
    assert wrong(answer.json()["text"], ENGLISH.said) <= 0.2
