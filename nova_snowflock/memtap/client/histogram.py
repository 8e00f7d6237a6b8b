# SPDX-License-Identifier: Apache-2.0
"""A latency histogram that costs an addition to update."""


class Histogram:
    """Counts of durations by powers of two: bucket n holds those below 2**n microseconds."""

    def __init__(self, buckets: int = 25) -> None:
        self.counts = [0] * buckets
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        bucket = int(seconds * 1e6).bit_length()
        self.counts[min(bucket, len(self.counts) - 1)] += 1
        self.total += seconds

    def as_dict(self) -> dict[str, object]:
        """{"seconds": total, "counts": [...], "below_us": [upper bound of each bucket]}."""
        bounds = [1 << bucket for bucket in range(len(self.counts))]
        return {"seconds": self.total, "counts": list(self.counts), "below_us": bounds}
