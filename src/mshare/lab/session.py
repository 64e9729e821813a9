"""One boot from start to end: what happened, and which exit status that means."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from mshare.lab import kmsg, qemu
from mshare.lab.guest import END_OF_LOG, Guest, read_busybox
from mshare.lab.relay import Input, Stream, step

EXIT_REPORT = 70
EXIT_TIMEOUT = 124
EXIT_LAB = 125

#: Seconds for the guest to end after its command did, or to restart after a panic.
_END_SECONDS = 60.0
_PANIC_SECONDS = 15.0
_PANIC = b"Kernel panic - not syncing"
_INIT = "Run /init as init process"
_NO_BOOT = "did not boot"
_TAIL = 40
#: Control and ] in an interactive shell end the machine at once.
_ESCAPE = b"\x1d"


@dataclass(frozen=True)
class Result:
    """What a run gave.

    ``status`` is what ``mshare lab`` exits with: that of the command (128+N for signal N), or 70
    with ``reports`` of the kernel, 124 past a time limit, 125 when the lab itself failed; then
    ``reason`` says why. ``command_status`` is the command's own, ``None`` if it did not end.
    ``boot_seconds`` is the time from the start of QEMU to the start of the command, ``elapsed``
    the whole.
    """

    status: int
    command_status: int | None
    stdout: bytes
    stderr: bytes
    log: str
    reports: list[kmsg.Report]
    boot_seconds: float | None
    elapsed: float
    reason: str

    def tail(self) -> str:
        """The last lines of the console."""
        return "\n".join(self.log.splitlines()[-_TAIL:])

    @property
    def emulator_failed(self) -> bool:
        """Whether emulated processors can be why it ended, before anything of ours ran.

        While it boots, a kernel patches its own text. At times an emulated processor runs into
        the breakpoint that another has taken out of there already. And debug-6.1, when other
        machines run beside it, at times waits for ever in the self tests of RCU.
        """
        breakpoint_left = re.search(r"\bint3: 0000 \[#1\]", self.log)
        hung = self.reason.startswith(_NO_BOOT)
        return bool(breakpoint_left or hung) and _INIT not in self.log


@dataclass
class Session:
    """A boot in progress; limits in seconds, sinks are file descriptors or ``None`` to keep."""

    machine: qemu.Machine
    guest: Guest
    timeout: float
    boot_timeout: float
    stdin: int | bytes = b""
    stdout: int | None = None
    stderr: int | None = None
    log: int | None = None
    disks: Sequence[tuple[str, int]] = ()
    _ready: float | None = field(init=False, default=None)
    _status: int | None = field(init=False, default=None)
    _status_time: float = field(init=False, default=0.0)
    _failure: str = field(init=False, default="")
    _panic: float | None = field(init=False, default=None)
    _log_ended: bool = field(init=False, default=False)
    _text: bytearray = field(init=False, default_factory=bytearray)
    _control_text: bytearray = field(init=False, default_factory=bytearray)

    def run(self) -> Result:
        """Boot, run, end. Whatever happens, no process and no file is left."""
        with contextlib.ExitStack() as stack:
            initramfs = _memory_file(stack, "initramfs", self.guest.initramfs(read_busybox()))
            errors = _memory_file(stack, "errors")
            names = ("ctl", "tty") if self.guest.terminal else ("ctl", "out", "err", "in")
            near: dict[str, socket.socket] = {}
            far: dict[str, socket.socket] = {}
            for name in ("console", *names):
                near[name], far[name] = socket.socketpair()
                stack.callback(near[name].close)
                stack.callback(far[name].close)
                near[name].setblocking(False)
            channels = [(name, end.fileno()) for name, end in far.items()]
            command = qemu.command_line(
                self.machine, f"/proc/self/fd/{initramfs}", channels, self.disks
            )
            keep = [initramfs, *(fd for _, fd in channels), *(fd for _, fd in self.disks)]
            start = time.monotonic()
            stack.callback(qemu.stop, qemu.start(command, keep, stderr=errors))
            for end in far.values():
                end.close()
            streams, feed = self._streams(near)
            late = self._follow(streams, feed, start)
            return self._result(streams, feed, late, errors, start)

    def _streams(self, near: dict[str, socket.socket]) -> tuple[dict[str, Stream], Input]:
        streams = {
            "console": Stream(near["console"], self.log, on_data=self._console),
            "ctl": Stream(near["ctl"], on_data=self._control),
        }
        if self.guest.terminal:
            streams["tty"] = Stream(near["tty"], self.stdout)
            way_in = near["tty"]
        else:
            streams["out"] = Stream(near["out"], self.stdout, self.guest.mark)
            streams["err"] = Stream(near["err"], self.stderr, self.guest.mark)
            way_in = near["in"]
        if isinstance(self.stdin, int):
            shell = self.guest.terminal is not None
            return streams, Input(way_in, self.stdin, escape=_ESCAPE * shell, held=True)
        return streams, Input(way_in, None, bytearray(self.stdin), held=True)

    def _console(self, data: bytes) -> None:
        self._text += data
        recent = self._text[-len(data) - 100 :]
        if self._panic is None and _PANIC in recent:
            self._panic = time.monotonic()
        if END_OF_LOG.encode() + b"\r\n" in recent:
            self._log_ended = True

    def _control(self, data: bytes) -> None:
        self._control_text += data
        while b"\n" in self._control_text:
            line, _, self._control_text = self._control_text.partition(b"\n")
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "ready":
                self._ready = time.monotonic()
            elif word == "fail":
                self._failure = rest
                self._status_time = time.monotonic()
            elif word == "exit":
                self._status = int(rest)
                self._status_time = time.monotonic()

    def _follow(self, streams: dict[str, Stream], feed: Input, start: float) -> str:
        """Carry streams until all is said; return which limit was passed, or ``""``."""
        while True:
            said = self._said(streams)
            feed.held = feed.held and self._ready is None
            if feed.escaped or (said and not any(map(_waits, streams.values()))):
                break
            limits = [(start + self.timeout, f"not done within {self.timeout:g} s")]
            if self._ready is None and self.boot_timeout < self.timeout:
                late = f"{_NO_BOOT} within {self.boot_timeout:g} s"
                limits.append((start + self.boot_timeout, late))
            if self._panic is not None:
                limits.append((self._panic + _PANIC_SECONDS, "did not restart after its panic"))
            if self._status_time and not said:
                late = f"did not end within {_END_SECONDS:g} s of its command"
                limits.append((self._status_time + _END_SECONDS, late))
            limit, reason = min(limits)
            if time.monotonic() >= limit:
                _flush(streams)
                return reason
            step(streams, feed, limit)
        _flush(streams)
        return ""

    def _said(self, streams: dict[str, Stream]) -> bool:
        """Whether nothing more will come: QEMU has ended, or the guest has said so."""
        if not any(stream.open for stream in streams.values()):
            return True
        if not self._status_time or not self._log_ended:
            return False
        if self._failure:
            return True
        if "tty" in streams:
            streams["tty"].receive()
            return True
        return not (streams["out"].open or streams["err"].open)

    def _result(
        self, streams: dict[str, Stream], feed: Input, late: str, errors: int, start: float
    ) -> Result:
        log = self._text.decode(errors="replace").replace("\r\n", "\n")
        reports = kmsg.find_reports(log)
        if self._failure:
            reason, status = self._failure, EXIT_LAB
        elif late:
            reason, status = late, EXIT_TIMEOUT
        elif feed.escaped:
            reason, status = "ended from the terminal", EXIT_LAB
        elif self._status is None:
            said = os.pread(errors, 4096, 0).decode(errors="replace").strip()
            reason, status = said or "the machine stopped before the command ended", EXIT_LAB
        else:
            reason, status = "", self._status
        return Result(
            status=EXIT_REPORT if reports else status,
            command_status=self._status,
            stdout=bytes(streams["out"].kept) if "out" in streams else b"",
            stderr=bytes(streams["err"].kept) if "err" in streams else b"",
            log=log,
            reports=reports,
            boot_seconds=None if self._ready is None else self._ready - start,
            elapsed=time.monotonic() - start,
            reason=reason,
        )


def _memory_file(stack: contextlib.ExitStack, name: str, data: bytes = b"") -> int:
    """A descriptor of a file in memory, closed with ``stack``."""
    fd = os.memfd_create(name)
    stack.callback(os.close, fd)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def _waits(stream: Stream) -> bool:
    return bool(stream.waiting)


def _flush(streams: dict[str, Stream]) -> None:
    """Deliver what can be delivered without waiting for anyone."""
    for stream in streams.values():
        while stream.waiting and stream.sink is not None:
            if not select.select([], [stream.sink], [], 0)[1]:
                break
            stream.deliver()
