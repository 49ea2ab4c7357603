"""How the server's processes end, on Windows above all: nothing may be left, and Ctrl-Break is a soft stop.

Needs what the launcher's `test` has installed; it is run with the Python of .venv.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RUN = Path(__file__).resolve().parent.parent / "run.py"
GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
LOGS = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
SOFT_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)


class Started:
    """A server with its model loaded, begun by the launcher."""

    def __init__(self, port: int) -> None:
        self.port = port
        log, name = tempfile.mkstemp(dir=LOGS.name)
        self.log = Path(name)
        self.launcher = subprocess.Popen(
            [sys.executable, str(RUN), "--port", str(port)],
            env={**os.environ, "WHISPER_MODEL": "base", "WHISPER_PRELOAD": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            creationflags=GROUP,
        )
        os.close(log)

    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, words: str) -> None:
        for _ in range(1200):
            if words in self.said():
                return
            assert self.launcher.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(f"no {words!r} in: {self.said()}")

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.launcher.pid)
        return [launcher, *launcher.children(recursive=True)]

    def server(self) -> psutil.Process:
        """Not the launcher, and not the python.exe of .venv, which starts the real one."""

        def listens(process: psutil.Process) -> bool:
            ports = [found.laddr.port for found in process.net_connections() if found.status == "LISTEN"]
            return self.port in ports

        (found,) = filter(listens, self.processes())
        return found


def check_that_all_end(processes: list[psutil.Process]) -> None:
    assert len(processes) > 1, processes
    _, left = psutil.wait_procs(processes, timeout=20)
    assert not left, left


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


port = free_port()
server = Started(port)
server.wait_for("loaded on")

second = Started(port)
assert second.launcher.wait(60) == 1, second.said()
assert "Cannot listen" in second.said(), second.said()
print("a second server on the port refuses")

everyone = server.processes()
server.server().kill()
server.launcher.wait(20)
check_that_all_end(everyone)
print("the server was killed, and none of its processes is left")

server = Started(port)
server.wait_for("loaded on")
everyone = server.processes()
server.launcher.send_signal(SOFT_STOP)
assert server.launcher.wait(60) == 0, server.said()
assert "stopped" in server.said(), server.said()
check_that_all_end(everyone)
print(f"{signal.Signals(SOFT_STOP).name} stopped it softly")
