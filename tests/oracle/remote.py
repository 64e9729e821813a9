"""The machine here, the kernel in the lab: calls go in and answers come out by the batch.

An emulated processor is slow at choosing calls and quick enough at making them.
"""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
from typing import Any

from tests.oracle import model
from tests.oracle.model import Mount
from tests.oracle.setting import Kernel, sources
from tests.oracle.worker import Call, Outcome

LAB = ("--memory", "3G", "--disk", "2G", "--swap", "512M")


def serve() -> None:
    """In the lab: a line of calls in, a line of answers out, until the input ends."""
    kernel = Kernel()
    _put(sys.stdout.buffer, (kernel.memory, kernel.over_a_part))
    for line in sys.stdin.buffer:
        _put(sys.stdout.buffer, kernel.engine.run(pickle.loads(base64.b64decode(line))))
    kernel.close()


def _put(stream: Any, thing: object) -> None:
    stream.write(base64.b64encode(pickle.dumps(thing)) + b"\n")
    stream.flush()


class Lab:
    """A setting: ``mshare lab`` with `serve` in it."""

    def __init__(self, kernel: str, seconds: int, module: str | None = None) -> None:
        mshare = os.path.join(os.path.dirname(sys.executable), "mshare")
        command = [mshare, "lab", "--kernel", kernel, *LAB, "--timeout", str(seconds), "--"]
        if module:
            command[-1:-1] = ["--module", module]
        command += [sys.executable, "-m", "tests.oracle.remote"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.memory, self.over_a_part = self._get()
        self.engine = self

    def _get(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the lab has ended"
        return pickle.loads(base64.b64decode(line))

    def run(self, calls: list[Call]) -> list[Outcome]:
        """Make calls in the lab."""
        _put(self.process.stdin, calls)
        answers: list[Outcome] = self._get()
        return answers

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model of it."""
        return Mount(sources(), self.memory, self.over_a_part, process)

    def close(self) -> None:
        """End the lab. :raises AssertionError: it has a report, or the mount was still in use."""
        assert self.process.stdin
        self.process.stdin.close()
        assert not self.process.wait(), "the lab reports a failure"


if __name__ == "__main__":
    serve()
