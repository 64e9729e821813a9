"""The lab for real, where QEMU and the kernels are: streams, statuses, limits, and no remains."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mshare.cli import lab as command
from mshare.lab import (
    EXIT_LAB,
    EXIT_REPORT,
    EXIT_TIMEOUT,
    Options,
    command_line,
    kernels,
    qemu,
    run,
)
from mshare.lab.build import build_module
from mshare.lab.packages import SERIES
from mshare.lab.qemu import BINARY
from tests.conftest import skip, started

KBUILD = "obj-m := mshare.o\n"
MODULE = """\
#include <linux/module.h>
static int __init mshare_test_init(void)
{
	%s
}
static void __exit mshare_test_exit(void) { }
module_init(mshare_test_init);
module_exit(mshare_test_exit);
MODULE_LICENSE("GPL");
"""


def lab(*arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    """``mshare lab`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mshare.lab", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | options,
    )


@pytest.fixture(params=SERIES)
def stock(request: pytest.FixtureRequest) -> str:
    """Each series in turn, where it can boot."""
    series: str = request.param
    need_lab(series)
    return series


@pytest.fixture
def newest() -> str:
    """The newest series that can boot."""
    need_lab(SERIES[0])
    return SERIES[0]


def need_lab(series: str) -> None:
    """Skip without QEMU or the kernel."""
    if shutil.which(BINARY) is None or shutil.which("busybox") is None:
        skip("needs QEMU and busybox-static")
    try:
        kernels.find_kernel(series)
    except OSError as error:
        skip(f"kernel {series}: {error}")


@pytest.fixture
def no_machine_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Afterwards no QEMU that this test started runs."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("MSHARE_TEST_MARK", mark)
    yield
    deadline = time.monotonic() + 5
    while machines(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not machines(mark)


def machines(mark: str) -> list[str]:
    """Process numbers of all QEMU with ``mark`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_text(errors="replace")
            if BINARY in text and mark.encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def module_source(folder: Path, body: str) -> Path:
    """The source of a small module that does ``body`` when loaded."""
    folder.mkdir()
    (folder / "Kbuild").write_text(KBUILD)
    (folder / "mshare.c").write_text(MODULE % body)
    return folder


def test_command_runs_as_if_here(stock: str, tmp_path: Path) -> None:
    """Streams stay apart and whole, stdin arrives, and the status, folder and files are here's."""
    data = os.urandom(300_000)
    (tmp_path / "data").write_bytes(data)
    script = "cat; cat data >&2; pwd; uname -r; echo again > /dev/stdout; rm data; exit 7"
    result = run(
        ["sh", "-c", script],
        Options(kernel=stock, module=False, cwd=tmp_path, accel="tcg", timeout=300),
        stdin=data,
    )
    assert result.status == result.command_status == 7, result.tail()
    assert result.stderr == data
    assert result.stdout[: len(data)] == data
    release = kernels.find_kernel(stock).release
    assert result.stdout[len(data) :].decode() == f"{tmp_path}\n{release}\nagain\n"
    assert (tmp_path / "data").exists()
    assert result.reports == [] and "Linux version" in result.log
    assert result.boot_seconds is not None and 0 < result.boot_seconds < result.elapsed


def test_signal_is_128_and_its_number(newest: str) -> None:
    """A command that a signal ended has the status a shell gives it; SIGINT is not ignored."""
    for name, number in (("TERM", 15), ("INT", 2)):
        result = run(["sh", "-c", f"kill -{name} $$"], Options(module=False, accel="tcg"))
        assert result.status == 128 + number


def test_lost_output_is_125(newest: str) -> None:
    """What carries the output is no victim of the OOM killer; killed by hand, the lab says so."""
    script = """
        cat > /dev/null  # then what carries the input has ended
        for folder in /proc/[0-9]*; do
            [ "$(tr '\\0' ' ' < $folder/cmdline)" = "/run/mshare-lab/busybox cat " ] || continue
            cat $folder/oom_score_adj
            [ -z "$1" ] || kill -9 ${folder#/proc/}
        done
        true
    """
    options = Options(module=False, accel="tcg")
    result = run(["sh", "-c", script, "sh"], options)
    assert (result.status, result.stdout) == (0, b"-1000\n-1000\n")
    result = run(["sh", "-c", script, "sh", "kill"], options)
    assert result.status == EXIT_LAB and "output is lost" in result.reason
    assert result.command_status == 0


def test_devices(stock: str, tmp_path: Path) -> None:
    """The file systems are there, and the disk, swap, huge pages and folder that were asked for."""
    script = """
        set -e
        grep -q ' /dev/shm tmpfs' /proc/mounts
        grep -q ' /tmp tmpfs' /proc/mounts
        grep -q ' /sys/fs/cgroup cgroup2' /proc/mounts
        grep -q ' hugetlbfs' /proc/mounts
        grep -q ' /mnt/disk ext4' /proc/mounts
        grep -q /dev/vd /proc/swaps
        grep -q 'HugePages_Total: *8$' /proc/meminfo
        echo x > /mnt/disk/file
        echo written > "$1/result"
        touch /etc/written-in-the-lab
        python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); \
socket.create_connection(s.getsockname())'
    """
    options = Options(
        kernel=stock,
        module=False,
        accel="tcg",
        disk=64 << 20,
        swap=64 << 20,
        hugepages=8,
        write=tmp_path,
        kernel_args="mitigations=off",
    )
    result = run(["sh", "-c", script, "sh", str(tmp_path)], options)
    assert result.status == 0, result.stderr.decode() + result.tail()
    assert (tmp_path / "result").read_text() == "written\n"
    assert not Path("/etc/written-in-the-lab").exists()


def test_warning_is_70(stock: str, tmp_path: Path) -> None:
    """A warning fails the run, though the command went well, and the log says why."""
    source = module_source(tmp_path / "kmod", 'WARN(1, "on purpose"); return 0;')
    done = lab("--kernel", stock, "--accel", "tcg", "--module", str(source), "--", "echo", "done")
    assert done.returncode == EXIT_REPORT, done.stderr
    assert done.stdout == "done\n"
    assert "WARNING: CPU" in done.stderr and "the command exited with 0" in done.stderr


def test_module_that_refuses(newest: str, tmp_path: Path) -> None:
    """A module that does not load is 125, and its own words are shown."""
    source = module_source(tmp_path / "kmod", 'pr_err("not on this machine\\n"); return -ENODEV;')
    done = lab("--accel", "tcg", "--module", str(source), "--", "true")
    assert done.returncode == EXIT_LAB
    assert "not on this machine" in done.stderr and "the module does not load" in done.stderr


def test_module_is_built_once(newest: str, tmp_path: Path) -> None:
    """The same text is built once, a changed one again, and the sources stay clean."""
    kernel = kernels.find_kernel(newest)
    source = module_source(tmp_path / "kmod", "return 0;")
    first = build_module(kernel, source)
    stamp = first.stat().st_mtime_ns
    assert build_module(kernel, source) == first and first.stat().st_mtime_ns == stamp
    (source / "mshare.c").write_text(MODULE % "return -EIO;")
    assert build_module(kernel, source) != first
    assert sorted(path.name for path in source.iterdir()) == ["Kbuild", "mshare.c"]
    (source / "mshare.c").write_text("this is not C\n")
    with pytest.raises(OSError, match="does not build"):
        build_module(kernel, source)


def test_panic_is_70(stock: str, no_machine_left: None, tmp_path: Path) -> None:
    """A panic ends the run at once, with what was printed before and the log."""
    log = tmp_path / "log"
    script = "echo before; sleep 1; echo c > /proc/sysrq-trigger; sleep 100"
    options = Options(kernel=stock, module=False, accel="tcg", log=log, timeout=300)
    result = run(["sh", "-c", script], options)
    assert result.status == EXIT_REPORT and result.command_status is None
    assert result.stdout == b"before\n"
    assert "sysrq triggered crash" in result.reports[0].title
    assert "sysrq triggered crash" in log.read_text()
    assert result.boot_seconds is not None and result.elapsed - result.boot_seconds < 80


def test_hang_is_124(newest: str, no_machine_left: None) -> None:
    """A command over the limit ends with the console's last lines and 124."""
    script = "echo before; trap '' TERM INT; while :; do :; done"
    for seconds in ("15", "60", "240"):  # the boot is part of them
        done = lab("--accel", "tcg", "--no-module", "--timeout", seconds, "--", "sh", "-c", script)
        if done.stdout:
            break
    assert done.returncode == EXIT_TIMEOUT
    assert done.stdout == "before\n"
    assert f"not done within {seconds} s" in done.stderr and "9p" in done.stderr


def test_boot_that_hangs_is_124(newest: str, no_machine_left: None) -> None:
    """A boot has a limit of its own."""
    options = Options(module=False, accel="tcg", boot_timeout=2, kernel_args="boot_delay=1000")
    result = run(["true"], options)
    assert result.status == EXIT_TIMEOUT and "did not boot" in result.reason
    assert result.elapsed < 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_lab_leaves_nothing(
    newest: str, no_machine_left: None, number: signal.Signals
) -> None:
    """Whatever ends the lab ends the machine."""
    lab_command = [sys.executable, "-m", "mshare.lab"]
    arguments = ["--accel", "tcg", "--no-module", "--disk", "64M", "--", "sh", "-c"]
    with started(
        [*lab_command, *arguments, "echo up; sleep 1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.send_signal(number)
        status = process.wait(20)
    assert status == (-number if number == signal.SIGKILL else 128 + number)


def test_reader_that_goes_away(newest: str, no_machine_left: None) -> None:
    """``mshare lab -- yes | head`` ends."""
    pipe = f"{sys.executable} -m mshare.lab --accel tcg --no-module -- yes | head -1"
    done = subprocess.run(
        ["sh", "-c", pipe], stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=False
    )
    assert done.stdout == b"y\n" and b"Traceback" not in done.stderr


def test_dry_run(newest: str) -> None:
    """The command line of QEMU, without starting it."""
    done = lab("--accel", "tcg", "--no-module", "--cpus", "3", "--dry-run", "--", "true")
    assert done.returncode == 0
    assert BINARY in done.stdout and "-smp 3" in done.stdout and "thread=multi" in done.stdout
    done = lab("--accel", "tcg", "--no-module", "--one-thread", "--dry-run", "--", "true")
    assert "thread=single" in done.stdout
    assert "readonly=on" in " ".join(command_line(["true"], Options(module=False, accel="tcg")))


def test_a_bad_verdict_on_kvm_is_not_the_last(
    newest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds for ``auto``; who asks for KVM by name has it tried again, and that holds then."""
    kernel = kernels.find_kernel(newest)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(qemu, "KVM", tmp_path)
    verdicts = [False, False, True]
    monkeypatch.setattr(qemu, "_probe", lambda kernel: verdicts.pop(0))
    assert [qemu.choose_accel("auto", kernel)[0] for _ in range(2)] == ["tcg", "tcg"]
    with pytest.raises(OSError, match="does not boot"):
        qemu.choose_accel("kvm", kernel)
    assert qemu.choose_accel("kvm", kernel) == ("kvm", "")
    assert qemu.choose_accel("auto", kernel) == ("kvm", "")
    assert not verdicts


def test_kvm_is_used_only_if_it_boots(newest: str) -> None:
    """``auto`` runs here in any case; ``kvm`` runs or says why not, within seconds."""
    started = time.monotonic()
    done = lab("--accel", "kvm", "--no-module", "--", "true")
    assert done.returncode in (0, EXIT_LAB)
    assert done.returncode == 0 or ("KVM" in done.stderr and time.monotonic() - started < 20)


def test_help() -> None:
    """The help has the exit codes."""
    done = lab("--help")
    assert done.returncode == 0 and "124" in done.stdout and command.SUMMARY in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--accel", "hvf"], ["--cpus", "two"], ["--no-module", "--module", "x"], ["--timeout"]],
)
def test_usage_errors(arguments: list[str]) -> None:
    """Wrong usage ends with 2."""
    assert lab(*arguments, "--", "true").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "1M"], "256 MiB of memory"),
        (["--kernel", "4.4"], "apt-get install"),
        (["--kernel", "/etc/passwd"], "not a Linux bzImage"),
        (["--module", "/nowhere"], "/nowhere"),
        (["--write", "/etc/passwd"], "not a folder"),
    ],
)
def test_lab_errors(newest: str, arguments: list[str], said: str) -> None:
    """What the lab cannot do it says in a line, and exits with 125."""
    extra = [] if "--module" in arguments else ["--no-module"]
    done = lab(*extra, *arguments, "--", "true")
    assert done.returncode == EXIT_LAB
    assert said in done.stderr and "Traceback" not in done.stderr
