"""The kernel module on this machine: build, install, load, unload, and what stands in the way."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mshare.lab.build import build_module, find_sources
from mshare.lab.kernels import Kernel
from mshare.lab.packages import SERIES, apt_command, apt_knows

NAME = "mshare"
FILE_SYSTEM = "msharefs"
MOUNT_POINT = Path("/sys/fs/mshare")
_SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
_SIGNING = (
    "its signature is needed here (Secure Boot or lockdown): install it with DKMS, which signs it, "
    "and enrol the key once with: mokutil --import /var/lib/dkms/mok.pub"
)


@dataclass(frozen=True)
class Status:
    """What there is; ``problems`` are pairs of what is wrong and what to do about it."""

    kernel: str
    kernel_supported: bool
    headers: str | None
    installed: str | None
    dkms: bool
    loaded: bool
    version: str | None
    users: int | None
    mounted: bool
    lockdown: str
    signature_enforced: bool
    secure_boot: bool
    problems: list[tuple[str, str]]


def status() -> Status:
    """Look at the machine; needs no root and changes nothing."""
    release = platform.release()
    loaded = Path(f"/sys/module/{NAME}").is_dir()
    supported, problems = _kernel_problems(release)
    headers = _headers(release)
    installed = _installed(release)
    lockdown = _lockdown()
    enforced = _read("/sys/module/module/parameters/sig_enforce") == "Y" or (
        _read("/proc/sys/kernel/module_sig_enforce") == "1"
    )
    if supported:
        if headers is None and installed is None and not loaded:
            problems.append(("no headers to build the module with", _headers_cure(release)))
        if (enforced or lockdown not in ("none", "")) and not loaded:
            problems.append(("the kernel takes signed modules only", _SIGNING))
        if not loaded:
            problems.append(("the module is not loaded", "mshare module load"))
        elif not mounts():
            problems.append((f"{FILE_SYSTEM} is not mounted", "mshare module load"))
    users = _read(f"/sys/module/{NAME}/refcnt")
    return Status(
        kernel=release,
        kernel_supported=supported,
        headers=headers,
        installed=installed,
        dkms=shutil.which("dkms") is not None,
        loaded=loaded,
        version=_read(f"/sys/module/{NAME}/version") or None,
        users=int(users) if users.isdigit() else None,
        mounted=bool(mounts()),
        lockdown=lockdown,
        signature_enforced=enforced,
        secure_boot=_secure_boot(),
        problems=problems,
    )


def build(source: Path | None = None) -> Path:
    """Build the module for the running kernel; return the ``.ko`` file.

    :raises OSError: the kernel takes no modules, headers are missing, or it does not build.
    """
    release = platform.release()
    _need_modules()
    if _headers(release) is None:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no headers of the running kernel; {_headers_cure(release)}",
            f"/lib/modules/{release}/build",
        )
    folder = Path(f"/lib/modules/{release}/build").resolve()
    kernel = Kernel(release, Path(f"/boot/vmlinuz-{release}"), folder, None)
    return build_module(kernel, (source or find_sources()).resolve())


def install(source: Path | None = None) -> str:
    """Install the module for good, with DKMS where it is; return a line that says how.

    :raises PermissionError: not root.
    :raises OSError: as :func:`build`, or DKMS failed.
    """
    _need_modules()
    _need_root("install a kernel module")
    source = (source or find_sources()).resolve()
    release = platform.release()
    if shutil.which("dkms") and (source / "dkms.conf").exists():
        version = _dkms_value(source, "PACKAGE_VERSION")
        target = Path(f"/usr/src/{NAME}-{version}")
        name = f"{NAME}/{version}"
        if Path(f"/var/lib/dkms/{name}").exists():
            _run(["dkms", "remove", name, "--all"])
        shutil.rmtree(target, ignore_errors=True)
        products = shutil.ignore_patterns(
            "*.o", "*.ko", "*.mod*", ".*", "modules.order", "*.symvers"
        )
        shutil.copytree(source, target, ignore=products)
        _run(["dkms", "add", name])
        _run(["dkms", "install", name, "-k", release])
        return f"installed {name} with DKMS, which builds it again for each new kernel"
    module = build(source)
    folder = Path(f"/lib/modules/{release}/updates")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(module, folder / module.name)
    _run(["depmod", "-a", release])
    return f"installed {folder / module.name} for {release} alone; with DKMS new kernels get it too"


def load(source: Path | None = None) -> str:
    """Load the module, installed or else built here, and mount msharefs; return what was done.

    :raises PermissionError: not root, or the kernel refuses the signature.
    :raises OSError: the kernel refuses the module; the message has its reason from the log.
    """
    _need_modules()
    _need_root("load a kernel module")
    done = []
    if not Path(f"/sys/module/{NAME}").is_dir():
        if _installed(platform.release()) and source is None:
            command = ["modprobe", NAME]
        else:
            command = ["insmod", str(build(source))]
        result = _try(command)
        if result.returncode:
            raise _refused(result.stderr)
        done.append("loaded")
    if not mounts():
        if not MOUNT_POINT.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, "the module made no mount point", str(MOUNT_POINT)
            )
        _run(["mount", "-t", FILE_SYSTEM, FILE_SYSTEM, str(MOUNT_POINT)])
        done.append(f"mounted {MOUNT_POINT}")
    return ", ".join(done) or "already loaded and mounted"


def unload() -> str:
    """Unmount msharefs and unload the module; return what was done.

    :raises OSError: EBUSY while a region exists or someone uses one; the message says which.
    """
    _need_root("unload a kernel module")
    if not Path(f"/sys/module/{NAME}").is_dir():
        return "not loaded"
    for point in mounts():
        holders = [f"{comm} ({pid})" for pid, comm in users(point)]
        if holders:
            raise _busy(f"in use by {', '.join(holders)}; end them first", point)
        regions = _regions(point)
        if regions:
            names = ", ".join(regions[:5]) + (", and more" if len(regions) > 5 else "")
            raise _busy(f"regions exist: {names}; remove them with: mshare rm", point)
        result = _try(["umount", str(point)])
        if result.returncode:
            raise _busy(result.stderr.strip(), point)
    result = _try(["rmmod", NAME])
    if result.returncode:
        raise _busy(f"{result.stderr.strip()}; an attachment or open file is left", Path(NAME))
    return "unloaded"


def mounts() -> list[Path]:
    """Where msharefs is mounted."""
    found = []
    for line in _read("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == FILE_SYSTEM:
            point = fields.split(" ")[4]
            found.append(Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)))
    return found


def users(mount: Path) -> list[tuple[int, str]]:
    """Processes that map or hold open something on the file system at ``mount``: pid and name.

    Without root, one's own only.
    """
    device = mount.stat().st_dev
    major, minor = os.major(device), os.minor(device)
    mark = f" {major:02x}:{minor:02x} "
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if mark in _read(folder / "maps") or device in _open_devices(folder):
            found.append((int(folder.name), _read(folder / "comm")))
    return found


def _open_devices(process: Path) -> Iterator[int]:
    try:
        links = [*(process / "fd").iterdir(), process / "cwd"]
    except OSError:
        return
    for link in links:
        try:
            yield link.stat().st_dev
        except OSError:
            continue


def _regions(mount: Path) -> list[str]:
    return sorted(
        str(path.relative_to(mount))
        for path in mount.rglob("*")
        if path.is_file() and path.name != "mshare_info"
    )


def _kernel_problems(release: str) -> tuple[bool, list[tuple[str, str]]]:
    """Whether the module is made for this kernel, and why not."""
    elsewhere = "try it in the lab: mshare lab -- COMMAND"
    if platform.machine() != "x86_64":
        return False, [("the module is for x86-64", elsewhere)]
    if _read("/sys/hypervisor/guest_type") == "PV":
        return False, [("the page tables of a Xen PV guest are not its own", elsewhere)]
    if not Path("/proc/modules").exists():
        why = "this kernel takes no modules (CONFIG_MODULES is not set)"
        return False, [(why, f"boot a distribution's kernel, or {elsewhere}")]
    if not re.match(_supported_pattern(), release):
        made_for = " and ".join(f"{series}.*" for series in reversed(SERIES))
        return False, [(f"the module is made for kernels {made_for}", elsewhere)]
    return True, []


def _supported_pattern() -> str:
    """What ``dkms.conf`` says, or else the series of the lab."""
    try:
        return _dkms_value(find_sources(), "BUILD_EXCLUSIVE_KERNEL")
    except OSError:
        return rf"^({'|'.join(map(re.escape, SERIES))})\."


def _dkms_value(source: Path, name: str) -> str:
    """A value of ``dkms.conf``.

    :raises OSError: no such file, or it does not set ``name``.
    """
    file = source / "dkms.conf"
    match = re.search(rf"^{name}=([\"']?)(.*)\1\s*$", file.read_text(), re.M)
    if match is None:
        raise OSError(errno.EINVAL, f"does not set {name}", str(file))
    return match[2]


def _headers(release: str) -> str | None:
    folder = Path(f"/lib/modules/{release}/build")
    return str(folder.resolve()) if (folder / "Makefile").exists() else None


def _headers_cure(release: str) -> str:
    package = f"linux-headers-{release}"
    if apt_knows(package):
        return apt_command([package, "make"])
    return f"apt has no package {package}: install the headers from where this kernel came from"


def _installed(release: str) -> str | None:
    """The installed module file for a kernel, which modprobe would load."""
    result = _try(["modinfo", "-k", release, "-F", "filename", NAME])
    return result.stdout.strip() or None


def _lockdown() -> str:
    match = re.search(r"\[(\w+)\]", _read("/sys/kernel/security/lockdown"))
    return match[1] if match else ""


def _secure_boot() -> bool:
    try:
        return _SECURE_BOOT.read_bytes()[4:5] == b"\1"
    except OSError:
        return False


def _need_modules() -> None:
    supported, problems = _kernel_problems(platform.release())
    if not supported:
        raise OSError(errno.EOPNOTSUPP, "; ".join(problems[0]), platform.release())


def _need_root(what: str) -> None:
    if os.geteuid():
        raise PermissionError(errno.EPERM, f"only root can {what}; use sudo", NAME)


def _refused(text: str) -> OSError:
    """Why the kernel did not take the module, from the loader's words and the kernel log."""
    if "Key was rejected" in text or "Required key" in text or "Operation not permitted" in text:
        return PermissionError(errno.EACCES, f"{text.strip()}; {_SIGNING}", NAME)
    lines = [line for line in _try(["dmesg"]).stdout.splitlines() if f"{NAME}:" in line]
    reason = "; ".join([text.strip(), *lines[-3:]])
    return OSError(errno.ENOEXEC, f"the kernel refuses the module: {reason}", NAME)


def _busy(message: str, thing: Path) -> OSError:
    return OSError(errno.EBUSY, message, str(thing))


def _try(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool of the system; one that is missing fails like one that says so."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    binary = shutil.which(command[0], path=path)
    if binary is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: not installed")
    return subprocess.run(
        [binary, *command[1:]],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "LC_ALL": "C"},
    )


def _run(command: Sequence[str]) -> None:
    result = _try(command)
    if result.returncode:
        output = (result.stderr.strip() or result.stdout.strip())[-2000:]
        raise OSError(errno.EIO, f"{' '.join(command)}: {output}", NAME)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
