"""Entry point of `python -m analysis`."""

from __future__ import annotations

import sys
from io import TextIOWrapper

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # as all files, whatever the locale
    try:
        from analysis.cli.main import main  # takes about a second, in which Ctrl-C may come
    except KeyboardInterrupt:
        print("analysis: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
