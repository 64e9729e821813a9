"""Run a machine for long: ``python -m tests.oracle --lab 6.12 --steps 100000 --seed 7``.

With ``--lab`` the machine runs here and drives the module on that kernel in the lab; without, in
the lab, the module of the kernel that runs. ``--library ENGINE`` is the library on one engine.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

from mshare import hugepages
from tests.conftest import HUGE_BYTES
from tests.oracle.library_machine import Library, LibraryMachine
from tests.oracle.machine import Comparing, Machine
from tests.oracle.remote import Lab
from tests.oracle.run import run
from tests.oracle.setting import Kernel, Modelled


def main() -> None:
    """Steps until there are enough, in runs that can be repeated by their seed."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", action="store_true", help="compare the model with itself")
    parser.add_argument("--library", metavar="ENGINE", help="the library on this engine")
    parser.add_argument("--no-shrink", action="store_true", help="report what was found as it is")
    parser.add_argument("--lab", metavar="KERNEL", help="the module in the lab on this kernel")
    parser.add_argument("--module", metavar="DIR", help="another module for --lab: its sources")
    parser.add_argument("--timeout", type=int, default=7200, help="seconds for the lab")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.library == "hugetlb":
            stack.enter_context(hugepages.reserved(HUGE_BYTES, print))
        repeat(options)


def repeat(options: argparse.Namespace) -> None:
    """Run after run, each with its seed."""
    setting: Modelled | Kernel | Library | Lab
    machine: type[Comparing] = Machine
    if options.library:
        setting, machine = Library(options.library), LibraryMachine
    elif options.lab:
        setting = Lab(options.lab, options.timeout, options.module)
    else:
        setting = Modelled() if options.model else Kernel()
    started, seed = time.monotonic(), options.seed
    while Comparing.steps < options.steps:
        done = run(machine, setting, 2_000, seed, shrink=not options.no_shrink)
        print(
            f"seed {seed}: {done} steps, {Comparing.steps} in all, "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        seed += 1
    if not isinstance(setting, Modelled):
        setting.close()


if __name__ == "__main__":
    main()
