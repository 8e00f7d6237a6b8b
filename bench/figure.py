# SPDX-License-Identifier: Apache-2.0
"""What a benchmark yields, and which benchmarks there are."""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import statistics
from typing import Any

RUNS = 5


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured figure.

    :param name: stays the same for good: figures are tracked by it
    :param values: one a run
    :param conditions: under which this was measured, and what the baseline is
    :param baseline: what to compare it with, one a run, in the same unit
    """

    name: str
    unit: str
    values: Sequence[float]
    conditions: str
    baseline: Sequence[float]

    def as_dict(self, machine: str) -> dict[str, Any]:
        """An entry of bench.json; ``ratio`` is value / baseline."""
        value = statistics.median(self.values)
        baseline = statistics.median(self.baseline)
        return {
            "name": self.name,
            "value": _round(value),
            "unit": self.unit,
            "n": len(self.values),
            "min": _round(min(self.values)),
            "max": _round(max(self.values)),
            "baseline": _round(baseline),
            "ratio": _round(value / baseline) if baseline else None,
            "conditions": f"{self.conditions}; {machine}",
        }


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A function that yields the figures ``names``."""

    names: tuple[str, ...]
    run: Callable[[], Iterator[Figure]]


BENCHMARKS: list[Benchmark] = []


def benchmark(
    *names: str,
) -> Callable[[Callable[[], Iterator[Figure]]], Callable[[], Iterator[Figure]]]:
    """Register a function that yields figures of these names."""

    def register(run: Callable[[], Iterator[Figure]]) -> Callable[[], Iterator[Figure]]:
        BENCHMARKS.append(Benchmark(names, run))
        return run

    return register


def _round(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1e4 else round(value)
