"""``python -m mshare``: the command."""

from mshare.cli import run

if __name__ == "__main__":
    run()
