"""The command `suite`, which is also `python -m suite` and `torchrun ... -m suite train CELL`."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; Ctrl-C while it is imported is one line and exit code 130."""
    try:
        from suite.cli.main import main as run  # takes about a second
    except KeyboardInterrupt:
        print("suite: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
