"""PostgreSQL with many connections: as it comes, on huge pages, and under ``mshare run``.

Run: ``mshare lab --memory 6G --disk 6G --timeout 3600 -- python -m benchmarks.postgresql``. The
server is Debian's, unmodified, and the same cluster in one boot, each way in turns. Shared buffers
are filled, then each connection looks into all of them by counting the rows of a table that has
one row a buffer, then ``pgbench -S`` runs. Counts are exact; of the times only the ratio within
this run says anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.postgresql import MSHARE_RUN, Cluster, binaries, of_process

from mshare.cli.output import progress_bar
from mshare.memory import meminfo
from mshare.sizes import human, parse_size

WAYS = ("stock", "huge_pages", "mshare run")
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
BUFFER = 8192
ROW = 7900
"""Bytes of a row, so that a buffer holds one: to count rows is to look into each buffer once."""
RATE = "pgbench -S, transactions/s"
Figures = dict[str, float]


def page_tables() -> int:
    """PageTables in bytes, with what each processor has not added to it yet."""
    with open("/proc/sys/vm/stat_refresh") as refresh:
        refresh.read()
    return meminfo()["PageTables"]


class Benchmark:
    """A cluster whose tables fill its shared buffers."""

    def __init__(self, options: argparse.Namespace, cluster: Cluster) -> None:
        self.options, self.cluster = options, cluster
        self.buffers = options.buffers // BUFFER
        self.rows = self.buffers * 85 // 100
        self.settings = {
            "shared_buffers": f"{options.buffers // 1024}kB",
            "max_connections": str(options.connections + 20),
            "fsync": "off",
            "autovacuum": "off",
            "max_parallel_workers_per_gather": "0",
            "jit": "off",
            "max_wal_size": "4GB",
            "checkpoint_timeout": "1h",
            "huge_pages": "off",
        }

    def fill(self) -> None:
        """Make the tables: pgbench's, and one that takes most of the buffers."""
        self.cluster.start(**self.settings)
        scale = max(1, self.buffers // 10 // 1916)
        self.cluster.run("pgbench", "-i", "-q", "-s", str(scale))
        connection = self.cluster.connect()
        for query in (
            "create extension pg_prewarm",
            "create extension pg_buffercache",
            "create unlogged table filler (content text)",
            "alter table filler alter content set storage plain",
            f"insert into filler select repeat('x', {ROW}) from generate_series(1, {self.rows})",
            "vacuum freeze filler",
            "vacuum freeze pgbench_accounts",
            "checkpoint",
        ):
            connection.ask(query)
        connection.close()
        self.cluster.stop()

    def measure(self, way: str, step: Callable[[str], None]) -> Figures:
        """Start the server one way, and look at it with all connections warm."""
        huge = way == "huge_pages"
        settings = {**self.settings, "huge_pages": "on" if huge else "off"}
        if huge:
            words = [f"-c{name}={value}" for name, value in self.settings.items()]
            ask = ["-D", str(self.cluster.data), *words, "-C", "shared_memory_size_in_huge_pages"]
            wanted = int(self.cluster.run("postgres", *ask)) + 2
            HUGE_PAGES.write_text(str(wanted))
            if int(HUGE_PAGES.read_text()) < wanted:
                sys.exit(f"no room for {wanted} huge pages; give the machine more memory")
        try:
            self.cluster.start([*MSHARE_RUN, "--"] if way == "mshare run" else (), **settings)
            step("fill the buffers")
            self._prewarm()
            return self._connections(step)
        finally:
            if self.cluster.server:
                self.cluster.stop()
            HUGE_PAGES.write_text("0")

    def _prewarm(self) -> None:
        first = self.cluster.connect()
        for table in ("filler", "pgbench_accounts", "pgbench_accounts_pkey"):
            first.ask(f"select pg_prewarm('{table}')")
        used = int(first.ask("select count(*) from pg_buffercache where relfilenode is not null"))
        first.close()
        if used < self.buffers * 9 // 10:
            sys.exit(f"only {used} of {self.buffers} buffers are in use")

    def _connections(self, step: Callable[[str], None]) -> Figures:
        options = self.options
        step(f"connect {options.connections} times")
        # once for nothing: what a backend reads from the disk is then in memory for all ways
        for connection in [self.cluster.connect() for _ in range(options.connections)]:
            connection.close()
        time.sleep(2)
        before, start = page_tables(), time.perf_counter()
        connections = [self.cluster.connect() for _ in range(options.connections)]
        connected = time.perf_counter()
        pids = [connection.pid for connection in connections]
        cold, idle = [of_process(pid) for pid in pids], page_tables()
        step("read all buffers in each connection: done 0")
        warming = time.perf_counter()
        for connection in connections:
            connection.send("select count(*) from filler")
        for number, connection in enumerate(connections, 1):
            if int(connection.result()) != self.rows:
                sys.exit("the table is not what was put into it")
            step(f"read all buffers in each connection: done {number}")
        done = time.perf_counter()
        warm, busy = [of_process(pid) for pid in pids], page_tables()
        for connection in connections:
            connection.close()
        step("pgbench")
        self.cluster.select_only(options.connections, max(2, options.seconds // 4))
        rates = [self.cluster.select_only(options.connections, options.seconds) for _ in range(3)]
        return {
            "page tables, all connections warm, MiB": (busy - before) / (1 << 20),
            "  of that for shared buffers, MiB": (busy - idle) / (1 << 20),
            "  VmPTE of a connection, KiB": median(each[0] for each in warm) / 1024,
            "  and before it is warm, KiB": median(each[0] for each in cold) / 1024,
            "minor faults to warm a connection": median(
                after[1] - early[1] for early, after in zip(cold, warm, strict=True)
            ),
            "connect, s": connected - start,
            "warm all, s": done - warming,
            RATE: median(rates),
        }


def tell(step: Callable[[str], None], where: str, text: str) -> None:
    """What is being done, and in which round."""
    step(f"{where}: {text}")


def main() -> None:
    """Make the cluster, measure it each way, and show the figures side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--buffers", type=parse_size, default="1G", help="shared_buffers")
    parser.add_argument("--connections", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=20, help="of pgbench, three times a round")
    parser.add_argument("--rounds", type=int, default=2, help="each way so often, in turns")
    parser.add_argument("--folder", type=Path, default=Path("/mnt/disk"))
    parser.add_argument("--way", action="append", choices=WAYS, help="only this way")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    programs = binaries()
    if not programs:
        sys.exit("PostgreSQL is not installed; try: apt-get install postgresql-15")
    if os.geteuid() or not os.path.exists("/sys/fs/mshare/mshare_info"):
        sys.exit("the kernel module is not loaded; run this in the lab: mshare lab -- ...")
    cluster = Cluster(options.folder / f"postgresql-{os.getpid()}", programs)
    ways = options.way or list(WAYS)
    rounds: dict[str, list[Figures]] = {way: [] for way in ways}
    try:
        with progress_bar() as (bar, task):
            benchmark = Benchmark(options, cluster)
            shown = ""

            def step(text: str) -> None:
                nonlocal shown
                bar.update(task, description=text)
                if bar.disable and text.rstrip("0123456789") != shown.rstrip("0123456789"):
                    print(text, file=sys.stderr, flush=True)
                shown = text

            step("make the tables")
            benchmark.fill()
            for turn in range(options.rounds):
                for way in ways if turn % 2 == 0 else ways[::-1]:
                    said = functools.partial(tell, step, f"{turn + 1}, {way}")
                    figures = benchmark.measure(way, said)
                    rounds[way].append(figures)
                    warm, rate = figures["warm all, s"], figures[RATE]
                    said(f"done, {warm:.1f} s to warm all, {rate:.1f} transactions/s")
    finally:
        cluster.remove()
    if options.json:
        print(json.dumps(rounds))
        return
    where = f"Linux {platform.release()}, {os.cpu_count()} processors"
    print(f"{where}, {options.connections} connections, {human(options.buffers)} of buffers")
    print(f"{'':<42}" + "".join(f"{way:>13}" for way in ways))
    for row in rounds[ways[0]][0]:
        values = [median(figures[row] for figures in rounds[way]) for way in ways]
        print(f"{row:<42}" + "".join(f"{value:>13,.1f}" for value in values))


if __name__ == "__main__":
    main()
