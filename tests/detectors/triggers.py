"""What reaches the planted bugs: ``python -m tests.detectors.triggers NAME``, in the lab.

Each does what programs do, and asks nothing: whether it went well is in the kernel's log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.kernel import abi
from tests.kernel.abi import PAGE, SLOT

SLOTS = 8
SECONDS = 240.0
DONTNEED = 4
SWEPT = 64 << 20


def layout_change() -> None:
    """Attach, touch every slot, take the content away, and have /proc walk the window."""
    region = abi.make(f"{abi.MOUNT}/trigger", SLOTS * SLOT, fill=False)
    for slot in range(SLOTS):
        abi.create_mapping(region, slot * SLOT, PAGE)
    window = abi.mmap(region, SLOTS * SLOT)
    for slot in range(SLOTS):
        abi.put(window + slot * SLOT, b"x")
    abi.unmap(region, 0, SLOTS * SLOT)
    for _ in range(20):
        Path("/proc/self/smaps").read_bytes()
        time.sleep(0.02)
    abi.munmap(window, SLOTS * SLOT)


def faults_and_detaches() -> None:
    """Two threads fault in a window, another has it detached again and again."""
    region = abi.make(f"{abi.MOUNT}/trigger")
    window = abi.mmap(region)
    abi.fill(window, SWEPT)
    end = time.monotonic() + SECONDS
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    done = False

    def detach() -> None:
        while not done:
            abi.madvise(window, SLOT, DONTNEED)

    def sweep() -> None:
        while not done:
            abi.touch(window, SWEPT)  # one call of C: the interpreter is another thread's

    threads = [threading.Thread(target=work) for work in (detach, sweep, sweep)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end and not reported(log):
        time.sleep(0.2)
    done = True
    for thread in threads:
        thread.join()
    abi.munmap(window)


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
    each.__name__: each for each in (layout_change, faults_and_detaches)
}

if __name__ == "__main__":
    TRIGGERS[sys.argv[1]]()
    print("done")
