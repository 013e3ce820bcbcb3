"""`python -m suite`, and `torchrun ... -m suite train CELL`."""

from suite.cli.main import main

if __name__ == "__main__":
    main()
