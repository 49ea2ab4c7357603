"""Tests of run.sh and run.py as their users meet them: real shells, a real .venv, real pip.

They start copies in a folder of their own, where the server is a stand-in and packages come from a folder
of tiny wheels, so that nothing is fetched. The clone is of the real server.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import run

pytestmark = pytest.mark.unix  # run.sh and signals; run.cmd is started by .ci/windows
HERE = Path(__file__).parent
SERVER = """
import importlib.util, json, os, signal, sys
tiny = importlib.util.find_spec("tiny") and __import__("tiny").VERSION
told = {"pid": os.getpid(), "arguments": sys.argv[1:], "environment": dict(os.environ), "tiny": tiny}
if sys.argv[1:] == ["serve"]:
    signal.signal(signal.SIGTERM, lambda *_: print("stopped") or sys.exit(3))
print(json.dumps({**told, "prefix": sys.prefix}), flush=True)
if sys.argv[1:] == ["serve"]:
    signal.pause()
"""
PYTEST = """
import os, sys
print(sys.argv[1:], os.getcwd(), [key for key in os.environ if key.startswith("WHISPER_")])
"""


def make_wheel(folder: Path, name: str, files: dict[str, str], tag: str = "py3-none-any") -> None:
    about, (project, version) = f"{name}.dist-info", name.split("-")
    with zipfile.ZipFile(folder / f"{name}-{tag}.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1", "2"):
        make_wheel(folder, f"tiny-{version}", {"tiny.py": f"VERSION = {version}"})
    make_wheel(folder, "tiny-3", {"tiny.py": ""}, "cp39-cp39-win32")
    make_wheel(folder, "pytest-9", {"pytest/__init__.py": "", "pytest/__main__.py": PYTEST})
    clips = {"pytest_audioeval/samples/audio/en/a.wav": "sound", "pytest_audioeval/__init__.py": ""}
    make_wheel(folder, "pytest_audioeval-0.1.3", clips)
    return folder


class Place:
    """A folder with the launcher in it, and what surrounds it."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder = folder / "a folder 音声"
        self.folder.mkdir()
        self.venv = self.folder / ".venv"
        for name in ("run.sh", "run.py"):
            shutil.copy(HERE / name, self.folder)
        (self.folder / "whisper_server.py").write_text(SERVER)
        self.require("tiny==1")
        pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        self.environment = {**os.environ, **pip, "PYTHON": sys.executable}
        for name in os.environ:
            if name.startswith(("PIP_", "WHISPER_", "PYTHON")) and name not in (*pip, "PYTHON"):
                del self.environment[name]

    def require(self, line: str) -> None:
        (self.folder / "requirements.txt").write_text(f"{line}\n")

    def pretend_installed(self) -> None:
        """As after a first start, without its seconds."""
        (self.venv / "bin").mkdir(parents=True)
        (self.venv / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
        (self.venv / "installed").mkdir()
        shutil.copy(self.folder / "requirements.txt", self.venv / "installed")
        (self.venv / "installed" / "python").write_bytes(run.MADE_WITH)

    def begin(self, *command: str, session: bool = False, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command or ["./run.sh"],
            cwd=self.folder,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=session,
        )

    def start(self, *command: str, **environment: str) -> tuple[int, str, str]:
        process = self.begin(*command, session=False, **environment)
        out, told = process.communicate(timeout=60)
        return process.returncode, out, told

    def served(self, *command: str, **environment: str) -> dict[str, Any]:
        """What the stand-in says when it has been started without a word from the launcher."""
        code, out, told = self.start(*command, **environment)
        assert (code, told) == (0, ""), told
        answer: dict[str, Any] = json.loads(out)
        return answer


@pytest.fixture
def place(tmp_path: Path, wheels: Path) -> Place:
    return Place(tmp_path, wheels)


@pytest.fixture
def ready(place: Place) -> Place:
    place.pretend_installed()
    return place


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Place:
    """A place after its first start."""
    place = Place(tmp_path_factory.mktemp("made"), wheels)
    code, out, told = place.start()
    assert (code, told) == (0, f"run: installing requirements.txt into {place.venv}\n")
    assert json.loads(out)["tiny"] == 1 and json.loads(out)["prefix"] == str(place.venv)
    return place


@pytest.fixture
def installed(place: Place, made: Place) -> Place:
    """The same, to be changed by a test."""
    shutil.copytree(made.venv, place.venv, symlinks=True)
    return place


@contextmanager
def silent_index() -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A package index that never answers: pip is at work for as long as a test needs."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/simple"
        listener.settimeout(30)
        yield listener, {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": url, "NO_PROXY": "*"}


def alive_in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- .env ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("A=b", {"A": "b"}),
        ("  export  A_1 =  b c  \r", {"A_1": "b c"}),
        ("A=b#c # d", {"A": "b#c"}),
        ("A=#b", {"A": "#b"}),
        ("A= # b", {"A": ""}),
        ("A=", {"A": ""}),
        ("A='b # \"c' d", {"A": 'b # "c'}),
        ('A = " b\'c " # d', {"A": " b'c "}),
        ('A="b', {"A": '"b'}),
        ("A=$HOME `id` \\n", {"A": "$HOME `id` \\n"}),
        ("A=b=c", {"A": "b=c"}),
        ("A=日本 # 語", {"A": "日本"}),
        ("# A=b", {}),
        (" \t\r", {}),
    ],
)
def test_line_of_env(line: str, found: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.parse_env(line) == found
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["just words", "1A=b", "A-B=c", "=b", "A=b\0c"])
def test_bad_line_of_env_is_skipped(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.parse_env(f"\n{line}\nC=d") == {"C": "d"}
    assert capsys.readouterr().err == "run: .env line 2 is not KEY=VALUE; skipped\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_env_reaches_the_server_and_what_is_set_wins(ready: Place, encoding: str) -> None:
    text = "WHISPER_MODEL=tiny\r\nWHISPER_PORT=1\r\noops\r\nWHISPER_HOST='音声 $HOME'\r\n"
    (ready.folder / ".env").write_bytes(text.encode(encoding))
    code, out, told = ready.start(WHISPER_PORT="2")
    assert (code, told) == (0, "run: .env line 3 is not KEY=VALUE; skipped\n")
    reached = json.loads(out)["environment"]
    wanted = {"WHISPER_MODEL": "tiny", "WHISPER_PORT": "2", "WHISPER_HOST": "音声 $HOME"}
    assert {name: reached[name] for name in wanted} == wanted


def test_env_in_another_encoding_is_passed_on_byte_for_byte(ready: Place) -> None:
    (ready.folder / ".env").write_bytes("A=音声".encode("cp932"))
    assert os.fsencode(ready.served()["environment"]["A"]) == "音声".encode("cp932")


def test_env_chooses_the_python(ready: Place, tmp_path: Path) -> None:
    chosen = tmp_path / "python-of-env"
    chosen.write_text(f'#!/bin/sh\necho chosen >&2\nexec "{sys.executable}" "$@"\n')
    chosen.chmod(0o755)
    (ready.folder / ".env").write_text(f"PYTHON={chosen}\n")
    path = {"PATH": f"{Path(sys.executable).parent}:{ready.environment['PATH']}"}
    del ready.environment["PYTHON"]
    code, out, told = ready.start("./run.sh", "--flag", **path)
    assert (code, told) == (0, "chosen\n")
    assert json.loads(out)["arguments"] == ["--flag"]


# ---- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [[], ["sh"], ["bash"], ["bash", "--posix"]])
def test_shells(ready: Place, shell: list[str]) -> None:
    command = [*shell, "./run.sh", "--a", "b c", ""]
    assert ready.served(*command)["arguments"] == ["--a", "b c", ""]


@pytest.mark.parametrize("shell", ["bash", "/bin/bash", "sh -s"])
def test_shell_that_is_fed_the_script_says_how_to_start_it(ready: Place, shell: str) -> None:
    code, out, told = ready.start("sh", "-c", f"{shell} < run.sh")
    assert (code, out) == (1, "")
    assert told == "run: this script has to be started as a file: /where/it/is/run.sh\n"


def test_link_to_run_sh(ready: Place, tmp_path: Path) -> None:
    (tmp_path / "whisper").symlink_to(ready.folder / "run.sh")
    assert ready.served(str(tmp_path / "whisper"), "--version")["arguments"] == ["--version"]


def test_process_stays_the_same_and_gets_sigterm(ready: Place) -> None:
    server = ready.begin("./run.sh", "serve")
    assert server.stdout
    assert json.loads(server.stdout.readline())["pid"] == server.pid
    server.send_signal(signal.SIGTERM)
    assert server.communicate(timeout=10) == ("stopped\n", "")
    assert server.returncode == 3


def test_no_python(ready: Place, tmp_path: Path) -> None:
    for tool in ("readlink", "dirname"):
        found = shutil.which(tool)
        assert found
        (tmp_path / tool).symlink_to(found)
    code, _, told = ready.start(PATH=str(tmp_path), PYTHON="")
    assert code == 1
    assert re.fullmatch(r"run: python3 not found: install Python 3\.10 or newer \(.*\)\n", told), told


def test_python_that_is_too_old(ready: Place, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    pretend = "import runpy, sys; sys.version_info = (3, 8); runpy.run_path(sys.argv[1], run_name='__main__')"
    old.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$@"\n')
    old.chmod(0o755)
    code, out, told = ready.start(PATH=f"{tmp_path}:{ready.environment['PATH']}", PYTHON="")
    assert (code, out) == (1, "")
    wanted = r"run: Python 3\.10 or newer is needed, and \S+ is 3\.8\. To choose .*PYTHON=\S+ \./run\.sh\n"
    assert re.fullmatch(wanted, told), told


def test_old_python_can_read_run_py() -> None:
    """Else its user would meet a SyntaxError."""
    ast.parse((HERE / "run.py").read_text(), feature_version=(3, 7))


def test_clone_by_a_git_that_turns_line_ends(tmp_path: Path) -> None:
    """As Git for Windows is installed: in WSL such a run.sh would end with "bad interpreter"."""

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    kept = tmp_path / "kept"
    kept.mkdir()
    names = [".gitattributes", "run.cmd", "run.py", "run.sh", "requirements.txt", "whisper_server.py"]
    for name in filter(lambda name: (HERE / name).exists(), names):
        shutil.copy(HERE / name, kept)
    git("init", "-q", "kept")
    git("-C", "kept", "add", ".")
    git("-C", "kept", "commit", "-qm", "all")
    git("-c", "core.autocrlf=true", "clone", "-q", "kept", "clone")
    venv = tmp_path / "clone" / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (venv / "installed").mkdir()
    shutil.copy(HERE / "requirements.txt", venv / "installed")  # not the clone's: line ends would count
    (venv / "installed" / "python").write_bytes(run.MADE_WITH)
    env = {**os.environ, "PYTHON": sys.executable}
    command = ["./run.sh", "--version"]
    ended = subprocess.run(command, cwd=venv.parent, env=env, capture_output=True, text=True, timeout=30)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", ended.stdout), ended.stderr
    script = (venv.parent / "run.cmd").read_bytes()
    assert script.count(b"\r\n") == script.count(b"\n") > 0  # cmd.exe loses its place without


# ---- what is installed ---------------------------------------------------------------------------


def test_second_start_installs_nothing(made: Place) -> None:
    assert made.served()["tiny"] == 1


def test_changed_requirements_are_installed_into_the_same_venv(installed: Place) -> None:
    (installed.venv / "kept").touch()
    installed.require("tiny==2")
    code, out, told = installed.start()
    assert (code, told) == (0, f"run: installing requirements.txt into {installed.venv}\n")
    assert json.loads(out)["tiny"] == 2 and (installed.venv / "kept").exists()


def test_venv_that_run_sh_made_before_there_was_run_py(ready: Place) -> None:
    program = "import sys; print(sys.version, sys.base_prefix)"  # what it recorded, as it did
    record = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout
    (ready.venv / "installed" / "python").write_bytes(record)
    ready.served()


def test_half_made_venv_and_one_of_another_python_are_made_anew(installed: Place) -> None:
    (installed.venv / "installed" / "python").write_text("3.9 /usr\n")
    (installed.venv / "rest").touch()
    assert installed.start()[0] == 0
    assert not (installed.venv / "rest").exists()


def test_two_at_once(place: Place) -> None:
    first, second = place.begin(), place.begin()
    told = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    assert sorted(told) == [
        "run: another run is installing; waiting for it\n",
        f"run: installing requirements.txt into {place.venv}\n",
    ]


def test_ctrl_c_while_pip_works_and_the_next_start(installed: Place) -> None:
    installed.require("tiny==2")
    with silent_index() as (listener, index):
        process = installed.begin(session=True, **index)
        with listener.accept()[0]:
            os.killpg(process.pid, signal.SIGINT)
            _, told = process.communicate(timeout=10)
    assert process.returncode == 130
    assert told.splitlines()[1:] == ["run: stopped; another start goes on"]
    assert not alive_in_group(process.pid)
    code, out, _ = installed.start()
    assert (code, json.loads(out)["tiny"]) == (0, 2)


def test_sigterm_for_the_launcher_alone_ends_pip(installed: Place) -> None:
    installed.require("tiny==2")
    with silent_index() as (listener, index):
        process = installed.begin(session=True, **index)
        with listener.accept()[0]:
            process.terminate()
            process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM
    assert not alive_in_group(process.pid)


def test_no_build_for_this_machine_is_one_line(installed: Place) -> None:
    installed.require("tiny==3")
    code, _, told = installed.start()
    lines = told.splitlines()[1:]
    assert code == 1 and len(lines) == 2, told
    assert lines[0] == "ERROR: No matching distribution found for tiny==3"
    assert lines[1].startswith("run: a package has no build for ")
    assert lines[1].endswith("PYTHON=python3.12 ./run.sh")


def test_index_that_cannot_be_reached(installed: Place) -> None:
    installed.require("tiny==2")
    index = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    code, _, told = installed.start(**index, PIP_FIND_LINKS="", NO_PROXY="*")
    assert code == 1 and "WARNING: Retrying" in told, told
    assert told.splitlines()[-1].startswith("run: the package index cannot be reached"), told


def test_other_faults_of_pip_are_shown(installed: Place) -> None:
    installed.require("tiny == = 2")
    code, _, told = installed.start()
    assert code == 1 and "ERROR: Invalid requirement" in told, told
    assert told.splitlines()[-1].startswith("run: the packages could not be installed (see above)"), told


FAULTS_OF_WINDOWS = {  # as pip words them: what is told
    "HINT: This system does not have Windows Long Path support enabled.": "a path is too long for Windows",
    "ERROR: OSError: [WinError 32] The process cannot access the file": "a file in .venv is in use: stop",
}


@pytest.mark.parametrize("fault", FAULTS_OF_WINDOWS)
def test_fault_that_pip_has_on_windows_is_named_with_its_cure(ready: Place, fault: str) -> None:
    python = ready.venv / "bin" / "python"  # in place of pip, which has no such faults here
    python.unlink()
    python.write_text(f"#!/bin/sh\necho '{fault}'\nexit 1\n")
    python.chmod(0o755)
    ready.require("tiny==2")
    code, _, told = ready.start()
    assert code == 1 and told.splitlines()[-1].startswith(f"run: {FAULTS_OF_WINDOWS[fault]}"), told


def test_python_without_venv(place: Place, tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    code, _, told = place.start(PYTHONPATH=str(tmp_path))
    cure = "install it (Debian, Ubuntu: sudo apt install python3-venv), then start again"
    assert code == 1 and told.splitlines()[1:] == [f"run: {sys.executable} lacks venv: {cure}"]


# ---- the tests' own start ------------------------------------------------------------------------


def test_test_mode(installed: Place) -> None:
    (installed.folder / "requirements-test.txt").write_text("-r requirements.txt\npytest\n")
    command = ["sh", "-c", 'cd / && "$0" test -k word', f"{installed.folder}/run.sh"]
    code, out, told = installed.start(*command, WHISPER_MODEL="tiny")
    assert (code, told) == (0, f"run: installing requirements-test.txt into {installed.venv}\n")
    assert out == f"{['--numprocesses', '3', '--dist', 'worksteal', '-k', 'word']} {installed.folder} []\n"
    (speech,) = installed.venv.glob("lib/*/site-packages/pytest_audioeval")
    assert [file.name for file in speech.rglob("*") if file.is_file()] == ["a.wav"]
    assert installed.start("./run.sh", "test")[2] == installed.start()[2] == ""


def test_no_tests_in_the_image(place: Place) -> None:
    code, _, told = place.start(sys.executable, "run.py", "test", WHISPER_IN_IMAGE="1")
    assert (code, told) == (1, "run: the tests run on a host, not in the image\n")
