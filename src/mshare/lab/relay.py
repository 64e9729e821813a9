"""Carry bytes between the guest's ports and the caller, in one loop that always ends.

Nothing here blocks: a reader that does not read its end holds up its own stream only, and the
time limits hold. Streams are passed on as they come and stay separate.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_CHUNK = 65536
#: What poll promises to take from a writer without blocking (PIPE_BUF).
_PIECE = 4096
#: Bytes waiting for a slow reader after which the guest has to wait too.
_LIMIT = 1 << 20


@dataclass
class Stream:
    """One way out of the guest; to ``sink`` (a descriptor) or else into ``kept``.

    ``mark`` ends the stream and is not part of it.
    """

    source: socket.socket
    sink: int | None = None
    mark: bytes = b""
    on_data: Callable[[bytes], None] | None = None
    kept: bytearray = field(default_factory=bytearray)
    waiting: bytearray = field(default_factory=bytearray)
    tail: bytes = b""
    open: bool = True

    @property
    def done(self) -> bool:
        """Nothing more comes, and what came was delivered."""
        return not self.open and not self.waiting

    def receive(self) -> None:
        """Read what is there."""
        try:
            data = self.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            data, self.tail, self.open = self.tail, b"", False
        elif self.mark:
            data = self._cut_mark(self.tail + data)
        if self.on_data:
            self.on_data(data)
        if self.sink is None:
            self.kept += data
        else:
            self.waiting += data

    def _cut_mark(self, data: bytes) -> bytes:
        """Hold back the end that may be a part of the mark."""
        end = data.find(self.mark)
        if end >= 0:
            self.tail, self.open = b"", False
            return data[:end]
        size = min(len(data), len(self.mark) - 1)
        while size and not self.mark.startswith(data[len(data) - size :]):
            size -= 1
        self.tail = data[len(data) - size :]
        return data[: len(data) - size]

    def deliver(self) -> None:
        """Write a piece to the sink.

        :raises BrokenPipeError: its reader is gone.
        """
        assert self.sink is not None
        with contextlib.suppress(BlockingIOError):
            del self.waiting[: os.write(self.sink, self.waiting[:_PIECE])]


@dataclass
class Input:
    """The way into the guest, from ``source`` (a descriptor) or from ``waiting`` alone.

    While ``held``, what comes waits: nobody in the guest listens yet. A byte equal to ``escape``
    ends everything (an interactive terminal), even then.
    """

    target: socket.socket
    source: int | None
    waiting: bytearray = field(default_factory=bytearray)
    escape: bytes = b""
    escaped: bool = False
    held: bool = False
    open: bool = True

    def receive(self) -> None:
        """Read what the caller has for the guest."""
        assert self.source is not None
        try:
            data = os.read(self.source, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self.escape and self.escape in data:
            self.escaped = True
        if not data:
            self.source = None
        self.waiting += data

    def send(self) -> None:
        """Pass a piece on; after the last one the guest sees the end of the file."""
        try:
            if self.waiting:
                del self.waiting[: self.target.send(self.waiting[:_CHUNK])]
            if not self.waiting and self.source is None:
                self.open = False
                self.target.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            self.open = False


def step(streams: Mapping[str, Stream], feed: Input | None, until: float) -> None:
    """Wait for something to carry, at most until the monotonic time ``until``, and carry it."""
    poll = select.poll()
    actions: dict[tuple[int, int], Callable[[], None]] = {}
    events: dict[int, int] = {}

    def watch(fd: int, event: int, action: Callable[[], None]) -> None:
        actions[fd, event] = action
        events[fd] = events.get(fd, 0) | event

    for stream in streams.values():
        if stream.open and len(stream.waiting) < _LIMIT:
            watch(stream.source.fileno(), select.POLLIN, stream.receive)
        if stream.waiting and stream.sink is not None:
            watch(stream.sink, select.POLLOUT, stream.deliver)
    if feed and feed.open:
        listens = bool(feed.escape) or not feed.held
        if feed.source is not None and listens and len(feed.waiting) < _LIMIT:
            watch(feed.source, select.POLLIN, feed.receive)
        if not feed.held and (feed.waiting or feed.source is None):
            watch(feed.target.fileno(), select.POLLOUT, feed.send)
    for fd, event in events.items():
        poll.register(fd, event)
    wait = max(0.0, min(until - time.monotonic(), 1.0))
    for fd, got in poll.poll(wait * 1000):
        ended = got & (select.POLLHUP | select.POLLERR | select.POLLNVAL)
        for event in (select.POLLIN, select.POLLOUT):
            if (fd, event) in actions and (got & event or ended):
                actions[fd, event]()
