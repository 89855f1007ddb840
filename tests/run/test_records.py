"""The records of a run, and their lines for people."""

from lmlib.run.records import Record, describe


def test_step_lines_have_the_format_of_the_original():
    timing = {"tokens_per_second": 1234.5, "utilization": 0.5, "seconds_left": 3725.0}
    step = Record("step", 100, {"loss": 10.2187}, timing)
    expected = "Step 100/10000: Loss=10.2187 | 1,234 tokens/s | 50% MFU | 1:02:05 left"
    assert describe(step, 10000) == expected
