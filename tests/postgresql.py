"""PostgreSQL as Debian ships it: a cluster of its own, connections, and what its processes cost."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

USER = "postgres"
MSHARE_RUN = [sys.executable, "-c", "from mshare.cli import run; run()", "run", "--verbose"]
_AS_USER = ["setpriv", "--reuid", USER, "--regid", USER, "--init-groups", "--"]


def binaries() -> Path | None:
    """The folder with ``postgres`` and the rest, of the newest version here."""
    found = glob.glob("/usr/lib/postgresql/*/bin/postgres")
    return Path(max(found, key=lambda name: int(name.split("/")[4]))).parent if found else None


class Connection:
    """One connection, speaking the protocol itself: one process here serves hundreds."""

    def __init__(self, folder: Path) -> None:
        """Connect. :raises OSError: the server does not, or not yet."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._file = self._socket.makefile("rb")
        self.pid = 0
        words = b"".join(
            word + b"\0" for word in (b"user", USER.encode(), b"database", b"postgres")
        )
        body = struct.pack("!I", 196608) + words + b"\0"
        try:
            self._socket.connect(f"{folder}/.s.PGSQL.5432")
            self._socket.sendall(struct.pack("!I", len(body) + 4) + body)
            self.result()
        except BaseException:
            self.close()
            raise

    def send(self, query: str) -> None:
        """Start a query."""
        body = query.encode() + b"\0"
        self._socket.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)

    def result(self) -> str:
        """The first value of its last row, once it is done.

        :raises OSError: it failed; a ConnectionError: the server is gone.
        """
        value, error = "", ""
        while True:
            head = self._file.read(5)
            if len(head) < 5:
                self.close()
                raise ConnectionResetError(f"the server closed the connection: {error}")
            body = self._file.read(struct.unpack_from("!I", head, 1)[0] - 4)
            match head[:1]:
                case b"D":
                    length = struct.unpack_from("!i", body, 2)[0]
                    value = body[6 : 6 + max(length, 0)].decode()
                case b"E":
                    fields = body.decode(errors="replace").split("\0")
                    error = next(field[1:] for field in fields if field.startswith("M"))
                case b"K":
                    self.pid = struct.unpack_from("!I", body)[0]
                case b"Z":
                    if error:
                        raise OSError(error)
                    return value

    def ask(self, query: str) -> str:
        """Send, and wait for the result."""
        self.send(query)
        return self.result()

    def close(self) -> None:
        """End it, and its backend."""
        self._file.close()
        self._socket.close()


class Cluster:
    """A cluster in a folder; started and stopped as often as wanted."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """Make it. :raises OSError: initdb failed, with what it said."""
        self.folder, self.programs = folder, programs
        self.log = folder / "log"
        self.data = folder / "data"
        self.server: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        shutil.chown(folder, USER, USER)
        self.run("initdb", "-D", str(self.data), "-A", "trust", "--no-sync", "--locale=C")

    def run(self, program: str, *arguments: str) -> str:
        """One of its programs, as its user; what it printed. :raises OSError: it failed."""
        done = subprocess.run(
            [*_AS_USER, str(self.programs / program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, "PGHOST": str(self.folder), "PGUSER": USER, "PGDATABASE": USER},
        )
        if done.returncode:
            raise OSError(f"{program} failed: {done.stderr[-2000:]}")
        return done.stdout

    def start(self, prefix: Sequence[str] = (), **settings: str) -> None:
        """Start the server, after ``prefix``. :raises OSError: it did not start; with its log."""
        options = [f"-c{name}={value}" for name, value in settings.items()]
        postgres = [str(self.programs / "postgres"), "-D", str(self.data), "-k", str(self.folder)]
        with self.log.open("ab") as log:
            self.server = subprocess.Popen(
                [*prefix, *_AS_USER, *postgres, "-clisten_addresses=", *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        self.wait()

    def wait(self, seconds: float = 300) -> None:
        """Until it accepts connections."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.connect().close()
                return
            except OSError as error:
                ended = self.server is None or self.server.poll() is not None
                if ended or time.monotonic() > deadline:
                    text = self.log.read_text(errors="replace")[-2000:]
                    raise OSError(f"the server did not start: {error}\n{text}") from None
            time.sleep(0.2)

    def connect(self) -> Connection:
        """A new connection."""
        return Connection(self.folder)

    def processes(self) -> list[int]:
        """Its processes, the first one first."""
        assert self.server
        first = self.server.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def stop(self, number: int = signal.SIGINT) -> int:
        """End it by a signal; the exit status. Fast shutdown by default."""
        assert self.server
        self.server.send_signal(number)
        status = self.server.wait(300)
        self.server = None
        return status

    def remove(self) -> None:
        """Stop it at once if it runs, and remove all of it."""
        if self.server:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def select_only(self, clients: int, seconds: int) -> float:
        """Transactions a second of ``pgbench -S``."""
        words = ["-S", "-n", "-c", str(clients), "-j", "2", "-T", str(seconds)]
        found = re.search(r"^tps = ([0-9.]+)", self.run("pgbench", *words), re.M)
        assert found
        return float(found[1])


def of_process(pid: int) -> tuple[int, int]:
    """Page-table bytes of a process, and its minor faults so far."""
    status = Path(f"/proc/{pid}/status").read_text().split("VmPTE:")[1]
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(status.split()[0]) * 1024, int(stat[7])
