import sys
from pathlib import Path

# What sweeps as people start them have in common, here as in tests/launch.
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
