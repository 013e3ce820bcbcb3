"""The fields of a line of train.jsonl that differ between two runs of one cell."""

TIMES = {"tokens_per_s", "cpu_share", "memory_bytes", "wall_s"}
