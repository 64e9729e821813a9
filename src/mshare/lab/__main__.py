"""``python -m mshare.lab``: the same as ``mshare lab``."""

from __future__ import annotations

import sys

from mshare.cli import run

if __name__ == "__main__":
    run(["lab", *sys.argv[1:]])
