"""``python -m mshare.lab``: the same as ``mshare lab``."""

import argparse
import sys

from mshare.cli import lab

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="mshare lab", description=lab.SUMMARY)
    lab.set_argparser(parser)
    sys.exit(lab.main(parser.parse_args()))
