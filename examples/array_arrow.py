"""Arrow: a table in a region, read by every process without a copy.

Saved: the table is in memory once, and reading it makes no copy: columns are places in the
region. With engine ``msharefs`` the page tables are there once too. An Arrow file on disk can be
opened through ``mshare.mmap`` in the same way.

Not saved: what is computed from the table, and anything that has to be decoded, such as Parquet
or compressed buffers, is each process's own.
"""

import multiprocessing

import pyarrow as pa

import mshare


def put(name: str, table: pa.Table) -> None:
    """Write a table into a new region, in Arrow's format for streams."""
    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema) as writer:
        writer.write_table(table)
    with mshare.create(name, -(-size.size() // 4096) * 4096) as region:
        out = pa.FixedSizeBufferWriter(pa.py_buffer(region))
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)


def get(name: str) -> pa.Table:
    """The table in a region; it keeps the region attached."""
    return pa.ipc.open_stream(pa.py_buffer(mshare.attach(name, readonly=True))).read_all()


def largest(name: str) -> tuple[str, int]:
    """Work on the table, in another process; and what it cost in Arrow's own memory."""
    table = get(name)
    own = pa.total_allocated_bytes()
    row = max(range(len(table)), key=lambda number: table["price"][number].as_py())
    return table["item"][row].as_py(), own


def main() -> None:
    """Share a table with a process that shares nothing else with this one."""
    table = pa.table({"item": [f"item {n}" for n in range(1000)], "price": [*range(500, 1500)]})
    put("prices", table)
    try:
        assert get("prices").equals(table)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(largest, ["prices"]) == ("item 999", 0)
    finally:
        mshare.unlink("prices")
    print("no byte was copied")


if __name__ == "__main__":
    main()
