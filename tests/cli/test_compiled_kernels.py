"""`suite bench kernels --compile`: the table of compiled kernels and its JSON document, of one call."""

from __future__ import annotations

import json

from cli_runner import Suite

CALL = ("bench", "kernels", "--compile", "--shapes", "134m: rotary positions of 768 columns, bfloat16")


def test_the_table_and_the_document_hold_the_same_facts_and_say_that_they_are_predicted(suite: Suite) -> None:
    done = suite(*CALL, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["failures"] == []
    assert document["kernels"]
    table = suite(*CALL)
    assert table.returncode == 0, table.stderr
    heading, *lines = table.stdout.splitlines()
    for name in ("kernel", "arch", "regs", "spills", "shared", "occupancy", "in flight/needed", "predicted", "shape"):
        assert name in heading
    assert len(lines) == len(document["kernels"])
    for line, row in zip(lines, document["kernels"], strict=True):
        assert (row["kernel"], row["shape"], row["basis"]) == ("_rotate_kernel", CALL[-1], "predicted")
        kernel, architecture, registers, spills, shared, warps, load, occupancy, flight, share, shape = line.split(
            None, 10
        )
        assert (kernel, architecture, shape) == (row["kernel"], row["architecture"], row["shape"])
        assert int(registers) == row["registers"] <= 255
        assert spills == f"{row['spill_stores']}/{row['spill_loads']}" == "0/0"
        assert (int(shared), int(warps), int(load)) == (row["shared"], row["warps"], row["load_bytes"])
        assert occupancy == f"{row['occupancy']:.0%}"
        # H100: 700 ns of 3.35 TB/s, divided among 132 multiprocessors.
        assert row["architecture"] == "sm_90"
        assert row["needed"] == round(700e-9 * 3.35e12 / 132)
        assert flight == f"{row['in_flight'] / 1024:.0f}/17"
        # Every thread that fits has a load of 16 bytes in flight, or several.
        threads = 32 * 64 * row["occupancy"]
        assert row["in_flight"] % (16 * threads) == 0 < row["in_flight"]
        assert share == f"{row['roof_share']:.0%}"


def test_shapes_that_do_not_exist_and_shapes_without_compiling_are_refused(suite: Suite) -> None:
    unknown = suite("bench", "kernels", "--compile", "--shapes", "9t")
    assert unknown.returncode == 2
    assert "--shapes: got '9t', allowed: a part of a shape, such as '1.3b' or 'rotary'" in unknown.stderr
    measuring = suite("bench", "kernels", "--shapes", "134m")
    assert measuring.returncode == 2
    assert "--shapes: got '134m', allowed: only with --compile" in measuring.stderr
