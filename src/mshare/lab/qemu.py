"""The QEMU command line, and whether KVM works here."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mshare.lab.guest import archive, read_busybox
from mshare.lab.images import boot_image, cache_dir
from mshare.lab.kernels import Kernel
from mshare.lab.packages import apt_command

BINARY = "qemu-system-x86_64"
KVM = Path("/dev/kvm")
PROBE_SECONDS = 5.0
_PROBE_MARK = b"mshare-lab: kvm works"

#: With la57 an emulated page walk has a fifth level, which KASAN kernels do not survive. With erms
#: and fsrm kernels clear and copy pages byte by byte, which takes an emulator three times as long.
_EMULATED_CPU = "max,la57=off,erms=off,fsrm=off"
_ROOT = "security_model=none,multidevs=remap"


@dataclass(frozen=True)
class Machine:
    """The virtual machine, apart from what runs in it; memory in bytes."""

    kernel: Kernel
    memory: int = 2 << 30
    cpus: int = 2
    accel: str = "tcg"
    one_thread: bool = False
    cpu_model: str = ""
    kernel_args: str = ""
    hugepages: int = 0
    written: Path | None = None


def find_qemu() -> str:
    """Path of the emulator.

    :raises FileNotFoundError: not installed; the message has the command that installs it.
    """
    binary = shutil.which(BINARY)
    if binary is None:
        command = apt_command(["qemu-system-x86"])
        raise FileNotFoundError(errno.ENOENT, f"not installed; try: {command}", BINARY)
    return binary


def command_line(
    machine: Machine,
    initramfs: str,
    channels: Sequence[tuple[str, int]],
    disks: Sequence[tuple[str, int]] = (),
) -> list[str]:
    """The command that boots ``machine``.

    ``channels`` are ``(name, file descriptor)`` of connected sockets: ``console``, ``tty``, or a
    port; ``disks`` are ``(serial number, file descriptor)``.
    """
    kvm = machine.accel == "kvm"
    arguments = ["console=ttyS0", "ignore_loglevel", "panic=-1", "oops=panic"]
    if not kvm:
        arguments.append(_patience(120 if machine.one_thread else 60))
    if machine.hugepages:
        arguments.append(f"hugepages={machine.hugepages}")
    if machine.kernel_args:
        arguments.append(machine.kernel_args)
    model = machine.cpu_model or ("host" if kvm else _EMULATED_CPU)
    command = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # On one thread a processor that waits for another hands over to it: several machines can share
    # the host's processors without waiting for each other.
    thread = "single" if machine.one_thread else "multi"
    accel = "kvm" if kvm else f"tcg,thread={thread}"
    command += ["-machine", "q35", "-accel", accel, "-cpu", model]
    command += ["-smp", str(machine.cpus), "-m", f"{machine.memory >> 20}M"]
    command += ["-kernel", str(boot_image(machine.kernel.image)), "-initrd", initramfs]
    command += ["-append", " ".join(arguments)]
    command += ["-virtfs", f"local,path=/,mount_tag=root,readonly=on,{_ROOT}"]
    if machine.written:
        path = str(machine.written).replace(",", ",,")
        command += ["-virtfs", f"local,path={path},mount_tag=written,{_ROOT}"]
    command += ["-device", "virtio-serial-pci,max_ports=8"]
    for name, fd in channels:
        command += ["-chardev", f"socket,id={name},fd={fd}"]
        if name == "console":
            command += ["-serial", "chardev:console"]
        elif name == "tty":
            command += ["-device", "virtconsole,chardev=tty"]
        else:
            command += ["-device", f"virtserialport,chardev={name},name={name}"]
    for serial, fd in disks:
        drive = f"file=/proc/self/fd/{fd},id={serial},format=raw,if=none,cache=unsafe,discard=unmap"
        command += ["-drive", drive, "-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
    return command


def _patience(seconds: int) -> str:
    """Emulated processors are slow, and their host may be busy: what looks like a stall after
    20 seconds is none. A real one is still reported, after ``seconds``. Their time stamp counters
    agree, which the kernel doubts.
    """
    stall = f"watchdog_thresh={seconds // 2} rcupdate.rcu_cpu_stall_timeout={seconds}"
    return f"{stall} tsc=reliable"


def start(
    command: Sequence[str],
    keep: Sequence[int],
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start QEMU with the descriptors ``keep``; it dies with this process, whatever happens."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=keep,
        start_new_session=True,
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End QEMU; never wait for more than a few seconds."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def choose_accel(wanted: str, kernel: Kernel) -> tuple[str, str]:
    """``kvm`` or ``tcg``, and a line for the user where KVM was there and is not used.

    :raises OSError: KVM was asked for by name and does not work.
    """
    if wanted == "tcg":
        return "tcg", ""
    if not os.access(KVM, os.R_OK | os.W_OK):
        if wanted == "kvm":
            raise OSError(errno.ENODEV, "KVM is not here or not yours to use", str(KVM))
        return "tcg", ""
    if _kvm_works(kernel, again=wanted == "kvm"):
        return "kvm", ""
    reason = "KVM is here but does not boot this kernel"
    if wanted == "kvm":
        raise OSError(errno.ENODEV, reason, str(KVM))
    return "tcg", f"{reason}; using emulation (slower)"


def _kvm_works(kernel: Kernel, *, again: bool) -> bool:
    """The verdict on KVM, remembered until the host boots; a bad one can be asked for ``again``."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    file = cache_dir() / "kvm.json"
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    key = f"{boot} {kernel.release} {kernel.image}"
    verdict = known.get(key)
    if not isinstance(verdict, bool) or (again and not verdict):
        known = {name: value for name, value in known.items() if name.startswith(boot)}
        verdict = known[key] = _probe(kernel)
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(known))
        scratch.replace(file)
    return verdict


def _probe(kernel: Kernel) -> bool:
    """Boot the kernel with KVM into a script that says hello, for a few seconds at most."""
    script = f"#!/bin/busybox sh\necho '{_PROBE_MARK.decode()}' > /dev/console\n"
    script += "/bin/busybox poweroff -f\n"
    data = archive(["bin", "dev"], {"init": script.encode(), "bin/busybox": read_busybox()})
    initramfs = os.memfd_create("initramfs")
    try:
        with os.fdopen(os.dup(initramfs), "wb") as file:
            file.write(data)
        command = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "512M"]
        command += ["-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{initramfs}"]
        command += ["-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"]
        process = start(command, (initramfs,), stdout=subprocess.PIPE)
        try:
            output, _ = process.communicate(timeout=PROBE_SECONDS)
        except subprocess.TimeoutExpired as late:
            output = late.stdout or b""
        finally:
            stop(process)
        return _PROBE_MARK in output
    finally:
        os.close(initramfs)
