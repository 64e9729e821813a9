"""Models with one rule wrong. A machine that does not find each of them out proves nothing."""

from __future__ import annotations

import signal

from tests.oracle.library import LibraryProcess
from tests.oracle.memory import LOCKED, Content, Fault, populate
from tests.oracle.model import Process


class ProtectsAll(Process):
    """PROTECT changes all of the region instead of its range."""

    def protect(self, handle: int, at: int, size: int, prot: int, reserved: int = 0) -> None:
        super().protect(handle, at, size, prot, reserved)
        region = self._layout(handle)
        super().protect(handle, 0, region.size, prot, reserved)
        region.layout_changes -= 1


class UnmapsNothing(Process):
    """UNMAP leaves the content where it was."""

    def unmap(self, handle: int, at: int, size: int) -> None:
        region = self._layout(handle)
        region.check_range(at, size)
        region.change(at, size)


class HoldsNoRegion(Process):
    """A window does not keep its region's memory."""

    def munmap(self, address: int, size: int) -> None:
        regions = [each.region for each in self.touched(address, address + size)]
        super().munmap(address, size)
        for region in regions:
            region.layout.remove(0, region.size)


class WritesThroughReaders(Process):
    """A read-only window can be written to."""

    def store(self, address: int, data: bytes) -> bool:
        window = self.memory(address)
        before, window.writable = window.writable, True
        try:
            return super().store(address, data)
        finally:
            window.writable = before


class LosesAdvised(Process):
    """MADV_DONTNEED drops the content."""

    def madvise(self, address: int, size: int, advice: str) -> None:
        super().madvise(address, size, advice)
        if advice == "DONTNEED":
            populate(self.window(address), address, size, write=False)
            for page in self.window(address).region.layout.extents:
                page.content.pages.clear()


class PassesEndOfFile(Process):
    """Past the end of a file there are zeros."""

    def load(self, address: int, size: int) -> tuple[bytes, bool]:
        try:
            return super().load(address, size)
        except Fault as fault:
            if fault.signal == signal.SIGBUS:
                return bytes(size), True
            raise


class MovesParts(Process):
    """mremap moves a part of a window."""

    def mremap(self, address: int, old: int, new: int, flags: int, target: int) -> None:
        window = self.window(address)
        super().mremap(window.address, window.size, window.size, flags, target)


class TrustsReaders(Process):
    """A descriptor for reading is enough for a writable window."""

    def mmap(  # type: ignore[override]
        self, handle: int, size: int, prot: int, flags: int, address: int, offset: int
    ) -> object:
        file = self._file(handle)
        return super().mmap(
            handle, size, prot if file.writable else prot & ~2, flags, address, offset
        )


class MixesKinds(Process):
    """A region can be locked here and movable there."""

    def create_mapping(
        self, handle: int, at: int, size: int, offset: int, prot: int, flags: int, source: str
    ) -> None:
        file = self.descriptors.get(handle)
        if file and file.region and file.region.locked is not None:
            file.region.locked = bool(flags & LOCKED)
        super().create_mapping(handle, at, size, offset, prot, flags, source)


class TakesLocked(Process):
    """UNMAP takes locked content from who has a window."""

    def unmap(self, handle: int, at: int, size: int) -> None:
        region = self._layout(handle)
        before, region.locked = region.locked, False
        try:
            super().unmap(handle, at, size)
        finally:
            region.locked = before


class LocksForFree(Process):
    """RLIMIT_MEMLOCK does not matter."""

    def _check_limit(self, size: int) -> None:
        pass


class OpensAnew(Process):
    """Who asks for the region of a file gets one of its own."""

    def _open_region_of(self, handle: int, content: Content, access: int) -> None:
        for region in self.mount.alive():
            if region.of:
                region.of = Content(), region.of[1]
        super()._open_region_of(handle, content, access)


class TrustsMappings(Process):
    """Any shared mapping gives all of its file, for reading and writing."""

    def open_mapping(
        self, handle: int, control: int, address: int, access: int, reserved: int = 0
    ) -> None:
        for mapping in self.others:
            mapping.may_write = mapping.may_move = True
        super().open_mapping(handle, control, address, access, reserved)


RAW: tuple[type[Process], ...] = (
    ProtectsAll,
    UnmapsNothing,
    HoldsNoRegion,
    WritesThroughReaders,
    LosesAdvised,
    PassesEndOfFile,
    MovesParts,
    TrustsReaders,
    MixesKinds,
    TakesLocked,
    LocksForFree,
    OpensAnew,
    TrustsMappings,
)


class ForgetsViews(LibraryProcess):
    """Closing a region unmaps it under its views."""

    def close_region(self, handle: int) -> None:
        self.regions[handle].views.clear()
        super().close_region(handle)

    def drop(self, view: int) -> None:
        del self.views[view]


class OpensToAll(LibraryProcess):
    """Mode bits do not matter."""

    def attach_by_name(self, handle: int, name: str, readonly: bool) -> None:
        user, self.user = self.user, 0
        try:
            super().attach_by_name(handle, name, readonly)
        finally:
            self.user = user


class TakesNames(LibraryProcess):
    """Creating a name that is taken replaces it."""

    def create(self, handle: int, name: str, size: int | str, mode: int) -> None:
        self.mount.names.pop(name, None)
        super().create(handle, name, size, mode)


LIBRARY: tuple[type[LibraryProcess], ...] = (ForgetsViews, OpensToAll, TakesNames)
