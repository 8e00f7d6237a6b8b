# SPDX-License-Identifier: Apache-2.0
"""What programs in guests can ask for: docs/guest.rst, calls.

They ask for their own server only, if its owner has allowed it, and get what the owner could have.
Who asks again under the same ID, after this service or the agent was restarted, gets the answer to
what has been done already.
"""

import base64
import collections
from collections.abc import Callable, Iterator
import contextlib
import threading
import time
from typing import Any
import uuid

import jsonschema
from nova import context as nova_context
from nova import objects
from nova import utils
from oslo_config import cfg
from oslo_log import log as logging
import tenacity

from nova_snowflock import exception
from nova_snowflock.guest import protocol
from nova_snowflock.virt import marks
from nova_snowflock.virt import records
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import cloud as agents_cloud
from nova_snowflock.virt.agents import schemas
from nova_snowflock.virt.agents import tickets as agents_tickets

LOG = logging.getLogger(__name__)

MAX_ID = 64
"""Characters of a request's ID."""
_LOOK_AGAIN = 2.0
"""Seconds between looks at clones that have not exited."""
_PATIENCE = 300.0
"""Seconds in which a parent's host that does not answer may be restarted."""
_REMEMBERED = 600.0
"""Seconds in which a joined ticket's outcome is told again."""
_KEEP = 300
"""Seconds that an image is kept for nobody; also for who asks again what became of its fork."""
_TICKETS = 100
"""How many of them a server may have, whatever its owner has allowed: each is a file."""
_ENDED = ("DELETED", "SOFT_DELETED", "ERROR", "SHUTOFF", "SHELVED", "SHELVED_OFFLOADED")
"""States of servers whose guest will not exit by itself."""

Part = Callable[[int, int, str], None]
"""Takes a clone ID, an offset, and a piece of that clone's result in base64."""
Arguments = dict[str, Any]
_Ticket = agents_tickets.Ticket


class CallError(Exception):
    """What a program is told instead of a result."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Calls:
    """Answers them.

    :param conf: the host's options
    :param cloud: asked for forks
    :param forks: this host's
    :param tickets: this host's
    :param hosts: asked to take what clones here have to say to their parents' hosts
    :param find: a server of this host, with its flavor and all its metadata
    :param stop: have a server's guest stop, since it has nothing to do any more
    """

    def __init__(
        self,
        conf: cfg.ConfigOpts,
        cloud: agents_cloud.Cloud,
        forks: records.Records,
        tickets: agents_tickets.Tickets,
        hosts: rpc.ComputeAPI,
        find: Callable[[str], objects.Instance],
        stop: Callable[[str], None],
    ) -> None:
        self._conf = conf.snowflock
        self._cloud = cloud
        self._forks = forks
        self._tickets = tickets
        self._hosts = hosts
        self._find = find
        self._stop = stop
        # Whoever changes a ticket reads it first; and those that wait for exits.
        self._changed = threading.Condition()
        # Tickets whose clones are just being made or deleted.
        self._in_use: set[str] = set()
        # How many checkpoints are just being made, by servers.
        self._checkpointing: collections.Counter[str] = collections.Counter()

    def answer(
        self, server: str, request: str, call: str, arguments: Arguments, part: Part
    ) -> dict[str, Any]:
        """The result of a call.

        :param server: the UUID of who asks
        :param request: the request's ID
        :param part: takes results before the answer
        :raises CallError: there is none
        """
        if call not in schemas.ARGUMENTS:
            raise CallError("invalid", f"There is no call {call[:32]!r}")
        try:
            schemas.validate(call, arguments)
        except jsonschema.ValidationError as error:
            raise CallError("invalid", f"{call}: {error.message[:200]}") from error
        try:
            if call == "join":
                return self._join(self._find(server), request, arguments, part)
            verb: Callable[[objects.Instance, str, Arguments], dict[str, Any]]
            verb = getattr(self, f"_{call}")
            return verb(self._find(server), request, arguments)
        except agents_tickets.NoTicket as error:
            raise CallError("invalid", str(error)) from error
        except agents_cloud.Refusal as error:
            kind = "refused" if error.status in (400, 403) else "failed"
            raise CallError(kind, str(error)) from error
        except exception.SnowFlockError as error:
            LOG.warning("A program in server %s asked for %s: %s", server, call, error)
            raise CallError("failed", "Its cloud does not answer; try again later") from error

    def sweep(self) -> None:
        """Forget tickets that nobody can use any more."""
        with self._changed:
            self._tickets.sweep(_REMEMBERED)

    def forget(self, server: str) -> None:
        """Forget the tickets of a server that is gone."""
        with self._changed:
            for ticket in self._tickets:
                if ticket.server == server:
                    self._tickets.remove(ticket)
            self._changed.notify_all()

    # Tickets

    def _request_ticket(
        self, server: objects.Instance, request: str, arguments: Arguments
    ) -> dict[str, Any]:
        limit = self._allowed(server)
        room = self._room(server)
        with self._changed:
            known = self._tickets.of(server.uuid)
            for ticket in known:
                if ticket.granted_to == request:
                    return {"ticket": ticket.id, "n": ticket.n}
            left = limit - sum(ticket.n for ticket in known)
            if len(known) >= _TICKETS:
                raise CallError("refused", f"A server may have {_TICKETS} tickets at a time")
            if left < 1:
                raise CallError(
                    "refused",
                    f"The server may have {limit} clones at a time, and has tickets for as many",
                )
            if room < 1:
                raise CallError("refused", "The quota of the server's project has no room")
            n = min(arguments["n"], left, room, self._conf.max_clones)
            ticket = _Ticket(str(uuid.uuid4()), server.uuid, n, request)
            self._tickets.put(ticket)
        return {"ticket": ticket.id, "n": n}

    def _allowed(self, server: objects.Instance) -> int:
        """
        :raises CallError: the owner has not allowed the server's programs to fork it
        """
        limit = marks.fork_max(server.metadata)
        if server.locked:
            raise CallError("refused", "The server is locked")
        if limit < 1:
            raise CallError(
                "refused",
                f"The server's owner has not allowed it: its property {marks.GUEST_FORK_MAX} says "
                "how many clones it may have",
            )
        if not self._cloud.is_configured:
            raise CallError("refused", "This cloud does not let servers fork themselves")
        return limit

    def _room(self, server: objects.Instance) -> int:
        """How many clones the quota of its project has room for."""
        limits = self._cloud.limits(server.project_id)
        rooms = [
            (limits[most] - limits[used]) // of_one
            for most, used, of_one in (
                ("maxTotalInstances", "totalInstancesUsed", 1),
                ("maxTotalCores", "totalCoresUsed", server.flavor.vcpus),
                ("maxTotalRAMSize", "totalRAMUsed", server.flavor.memory_mb),
            )
            if limits[most] >= 0
        ]
        return min(rooms, default=self._conf.max_clones)

    def _get(self, server: objects.Instance, identity: str) -> _Ticket:
        """
        :raises NoTicket: it is not this server's
        """
        ticket = self._tickets.get(identity)
        if ticket.server != server.uuid:
            raise agents_tickets.NoTicket(f"There is no ticket {identity}")
        return ticket

    # Forks

    def _clone(
        self, server: objects.Instance, request: str, arguments: Arguments
    ) -> dict[str, Any]:
        params = {**arguments.get("params", {}), marks.REQUEST: request}

        def fork(ticket: _Ticket) -> dict[str, Any]:
            for record in self._forks_for(server.uuid, *ticket.used_by):
                return self._cloud.find(server.uuid, record.id)
            return self._cloud.fork(server.uuid, count=ticket.n, params=params, keep=_KEEP)

        self._use(server, arguments["ticket"], request, fork)
        return {"clone_id": 0}

    def _create_clones(
        self, server: objects.Instance, request: str, arguments: Arguments
    ) -> dict[str, Any]:
        identity = self._checkpoint(server, arguments["checkpoint"]).id

        def fork(ticket: _Ticket) -> dict[str, Any]:
            record = self._checkpoint(server, identity)
            if ticket.fork is None:
                with self._changed:
                    ticket.fork, ticket.first = identity, record.clones + 1
                    self._tickets.put(ticket)
            elif record.clones >= ticket.first:
                return self._cloud.find(server.uuid, identity)
            made = self._cloud.fork(server.uuid, fork_id=identity, count=ticket.n)
            # The owner may have made others meanwhile.
            ticket.first = min(clone["clone_id"] for clone in made["clones"])
            return made

        # One after the other: each ticket's clones are those that come next.
        one_at_a_time = utils.synchronized(f"snowflock-clones-{identity}")(fork)
        self._use(server, arguments["ticket"], request, one_at_a_time)
        return {}

    def _use(
        self,
        server: objects.Instance,
        identity: str,
        request: str,
        fork: Callable[[_Ticket], dict[str, Any]],
    ) -> None:
        """Have a ticket's clones be made, once."""
        self._allowed(server)
        with self._alone(server, identity):
            with self._changed:
                ticket = self._get(server, identity)
                if ticket.state in (agents_tickets.CLONED, agents_tickets.JOINED):
                    if request in ticket.used_by:
                        return
                    raise CallError("invalid", f"The ticket {identity} has been used")
                # Of who asked before and got no answer, there may be clones.
                ticket.used_by = list(dict.fromkeys([*ticket.used_by, request]))
                ticket.state = agents_tickets.CLONING
                self._tickets.put(ticket)
            try:
                made = fork(ticket)
            except exception.HostUnavailable:
                raise  # nobody knows what came of it: it stays as it is
            except Exception:
                # Unless the server is gone meanwhile, and its tickets.
                with self._changed, contextlib.suppress(agents_tickets.NoTicket):
                    self._get(server, identity)
                    ticket.state, ticket.used_by = agents_tickets.GRANTED, []
                    ticket.fork, ticket.first = None, 1
                    self._tickets.put(ticket)
                raise
            with self._changed:
                # Clones may have exited already.
                ticket.exits = self._get(server, identity).exits
                ticket.state, ticket.fork = agents_tickets.CLONED, made["id"]
                ticket.clones = _clones_of(ticket, made)
                self._tickets.put(ticket)

    @contextlib.contextmanager
    def _alone(self, server: objects.Instance, identity: str) -> Iterator[None]:
        """Have nobody else make or delete a ticket's clones meanwhile.

        :raises CallError: somebody does
        """
        with self._changed:
            self._get(server, identity)
            if identity in self._in_use:
                raise CallError(
                    "busy", f"The clones of the ticket {identity} are being made or deleted"
                )
            self._in_use.add(identity)
        try:
            yield
        finally:
            with self._changed:
                self._in_use.discard(identity)

    def _checkpoint_parent(
        self, server: objects.Instance, request: str, arguments: Arguments
    ) -> dict[str, Any]:
        limit = self._allowed(server)
        for record in self._forks_for(server.uuid, request):
            return {"checkpoint": record.id, "clone_id": 0}
        params = {**arguments.get("params", {}), marks.REQUEST: request}
        with self._room_for_checkpoint(server.uuid, limit):
            made = self._cloud.fork(server.uuid, count=0, checkpoint=True, params=params)
        return {"checkpoint": made["id"], "clone_id": 0}

    @contextlib.contextmanager
    def _room_for_checkpoint(self, server: str, limit: int) -> Iterator[None]:
        """
        :raises CallError: its programs have as many as they may
        """
        with self._changed:
            made = sum(record.confirmed and _is_programs(record, server) for record in self._forks)
            if made + self._checkpointing[server] >= limit:
                raise CallError("refused", f"The server may have {limit} checkpoints at a time")
            self._checkpointing[server] += 1
        try:
            yield
        finally:
            with self._changed:
                self._checkpointing[server] -= 1
                if not self._checkpointing[server]:
                    del self._checkpointing[server]

    def _forks_for(self, server: str, *requests: str) -> list[records.Fork]:
        """What was made for requests, before whoever was to answer them was restarted."""
        return [
            record
            for record in self._forks
            if record.parent == server
            and record.confirmed
            and record.params.get(marks.REQUEST) in requests
        ]

    def _checkpoint(self, server: objects.Instance, identity: str) -> records.Fork:
        """
        :raises CallError: it is not of this server's programs; its owner's are the owner's
        """
        with contextlib.suppress(exception.ForkNotFound):
            record = self._forks.get(identity)
            if _is_programs(record, server.uuid):
                return record
        raise CallError("invalid", f"There is no checkpoint {identity}")

    def _release(
        self, server: objects.Instance, request: str, arguments: Arguments
    ) -> dict[str, Any]:
        self._cloud.release(server.uuid, self._checkpoint(server, arguments["checkpoint"]).id)
        return {}

    # In clones

    def _put(self, server: objects.Instance, request: str, arguments: Arguments) -> dict[str, Any]:
        try:
            data = base64.b64decode(arguments["data"], validate=True)
        except ValueError as error:  # binascii.Error is one, and so is what is not ASCII
            raise CallError("invalid", "put: the data is not in base64") from error
        if arguments["offset"] + len(data) > self._conf.guest_result_max:
            raise CallError(
                "refused",
                f"A clone's result may have {self._conf.guest_result_max} bytes on this cloud",
            )
        self._tell_parent(server, offset=arguments["offset"], data=arguments["data"], status=None)
        return {}

    def _exit(self, server: objects.Instance, request: str, arguments: Arguments) -> dict[str, Any]:
        self._tell_parent(server, offset=None, data=None, status=arguments["status"])
        self._stop(server.uuid)
        return {}

    def _tell_parent(self, server: objects.Instance, **what: Any) -> None:
        known = server.system_metadata
        if rpc.FORK not in known:
            raise CallError("invalid", "The server is not a clone")
        told = tenacity.retry(
            retry=tenacity.retry_if_exception_type(exception.HostUnavailable),
            stop=tenacity.stop_after_delay(_PATIENCE),
            wait=tenacity.wait_fixed(_LOOK_AGAIN),
            reraise=True,
        )(self._hosts.tell)
        context = nova_context.get_admin_context()
        if not told(context, known[rpc.HOST], known[rpc.FORK], int(known[rpc.CLONE_ID]), **what):
            raise CallError(
                "invalid", "No program of its parent waits for it, or pieces before it are missing"
            )

    def told(
        self,
        fork: str,
        clone_id: int,
        offset: int | None,
        data: str | None,
        status: int | None,
    ) -> bool:
        """Take a piece of a clone's result, or its end, from its host.

        :returns: whether a ticket's clone it is, and what comes before that piece is here
        """
        with self._changed:
            ticket = self._tickets.find(fork, clone_id) or self._by_request(fork, clone_id)
            if ticket is None or ticket.state == agents_tickets.JOINED:
                return False
            if data is not None and offset is not None:
                try:
                    self._tickets.write_result(ticket, clone_id, offset, base64.b64decode(data))
                except ValueError:
                    return False
            if status is not None:
                ticket.exits[str(clone_id)] = status
                self._tickets.put(ticket)
                self._changed.notify_all()
        return True

    def _by_request(self, fork: str, clone_id: int) -> _Ticket | None:
        """The ticket of clones that have something to say before who made them got an answer."""
        with contextlib.suppress(exception.ForkNotFound):
            record = self._forks.get(fork)
            for ticket in self._tickets.of(record.parent):
                if (
                    ticket.state == agents_tickets.CLONING
                    and record.params.get(marks.REQUEST) in ticket.used_by
                    and clone_id in ticket.clone_ids
                ):
                    return ticket
        return None

    # The end of clones

    def _join(
        self, server: objects.Instance, request: str, arguments: Arguments, part: Part
    ) -> dict[str, Any]:
        identity = arguments["ticket"]
        ticket = self._get(server, identity)
        if ticket.state == agents_tickets.JOINED and ticket.joined_by == request:
            return self._outcome(ticket, part)
        if ticket.state != agents_tickets.CLONED:
            raise CallError("invalid", f"The ticket {identity} has no clones")
        ended = self._wait(server, identity)
        with self._alone(server, identity):
            ticket = self._get(server, identity)
            if ticket.state != agents_tickets.CLONED:
                raise CallError("invalid", f"The ticket {identity} was joined by another")
            ticket.outcome = [
                {
                    "clone_id": clone_id,
                    "status": ticket.exits.get(str(clone_id)),
                    "error": None if str(clone_id) in ticket.exits else ended[clone_id],
                }
                for clone_id in ticket.clone_ids
            ]
            self._delete_clones(server, ticket)
            with self._changed:
                self._get(server, identity)
                ticket.state, ticket.joined_by, ticket.joined_at = (
                    agents_tickets.JOINED,
                    request,
                    time.time(),
                )
                self._tickets.put(ticket)
        return self._outcome(ticket, part)

    def _wait(self, server: objects.Instance, identity: str) -> dict[int, str]:
        """Until every clone has exited, or ended without.

        :returns: why those have, by clone ID
        """
        ended: dict[int, str] = {}

        def left() -> list[int]:
            ticket = self._get(server, identity)
            return [
                clone_id
                for clone_id in ticket.clone_ids
                if str(clone_id) not in ticket.exits and clone_id not in ended
            ]

        while True:
            with self._changed:
                if self._changed.wait_for(lambda: not left(), _LOOK_AGAIN):
                    return ended
                fork = str(self._get(server, identity).fork)
            try:
                shown = self._shown(server, fork)
            except exception.HostUnavailable as error:
                LOG.info("Clones of fork %s are looked at again: %s", fork, error)
                continue
            states = {clone["clone_id"]: clone["status"] for clone in shown["clones"]}
            for clone_id in left():
                state = states.get(clone_id, "DELETED")
                if state in _ENDED:
                    ended[clone_id] = f"Its server is {state}, and it has not exited"

    def _shown(self, server: objects.Instance, fork: str) -> dict[str, Any]:
        try:
            return self._cloud.find(server.uuid, fork)
        except agents_cloud.Refusal as error:
            if error.status != 404:
                raise
            return {"clones": []}  # the image is gone, and all clones are

    def _outcome(self, ticket: _Ticket, part: Part) -> dict[str, Any]:
        clones = []
        for clone in ticket.outcome:
            clone_id, offset = int(str(clone["clone_id"])), 0
            while data := self._tickets.read_result(ticket, clone_id, offset, protocol.MAX_PIECE):
                part(clone_id, offset, base64.b64encode(data).decode())
                offset += len(data)
            clones.append({**clone, "size": offset})
        return {"clones": clones}

    def _kill(self, server: objects.Instance, request: str, arguments: Arguments) -> dict[str, Any]:
        identity = arguments["ticket"]
        with self._alone(server, identity):
            ticket = self._get(server, identity)
            if ticket.state == agents_tickets.CLONING:
                # Who had them made did not ask again, after this service was restarted.
                self._find_clones(server, ticket)
            if ticket.state != agents_tickets.JOINED:
                self._delete_clones(server, ticket)
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()
        return {}

    def _find_clones(self, server: objects.Instance, ticket: _Ticket) -> None:
        if ticket.fork is None:
            made = self._forks_for(server.uuid, *ticket.used_by)
            ticket.fork = made[0].id if made else None
        if ticket.fork is not None:
            ticket.clones = _clones_of(ticket, self._shown(server, ticket.fork))

    def _delete_clones(self, server: objects.Instance, ticket: _Ticket) -> None:
        """With their image, if it is nobody else's."""
        if ticket.fork is None:
            return
        try:
            fork = self._cloud.find(server.uuid, ticket.fork)
        except agents_cloud.Refusal as error:
            if error.status == 404:  # all of it is gone
                return
            raise
        others = {clone["clone_id"] for clone in fork["clones"]} - set(ticket.clone_ids)
        if fork["checkpoint"] or others:
            for clone in ticket.clones.values():
                self._cloud.delete_server(clone)
            return
        try:
            self._cloud.delete(server.uuid, ticket.fork)
        except agents_cloud.Refusal as error:
            LOG.info("The image of the fork %s stays for now: %s", ticket.fork, error)
            for clone in ticket.clones.values():
                self._cloud.delete_server(clone)

    def _info(self, server: objects.Instance, request: str, arguments: Arguments) -> dict[str, Any]:
        known = server.system_metadata
        return {
            "server": server.uuid,
            "clone_id": int(known.get(rpc.CLONE_ID, 0)),
            "fork": known.get(rpc.FORK),
            "parent": known.get(rpc.PARENT),
            "params": marks.for_hooks(marks.params(server.metadata)),
            "limit": marks.fork_max(server.metadata),
            "tickets": [
                {"ticket": ticket.id, "n": ticket.n, "state": ticket.state}
                for ticket in self._tickets.of(server.uuid)
            ],
        }


def _is_programs(record: records.Fork, server: str) -> bool:
    """Whether it is a checkpoint that a program in a server asked for."""
    return record.parent == server and record.checkpoint and marks.REQUEST in record.params


def _clones_of(ticket: _Ticket, fork: dict[str, Any]) -> dict[str, str]:
    """The servers of a ticket's clones, of a fork as the API shows it."""
    return {
        str(clone["clone_id"]): str(clone["server_id"])
        for clone in fork["clones"]
        if clone["clone_id"] in ticket.clone_ids
    }
