"""Tests that plant bugs in the module: minutes each, on kernels with detectors. Asked for only."""

from __future__ import annotations

import os

if os.environ.get("MSHARE_DETECTORS") != "1":
    collect_ignore_glob = ["test_*.py"]
