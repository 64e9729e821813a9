"""What the library promises on each engine: the same model, and what the engines declare.

A region of the library is one of `model.py` with content from the start. An engine differs in
three facts (`Facts`); everything else is the same on all of them, and so is the machine.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tests.oracle.memory import (
    ANONYMOUS,
    FIXED,
    PAGE,
    READ,
    RW,
    SHARED,
    Closed,
    Content,
    Extent,
    Readonly,
    Region,
    Source,
    Window,
    refuse,
    refuse_if,
)
from tests.oracle.model import Descriptor, Mount, Process

BAD_NAMES = {
    "": errno.EINVAL,
    "a/b": errno.EINVAL,
    ".hidden": errno.EINVAL,
    "new\nline": errno.EINVAL,
    "x" * 256: errno.ENAMETOOLONG,
}
SIZES: dict[int | str, int] = {
    PAGE: PAGE, 3 * PAGE: 3 * PAGE, 2 << 20: 2 << 20, (2 << 20) + PAGE: (2 << 20) + PAGE,
    4 << 20: 4 << 20, "4K": PAGE, "1.5M": 3 << 19, "1 MiB": 1 << 20,
}  # fmt: skip
"""Sizes as they are given, and the bytes they are."""
BAD_SIZES: dict[int | str, int] = {
    0: errno.EINVAL, -PAGE: errno.EINVAL, 100: errno.EINVAL, PAGE + 1: errno.EINVAL,
    "": errno.EINVAL, "4Q": errno.EINVAL, "1.0001K": errno.EINVAL, 1 << 62: errno.EFBIG,
}  # fmt: skip
FILE = "file"
"""The one file that is mapped into regions."""


class Facts(NamedTuple):
    """What an engine declares."""

    name: str
    granule: int
    """A region's file is a multiple of this."""
    reserves: bool
    """All memory is there from the start, and what is given is rounded up to the granule."""
    layouts: bool
    """Whether map, unmap and protect work; else EOPNOTSUPP."""


@dataclass(eq=False)
class Attachment:
    """A ``mshare.Region``: an attachment, until it is closed and its last view has died."""

    name: str
    window: Window
    size: int
    readonly: bool
    open: bool = True
    views: set[int] = field(default_factory=set)


class LibraryMount(Mount):
    """The machine, as one engine sees it: names, and regions that somebody can reach."""

    def __init__(self, facts: Facts, process: type[Process] | None = None) -> None:
        sources = {FILE: Source(Content(8 * PAGE))}
        super().__init__(sources, process=process or LibraryProcess)
        self.facts = facts

    def fork(self, parent: int, child: int) -> None:
        """A child has the regions and views of its parent."""
        old = self.processes[parent]
        super().fork(parent, child)
        new = self.processes[child]
        assert isinstance(old, LibraryProcess)
        assert isinstance(new, LibraryProcess)
        windows = dict(zip(old.windows, new.windows, strict=True))
        copies = {}
        for each in {*old.regions.values(), *old.views.values()}:
            window = windows.get(each.window, each.window)
            copies[each] = replace(each, window=window, views=set(each.views))
        new.regions = {handle: copies[each] for handle, each in old.regions.items()}
        new.views = {handle: copies[each] for handle, each in old.views.items()}


class LibraryProcess(Process):
    """The calls of the library, in one process."""

    def __init__(self, mount: Mount, user: int = 0) -> None:
        super().__init__(mount, user)
        assert isinstance(mount, LibraryMount)
        self.engine = mount.facts
        self.regions: dict[int, Attachment] = {}
        self.views: dict[int, Attachment] = {}

    def create(self, handle: int, name: str, size: int | str, mode: int) -> None:
        """A region with content from the start, attached read-write."""
        refuse_if(name in BAD_NAMES, BAD_NAMES.get(name, 0))
        refuse_if(size in BAD_SIZES, BAD_SIZES.get(size, 0))
        refuse_if(not 0 <= mode <= 0o777, errno.EINVAL)
        refuse_if(name in self.mount.names, errno.EEXIST)
        bytes_, facts = SIZES[size], self.engine
        region = Region(mode, self.user, {name})
        region.size = -(-bytes_ // facts.granule) * facts.granule
        end = region.size if facts.reserves else bytes_
        region.layout.put(Extent(0, end, Content(), 0, writable=True, may_write=True))
        region.layout_changes = 1
        self.mount.names[name] = region
        if not self._may(region, 6):
            del self.mount.names[name]
            refuse(errno.EACCES)
        self._attach(handle, name, region, readonly=False)

    def attach_by_name(self, handle: int, name: str, readonly: bool) -> None:
        """Whoever the mode bits allow it to."""
        refuse_if(name in BAD_NAMES, BAD_NAMES.get(name, 0))
        region = self.mount.names.get(name)
        refuse_if(not region, errno.ENOENT)
        assert region
        refuse_if(not self._may(region, 4 if readonly else 6), errno.EACCES)
        self._attach(handle, name, region, readonly)

    def attach_by_descriptor(self, handle: int, other: int, readonly: bool) -> None:
        """By the descriptor of an attachment, which gives no more than it has."""
        found = self._open(other)
        writable = self.descriptors[other].writable
        refuse_if(not writable and not readonly, errno.EACCES)
        self._attach(handle, found.name, found.window.region, readonly, writable)

    def unpickle(self, handle: int, other: int) -> None:
        """A pickled region is its name and options: attached anew; if it is gone, its use fails."""
        found = self.regions[other]
        self.attach_by_name(handle, found.name, found.readonly)

    def _attach(
        self, handle: int, name: str, region: Region, readonly: bool, writable: bool = False
    ) -> None:
        window = Window(region, 0, region.size, 0, not readonly)
        size = region.layout.mapped_end or region.size
        self.attach(window)
        self.regions[handle] = Attachment(name, window, size, readonly)
        self.descriptors[handle] = Descriptor(region, True, writable or not readonly)

    def _open(self, handle: int) -> Attachment:
        if not self.regions[handle].open:
            raise Closed
        return self.regions[handle]

    def close_region(self, handle: int) -> None:
        """The attachment ends with the last view."""
        found = self.regions[handle]
        if found.open:
            found.open = False
            del self.descriptors[handle]
            self._let_go(found)

    def forget(self, handle: int) -> None:
        """Losing the object is as closing it."""
        self.close_region(handle)
        del self.regions[handle]

    def look(self, view: int, handle: int) -> None:
        """A view, which keeps the memory."""
        found = self._open(handle)
        found.views.add(view)
        self.views[view] = found

    def drop(self, view: int) -> None:
        """A view dies."""
        found = self.views.pop(view)
        found.views.discard(view)
        self._let_go(found)

    def _let_go(self, attachment: Attachment) -> None:
        if not attachment.open and not attachment.views:
            self.detach(attachment.window)

    def facts(self, handle: int) -> tuple[int, int, bool, bool]:
        """Size, mode, whether it is read-only, and whether it is closed."""
        found = self.regions[handle]
        return found.size, 0, found.readonly, not found.open

    def read(self, view: int, offset: int = 0) -> bytes:  # type: ignore[override]
        """Eight bytes of a view."""
        page, _ = self.views[view].window.access(offset, write=False)
        return bytes(page[offset % PAGE :][:8])

    def write(self, view: int, offset: int = 0, data: bytes = b"") -> None:
        """Eight bytes of a view."""
        if self.views[view].readonly:
            raise Readonly
        page, _ = self.views[view].window.access(offset, write=True)
        page[offset % PAGE : offset % PAGE + 8] = data

    def mappings(self) -> int:
        """Attachments whose memory is mapped: open, or with a live view."""
        return len(self.windows)

    def remove(self, name: str) -> None:
        """``mshare.unlink``."""
        refuse_if(name in BAD_NAMES, BAD_NAMES.get(name, 0))
        self.unlink(name)

    def stat(self, name: str) -> tuple[int, int, int, int | None]:
        """Size of the file, mode, owner, memory."""
        refuse_if(name in BAD_NAMES, BAD_NAMES.get(name, 0))
        refuse_if(name not in self.mount.names, errno.ENOENT)
        region = self.mount.names[name]
        resident = region.size if self.engine.reserves else region.layout.resident_bytes
        return region.size, region.mode, region.owner, resident

    def list(self) -> list[str]:
        """All names."""
        return self.mount.listdir()

    def map(
        self, handle: int, file: bool, offset: int, length: int | None, readonly: bool, at: int
    ) -> None:
        """A file or fresh memory, in place of what is there."""
        found = self.regions[handle]
        whole = found.window.region.size
        self._check(offset, 0, whole)
        size = length or (8 * PAGE - at if file else whole - offset)
        refuse_if(at % PAGE or size <= 0, errno.EINVAL)
        self._check(offset, size, whole)
        self._layouts(handle)
        flags = SHARED | FIXED | (0 if file else ANONYMOUS)
        prot = READ if readonly else RW
        self.create_mapping(handle, offset, size, at, prot, flags, FILE)

    def unmap_part(self, handle: int, offset: int, length: int) -> None:
        """A hole."""
        self._check(offset, length, self.regions[handle].window.region.size)
        self._layouts(handle)
        self.unmap(handle, offset, length)

    def protect_part(self, handle: int, offset: int, length: int, readonly: bool) -> None:
        """Forbid or allow writing."""
        self._check(offset, length, self.regions[handle].window.region.size)
        self._layouts(handle)
        self.protect(handle, offset, length, READ if readonly else RW)

    @staticmethod
    def _check(offset: int, size: int, whole: int) -> None:
        refuse_if(offset < 0 or offset % PAGE or offset + size > whole, errno.EINVAL)

    def _layouts(self, handle: int) -> None:
        self._open(handle)
        refuse_if(not self.engine.layouts, errno.EOPNOTSUPP)
