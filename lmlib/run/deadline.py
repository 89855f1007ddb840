"""max_hours: stop in time for a job's limit."""

import time
from dataclasses import dataclass


@dataclass
class Deadline:
    """Whether another step and a save would go beyond `hours` from `began`."""
    began: float  # on the monotonic clock
    hours: float | None
    checkpoint_bytes: int
    longest: float = 0.0  # step so far, with its evaluation and save, in seconds

    def __post_init__(self):
        self.last = time.monotonic()

    def is_near(self) -> bool:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        reserve = 2 * self.longest + self.checkpoint_bytes / 100e6  # a slow disk: 100 MB/s
        return self.hours is not None and now + reserve > self.began + 3600 * self.hours
