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

ROWS = 200_000


def put(name: str, table: pa.Table, compression: str | None = None) -> None:
    """Write a table into a new region, in Arrow's format for streams."""
    options = pa.ipc.IpcWriteOptions(compression=compression)
    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema, options=options) as writer:
        writer.write_table(table)

    def write(region: mshare.Region) -> None:
        out = pa.FixedSizeBufferWriter(pa.py_buffer(region))
        with pa.ipc.new_stream(out, table.schema, options=options) as writer:
            writer.write_table(table)

    mshare.create(name, -(-size.size() // 4096) * 4096, fill=write).close()


def get(name: str) -> pa.Table:
    """The table in a region; it keeps the region attached."""
    return pa.ipc.open_stream(pa.py_buffer(mshare.attach(name, readonly=True))).read_all()


def largest(name: str) -> tuple[str, int]:
    """Work on the table, in another process; and what reading it cost in Arrow's own memory."""
    table = get(name)
    own = pa.total_allocated_bytes()
    row = max(range(0, len(table), 999), key=lambda number: table["price"][number].as_py())
    return table["item"][row].as_py(), own


def main() -> None:
    """Share a table with a process that shares nothing else with this one."""
    table = pa.table(
        {"item": [f"item {n}" for n in range(ROWS)], "price": [*range(500, 500 + ROWS)]}
    )
    print(f"a table of {table.nbytes:,} bytes, read by another process:")
    for compression, how in ((None, "as it is"), ("zstd", "not saved: compressed, so decoded")):
        put("prices", table, compression)
        try:
            assert get("prices").equals(table)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                item, own = pool.apply(largest, ["prices"])
        finally:
            mshare.unlink("prices")
        assert item == "item 199800"
        assert own == 0 if compression is None else own >= table.nbytes
        print(f"  {how:<36}{own:>12,} bytes of its own")
    print("no byte was copied of what is not compressed")


if __name__ == "__main__":
    main()
