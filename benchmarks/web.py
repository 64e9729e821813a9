"""A web application whose workers search one large file: with mmap, and with mshare.mmap.

Run: ``mshare lab --memory 5G --disk 3G --timeout 1500 -- python benchmarks/web.py``. gunicorn
serves with 34 workers; each request searches a sorted array of 1 GiB by bisection, at keys spread
over all of it. Counts are exact; of the rates only the ratio within this run says anything.
"""

from __future__ import annotations

import argparse
import bisect
import http.client
import json
import mmap
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from urllib.parse import parse_qs

import numpy as np

from mshare.memory import meminfo

STEP = 3
"""The array holds the multiples of this; a key that is none is not there."""
PORT = 8034
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


def client(first: int, requests: int, keys: int, count: int) -> None:
    """Send requests, one after the other, and check each tenth answer."""
    for seed in range(first, first + requests):
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
        connection.request("GET", f"/?seed={seed}&keys={keys}")
        answer = int(connection.getresponse().read())
        connection.close()
        if seed % 10 == 0 and answer != expected(seed, keys, count):
            raise ValueError(f"wrong answer to {seed}: {answer}")


def load(first: int, options: argparse.Namespace, count: int) -> float:
    """Requests a second, by a few clients at once."""
    each = options.requests // options.clients
    processes = [
        multiprocessing.Process(
            target=client, args=(first + number * each, each, options.keys, count)
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
    return each * options.clients / (time.perf_counter() - start)


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


def serve(kind: str, path: Path, options: argparse.Namespace) -> Figures:
    """Start the server, put load on it, and look at its workers."""
    before, used = meminfo()["PageTables"], in_use()
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--chdir", os.path.dirname(__file__)),
        *("--workers", str(options.workers), "--bind", f"127.0.0.1:{PORT}", "--timeout", "300"),
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
            idle = [of_worker(pid) for pid in workers]
            cold = load(0, options, count)
            warm = load(10**6, options, count)
            busy = [of_worker(pid) for pid in workers]
            return {
                "requests/s, first": cold,
                "requests/s, then": warm,
                "page tables, all, KiB": (meminfo()["PageTables"] - before) / 1024,
                "  each worker, more than idle, KiB": median(
                    b[0] - i[0] for b, i in zip(busy, idle, strict=True)
                )
                / 1024,
                "faults, each worker": median(b[1] - i[1] for b, i in zip(busy, idle, strict=True)),
                "memory in use, MiB": (in_use() - used) / (1 << 20),
            }
        finally:
            server.send_signal(signal.SIGTERM)


def main() -> None:
    """Make the file, serve it both ways in turns, and show the medians side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the file")
    parser.add_argument("--workers", type=int, default=34)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=1360, help="in each of two parts")
    parser.add_argument("--keys", type=int, default=200, help="searched for in each request")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/mnt/disk"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not os.path.exists("/sys/fs/mshare/mshare_info"):
        sys.exit("the kernel module is not loaded; run this in the lab: mshare lab -- ...")
    path = options.folder / f"web-{os.getpid()}"
    results: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    try:
        with open(path, "wb") as file:
            part = options.size // 8 // 64
            for start in range(0, options.size // 8, part):
                np.arange(start * STEP, (start + part) * STEP, STEP, dtype="<u8").tofile(file)
            file.flush()
            os.fsync(file.fileno())
        for turn in range(options.rounds):
            for kind in KINDS if turn % 2 == 0 else KINDS[::-1]:
                results[kind].append(serve(kind, path, options))
    finally:
        path.unlink(missing_ok=True)
    if options.json:
        print(json.dumps(results))
        return
    print(f"Linux {platform.release()}, {os.cpu_count()} processors, {options.workers} workers")
    print(f"{'':<36}" + "".join(f"{kind:>14}" for kind in KINDS) + f"{'ratio':>10}")
    for row in results[KINDS[0]][0]:
        ours, theirs = (median(each[row] for each in results[kind]) for kind in KINDS)
        print(f"{row:<36}{ours:>14,.1f}{theirs:>14,.1f}{theirs / ours if ours else 0:>10.2f}")


if __name__ == "__main__":
    main()
