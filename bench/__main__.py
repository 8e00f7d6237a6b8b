# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks: ``python -m bench [name...]``, e.g. ``python -m bench engine.fault``."""

import argparse
import importlib
import json
import os
import pathlib
import platform
import sys
import traceback
from typing import Any

from rich import box
from rich import console as rich_console
from rich import table as rich_table

from bench import figure

SUBJECTS = (
    "fault",
    "distribution",
    "pause",
    "clones",
    "memory",
    "overhead",
    "cloud",
    "guest",
    "xen",
)
"""The modules, in the order in which they run; importing one registers its benchmarks."""

OUTPUT = pathlib.Path("build/bench.json")


def machine() -> str:
    """What every figure depends on; the load counts those who use the machine besides us."""
    return (
        f"{os.cpu_count()} CPUs ({_cpu()}), Linux {platform.release()}, "
        f"Python {platform.python_version()}, load before {os.getloadavg()[0]:.1f}"
    )


def _cpu() -> str:
    with open("/proc/cpuinfo", encoding="ascii") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def selected(prefixes: list[str]) -> list[figure.Benchmark]:
    """The benchmarks of which a figure's name starts with one of these, in whole words."""
    chosen = [
        benchmark
        for benchmark in figure.BENCHMARKS
        if not prefixes
        or any(
            f"{name}.".startswith(f"{prefix}.") for name in benchmark.names for prefix in prefixes
        )
    ]
    if not chosen:
        raise SystemExit(f"no benchmark is named {' or '.join(prefixes)}; see --list")
    return chosen


def run(benchmarks: list[figure.Benchmark], output: pathlib.Path) -> list[str]:
    """Run benchmarks; save after each figure. The names of figures that could not be measured."""
    console = rich_console.Console(stderr=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for benchmark in benchmarks:
        missing = dict.fromkeys(benchmark.names)
        where = machine()
        with console.status(" ".join(benchmark.names)):
            try:
                for measured in benchmark.run():
                    results.append(measured.as_dict(where))
                    missing.pop(measured.name, None)
                    output.write_text(json.dumps(results, indent=2) + "\n")
                    console.print(summary(results[-1]))
            except Exception:
                traceback.print_exc()
        failed += missing
    show(results)
    return failed


def summary(result: dict[str, Any]) -> str:
    """One figure in a line."""
    return f"{result['name']}: {result['value']} {result['unit']} ({result['n']} runs)"


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    columns = ("value", "min", "max", "baseline", "ratio")
    table = rich_table.Table(box=box.SIMPLE)
    table.add_column("figure", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("unit")
    table.add_column("n")
    for result in results:
        numbers = ["" if result[column] is None else f"{result[column]:g}" for column in columns]
        table.add_row(result["name"], *numbers, result["unit"], str(result["n"]))
    console = rich_console.Console()
    if not console.is_terminal:
        console.width = 120  # a log has no width of its own
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="or beginnings of names; all if there are none")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT)
    arguments = parser.parse_args()
    for subject in SUBJECTS:
        importlib.import_module(f"bench.{subject}")
    benchmarks = selected(arguments.names)
    if arguments.list:
        print(*(name for benchmark in benchmarks for name in benchmark.names), sep="\n")
        return 0
    failed = run(benchmarks, arguments.output)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
