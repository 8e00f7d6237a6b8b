# SPDX-License-Identifier: Apache-2.0
"""A function for each item of a list, in clones of this machine: like multiprocessing's Pool.map.

The clones have the memory of their parent, so that neither the function nor its items are pickled.
Results are, and travel over the agent's port: the host refuses those of a clone that are together
larger than its configured maximum (1 MiB unless configured). More goes by way of the network or a
volume.

Everything else that runs in this machine goes on in the clones too, other threads of this program
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import os
import pickle
import random
import sys
import time
import traceback
from typing import Any, NoReturn, TypeVar

from nova_snowflock.guest import client

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Statuses of a worker. Any other is not map's: something else in the clone has called exit.
_DONE = 0
_UNSENT = 3

_RETRY = 10.0


class WorkerError(Exception):
    """A function raised, or a clone came to nothing.

    ``clone_id`` says which clone it was, ``item`` which item (None if all of the clone's), and
    ``text`` is the function's traceback, or a sentence.
    """

    def __init__(self, clone_id: int, item: int | None, text: str) -> None:
        of = "" if item is None else f", item {item}"
        super().__init__(f"clone {clone_id}{of}: {text}")
        self.clone_id = clone_id
        self.item = item
        self.text = text


def map(function: Callable[[_Item], _Result], items: Iterable[_Item], clones: int) -> list[_Result]:
    """Call the function for each item, in up to this many clones; the results, in order.

    With fewer clones than asked for, each computes more: of ``m``, the n-th has the items n - 1,
    n - 1 + m, and so on. It waits until all have ended.

    :raises WorkerError: a clone died, or a function raised; of several items, the first
    :raises SnowFlockError: there are no clones
    """
    if clones < 1:
        raise ValueError(f"{clones} clones cannot compute anything")
    inputs = list(items)
    if not inputs:
        return []
    ticket = client.request_ticket(min(clones, len(inputs)))
    if ticket.n < 1:
        raise client.Refused("no clones were granted")
    clone_id = client.clone(ticket)
    if clone_id:
        _work(function, inputs[clone_id - 1 :: ticket.n])
    try:
        joined = client.join(ticket)
    except client.SnowFlockError:
        raise
    except BaseException:  # nobody will ask for the results any more
        client.kill(ticket)
        raise
    return _gather({clone.clone_id: clone for clone in joined}, len(inputs), ticket.n)


def _work(function: Callable[[_Item], Any], inputs: Sequence[_Item]) -> NoReturn:
    """Be a clone. Whatever happens, the program around :func:`map` does not go on in here."""
    try:
        _leave(*_compute(function, inputs))
    finally:
        os._exit(1)  # not even an error can be told


def _compute(function: Callable[[_Item], Any], inputs: Sequence[_Item]) -> tuple[int, bytes]:
    """The status and the result of this clone."""
    try:
        # Otherwise all clones would draw the same numbers.
        random.seed()
        return _DONE, pickle.dumps([_outcome(function, item) for item in inputs])
    except BaseException:
        traceback.print_exc()
        return _UNSENT, b""


def _leave(status: int, result: bytes) -> NoReturn:
    delay = 0.0
    while True:
        try:
            time.sleep(delay)
            client.exit(status, result)
        except (client.Failed, client.Busy, client.NoAgent) as error:
            print(f"snowflock: exit: {error}; trying again", file=sys.stderr)
            delay = _RETRY
        except client.SnowFlockError as error:
            print(f"snowflock: exit: {error}", file=sys.stderr)
            delay = _RETRY if status == _UNSENT else 0.0
            # The results were not taken: that is told without them.
            status, result = _UNSENT, b""
        except BaseException:
            traceback.print_exc()


def _outcome(function: Callable[[_Item], Any], item: _Item) -> tuple[bool, bytes]:
    """Whether it worked, and the pickled result or the traceback."""
    try:
        return True, pickle.dumps(function(item))
    except BaseException:
        return False, traceback.format_exc().encode(errors="backslashreplace")


def _gather(joined: dict[int, client.Joined], count: int, clones: int) -> list[Any]:
    outcomes = {
        clone_id: _outcomes(clone_id, joined.get(clone_id)) for clone_id in range(1, clones + 1)
    }
    results = []
    for item in range(count):
        clone_id = item % clones + 1
        try:
            worked, data = outcomes[clone_id][item // clones]
        except IndexError:
            raise WorkerError(clone_id, item, "its result is missing") from None
        if not worked:
            raise WorkerError(clone_id, item, data.decode())
        try:
            results.append(pickle.loads(data))
        except Exception as error:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            raise WorkerError(clone_id, item, text) from error
    return results


def _outcomes(clone_id: int, clone: client.Joined | None) -> list[tuple[bool, bytes]]:
    if clone is None:
        raise WorkerError(clone_id, None, "it was not made")
    if clone.error is not None or clone.status is None:
        raise WorkerError(clone_id, None, clone.error or "it ended without a status")
    if clone.status == _UNSENT:
        text = "it could not hand over its results; are they too large?"
        raise WorkerError(clone_id, None, text)
    if clone.status != _DONE:
        raise WorkerError(clone_id, None, f"it ended with the status {clone.status}")
    try:
        outcomes: list[tuple[bool, bytes]] = pickle.loads(clone.result)
    except Exception as error:
        raise WorkerError(clone_id, None, f"its results are damaged: {error!r}") from error
    return outcomes
