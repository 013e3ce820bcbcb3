"""Entry point of `python -m analysis`."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from analysis.cli.main import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # as all files, whatever the locale
    sys.exit(main())
