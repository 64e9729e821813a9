"""What msharefs promises, as a program: the reference model of docs/abi.md.

Read it to learn what a call does. Nothing here asks a kernel: a `Mount` is a file system with
its regions, a `Process` has the calls, and each either answers, raises ``OSError`` with the errno
it is refused with, or, for an access to memory, `Fault` with the signal. `machine.py` makes the
same calls here and on a real kernel, and compares.

`memory.py` has what a region and a window are, and what an access gives. Here are the calls, in
the order of docs/abi.md, each with its refusals in the order in which they are found.

What the ABI leaves open is not here: addresses the kernel chooses, counters of single faults,
when content leaves memory. What is here is exact.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass, replace

from tests.oracle.memory import (
    ADDRESSES,
    ADVICE,
    ANONYMOUS,
    DONTUNMAP,
    EXEC,
    FIXED,
    LOCKED,
    MAX_SIZE,
    MAYMOVE,
    NOREPLACE,
    NORESERVE,
    PAGE,
    PRIVATE,
    READ,
    RW,
    SHARED,
    SLOT,
    TMPFILE,
    TO_FIXED,
    WRITE,
    Content,
    Extent,
    Fault,
    Mapping,
    Region,
    Source,
    Window,
    populate,
    refuse,
    refuse_if,
)


@dataclass(frozen=True, eq=False)
class Descriptor:
    """An open file of the mount: a region, or with None the file ``mshare_info``."""

    region: Region | None
    readable: bool = True
    writable: bool = True
    path_only: bool = False


class Mount:
    """A mounted msharefs, the machine's memory, and the processes that use it."""

    def __init__(
        self,
        sources: dict[str, Source],
        memory: int = 1 << 62,
        over_a_part: int = errno.EINVAL,
        process: type[Process] | None = None,
    ) -> None:
        self.names: dict[str, Region] = {}
        self.sources = sources
        self.memory = memory
        """Memory and swap: more than that is never committed at once."""
        self.over_a_part = over_a_part
        """What MAP_FIXED over a part of a window is refused with: ENOMEM on 6.1."""
        self.processes: dict[int, Process] = {}
        self._process = process or Process

    def spawn(self, number: int, user: int = 0) -> None:
        """A process with nothing."""
        self.processes[number] = self._process(self, user)

    def fork(self, parent: int, child: int) -> None:
        """ABI, Windows: a child has all descriptors, and all windows but those of DONTFORK."""
        old, new = self.processes[parent], self._process(self, self.processes[parent].user)
        new.descriptors, new.others = dict(old.descriptors), list(old.others)
        new.may_lock = old.may_lock
        for window in old.windows:
            if window.kept["fork"] == "DOFORK":
                kept = dict(window.kept)
                new.attach(replace(window, kept=kept, loose=set()))
        self.processes[child] = new

    def kill(self, number: int) -> None:
        """A process ends, however: its windows and descriptors go, nothing else."""
        process = self.processes.pop(number)
        for window in list(process.windows):
            process.detach(window)

    def load_of(self, reader: int, owner: int, address: int, size: int) -> bytes:
        """One process reads the memory of another of its user: as a load there, or EFAULT."""
        user = self.processes[reader].user
        refuse_if(user not in (0, self.processes[owner].user), errno.EPERM)
        refuse_if(not self.processes[owner].window(address).readable, errno.EFAULT)
        return self.processes[owner].load(address, size)[0]

    def send(self, sender: int, handle: int, receiver: int) -> None:
        """A descriptor goes over a socket. It is all a process needs to attach."""
        self.processes[receiver].descriptors[handle] = self.processes[sender].descriptors[handle]

    def alive(self) -> list[Region]:
        """ABI, The file system: a region lives while it has a name, a descriptor or a window."""
        found = list(self.names.values())
        for process in self.processes.values():
            found += [each.region for each in process.descriptors.values() if each.region]
            found += [window.region for window in process.windows]
        return list(dict.fromkeys(found))

    def statfs(self) -> int | None:
        """Bytes that all regions hold in memory, where that is exact."""
        total = 0
        for region in self.alive():
            resident = region.layout.resident_bytes
            if resident is None:
                return None
            total += resident
        return total

    def listdir(self) -> list[str]:
        """The names, without ``mshare_info``."""
        return sorted(self.names)


class Process:
    """A process: what it has open and mapped, and the calls it can make.

    Descriptors go by handles that the caller chooses, so that model and kernel agree on them.
    """

    def __init__(self, mount: Mount, user: int = 0) -> None:
        self.mount = mount
        self.user = user
        self.descriptors: dict[int, Descriptor] = {}
        self.windows: list[Window] = []
        self.others: list[Mapping] = []
        """Other memory that it has mapped."""
        self.may_lock = 1 << 62
        """RLIMIT_MEMLOCK, which holds for all but root."""

    # Names, modes and sizes: ABI, The file system; Making a region.

    def open(self, handle: int, name: str, flags: int, mode: int) -> None:
        """open(2), with ``TMPFILE`` for a region that has no name yet."""
        region = None if name == TMPFILE else self.mount.names.get(name)
        if name == TMPFILE:
            region = Region(mode, self.user, set(), linkable=True)
        elif not region and name != "mshare_info":
            refuse_if(not flags & os.O_CREAT, errno.ENOENT)
            region = self.mount.names[name] = Region(mode, self.user, {name})
        else:
            exclusive = flags & os.O_CREAT and flags & os.O_EXCL
            refuse_if(exclusive and not flags & os.O_PATH, errno.EEXIST)
            self._check_mode(region, flags)
        self._opened(handle, region, flags)

    def open_again(self, handle: int, other: int, flags: int) -> None:
        """open(2) of /proc/self/fd: what a descriptor allows does not matter, the mode does."""
        refuse_if(other not in self.descriptors, errno.ENOENT)
        region = self.descriptors[other].region
        self._check_mode(region, flags)
        self._opened(handle, region, flags)

    def _check_mode(self, region: Region | None, flags: int) -> None:
        """Of what is there already. Nobody changes ``mshare_info``."""
        if flags & os.O_PATH:
            return
        access = flags & os.O_ACCMODE
        writes = access != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if not region:
            refuse_if(writes, errno.EPERM)
            return
        refuse_if(not self._may(region, 4 * (access != os.O_WRONLY) | 2 * writes), errno.EACCES)
        refuse_if(flags & os.O_TRUNC and region.size, errno.EINVAL)

    def _opened(self, handle: int, region: Region | None, flags: int) -> None:
        access = flags & os.O_ACCMODE
        self.descriptors[handle] = Descriptor(
            region, access != os.O_WRONLY, access != os.O_RDONLY, bool(flags & os.O_PATH)
        )

    def _may(self, region: Region, wanted: int) -> bool:
        shift = 6 if self.user == region.owner else 0
        return not self.user or (region.mode >> shift) & wanted == wanted

    def close(self, handle: int) -> None:
        """close(2)."""
        refuse_if(handle not in self.descriptors, errno.EBADF)
        del self.descriptors[handle]

    def _file(self, handle: int) -> Descriptor:
        found = self.descriptors.get(handle)
        if found is None or found.path_only:
            refuse(errno.EBADF)
        return found

    def ftruncate(self, handle: int, size: int) -> None:
        """ftruncate(2): sets the size, which takes no memory."""
        refuse_if(size < 0, errno.EINVAL)
        file = self._file(handle)
        refuse_if(not file.writable or not file.region, errno.EINVAL)
        assert file.region
        file.region.set_size(size)

    def fallocate(self, handle: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2): the same."""
        file = self._file(handle)
        refuse_if(offset < 0 or size <= 0, errno.EINVAL)
        refuse_if(not file.writable or not file.region, errno.EBADF)
        refuse_if(mode, errno.EOPNOTSUPP)
        assert file.region
        refuse_if(offset, errno.EINVAL)
        file.region.set_size(size)

    def read(self, handle: int) -> None:
        """read(2), of no bytes: content is reached by mmap only."""
        file = self._file(handle)
        refuse_if(not file.readable, errno.EBADF)
        refuse_if(file.region, errno.EINVAL)

    def write(self, handle: int) -> None:
        """write(2): as read."""
        refuse_if(not self._file(handle).writable, errno.EBADF)
        refuse(errno.EINVAL)

    def fstat(self, handle: int) -> tuple[int, int, int, int]:
        """Size, mode, number of names and owner."""
        refuse_if(handle not in self.descriptors, errno.EBADF)
        region = self.descriptors[handle].region
        if not region:
            return 0, 0o444, 1, 0
        return region.size, region.mode, len(region.names), region.owner

    def fchmod(self, handle: int, mode: int) -> None:
        """fchmod(2): the owner's, and root's."""
        region = self._file(handle).region
        refuse_if(not region or self.user not in (0, region.owner), errno.EPERM)
        assert region
        region.mode = mode

    def link(self, handle: int, name: str) -> None:
        """linkat(2) of a descriptor: one more name, or the first after O_TMPFILE."""
        refuse_if(handle not in self.descriptors, errno.ENOENT)
        refuse_if(name in self.mount.names, errno.EEXIST)
        region = self.descriptors[handle].region
        if not region:
            refuse(errno.EPERM)
        refuse_if(not region.names and not region.linkable, errno.ENOENT)
        region.linkable = False
        region.names.add(name)
        self.mount.names[name] = region

    def unlink(self, name: str) -> None:
        """unlink(2): the root is sticky, so a name is its owner's to remove."""
        refuse_if(name not in self.mount.names, errno.ENOENT)
        self._own(name)
        self.mount.names.pop(name).names.discard(name)

    def _own(self, name: str) -> None:
        refuse_if(self.user not in (0, self.mount.names[name].owner), errno.EPERM)

    def rename(self, old: str, new: str) -> None:
        """rename(2): replaces what had the new name, unless it is the same region."""
        refuse_if(old not in self.mount.names, errno.ENOENT)
        if self.mount.names[old] is self.mount.names.get(new):
            return
        self._own(old)
        if new in self.mount.names:
            self._own(new)
            self.mount.names.pop(new).names.discard(new)
        region = self.mount.names[new] = self.mount.names.pop(old)
        region.names.discard(old)
        region.names.add(new)

    # The ioctls: ABI, The ioctls; Errors.

    def _layout(self, handle: int) -> Region:
        file = self._file(handle)
        refuse_if(not file.region, errno.ENOTTY)
        refuse_if(not file.writable, errno.EACCES)
        assert file.region
        refuse_if(file.region.of, errno.EPERM)
        return file.region

    @staticmethod
    def _check_prot(prot: int) -> None:
        refuse_if(prot & EXEC, errno.EPERM)
        refuse_if(prot not in (READ, RW), errno.EINVAL)

    def create_mapping(
        self, handle: int, at: int, size: int, offset: int, prot: int, flags: int, source: str
    ) -> None:
        """CREATE_MAPPING: put content into the region, in place of what is there.

        With MAP_LOCKED all of it is in memory now, and stays there; a file is not the region's
        to keep.
        """
        region = self._layout(handle)
        region.check_range(at, size)
        self._check_prot(prot)
        known = SHARED | PRIVATE | FIXED | ANONYMOUS | NORESERVE | LOCKED
        refuse_if(flags & ~known or flags & 3 != SHARED or not flags & FIXED, errno.EINVAL)
        writable, locked = bool(prot & WRITE), bool(flags & LOCKED)
        if flags & ANONYMOUS:
            refuse_if(offset, errno.EINVAL)
            refuse_if(size > self.mount.memory and not flags & NORESERVE, errno.ENOMEM)
            file, content = Source(None), Content()
        else:
            refuse_if(locked, errno.EOPNOTSUPP)
            refuse_if(offset % PAGE or offset + size >= 1 << 63, errno.EINVAL)
            file, content = self._shareable(source, writable)
        if locked:
            already = sum(each.layout.locked_bytes(self.user) for each in self.mount.alive())
            self._check_limit(already + size)
        refuse_if(file.sealed and writable, errno.EPERM)
        refuse_if(region.locked is not None and region.locked != locked, errno.EINVAL)
        region.change(at, size)
        region.layout.remove(at, at + size)
        region.locked = locked
        may_write = file.writable and not file.sealed
        payer = self.user if locked else None
        region.layout.put(Extent(at, at + size, content, offset, writable, may_write, payer))

    def _shareable(self, source: str, writable: bool) -> tuple[Source, Content]:
        """A file by its descriptor, and that can be shared."""
        file = self.mount.sources.get(source)
        if not file:
            refuse(errno.EBADF)
        refuse_if(not file.readable or (writable and not file.writable), errno.EACCES)
        if not file.content:
            refuse(errno.EOPNOTSUPP)
        return file, file.content

    def _check_limit(self, size: int) -> None:
        """RLIMIT_MEMLOCK. Root has CAP_IPC_LOCK, so it has no limit."""
        refuse_if(self.user and not self.may_lock, errno.EPERM)
        refuse_if(self.user and size > self.may_lock, errno.ENOMEM)

    def limit_locked(self, size: int) -> None:
        """setrlimit(2) of RLIMIT_MEMLOCK."""
        self.may_lock = size

    def unmap(self, handle: int, at: int, size: int) -> None:
        """UNMAP: make a hole."""
        region = self._layout(handle)
        region.check_range(at, size)
        region.change(at, size)
        region.layout.remove(at, at + size)

    def protect(self, handle: int, at: int, size: int, prot: int, reserved: int = 0) -> None:
        """PROTECT: forbid or allow writing to a range; on an error what came before is done."""
        region = self._layout(handle)
        refuse_if(reserved, errno.EINVAL)
        region.check_range(at, size)
        self._check_prot(prot)
        region.change(at, size)
        for part in region.layout.within(at, at + size):
            refuse_if(prot & WRITE and not part.may_write and not part.writable, errno.EACCES)
            if part.writable != bool(prot & WRITE):
                region.layout.put(replace(part, writable=bool(prot & WRITE)))

    def info(self, handle: int, room: int = 128) -> dict[str, int | None]:
        """INFO: the fields that are exact, as far as they fit into ``room``."""
        region = self._file(handle).region
        refuse_if(not region, errno.ENOTTY)
        assert region
        refuse_if(room < 16, errno.EINVAL)
        offsets: dict[str, tuple[int, int | None]] = {
            "region_size": (8, region.size),
            "alignment": (16, SLOT),
            "attachments": (24, len(region.windows)),
            "in_place": (40, region.slots_in_place),
            "layout_changes": (64, region.layout_changes),
            "resident_bytes": (80, region.layout.resident_bytes),
            "mapped_bytes": (88, region.layout.mapped_bytes),
            "mapped_end": (96, region.layout.mapped_end),
            "locked_bytes": (104, region.layout.locked_bytes()),
        }
        fields: dict[str, int | None] = {"size": min(room, 128), "flags": int(bool(region.locked))}
        return fields | {k: v for k, (at, v) in offsets.items() if at + 8 <= room}

    def ioctl(self, handle: int, number: int) -> None:
        """A call there is not."""
        self._file(handle)
        refuse(errno.ENOTTY)

    def open_file(self, handle: int, control: int, source: str, access: int) -> None:
        """OPEN_FILE: the region of a file, by a descriptor of the file."""
        self._check_request(control, access)
        writable = access == os.O_RDWR
        file, content = self._shareable(source, writable)
        refuse_if(file.sealed and writable, errno.EPERM)
        self._open_region_of(handle, content, access)

    def open_mapping(
        self, handle: int, control: int, address: int, access: int, reserved: int = 0
    ) -> None:
        """OPEN_MAPPING: the region of a file, by a mapping of it that can reach all of it."""
        self._check_request(control, access)
        refuse_if(reserved, errno.EINVAL)
        refuse_if(self.touched(address, address + 1), errno.EOPNOTSUPP)
        found = self._mapped(address)
        if not found:
            refuse(errno.EFAULT)
        refuse_if(not found.shared, errno.EINVAL)
        refuse_if(access == os.O_RDWR and not found.may_write, errno.EACCES)
        refuse_if(found.offset and not found.may_move, errno.EACCES)
        self._open_region_of(handle, found.content, access)

    def _check_request(self, control: int, access: int) -> None:
        refuse_if(self._file(control).region, errno.ENOTTY)
        refuse_if(access not in (os.O_RDONLY, os.O_RDWR), errno.EINVAL)

    def _open_region_of(self, handle: int, content: Content, access: int) -> None:
        """The one that is there, or a new one: all of the file, and no name or right to get one."""
        writable = access == os.O_RDWR
        of = content, writable
        region = next((each for each in self.mount.alive() if each.of == of), None)
        if not region:
            region = Region(0, self.user, set(), size=MAX_SIZE, locked=False, of=of)
            region.change(0, MAX_SIZE)
            region.layout.put(Extent(0, MAX_SIZE, content, 0, writable, may_write=writable))
        self._opened(handle, region, access)

    # Windows: ABI, Windows; Errors, mmap.

    def attach(self, window: Window) -> None:
        """The window exists from now on."""
        self.windows.append(window)
        window.region.windows.append(window)

    def detach(self, window: Window) -> None:
        """And no longer."""
        self.windows.remove(window)
        window.region.windows.remove(window)

    def window(self, address: int) -> Window:
        """The window at an address that has one."""
        return next(each for each in self.windows if each.address <= address < each.end)

    def touched(self, start: int, end: int) -> list[Window]:
        """Windows that have a byte between two addresses."""
        return [each for each in self.windows if each.address < end and start < each.end]

    def _clear(self, start: int, size: int, code: int = errno.EINVAL) -> None:
        """Unmap what is in a range; a window goes as a whole or the call is refused."""
        windows = self.touched(start, start + size)
        whole = all(start <= each.address and each.end <= start + size for each in windows)
        refuse_if(not whole, code)
        for each in windows:
            self.detach(each)

    def mmap(
        self, handle: int, size: int, prot: int, flags: int, address: int, offset: int
    ) -> Window:
        """mmap(2). Without MAP_FIXED the kernel chooses the address, a multiple of a slot."""
        refuse_if(offset % PAGE, errno.EINVAL)
        file = self._file(handle)
        refuse_if(not size, errno.EINVAL)
        size = -(-size // PAGE) * PAGE
        fixed = flags & (FIXED | NOREPLACE)
        refuse_if(size > ADDRESSES - PAGE, errno.ENOMEM)
        refuse_if(fixed and file.region and (address | size) % SLOT, errno.EINVAL)
        if not fixed:
            refuse_if(size > ADDRESSES - SLOT, errno.ENOMEM)
            address = 0
        refuse_if(address + size > ADDRESSES - PAGE, errno.ENOMEM)
        refuse_if(address % PAGE, errno.EINVAL)
        taken = flags & NOREPLACE and self.touched(address, address + size)
        refuse_if(taken, errno.EEXIST)
        refuse_if(not flags & 3, errno.EINVAL)
        shared, writable = flags & 3 == SHARED, bool(prot & WRITE)
        refuse_if(shared and writable and not file.writable, errno.EACCES)
        refuse_if(not file.readable, errno.EACCES)
        refuse_if(prot & EXEC, errno.EPERM)
        refuse_if(not file.region, errno.ENODEV)
        assert file.region
        if fixed:
            self._clear(address, size, self.mount.over_a_part)
        refuse_if(not shared and writable and size > self.mount.memory, errno.ENOMEM)
        refuse_if(not shared or not prot & RW, errno.EINVAL)
        refuse_if((address | size | offset) % SLOT, errno.EINVAL)
        refuse_if(offset + size > file.region.size, errno.EINVAL)
        window = Window(file.region, address, size, offset, writable, bool(prot & READ))
        self.attach(window)
        return window

    def munmap(self, address: int, size: int) -> None:
        """munmap(2): of whole windows."""
        refuse_if(address % PAGE or not size, errno.EINVAL)
        self._clear(address, size)

    def cover(self, address: int, size: int) -> None:
        """mmap(2) of other memory, with MAP_FIXED, over whole windows; then munmap(2) of it."""
        self._clear(address, size, self.mount.over_a_part)

    def mremap(self, address: int, old: int, new: int, flags: int, target: int) -> None:
        """mremap(2) of an address in a window: all of it, to another aligned address."""
        refuse_if(flags & TO_FIXED and not flags & MAYMOVE, errno.EINVAL)
        refuse_if(flags & DONTUNMAP and old != new, errno.EINVAL)
        window = self.window(address)
        if flags & TO_FIXED:
            overlap = target < address + old and address < target + new
            refuse_if(target % PAGE or overlap, errno.EINVAL)
            self._clear(target, new)
        refuse_if(new < old or flags & DONTUNMAP, errno.EINVAL)
        refuse_if(new > old or address + old > window.end, errno.EFAULT)
        if not flags & TO_FIXED:
            return
        refuse_if((address, old) != (window.address, window.size), errno.EINVAL)
        refuse_if(target % SLOT, errno.EINVAL)
        window.address = target
        window.loose.clear()

    def mprotect(self, address: int, size: int, prot: int) -> None:
        """mprotect(2): never. A window's rights are those it was made with."""
        more = prot & EXEC or (prot & WRITE and not self.window(address).writable)
        refuse(errno.EACCES if more else errno.EINVAL)

    def madvise(self, address: int, size: int, advice: str) -> None:
        """madvise(2): advice changes what is in memory, not what is there."""
        window = self.window(address)
        ADVICE[advice](window, address, size)

    def mlock(self, address: int, size: int) -> None:
        """mlock(2): brings pages in, and locks none."""
        self._check_limit(size)
        window = self.window(address)
        try:
            populate(window, address, size, write=False)
        except OSError:
            refuse(errno.ENOMEM)

    # Other memory, which OPEN_MAPPING can be asked about.

    def mmap_other(
        self, address: int, source: str, size: int, prot: int, flags: int, offset: int
    ) -> None:
        """mmap(2) of a file or new memory, or shmat(2) of a new segment that has been removed."""
        self.munmap_other(address)
        made = source in ("anonymous", "segment")
        file = Source(Content(size)) if made else self.mount.sources[source]
        shared, writable = flags & 3 == SHARED, bool(prot & WRITE)
        refuse_if(not file.readable, errno.EACCES)
        refuse_if(shared and writable and not file.writable, errno.EACCES)
        refuse_if(shared and writable and file.sealed, errno.EPERM)
        assert file.content
        may_write = writable if source == "segment" else file.writable and not file.sealed
        self.others.append(
            Mapping(address, size, file.content, offset, shared, writable, may_write, file.writable)
        )

    def munmap_other(self, address: int) -> None:
        """munmap(2) of it."""
        self.others = [each for each in self.others if each.address != address]

    def _mapped(self, address: int) -> Mapping | None:
        found = (each for each in self.others if each.address <= address < each.end)
        return next(found, None)

    # Memory: ABI, Faults.

    def memory(self, address: int) -> Window | Mapping:
        """What is at an address where something is."""
        return self._mapped(address) or self.window(address)

    def load(self, address: int, size: int) -> tuple[bytes, bool]:
        """Bytes of one page, and whether reading them may be a fault."""
        page, fault = self.memory(address).access(address, write=False)
        return bytes(page[address % PAGE :][:size]), fault

    def store(self, address: int, data: bytes) -> bool:
        """Write bytes of one page; whether that may be a fault."""
        page, fault = self.memory(address).access(address, write=True)
        page[address % PAGE : address % PAGE + len(data)] = data
        return fault

    def end_of(self, address: int, write: bool) -> str | None:
        """The signal that a child of fork gets by an access for which this process gets one."""
        memory = self.memory(address)
        try:
            memory.find(address, write=write)
        except Fault as fault:
            inherited = not isinstance(memory, Window) or memory.kept["fork"] == "DOFORK"
            return fault.signal.name if inherited else signal.SIGSEGV.name
        return None

    # Files that are mapped into regions, by read, write and ftruncate of their own.

    def file_read(self, source: str, offset: int, size: int) -> bytes:
        """pread(2) inside one page of a file: what was stored through a region is there."""
        content = self.mount.sources[source].content
        assert content
        page = content.pages.get(offset // PAGE, bytes(PAGE))
        inside = offset < (content.size or 0)
        return bytes(page[offset % PAGE :][:size]) if inside else b""

    def file_write(self, source: str, offset: int, data: bytes) -> None:
        """pwrite(2) inside one page of a file: it is in the region at once."""
        content = self.mount.sources[source].content
        assert content
        content.size = max(content.size or 0, (offset // PAGE + 1) * PAGE)
        content.page(offset // PAGE)[offset % PAGE : offset % PAGE + len(data)] = data

    def file_resize(self, source: str, size: int) -> None:
        """ftruncate(2) of a file: what lies past the end in a region is SIGBUS."""
        content = self.mount.sources[source].content
        assert content
        content.resize(size)
