"""The lab without a boot: which kernel, what counts as a report, what the guest gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mshare.lab import Options, kernels, options, session
from mshare.lab.build import build_module
from mshare.lab.guest import Guest, archive, guest_environment
from mshare.lab.kmsg import find_reports, is_report, kernels_races, message
from mshare.lab.packages import SERIES, apt_command, kernel_packages, version_key

REPORTS = """\
------------[ cut here ]------------
WARNING: CPU: 1 PID: 170 at /src/mshare.c:2 init+0x15/0xff0 [mshare]
WARNING: possible circular locking dependency detected
WARNING: possible recursive locking detected
WARNING: inconsistent lock state
WARNING: suspicious RCU usage
WARNING: bad unlock balance detected!
BUG: kernel NULL pointer dereference, address: 0000000000000008
BUG: KASAN: slab-use-after-free in graft+0x1/0x2 [mshare]
BUG: KCSAN: data-race in mshare_graft [mshare] / mshare_ungraft [mshare]
BUG: KCSAN: data-race in mshare_graft [mshare]
BUG: KCSAN: data-race in mas_walk / drain [mshare]
BUG: KFENCE: use-after-free read in a
BUG: Bad page state in process python3  pfn:12345
BUG: Bad rss-counter state mm:00000000 type:MM_SHMEMPAGES val:1
BUG: non-zero pgtables_bytes on freeing mm: 4096
BUG: sleeping function called from invalid context at mm/x.c:1
BUG kmalloc-64 (Tainted: G           O      ): Redzone overwritten
kernel BUG at mm/memory.c:1234!
Oops: 0002 [#1] PREEMPT SMP NOPTI
Oops: general protection fault, probably for non-canonical address: 0000 [#1]
general protection fault, probably for non-canonical address 0xdead: 0000 [#1] PREEMPT SMP
Kernel panic - not syncing: sysrq triggered crash
UBSAN: array-index-out-of-bounds in mm/x.c:1:2
kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)
INFO: task python3:123 blocked for more than 120 seconds.
watchdog: BUG: soft lockup - CPU#0 stuck for 52s! [python3:123]
NMI watchdog: Watchdog detected hard LOCKUP on cpu 0
rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:
rcu: INFO: rcu_preempt self-detected stall on CPU
INFO: trying to register non-static key.
list_del corruption. prev->next should be x, but was y
sysfs: cannot create duplicate filename '/fs/mshare'
"""

HARMLESS = """\
traps: python3[12] general protection fault ip:7f sp:7f error:0 in libc.so.6[7f+1000]
python3[12]: segfault at 0 ip 00007f sp 00007f error 4 in x.so
python3: page allocation failure: order:0, mode:0xcc0(GFP_KERNEL), nodemask=(null)
python3 invoked oom-killer: gfp_mask=0x140dca, order=0, oom_score_adj=0
Out of memory: Killed process 12 (python3) total-vm:1kB
RETBleed: WARNING: Spectre v2 mitigation leaves CPU vulnerable to RETBleed attacks, data leaks
AMD-Vi: AMD IOMMUv2 functionality not available on this system - This is not a bug.
PCI: Using host bridge windows from ACPI; if necessary, use "pci=nocrs" and report a bug
tsc: Marking TSC unstable due to TSCs unsynchronized
BUG: KCSAN: data-race in mas_walk / mas_store_prealloc
BUG: KCSAN: data-race in __mod_memcg_lruvec_state
BUG: KCSAN: assert: race in dequeue_entities / ttwu_do_activate
kmemleak: 0 new suspected memory leaks
RCU CPU stall warnings timeout set to 60 (rcu_cpu_stall_timeout).
printk: debug: ignoring loglevel setting.
mshare: module verification failed: signature and/or required key missing - tainting kernel
"""


@pytest.mark.parametrize("line", REPORTS.splitlines())
@pytest.mark.parametrize("stamp", ["", "[    4.690848] ", "[   12.000001][   T123] "])
def test_report_found(line: str, stamp: str) -> None:
    """Whatever the kernel says when it caught itself is a report."""
    assert is_report(stamp + line)


@pytest.mark.parametrize("line", HARMLESS.splitlines())
def test_harmless_line(line: str) -> None:
    """A user program's crash, a failed allocation and the noise of a boot are none."""
    assert not is_report(f"[    1.000000] {line}")


def test_report_is_whole() -> None:
    """A report has its end mark, the next one is another, and the title is what it says."""
    log = "\n".join(
        [
            "[    1.0] before",
            "[    2.0] ------------[ cut here ]------------",
            "[    2.0] WARNING: CPU: 1 PID: 170 at a.c:2 init+0x15/0xff0 [mshare]",
            "[    2.0] Call Trace:",
            "[    2.0] ---[ end trace 0000000000000000 ]---",
            "[    3.0] between",
            "[    4.0] BUG: non-zero pgtables_bytes on freeing mm: 4096",
        ]
    )
    first, second = find_reports(log)
    assert first.title.startswith("WARNING: CPU: 1")
    assert first.lines[-1].endswith("[ end trace 0000000000000000 ]---")
    assert message(second.title) == "BUG: non-zero pgtables_bytes on freeing mm: 4096"
    assert find_reports("") == []


def test_races_of_the_kernel_are_counted() -> None:
    """A data race without a module in it is no report; it is counted by its title."""
    titles = ["data-race in a / b", "data-race in c", "data-race in a / b"]
    log = "\n".join(f"[    1.0][  T1] BUG: KCSAN: {title}" for title in titles)
    assert find_reports(log) == []
    assert kernels_races(log) == {"data-race in a / b": 2, "data-race in c": 1}
    log += "\n[    2.0][  T1] BUG: KCSAN: data-race in graft [mshare] / a"
    assert len(find_reports(log)) == 1
    assert kernels_races(log).total() == 3


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``/boot`` and a ``/lib/modules`` of one's own; returns the first."""
    folder = tmp_path / "boot"
    folder.mkdir()
    monkeypatch.setattr(kernels, "BOOT", folder)
    monkeypatch.setattr(kernels, "MODULES", tmp_path / "modules")
    return folder


def bzimage(path: Path, release: str) -> Path:
    """A file with the header of a bzImage."""
    data = bytearray(0x400)
    data[0x202:0x206] = b"HdrS"
    data[0x20E:0x210] = (0x100).to_bytes(2, "little")
    text = f"{release} (builder@host) #1 SMP".encode() + b"\0"
    data[0x300 : 0x300 + len(text)] = text
    path.write_bytes(data)
    return path


def test_newest_kernel_of_a_series(boot: Path) -> None:
    """Numbers are compared as numbers; real-time, cloud and other series are left alone."""
    for release in (
        "6.1.0-9-amd64",
        "6.1.0-56-amd64",
        "6.1.0-60-rt-amd64",
        "6.1.0-61-cloud-amd64",
        "6.12.9+deb12-amd64",
        "6.12.117+deb12-amd64",
    ):
        bzimage(boot / f"vmlinuz-{release}", release)
    assert kernels.find_kernel("6.1").release == "6.1.0-56-amd64"
    assert kernels.find_kernel("6.12").release == "6.12.117+deb12-amd64"
    assert kernels.find_kernel().series == SERIES[0]
    assert kernels.find_kernel("6.1.0-9-amd64").release == "6.1.0-9-amd64"
    assert kernels.find_kernel(str(boot / "vmlinuz-6.1.0-9-amd64")).build is None


def test_missing_kernel_names_the_command(boot: Path) -> None:
    """The error has the line to type."""
    for name in (None, "6.1", "6.12"):
        with pytest.raises(FileNotFoundError, match=r"apt-get install .*linux-image-6\.1"):
            kernels.find_kernel(name)
    with pytest.raises(FileNotFoundError, match="no kernel image or build tree"):
        kernels.find_kernel(str(boot / "nothing"))


def test_not_a_kernel(boot: Path) -> None:
    """A file that is no bzImage, and a folder that is no build tree, are named."""
    (boot / "text").write_text("text")
    with pytest.raises(ValueError, match="not a Linux bzImage"):
        kernels.find_kernel(str(boot / "text"))
    with pytest.raises(FileNotFoundError, match="not a built kernel tree"):
        kernels.find_kernel(str(boot))


def test_build_tree(boot: Path) -> None:
    """A build tree is a kernel, if what the guest needs is built in."""
    tree = boot / "linux"
    (tree / "arch/x86/boot").mkdir(parents=True)
    (tree / "include/config").mkdir(parents=True)
    bzimage(tree / "arch/x86/boot/bzImage", "6.12.1-debug")
    (tree / "include/config/kernel.release").write_text("6.12.1-debug\n")
    (tree / ".config").write_text("CONFIG_VIRTIO_PCI=y\nCONFIG_9P_FS=m\n")
    with pytest.raises(ValueError, match="9P_FS"):
        kernels.find_kernel(str(tree))
    symbols = [symbol for _, symbol in kernels.NEEDED]
    (tree / ".config").write_text("".join(f"CONFIG_{symbol}=y\n" for symbol in symbols))
    kernel = kernels.find_kernel(str(tree))
    assert (kernel.release, kernel.build) == ("6.12.1-debug", tree)
    assert kernels.needed_modules(kernel, True) == []


def test_module_order(tmp_path: Path) -> None:
    """Modules come after what they depend on, once each; built-in ones are left out."""
    (tmp_path / "modules.builtin").write_text("kernel/virtio_pci.ko\nkernel/virtio_console.ko\n")
    (tmp_path / "modules.dep").write_text(
        "a/9p.ko: a/9pnet.ko a/netfs.ko\na/9pnet.ko:\na/netfs.ko:\n"
        "a/9pnet_virtio.ko: a/9pnet.ko\na/overlay.ko:\n"
    )
    (tmp_path / "a").mkdir()
    for name in ("9p", "9pnet", "netfs", "9pnet_virtio", "overlay"):
        (tmp_path / f"a/{name}.ko").write_bytes(name.encode())
    kernel = kernels.Kernel("6.1", tmp_path, None, tmp_path)
    names = [name for name, _ in kernels.needed_modules(kernel, False)]
    assert names == ["9pnet", "9pnet_virtio", "netfs", "9p", "overlay"]


def test_packages() -> None:
    """Versions order by number, and the command is one line."""
    assert version_key("6.12.117+deb12") > version_key("6.12.9+deb12")
    image, headers = kernel_packages("9.99")
    assert apt_command([image, headers]).endswith(f"'{image}' '{headers}'")


def test_environment() -> None:
    """The guest sees what programs need, and nothing else of the caller."""
    host = {"PATH": "/x", "MSHARE_ENGINE": "shm", "PYTHONPATH": "/y", "SECRET": "1", "TERM": "a"}
    seen = guest_environment(host)
    assert seen["PATH"].startswith("/x:") and "/usr/sbin" in seen["PATH"]
    assert (seen["MSHARE_ENGINE"], seen["PYTHONPATH"], seen["TERM"]) == ("shm", "/y", "a")
    assert "SECRET" not in seen


def test_log_is_left_alone_until_it_runs(
    boot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line alone does not empty the log of an earlier run."""
    log = tmp_path / "log"
    log.write_text("earlier\n")
    kernel = kernels.Kernel("6.1", bzimage(boot / "vmlinuz", "6.1"), None, boot)
    monkeypatch.setattr(options, "find_kernel", lambda name: kernel)
    monkeypatch.setattr(options, "needed_modules", lambda kernel, disks: [])
    options.command_line(["true"], Options(module=False, accel="tcg", log=log))
    assert log.read_text() == "earlier\n"


@pytest.mark.parametrize(
    ("log", "reason", "boots"),
    [
        ("[ 2.2] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI\n", "", 2),
        ("[ 2.2] int3: 0000 [#1] PREEMPT SMP NOPTI\n", "", 2),
        ("[ 2.1] Run /init as init process\n[ 2.2] Oops: int3: 0000 [#1] PREEMPT SMP\n", "", 1),
        ("[ 2.2] Oops: 0002 [#1] PREEMPT SMP NOPTI\n", "", 1),
        ("[ 2.1] Run /init as init process\n", "", 1),
        ("[ 2.2] Running RCU-tasks wait API self tests\n", "did not boot within 300 s", 2),
        ("[ 2.1] Run /init as init process\n", "did not boot within 300 s", 1),
        ("[ 2.2] Running RCU-tasks wait API self tests\n", "not done within 20 s", 1),
    ],
)
def test_what_the_emulator_broke_is_booted_again(
    boot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, reason: str, boots: int
) -> None:
    """Once, and only what ended before anything of ours ran."""
    seen = []

    def run(self: session.Session) -> session.Result:
        seen.append(self)
        assert self.log is not None
        os.write(self.log, log.encode())
        self._control(b"exit 3\n")
        return session.Result(3, 3, b"", b"", log, [], None, 1.0, reason)

    kernel = kernels.Kernel("6.1", bzimage(boot / "vmlinuz", "6.1"), None, boot)
    monkeypatch.setattr(options, "find_kernel", lambda name: kernel)
    monkeypatch.setattr(options, "needed_modules", lambda kernel, disks: [])
    monkeypatch.setattr(session.Session, "run", run)
    path = tmp_path / "log"
    options.run(["true"], Options(module=False, accel="tcg", log=path, disk=1 << 20))
    assert len(seen) == boots
    assert path.read_text() == log
    assert len({id(each._control_text) for each in seen}) == boots


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Options(timeout=float("nan")), "processors and time"),
        (Options(cpus=0), "processors and time"),
        (Options(hugepages=-1), "huge pages is 0 or more"),
    ],
)
def test_options_out_of_range(wrong: Options, message: str) -> None:
    """What is wrong is named."""
    with pytest.raises(ValueError, match=message):
        options.command_line(["true"], wrong)


def test_folder_without_sources(tmp_path: Path) -> None:
    """The message is a whole sentence about the folder."""
    kernel = kernels.Kernel("6.1", tmp_path, None, tmp_path)
    with pytest.raises(FileNotFoundError, match="no Kbuild or Makefile in this folder"):
        build_module(kernel, tmp_path)


def test_covered_folders_are_shown() -> None:
    """A current directory below the guest's own /tmp is put back; /tmp itself is not."""
    guest = Guest(["true"], Path("/tmp/a b"), {}, shown=[Path("/tmp/a b"), Path("/tmp"), Path("/")])
    assert b"/tmp/a b\n" in guest.initramfs(b"")
    assert b"\n/tmp\n" not in guest.initramfs(b"")
    assert archive([], {}).startswith(b"070701")
