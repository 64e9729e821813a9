"""``mshare export``."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mshare.cli.arguments import between
from mshare.cli.output import say
from mshare.errors import invalid
from mshare.watch import Snapshot, snapshot

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import CollectorRegistry

SUMMARY = "give the figures of mshare top to Prometheus"
EXAMPLE = """\
  mshare export --port 9435
  mshare export --textfile /var/lib/prometheus/node-exporter/mshare.prom"""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{SUMMARY}; without --port or --textfile, print them"
    where = parser.add_mutually_exclusive_group()
    port = between(int, 0, 65535)
    where.add_argument("--port", type=port, help="serve /metrics on this port; 0 takes a free one")
    where.add_argument(
        "--textfile", metavar="FILE.prom", help="write a file for node exporter, whole at any time"
    )
    add = parser.add_argument
    add("--address", default="127.0.0.1", help="to serve on (127.0.0.1: this machine alone)")
    most = "those with most page tables (10)"
    add("--programs", type=between(int, 1), default=10, metavar="N", help=most)


def main(args: argparse.Namespace) -> int:
    if not importlib.util.find_spec("prometheus_client"):
        missing = "the Prometheus client library is not installed"
        raise OSError(errno.ENOENT, f"{missing}; in a checkout of mshare: pip install '.[export]'")
    registry = _registry(args.programs)
    if args.port is not None:
        _serve(registry, args.port, args.address)
    elif args.textfile is not None:
        _write(registry, args.textfile)
    else:
        from prometheus_client import generate_latest

        sys.stdout.write(generate_latest(registry).decode())
    return 0


def _registry(programs: int) -> CollectorRegistry:
    """Metrics that are read anew each time they are asked for."""
    from prometheus_client.registry import Collector, CollectorRegistry

    class Figures(Collector):
        def collect(self) -> Iterator[Metric]:
            return _metrics(snapshot(), programs)

        def describe(self) -> list[Metric]:
            return []

    registry = CollectorRegistry()
    registry.register(Figures())
    return registry


def _metrics(now: Snapshot, programs: int) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily(
        "mshare_pagetable_bytes", "Page tables of all processes.", value=now.page_tables
    )
    for kind, name, text, field in (
        (GaugeMetricFamily, "size_bytes", "Size of a region.", "size"),
        (GaugeMetricFamily, "resident_bytes", "Memory a region holds.", "resident"),
        (GaugeMetricFamily, "attachments", "Attachments of a region.", "attachments"),
        (GaugeMetricFamily, "pagetable_bytes", "Page tables shared in a region.", "page_tables"),
        (CounterMetricFamily, "faults", "Faults the kernel module passed on.", "faults"),
        (CounterMetricFamily, "flushes", "TLB flushes for a region.", "flushes"),
    ):
        family = kind(f"mshare_region_{name}", text, labels=("region", "engine"))
        for region in now.regions:
            value = getattr(region, field)
            if value is not None:
                family.add_metric((region.name, region.engine), value)
        yield family
    for name, text, field in (
        ("processes", "Processes of a program.", "processes"),
        ("pagetable_bytes", "Page tables of a program's processes together.", "page_tables"),
        ("largest_pagetable_bytes", "Page tables of its largest process.", "largest"),
    ):
        gauge = GaugeMetricFamily(f"mshare_program_{name}", text, labels=("program",))
        for program in now.programs[:programs]:
            gauge.add_metric((program.name,), getattr(program, field))
        yield gauge


def _serve(registry: CollectorRegistry, port: int, address: str) -> None:
    """Answer until interrupted."""
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise OSError(
            error.errno, f"can't serve there: {error.strerror}", f"{address}:{port}"
        ) from None
    try:
        host = f"[{address}]" if ":" in address else address
        say(f"serving http://{host}:{server.server_port}/metrics")
        thread.join()
    finally:
        server.shutdown()
        server.server_close()


def _write(registry: CollectorRegistry, path: str) -> None:
    from prometheus_client import write_to_textfile

    if not path.endswith(".prom"):
        raise invalid("node exporter reads only files that end in .prom", path)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    try:
        write_to_textfile(path, registry)
    except OSError as error:
        raise OSError(error.errno, f"can't write it: {error.strerror}", path) from None
