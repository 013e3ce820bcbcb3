"""`python -m kernels.bench`."""

import sys

from kernels.bench.main import main

sys.exit(main())
