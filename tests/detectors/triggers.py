"""What reaches the planted bugs: ``python -m tests.detectors.triggers NAME``, in the lab.

Each does what programs do, and asks nothing: whether it went well is in the kernel's log.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.kernel import abi
from tests.kernel.abi import PAGE, SLOT

SLOTS = 8
SECONDS = 120.0


def full() -> int:
    """A region with a page in each of its slots."""
    region = abi.make(f"{abi.MOUNT}/trigger", SLOTS * SLOT, fill=False)
    for slot in range(SLOTS):
        abi.create_mapping(region, slot * SLOT, PAGE)
    return region


def layout_change() -> None:
    """Attach, touch every slot, take the content away, and have /proc walk the window."""
    region = full()
    window = abi.mmap(region, SLOTS * SLOT)
    for slot in range(SLOTS):
        abi.put(window + slot * SLOT, b"x")
    abi.unmap(region, 0, SLOTS * SLOT)
    for _ in range(20):
        Path("/proc/self/smaps").read_bytes()
        time.sleep(0.02)
    abi.munmap(window, SLOTS * SLOT)


def attaches() -> None:
    """Two processes attach every slot at once, again and again; end when a race was seen."""
    region = full()
    end = time.monotonic() + SECONDS
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)

    def attach() -> None:
        while True:
            abi.munmap(abi.mmap(region, SLOTS * SLOT), SLOTS * SLOT)

    processes = [abi.Child(attach) for _ in range(2)]
    while time.monotonic() < end and not reported(log):
        time.sleep(0.2)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        assert process.signal() == signal.SIGKILL  # it had not ended before


def reported(log: int) -> bool:
    """Whether a race in the module is in what the kernel has said since the last time."""
    try:
        while line := os.read(log, 8192):
            if b"KCSAN" in line and b"[mshare]" in line:
                return True
    except (BlockingIOError, BrokenPipeError):
        pass
    return False


TRIGGERS: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (layout_change, attaches)
}

if __name__ == "__main__":
    TRIGGERS[sys.argv[1]]()
    print("done")
