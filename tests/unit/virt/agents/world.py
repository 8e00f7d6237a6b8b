# SPDX-License-Identifier: Apache-2.0
"""A host, and a cloud, for what programs in guests ask."""

import base64
from collections.abc import Callable
import pathlib
import threading
from typing import Any
import uuid

from nova import objects
from oslo_config import cfg

from nova_snowflock import conf as snowflock_conf
from nova_snowflock.virt import marks
from nova_snowflock.virt import records
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import calls
from nova_snowflock.virt.agents import cloud as agents_cloud
from nova_snowflock.virt.agents import tickets

HOST = "host1"
PROJECT = "demo"
TIMEOUT = 20.0


def server(
    limit: str | None = "4",
    *,
    locked: bool = False,
    metadata: dict[str, str] | None = None,
    known: dict[str, str] | None = None,
) -> objects.Instance:
    allowed = {} if limit is None else {marks.GUEST_FORK_MAX: limit}
    return objects.Instance(
        uuid=str(uuid.uuid4()),
        hostname="a-name",
        project_id=PROJECT,
        locked=locked,
        flavor=objects.Flavor(vcpus=2, memory_mb=512),
        metadata={**allowed, **(metadata or {})},
        system_metadata=known or {},
    )


class Cloud:
    """Nova's API, and what it has this host do."""

    def __init__(self, world: "World") -> None:
        self.is_configured = True
        self.asked: list[tuple[Any, ...]] = []
        self.clones: dict[str, dict[int, dict[str, Any]]] = {}
        self.deleted: list[str] = []
        self.refusal: Exception | None = None
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[str], None] = lambda fork: None
        self.shown: Callable[[], None] = lambda: None
        self.room = {
            "maxTotalInstances": 100,
            "totalInstancesUsed": 0,
            "maxTotalCores": -1,
            "totalCoresUsed": 0,
            "maxTotalRAMSize": -1,
            "totalRAMUsed": 0,
        }
        self._world = world
        self._lock = threading.Lock()

    def limits(self, project: str) -> dict[str, int]:
        assert project == PROJECT
        return self.room

    def forks(self) -> list[dict[str, Any]]:
        """With what options it was asked for forks."""
        return [options for verb, _, options in self.asked if verb == "fork"]

    def fork(self, parent: str, **options: Any) -> dict[str, Any]:
        self.asked.append(("fork", parent, options))
        if self.refusal is not None:
            raise self.refusal
        self.before()
        with self._lock:
            record = self._record(parent, options)
            first = record.clones + 1
            record.clones += options["count"]
            self._world.forks.put(record)
            made = [self._clone(record, n) for n in range(first, record.clones + 1)]
        self.after(record.id)
        return {"id": record.id, "clones": made}

    def find(self, parent: str, fork: str) -> dict[str, Any]:
        self.shown()
        if fork not in self.clones or self._world.forks.get(fork).parent != parent:
            raise agents_cloud.Refusal(404, f"There is no fork {fork}")
        clones = [one for one in self.clones[fork].values() if one["status"] != "GONE"]
        return {"id": fork, "checkpoint": self._world.forks.get(fork).checkpoint, "clones": clones}

    def release(self, parent: str, fork: str) -> None:
        self.asked.append(("release", parent, fork))
        if self.refusal is not None:
            raise self.refusal
        self._world.forks.remove(fork)

    def delete(self, parent: str, fork: str) -> None:
        self.asked.append(("delete", parent, fork))
        for clone in self.clones[fork].values():
            self.delete_server(clone["server_id"])

    def delete_server(self, identity: str) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.deleted.append(identity)

    def _record(self, parent: str, options: dict[str, Any]) -> records.Fork:
        if "fork_id" in options:
            return self._world.forks.get(options["fork_id"])
        return self._world.record(
            parent, params=options["params"], checkpoint=options.get("checkpoint", False)
        )

    def _clone(self, record: records.Fork, clone_id: int) -> dict[str, Any]:
        clone = server(None, known=_known(record, clone_id))
        clone.metadata = marks.of(record.id, record.parent, record.params)
        self._world.servers[clone.uuid] = clone
        shown = {"clone_id": clone_id, "server_id": clone.uuid, "status": "ACTIVE"}
        self.clones.setdefault(record.id, {})[clone_id] = shown
        return shown


def _known(record: records.Fork, clone_id: int) -> dict[str, str]:
    return {
        rpc.FORK: record.id,
        rpc.HOST: HOST,
        rpc.PARENT: record.parent,
        rpc.CLONE_ID: str(clone_id),
    }


class Hosts:
    """What clones' hosts tell their parents', which is the same host here."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.trouble: list[Exception] = []

    def tell(self, context: Any, host: str, fork: str, clone_id: int, **what: Any) -> bool:
        assert context.is_admin
        assert host == HOST
        if self.trouble:
            raise self.trouble.pop()
        return self._world.calls.told(fork, clone_id, what["offset"], what["data"], what["status"])


class World:
    def __init__(self, directory: pathlib.Path) -> None:
        self.conf = cfg.ConfigOpts()
        snowflock_conf.register_opts(self.conf)
        self.conf([])
        self.directory = directory
        self.forks = records.Records(str(directory / "snowflock"))
        self.servers: dict[str, objects.Instance] = {}
        self.stopped: list[str] = []
        self.pieces: list[tuple[int, int, str]] = []
        self.cloud = Cloud(self)
        self.hosts = Hosts(self)
        self.restart()

    def restart(self) -> None:
        """Of the service: it knows what is in its files."""
        self.tickets = tickets.Tickets(str(self.directory / "snowflock" / "tickets"))
        cloud: Any = self.cloud
        hosts: Any = self.hosts
        self.calls = calls.Calls(
            self.conf,
            cloud,
            self.forks,
            self.tickets,
            hosts,
            self.servers.__getitem__,
            self.stopped.append,
        )

    def add(self, *arguments: Any, **options: Any) -> str:
        """A server, and the UUID of it."""
        made = server(*arguments, **options)
        self.servers[made.uuid] = made
        return str(made.uuid)

    def record(
        self, parent: str, *, params: dict[str, str] | None = None, checkpoint: bool = False
    ) -> records.Fork:
        record = records.Fork(
            id=str(uuid.uuid4()),
            parent=parent,
            project_id=PROJECT,
            created="2026-11-20T13:00:00.000+00:00",
            confirmed=True,
            checkpoint=checkpoint,
            keep=None,
            params=params or {},
            clones=0,
            pause=0.0,
            stages={},
            after={},
            size=1,
            vcpus=2,
            image_ref="",
            key=bytes(32),
            descriptor=b"",
        )
        self.forks.put(record)
        self.cloud.clones[record.id] = {}
        return record

    def ask(self, asker: str, call: str, request: str | None = None, **arguments: Any) -> Any:
        def part(clone_id: int, offset: int, data: str) -> None:
            self.pieces.append((clone_id, offset, data))

        return self.calls.answer(asker, request or str(uuid.uuid4()), call, arguments, part)

    def ticket(self, asker: str, n: int = 1) -> str:
        return str(self.ask(asker, "request_ticket", n=n)["ticket"])

    def cloned(self, asker: str, n: int = 1) -> tuple[str, list[str]]:
        """A ticket that has been used, and its clones' servers."""
        ticket = self.ticket(asker, n)
        assert self.ask(asker, "clone", ticket=ticket) == {"clone_id": 0}
        return ticket, list(self.tickets.get(ticket).clones.values())

    def results(self) -> dict[int, bytes]:
        """What has come in pieces: each where the one before ended, or anew."""
        found: dict[int, bytes] = {}
        for clone_id, offset, data in self.pieces:
            assert offset in (0, len(found.get(clone_id, b"")))
            found[clone_id] = found.get(clone_id, b"")[:offset] + base64.b64decode(data)
        return found


class Asked:
    """A call that is waited for in a thread."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None

        def run() -> None:
            try:
                self._result = function(*arguments, **options)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(TIMEOUT)
        assert not self.waits, "it does not end"
        if self._error is not None:
            raise self._error
        return self._result
