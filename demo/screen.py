# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: a timeline, progress bars below it, and tables."""

import io
import pathlib
import sys
import time
from types import TracebackType
from typing import Self

from rich import box
from rich import console
from rich import progress
from rich import table
from rich import text

WIDTH = 100


class Screen:
    """Prints to the terminal, and into an SVG picture if there is a path for one."""

    def __init__(self, picture: pathlib.Path | None = None) -> None:
        self._picture = picture
        width = None if sys.stdout.isatty() else WIDTH
        self._terminal = console.Console(width=width, highlight=False)
        # The picture has no frames of a bar that moves, only what is printed for good.
        self._recorder = console.Console(
            width=WIDTH, file=io.StringIO(), record=True, force_terminal=True, highlight=False
        )
        self._bars = progress.Progress(
            progress.TextColumn("           {task.description}"),
            progress.BarColumn(bar_width=40),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.completed:.0f} of {task.total:.0f} MB"),
            console=self._terminal,
            transient=True,
        )
        self._zero = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()
        if self._picture and error is None:
            self._recorder.save_svg(str(self._picture), title="make demo")

    def title(self, words: str) -> None:
        """A line that stands out. Times count from the latest one."""
        self._zero = time.monotonic()
        self.show(text.Text(f"\n{words}", style="bold cyan"))

    def say(self, words: str, style: str = "", moment: float | None = None) -> None:
        """A line of the timeline: what has happened now, or at a moment (time.monotonic())."""
        seconds = (time.monotonic() if moment is None else moment) - self._zero
        line = text.Text.assemble((f"{seconds:8.3f} s ", "dim"), (words, style))
        self.show(line)

    def show(self, renderable: console.RenderableType) -> None:
        """Print above the progress bars."""
        self._bars.print(renderable)
        self._recorder.print(renderable)

    def show_table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; all but the first column are numbers."""
        grid = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(columns):
            grid.add_column(column, justify="right" if number else "left")
        for row in rows:
            grid.add_row(*row)
        self.show(text.Text(title, style="italic"))
        self.show(grid)

    def bar(self, name: str, completed: float, total: float) -> None:
        """Show a progress bar, or how far it has come; in MB."""
        known = [task.id for task in self._bars.tasks if task.description == name]
        bar = known[0] if known else self._bars.add_task(name)
        self._bars.update(bar, completed=completed, total=total)

    def end_bars(self) -> None:
        """Print the bars for good."""
        self.show(self._bars.make_tasks_table(self._bars.tasks))
        for task in self._bars.task_ids:
            self._bars.remove_task(task)
