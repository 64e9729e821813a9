"""What runs in the guest before and after the command: an initramfs with a busybox script.

The first stage loads the modules the guest needs to see its host, mounts the host's root (9p,
read-only) under an overlay in memory, and switches to it. The second mounts the rest, loads
mshare and runs the command. Both speak to the host over virtio-serial ports, by name:
``ctl`` (ready, fail, exit), ``out``, ``err``, ``in``, or ``tty`` for an interactive shell.

The command gets pipes, not ports: a port can be opened once only, so ``/dev/stdout`` would
fail. When a stream has ended a mark follows it, so the host knows that nothing is missing.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mshare.lab.packages import apt_command

#: Folders of the host that the guest covers with file systems of its own.
COVERED = ("/tmp", "/run", "/dev", "/proc", "/sys")
MOUNT_POINT = "/sys/fs/mshare"
DISK = "/mnt/disk"
END_OF_LOG = "mshare-lab: end of log"
_RUN = "/run/mshare-lab"
_PASSED = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "TERM", "CI", "NO_COLOR", "VIRTUAL_ENV")
_PASSED_PREFIXES = ("PYTHON", "PYTEST", "MSHARE", "LC_")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_STAGE1 = r"""#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /host /rw /new /keep
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
fail() {
    echo "mshare-lab: $*" > /dev/kmsg
    echo "mshare-lab: end of log" > /dev/kmsg
    [ -n "$ctl" ] && echo "fail $*" >&3
    $b sleep 60
    $b poweroff -f
}
for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    $b insmod "$module" || fail "cannot load $module"
done
find_port() {
    tries=0
    while [ $tries -lt 500 ]; do
        for entry in /sys/class/virtio-ports/*; do
            [ -e "$entry/name" ] || continue
            read -r name < "$entry/name"
            if [ "$name" = "$1" ]; then
                port=/dev/${entry##*/}
                [ -e "$port" ] && return
            fi
        done
        $b usleep 20000
        tries=$((tries + 1))
    done
    fail "no port $1"
}
find_port ctl
exec 3>"$port"
ctl=1
if [ -e /lab/tty ]; then
    :
else
    find_port out
    exec 4>"$port"
    find_port err
    exec 5>"$port"
    find_port in
    exec 6<"$port"
fi
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose,noxattr root /host ||
    fail "cannot mount the host's root"
$b mount -t tmpfs -o mode=755 rw /rw
$b mkdir /rw/upper /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new ||
    fail "cannot mount the overlay"
$b mount -o bind /new /keep
$b mount -t tmpfs -o mode=1777 tmp /new/tmp
$b mount -t tmpfs -o mode=755 run /new/run
$b mount -o move /dev /new/dev
$b mount -o move /proc /new/proc
$b mount -o move /sys /new/sys
while read -r path; do
    $b mkdir -p "/new$path"
    $b mount -o bind "/keep$path" "/new$path" || fail "cannot show $path"
done < /lab/shown
if [ -s /lab/written ]; then
    read -r path < /lab/written
    $b mkdir -p "/new$path"
    $b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 written "/new$path" ||
        fail "cannot mount $path"
fi
$b mkdir -p /new/run/mshare-lab
$b cp -a /lab/. /bin/busybox /new/run/mshare-lab/
exec $b switch_root /new /run/mshare-lab/busybox sh /run/mshare-lab/stage2
"""

_STAGE2 = r"""lab=/run/mshare-lab
b=$lab/busybox
fail() {
    echo "mshare-lab: $*" > /dev/kmsg
    echo "mshare-lab: end of log" > /dev/kmsg
    echo "fail $*" >&3
    $b sleep 60
    $b poweroff -f
}
find_disk() {
    for entry in /sys/block/vd*; do
        [ -e "$entry/serial" ] || continue
        serial=
        read -r serial < "$entry/serial"
        [ "$serial" = "$1" ] && disk=/dev/${entry##*/} && return
    done
    fail "no disk $1"
}
cd /
$b mkdir -p /dev/pts /dev/shm /dev/hugepages
$b mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
$b mount -t tmpfs -o mode=1777 shm /dev/shm
$b mount -t hugetlbfs -o mode=1777 hugetlbfs /dev/hugepages
$b ln -sf /proc/self/fd /dev/fd
$b ln -sf /proc/self/fd/0 /dev/stdin
$b ln -sf /proc/self/fd/1 /dev/stdout
$b ln -sf /proc/self/fd/2 /dev/stderr
$b mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control
$b mount -t securityfs securityfs /sys/kernel/security 2> /dev/null
$b mount -t debugfs debugfs /sys/kernel/debug 2> /dev/null
$b mount -t tracefs tracefs /sys/kernel/tracing 2> /dev/null
$b ip link set lo up
$b hostname mshare-lab
if [ -e $lab/swap ]; then
    find_disk swap
    $b mkswap "$disk" > /dev/null && $b swapon "$disk" || fail "cannot swap on $disk"
fi
if [ -e $lab/disk ]; then
    find_disk disk
    $b mkdir -p /mnt/disk
    $b mount -t ext4 "$disk" /mnt/disk || fail "cannot mount $disk"
    $b chmod 1777 /mnt/disk
fi
if [ -e $lab/module.ko ]; then
    insmod=/sbin/insmod
    [ -x $insmod ] || insmod="$b insmod"
    $insmod $lab/module.ko || fail "the module does not load"
    if [ -d /sys/fs/mshare ]; then
        $b mount -t msharefs msharefs /sys/fs/mshare || fail "cannot mount msharefs"
    fi
fi
read -r uptime rest < /proc/uptime
echo "ready $uptime" >&3
if [ -e $lab/tty ]; then
    $b setsid -c /bin/sh $lab/command < /dev/hvc0 > /dev/hvc0 2>&1 3>&-
    status=$?
    keep=
else
    # Each pipe is opened for both ways first: no open waits for the other end.
    $b mkfifo $lab/out $lab/err $lab/in
    exec 7<> $lab/out 8< $lab/out 9> $lab/out 7>&-
    $b cat <&8 >&4 3>&- 5>&- 6<&- 8<&- 9>&- &
    keep=$!
    exec 8<&- 1>&9 9>&-
    exec 7<> $lab/err 8< $lab/err 9> $lab/err 7>&-
    $b cat <&8 >&5 3>&- 4>&- 6<&- 8<&- 9>&- &
    keep="$keep $!"
    exec 7<> $lab/in 8< $lab/in
    $b cat <&6 >&7 2> /dev/null 3>&- 4>&- 5>&- 7>&- 8<&- 9>&- &
    exec 7>&-
    # What they carry must arrive, whoever else is killed for want of memory.
    for pid in $keep $!; do
        echo -1000 > /proc/$pid/oom_score_adj
    done
    # Not with "&": a shell starts such a command with SIGINT ignored.
    $b setsid /bin/sh $lab/command <&8 2>&9 3>&- 4>&- 5>&- 6<&- 8<&- 9>&-
    status=$?
    exec 1> /dev/console 8<&- 9>&-
fi
lost=
for entry in /proc/[0-9]*; do
    pid=${entry#/proc/}
    case " 1 $keep " in
        *" $pid "*) ;;
        *) kill -9 "$pid" 2> /dev/null ;;
    esac
done
if [ -n "$keep" ]; then
    for pid in $keep; do
        wait $pid || lost=1
    done
    $b cat $lab/mark >&4
    $b cat $lab/mark >&5
fi
cd /
if [ -e $lab/module.ko ]; then
    [ -d /sys/fs/mshare ] && $b umount /sys/fs/mshare 2> /dev/null
    read -r module < $lab/module.name
    $b rmmod "$module" 2> /dev/null
fi
if [ -e /sys/kernel/debug/kmemleak ]; then
    $b sleep 6
    echo scan > /sys/kernel/debug/kmemleak
fi
[ -z "$lost" ] || echo "fail a part of the output is lost: what carries it ended early" >&3
echo "exit $status" >&3
echo "mshare-lab: end of log" > /dev/kmsg
$b sleep 60
$b poweroff -f
"""


@dataclass
class Guest:
    """The command and what it finds; ``mark`` ends each of its streams."""

    command: Sequence[str]
    cwd: Path
    environment: Mapping[str, str]
    shown: Sequence[Path] = ()
    module: Path | None = None
    modules: Sequence[tuple[str, bytes]] = ()
    terminal: tuple[int, int] | None = None
    disk: bool = False
    swap: bool = False
    written: Path | None = None
    mark: bytes = field(default_factory=lambda: os.urandom(24).hex().encode())

    def initramfs(self, busybox: bytes) -> bytes:
        """The archive the kernel boots into."""
        lab: dict[str, bytes] = {
            "command": self._script().encode(errors="surrogateescape"),
            "stage2": _STAGE2.encode(),
            "mark": self.mark,
            "shown": "".join(f"{path}\n" for path in self._shown()).encode(),
        }
        if self.written:
            lab["written"] = f"{self.written}\n".encode()
        if self.module:
            lab["module.ko"] = self.module.read_bytes()
            lab["module.name"] = self.module.stem.replace("-", "_").encode() + b"\n"
        for name, wanted in (("tty", self.terminal), ("disk", self.disk), ("swap", self.swap)):
            if wanted:
                lab[name] = b""
        files = {"init": _STAGE1.encode(), "bin/busybox": busybox}
        files |= {f"lab/{name}": data for name, data in lab.items()}
        for index, (name, data) in enumerate(self.modules):
            files[f"modules/{index:02}-{name}.ko"] = data
        return archive(["bin", "lab", "modules", "dev"], files)

    def _shown(self) -> list[str]:
        """Folders of the host to put back where the guest covers them."""
        covered = tuple(f"{folder}/" for folder in COVERED)
        paths = {str(path) for path in self.shown if f"{path}/".startswith(covered)}
        return sorted(path for path in paths if path not in COVERED)

    def _script(self) -> str:
        """The shell script that becomes the command; unset what the kernel left in init."""
        lines = ["for name in $(env | sed 's/=.*//'); do unset $name; done"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.terminal:
            columns, rows = self.terminal
            if columns and rows:
                lines.append(f"stty cols {columns} rows {rows}")
        lines.append(f"cd {shlex.quote(str(self.cwd))} || exit 125")
        lines.append("exec " + shlex.join(self.command))
        return "\n".join(lines) + "\n"


def guest_environment(host: Mapping[str, str]) -> dict[str, str]:
    """The part of the caller's environment a command inside sees."""
    environment = {
        name: value
        for name, value in host.items()
        if name.isidentifier() and (name in _PASSED or name.startswith(_PASSED_PREFIXES))
    }
    environment.setdefault("HOME", "/root")
    environment["PATH"] = ":".join(filter(None, (host.get("PATH"), _SYSTEM_PATH)))
    environment["MSHARE_LAB"] = "1"
    return environment


def read_busybox() -> bytes:
    """The static busybox of this machine.

    :raises FileNotFoundError: not installed, or not the static one.
    """
    command = apt_command(["busybox-static"])
    for place in ("/usr/bin/busybox", "/bin/busybox"):
        if os.access(place, os.R_OK):
            data = Path(place).read_bytes()
            if b"/ld-linux" in data[:8192]:
                raise FileNotFoundError(errno.ENOENT, f"not static; try: {command}", place)
            return data
    raise FileNotFoundError(errno.ENOENT, f"not installed; try: {command}", "busybox")


def archive(folders: Sequence[str], files: Mapping[str, bytes]) -> bytes:
    """A cpio archive ("newc") of executable files; the console's node comes with the kernel."""
    parts: list[bytes] = []
    entries = [(name, stat.S_IFDIR, b"") for name in folders]
    entries += [(name, stat.S_IFREG, data) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    for inode, (name, kind, data) in enumerate(entries, 1):
        mode = kind | 0o755 if kind else 0
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        parts.append(b"070701" + b"".join(b"%08x" % value for value in fields))
        parts.append(name.encode() + b"\0" + b"\0" * (-(110 + len(name) + 1) % 4))
        parts.append(data + b"\0" * (-len(data) % 4))
    return b"".join(parts)
