"""A web application whose workers search one large file: with mmap, and with mshare.mmap.

gunicorn serves with 34 workers; each request searches a sorted array of 1 GiB by bisection, at
keys spread over all of it. Both ways take turns. Counts are exact; of the rates only the ratio
within one run says anything.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import importlib.util
import json
import mmap
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs

import numpy as np

from mshare.memory import meminfo
from mshare.sizes import human, parse_size

EXAMPLE = """\
example:
  mshare lab --kernel 6.12 --memory 5G --disk 3G --timeout 1500 -- python benchmarks/web.py
"""
STEP = 3
"""The array holds the multiples of this; a key that is none is not there."""
KINDS = ("mmap", "mshare.mmap")
Figures = dict[str, float]


class Application:
    """Says how many of the keys that a request's seed chooses are in the file."""

    def __init__(self) -> None:
        self.table: memoryview | None = None

    def open(self) -> memoryview:
        """Map the file, once in each worker."""
        import mshare

        mapper = mshare.mmap if os.environ["WEB_KIND"] == "mshare.mmap" else mmap.mmap
        with open(os.environ["WEB_FILE"], "rb") as file:
            memory = mapper(file.fileno(), 0, access=mmap.ACCESS_READ)
        if isinstance(memory, mshare.mmap) and not memory.shared:
            raise RuntimeError("mshare.mmap does not share page tables here")
        return memoryview(memory).cast("Q")

    def __call__(
        self, environ: dict[str, str], start: Callable[[str, list[tuple[str, str]]], object]
    ) -> Iterable[bytes]:
        """Answer one request."""
        table = self.table = self.table or self.open()
        query = parse_qs(environ["QUERY_STRING"])
        keys = random.Random(query["seed"][0])
        found = 0
        for _ in range(int(query["keys"][0])):
            key = keys.randrange(len(table) * STEP)
            at = bisect.bisect_left(table, key)
            found += at < len(table) and table[at] == key
        start("200 OK", [("Content-Type", "text/plain")])
        return [str(found).encode()]


application = Application()


def expected(seed: int, keys: int, count: int) -> int:
    """What the answer must be."""
    numbers = random.Random(str(seed))
    return sum(numbers.randrange(count * STEP) % STEP == 0 for _ in range(keys))


def client(port: int, first: int, requests: int, keys: int, count: int) -> None:
    """Send requests, one after the other, and check each tenth answer."""
    for seed in range(first, first + requests):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("GET", f"/?seed={seed}&keys={keys}")
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"the server answered {response.status}")
        answer = int(response.read())
        connection.close()
        if seed % 10 == 0 and answer != expected(seed, keys, count):
            raise ValueError(f"wrong answer to {seed}: {answer}")


def load(port: int, first: int, options: argparse.Namespace, count: int) -> float:
    """Requests a second, by a few clients at once."""
    each = options.requests // options.clients
    processes = [
        multiprocessing.Process(
            target=client, args=(port, first + number * each, each, options.keys, count)
        )
        for number in range(options.clients)
    ]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit("a client failed")
    return float(each * options.clients) / (time.perf_counter() - start)


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def of_worker(pid: int) -> tuple[int, int]:
    """Page-table bytes and faults of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text().split("VmPTE:")[1]
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(status.split()[0]) * 1024, int(stat[7])


def in_use() -> int:
    """Bytes of memory that could not be had for anything else."""
    fields = meminfo()
    return fields["MemTotal"] - fields["MemAvailable"]


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def page_tables() -> int:
    """Bytes of page tables of all processes, with what each processor has not yet added."""
    with suppress(PermissionError), open("/proc/sys/vm/stat_refresh") as refresh:
        refresh.read()
    return meminfo()["PageTables"]


def serve(kind: str, path: Path, options: argparse.Namespace) -> Figures:
    """Start the server, put load on it, and look at its workers."""
    used, port = in_use(), free_port()
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--chdir", os.path.dirname(__file__)),
        *("--workers", str(options.workers), "--bind", f"127.0.0.1:{port}", "--timeout", "300"),
        *("--log-level", "warning", "web:application"),
    ]
    environment = {**os.environ, "WEB_KIND": kind, "WEB_FILE": str(path)}
    count = path.stat().st_size // 8
    with subprocess.Popen(command, env=environment) as server:
        try:
            deadline = time.monotonic() + 300
            while len(children(server.pid)) < options.workers:
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit("gunicorn did not start")
                time.sleep(0.5)
            time.sleep(5)
            workers = children(server.pid)
            idle, idle_tables = [of_worker(pid) for pid in workers], page_tables()
            cold = load(port, 0, options, count)
            warm = load(port, 10**6, options, count)
            busy, busy_tables = [of_worker(pid) for pid in workers], page_tables()
            own = [(b[0] - i[0], b[1] - i[1]) for b, i in zip(busy, idle, strict=True)]
            return {
                "page tables for the file, all, KiB": (busy_tables - idle_tables) / 1024,
                "  each worker, KiB": median(tables for tables, _ in own) / 1024,
                "faults, each worker": median(faults for _, faults in own),
                "  all workers": sum(faults for _, faults in own),
                "memory in use, MiB": (in_use() - used) / (1 << 20),
                "requests/s, first": cold,
                "requests/s, then": warm,
            }
        finally:
            server.send_signal(signal.SIGTERM)


def make_file(path: Path, size: int) -> None:
    """Write the sorted array."""
    with open(path, "wb") as file:
        part = size // 8 // 64
        for start in range(0, part * 64, part):
            np.arange(start * STEP, (start + part) * STEP, STEP, dtype="<u8").tofile(file)
        file.flush()
        os.fsync(file.fileno())


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def checked() -> argparse.Namespace:
    """The options, after what could go wrong later was looked at."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1G", help="of the file (1G)")
    parser.add_argument("--workers", type=int, default=34, help="of gunicorn (34)")
    parser.add_argument("--clients", type=int, default=4, help="at once (4)")
    parser.add_argument("--requests", type=int, default=1360, help="in each of two parts (1360)")
    parser.add_argument("--keys", type=int, default=200, help="in each request (200)")
    parser.add_argument("--rounds", type=int, default=2, help="of both ways (2)")
    parser.add_argument("--folder", type=Path, default=Path("/mnt/disk"), help="for the file")
    parser.add_argument("--json", action="store_true", help="every round, for programs")
    options = parser.parse_args()
    try:
        options.size = parse_size(options.size)
    except ValueError as error:
        parser.error(f"--size: {error}")
    if options.size < 4 << 20:
        parser.error("--size: below 4M mshare.mmap is a plain mmap")
    if min(options.workers, options.clients, options.keys, options.rounds) < 1:
        parser.error("--workers, --clients, --keys and --rounds are at least 1")
    if options.requests < options.clients:
        parser.error("--requests: at least one for each client")
    if not os.path.exists("/sys/fs/mshare/mshare_info"):
        sys.exit("the kernel module is not loaded; run this in the lab: mshare lab -- ...")
    if not importlib.util.find_spec("gunicorn"):
        sys.exit("gunicorn is not installed: pip install gunicorn")
    if not options.folder.is_dir():
        sys.exit(f"{options.folder} is no folder; the lab makes /mnt/disk with --disk 3G")
    free = shutil.disk_usage(options.folder).free
    if free < options.size:
        sys.exit(f"{options.folder} has {human(free)} free, {human(options.size)} are needed")
    return options


def main() -> None:
    """Make the file, serve it both ways in turns, and show the medians side by side."""
    options = checked()
    path = options.folder / f"web-{os.getpid()}"
    results: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    try:
        say(f"writing {human(options.size)} to {path}")
        make_file(path, options.size)
        for turn in range(options.rounds):
            for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
                say(f"round {turn + 1} of {options.rounds}: {kind}")
                results[kind].append(serve(kind, path, options))
    finally:
        path.unlink(missing_ok=True)
    if options.json:
        setting = {name: getattr(options, name) for name in ("size", "workers", "requests", "keys")}
        print(json.dumps({"kernel": platform.release(), **setting, "rounds": results}))
        return
    print(
        f"Linux {platform.release()}, {os.cpu_count()} processors, {options.workers} workers, "
        f"a file of {human(options.size)}"
    )
    print(f"{'':<36}" + "".join(f"{kind:>14}" for kind in KINDS) + f"{'ratio':>10}")
    for row in results[KINDS[0]][0]:
        plain, shared = (median(each[row] for each in results[kind]) for kind in KINDS)
        ratio = f"{shared / plain:>10.3f}" if plain else f"{'':>10}"
        print(f"{row:<36}{plain:>14,.1f}{shared:>14,.1f}{ratio}")


if __name__ == "__main__":
    main()
