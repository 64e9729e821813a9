"""PostgreSQL as Debian ships it, under ``mshare run``: it works, crashes and recovers as ever."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip
from tests.kernel import abi
from tests.kernel.test_lifetime import module_users, nothing_left
from tests.postgresql import MSHARE_RUN, Cluster, binaries, of_process

SETTINGS = {"shared_buffers": "128MB", "huge_pages": "off", "autovacuum": "off", "jit": "off"}
UNDER = [*MSHARE_RUN, "--"]
COUNT = "select count(*) from content"
ROWS = 8_000


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    """A cluster with a table of 32 MiB in it, and pgbench's; not started."""
    programs = binaries()
    if not programs:
        skip("PostgreSQL is not installed; try: apt-get install postgresql-15")
    assert programs
    place = Path("/mnt/disk" if os.path.ismount("/mnt/disk") else "/tmp")
    new = Cluster(place / f"postgresql-{uuid.uuid4().hex[:12]}", programs)
    try:
        new.start(UNDER, **SETTINGS)
        connection = new.connect()
        connection.ask("create table content (text text)")
        connection.ask("alter table content alter text set storage plain")
        connection.ask(
            f"insert into content select repeat('x', 3900) from generate_series(1, {ROWS})"
        )
        connection.close()
        new.run("pgbench", "-i", "-q", "-s", "1")
        assert new.stop() == 0
        yield new
    finally:
        new.remove()


@pytest.fixture
def cluster(made: Cluster) -> Iterator[Cluster]:
    """The cluster, not running; stopped after the test if that has not done it."""
    made.log.write_text("")
    yield made
    if made.server:
        made.stop(signal.SIGQUIT)


def test_connections_pay_no_page_tables(cluster: Cluster) -> None:
    """A connection that reads 32 MiB of buffers takes few faults and makes no tables for them."""
    with nothing_left():
        cluster.start(UNDER, **SETTINGS)
        assert ": shared: " in cluster.log.read_text()
        assert "not shared: " not in cluster.log.read_text()
        first, second = cluster.connect(), cluster.connect()
        query = "select sum(octet_length(text)) from content"
        assert int(first.ask(query)) == ROWS * 3900
        second.ask("select count(*) from pg_class")
        tables, faults = of_process(second.pid)
        assert int(second.ask(query)) == ROWS * 3900
        after = of_process(second.pid)
        assert after[0] - tables <= 16 << 10
        assert after[1] - faults < 150
        first.close()
        second.close()
        assert cluster.stop() == 0


def test_pgbench(cluster: Cluster) -> None:
    """Clients that read and write at once leave a state that adds up."""
    cluster.start(UNDER, **SETTINGS)
    cluster.run("pgbench", "-n", "-c", "4", "-j", "2", "-t", "50")
    cluster.run("pgbench", "-n", "-S", "-c", "4", "-j", "2", "-t", "200")
    connection = cluster.connect()
    sums = {
        connection.ask(f"select sum({name[0]}balance) from pgbench_{name}")
        for name in ("accounts", "branches", "tellers")
    }
    sums.add(connection.ask("select sum(delta) from pgbench_history"))
    assert len(sums) == 1
    assert connection.ask("select count(*) from pgbench_history") == "200"
    # a parallel query, which maps shared memory of its own
    for setting in (
        "parallel_setup_cost = 0",
        "parallel_tuple_cost = 0",
        "min_parallel_table_scan_size = 0",
    ):
        connection.ask(f"set {setting}")
    assert connection.ask(COUNT) == str(ROWS)
    connection.close()
    assert cluster.stop() == 0


def test_a_killed_backend(cluster: Cluster) -> None:
    """kill -9 of a backend: the server restarts by itself, with all that was committed."""
    with nothing_left():
        cluster.start(UNDER, **SETTINGS)
        victim, other = cluster.connect(), cluster.connect()
        other.ask("create table committed (number int)")
        other.ask("insert into committed values (42)")
        victim.ask("begin; insert into committed values (43)")
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError):
            for _ in range(600):
                other.ask("select 1")
                time.sleep(0.1)
        cluster.wait()
        again = cluster.connect()
        assert again.ask("select sum(number) from committed") == "42"
        assert again.ask(COUNT) == str(ROWS)
        again.ask("drop table committed")
        for connection in (victim, other, again):
            connection.close()
        assert cluster.log.read_text().count("terminating any other active server processes") == 1
        assert cluster.stop() == 0


def test_a_killed_server(cluster: Cluster) -> None:
    """kill -9 of the first process: its backends end, the regions go, and it starts again.

    What PostgreSQL keeps in /dev/shm it finds and removes itself when it starts, as ever.
    """
    with nothing_left():
        users = module_users()
        cluster.start(UNDER, **SETTINGS)
        connection = cluster.connect()
        connection.ask("create table committed as select 42 as number")
        processes = cluster.processes()
        assert len(processes) > 5
        assert module_users() > users
        assert cluster.stop(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(ConnectionError):
            connection.ask("select 1")
        connection.close()
        deadline = time.monotonic() + 60
        while any(os.path.exists(f"/proc/{pid}") for pid in processes):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert abi.settle(module_users, users) == users
        cluster.start(UNDER, **SETTINGS)
        connection = cluster.connect()
        assert connection.ask("select number from committed") == "42"
        assert connection.ask(COUNT) == str(ROWS)
        connection.ask("drop table committed")
        connection.close()
        assert cluster.stop() == 0


def test_a_second_server_is_refused(cluster: Cluster) -> None:
    """On a cluster that runs, PostgreSQL says so itself, as without mshare run."""
    cluster.start(UNDER, **SETTINGS)
    with pytest.raises(OSError, match=r'lock file "postmaster.pid" already exists'):
        second = Cluster.__new__(Cluster)
        second.__dict__ |= cluster.__dict__ | {"server": None}
        second.folder = cluster.folder / "second"
        second.folder.mkdir(exist_ok=True)
        second.start(UNDER, **SETTINGS)
    assert cluster.stop() == 0
