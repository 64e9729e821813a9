"""Run the fuzzer in the lab as a user without rights, and look at what it leaves.

``mshare lab --memory 3G -- python -m tests.security.run_fuzz --calls 1000000``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import NOBODY
from tests.kernel import abi
from tests.kernel.test_lifetime import nothing_left

SOURCE = Path(__file__).with_name("fuzz.c")
MOST = "700M"
"""What the fuzzer may keep in memory, in its cgroup."""


@contextmanager
def program() -> Iterator[str]:
    """The fuzzer, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        binary = f"{folder}/fuzz"
        command = ["cc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", binary]
        subprocess.run([*command, SOURCE], check=True)
        yield binary


def fuzz(calls: int, seed: int, only: int | None = None) -> str:
    """Make so many calls; what the fuzzer printed.

    :raises AssertionError: it found something, or something is left of it.
    """
    folder = f"{abi.MOUNT}/fuzz-{os.getpid()}"
    os.mkdir(folder, 0o700)
    os.chown(folder, NOBODY, NOBODY)
    userfaultfd = Path("/proc/sys/vm/unprivileged_userfaultfd")
    was = userfaultfd.read_text()
    userfaultfd.write_text("1")
    try:
        with program() as binary, abi.cgroup("fuzz", max=MOST) as group:

            def become() -> None:
                abi.enter(group)
                # content of regions is no process's: the kernel may kill any. Workers put it back
                Path("/proc/self/oom_score_adj").write_text("-1000")
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)

            words = [binary, str(seed), str(calls), folder, *([] if only is None else [str(only)])]
            subprocess.run([binary, str(seed), "1", folder], preexec_fn=become, check=True)
            with nothing_left(1000):
                run = subprocess.run(
                    words, preexec_fn=become, stdout=subprocess.PIPE, text=True, check=False
                )
                assert run.returncode == 0, (run.returncode, run.stdout)
                assert os.listdir(folder) == []
            return run.stdout
    finally:
        userfaultfd.write_text(was)
        os.rmdir(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--round", type=int, help="that one alone, to see it again")
    options = parser.parse_args()
    print(f"seed {options.seed}, {os.uname().release}", flush=True)
    started = time.monotonic()
    print(fuzz(options.calls, options.seed, options.round), end="")
    print(f"{time.monotonic() - started:.0f} seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
