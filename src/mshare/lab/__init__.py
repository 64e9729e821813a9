"""The lab: boot a stock kernel with the module in QEMU and run a command there.

>>> from mshare.lab import Options, run
>>> result = run(["uname", "-r"], Options(kernel="6.12"))                  # doctest: +SKIP
>>> result.status, result.stdout, result.boot_seconds                      # doctest: +SKIP

Why not virtme-ng, which does much of this: on one machine its guest was at the command after
11.7 s, this one's after about 5; it shows the kernel log only inside the command's standard
error, and it leaves time limits and the module to us. What was left to add was as large as this.
"""

from __future__ import annotations

from mshare.lab.options import Options, command_line, run
from mshare.lab.session import EXIT_LAB, EXIT_REPORT, EXIT_TIMEOUT, Result

__all__ = [
    "EXIT_LAB",
    "EXIT_REPORT",
    "EXIT_TIMEOUT",
    "Options",
    "Result",
    "command_line",
    "run",
]
