# SPDX-License-Identifier: Apache-2.0
"""The agents of all of this host's guests."""

from collections.abc import Callable, Iterable
import dataclasses
import threading
import time
from typing import Any

from nova import utils
from oslo_log import log as logging

from nova_snowflock import exception
from nova_snowflock.guest import protocol
from nova_snowflock.virt.agents import calls as guest_calls
from nova_snowflock.virt.agents import channel as agent_channel

LOG = logging.getLogger(__name__)

_LOOK_AGAIN = 3.0
"""Seconds between looks for agents that have opened their ports."""
_ANSWER = 2.0
"""Seconds in which an agent that is there says so."""
_REQUESTS = 8
"""That a guest may have waiting for answers."""
_SENTENCES, _SENTENCE = 20, 200
"""How much of what went wrong in a guest is kept."""


@dataclasses.dataclass(frozen=True)
class Quiesced:
    """How a guest was told that it is about to be forked.

    :param agent: whether it has an agent that answered
    :param problems: sentences, of what went wrong
    """

    agent: bool
    problems: list[str]


class _Guest:
    """What is known of one guest."""

    def __init__(self, channel: agent_channel.Channel) -> None:
        self.channel = channel
        self.hello = threading.Event()
        self.ready: dict[str, list[str]] = {}
        self.heard = threading.Condition()
        self.gone = False
        self.reported = 0


class Agents:
    """Hears them, and tells them who they are and when they are forked.

    :param connect: a connection to the port of a server's agent
    :param opened: the servers of this host whose guest has its port open
    :param describe: who a server is, as ``you`` says
    :param online: have a clone's network interfaces have a link, if what it says of itself is
        enough for that; whether they do
    :param calls: does what programs ask for
    """

    def __init__(
        self,
        connect: Callable[[str], Any],
        opened: Callable[[], Iterable[str]],
        describe: Callable[[str], protocol.Message],
        online: Callable[[str, protocol.Message], bool],
        calls: guest_calls.Calls,
    ) -> None:
        self._connect = connect
        self._opened = opened
        self._describe = describe
        self._online = online
        self._calls = calls
        self._guests: dict[str, _Guest] = {}
        # Requests that are being answered, by servers; they outlive a connection.
        self._requests: dict[str, set[str]] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        """Look for agents, from now on."""
        threading.Thread(target=self._look, name="snowflock-agents", daemon=True).start()

    def watch(self, server: str, description: protocol.Message | None = None) -> None:
        """Hear the agent of a server, if it has one.

        It is told at once who it is: a clone's has said hello to its parent's host, and others may
        not have noticed that this is a new connection.

        :param description: ``you``, if it is known; a clone that is told it again is told nothing
            new
        """
        # A guest may keep its host waiting, but no other guest.
        utils.synchronized(f"snowflock-agent-{server}")(self._watch)(server, description)

    def _watch(self, server: str, description: protocol.Message | None) -> None:
        if server in self._guests:
            if description is not None:
                self._say(server, description)
            return
        try:
            channel = agent_channel.Channel(self._connect(server))
        except (OSError, exception.SnowFlockError, agent_channel.Closed) as error:
            LOG.info("The agent of server %s cannot be heard: %s", server, error)
            return
        guest = _Guest(channel)
        with self._lock:
            self._guests[server] = guest
        threading.Thread(
            target=self._hear,
            args=(server, guest, description),
            name=f"agent-{server}",
            daemon=True,
        ).start()

    def quiesce(
        self,
        server: str,
        is_open: bool,
        fork: str,
        params: dict[str, str],
        interfaces: list[dict[str, Any]],
        seconds: float,
    ) -> Quiesced:
        """Have a guest prepare for a fork. What it does not do in time, it does not do.

        :param is_open: whether it has its port open
        :param interfaces: those that it has, as in ``you``
        """
        if not is_open:
            return Quiesced(False, [])
        self.watch(server)
        guest = self._guests.get(server)
        if guest is None or not guest.hello.wait(_ANSWER):
            return Quiesced(False, ["Its agent has its port open, and does not answer."])
        said = self._say(
            server,
            {
                "type": "prefork",
                "fork": fork,
                "params": params,
                "seconds": seconds,
                "interfaces": interfaces,
            },
        )
        with guest.heard:
            if said:
                guest.heard.wait_for(lambda: fork in guest.ready or guest.gone, seconds)
            ready = fork in guest.ready
            problems = guest.ready.pop(fork, [])
        if not ready:
            problems = [f"Its agent was not ready within {seconds:g} s, and was not waited for."]
        return Quiesced(True, problems)

    def forked(
        self, server: str, fork: str, params: dict[str, str], error: str | None = None
    ) -> None:
        """Tell a guest that was to be forked what came of it."""
        self._say(server, {"type": "parent", "fork": fork, "params": params, "error": error})

    def _look(self) -> None:
        while True:
            time.sleep(_LOOK_AGAIN)
            self._look_once()

    def _look_once(self) -> None:
        try:
            for server in self._opened():
                try:
                    self.watch(server)
                except Exception:
                    LOG.exception("The agent of server %s is not heard for now", server)
            self._calls.sweep()
        except Exception:
            LOG.exception("Guests' agents are looked for again in %d s", _LOOK_AGAIN)

    def _hear(self, server: str, guest: _Guest, description: protocol.Message | None) -> None:
        try:
            guest.channel.say(description or self._describe(server))
            for message in guest.channel.messages():
                try:
                    self._take(server, guest, message)
                except agent_channel.Closed:
                    break
                except Exception:
                    LOG.exception("What the agent of server %s said is passed over", server)
        except agent_channel.Closed:
            LOG.info("The agent of server %s does not listen", server)
        except Exception:
            LOG.exception("The agent of server %s is not heard for now", server)
        finally:
            guest.channel.close()
            with guest.heard:
                guest.gone = True
                guest.heard.notify_all()
            with self._lock:
                if self._guests.get(server) is guest:
                    del self._guests[server]
            if guest.channel.dropped:
                LOG.warning(
                    "The agent of server %s said %d lines that make no sense",
                    server,
                    guest.channel.dropped,
                )

    def _take(self, server: str, guest: _Guest, message: protocol.Message) -> None:
        kind = message["type"]
        if kind == "hello":
            guest.channel.say(self._describe(server))
            guest.hello.set()
        elif kind == "ready":
            with guest.heard:
                # One fork at a time, so it has no use for more.
                guest.ready = {str(message.get("fork")): _problems(message)}
                guest.heard.notify_all()
        elif kind == "self":
            self._report(server, guest, message)
            if self._online(server, message):
                guest.channel.say({"type": "online"})
        elif kind == "done":
            self._report(server, guest, message)
        elif kind == "request":
            self._request(server, message)

    def _report(self, server: str, guest: _Guest, message: protocol.Message) -> None:
        # On one connection only so many: logs are not for guests to fill.
        for problem in _problems(message)[: _SENTENCES - guest.reported]:
            guest.reported += 1
            LOG.warning("The guest of server %s, after a fork: %s", server, problem)

    def _request(self, server: str, message: protocol.Message) -> None:
        identity, call = message.get("id"), message.get("call")
        arguments = message.get("arguments")
        if (
            not (isinstance(identity, str) and isinstance(call, str))
            or not 0 < len(identity) <= guest_calls.MAX_ID
            or not isinstance(arguments, dict)
        ):
            return  # there is nobody to answer to
        with self._lock:
            under_way = self._requests.setdefault(server, set())
            if identity in under_way:
                return  # it is answered when there is an answer
            is_busy = len(under_way) >= _REQUESTS
            if not is_busy:
                under_way.add(identity)
        if is_busy:
            problem = {"kind": "busy", "message": f"More than {_REQUESTS} requests at a time"}
            self._say(server, {"type": "answer", "id": identity, "error": problem})
            return
        answering = threading.Thread(
            target=self._answer,
            args=(server, identity, call, arguments),
            name=f"{call[:16]}-{server}",
            daemon=True,
        )
        try:
            answering.start()
        except RuntimeError:  # the system has no more threads; the agent may ask again
            self._end(server, identity)
            raise

    def _answer(self, server: str, identity: str, call: str, arguments: dict[str, Any]) -> None:
        answer: protocol.Message = {"type": "answer", "id": identity}

        def part(clone_id: int, offset: int, data: str) -> None:
            piece = {"clone_id": clone_id, "offset": offset, "data": data}
            self._say(server, {"type": "part", "id": identity, **piece})

        try:
            answer["result"] = self._calls.answer(server, identity, call, arguments, part)
        except guest_calls.CallError as error:
            answer["error"] = {"kind": error.kind, "message": str(error)}
        except Exception:
            LOG.exception("A program in server %s asked for %.16s", server, call)
            answer["error"] = {"kind": "failed", "message": "Something failed on the host"}
        finally:
            self._end(server, identity)
        try:
            protocol.encode(answer)
        except ValueError:
            problem = {"kind": "failed", "message": "The answer is too long"}
            answer = {"type": "answer", "id": identity, "error": problem}
        self._say(server, answer)

    def _end(self, server: str, identity: str) -> None:
        with self._lock:
            self._requests[server].discard(identity)
            if not self._requests[server]:
                del self._requests[server]

    def _say(self, server: str, message: protocol.Message) -> bool:
        """:returns: whether there is an agent, and it may hear it"""
        guest = self._guests.get(server)
        if guest is None:
            return False
        try:
            guest.channel.say(message)
        except agent_channel.Closed:
            return False
        except ValueError as error:
            LOG.warning("The agent of server %s is not told: %s", server, error)
            return False
        return True


def _problems(message: protocol.Message) -> list[str]:
    problems = message.get("problems")
    if not isinstance(problems, list):
        return []
    # Into logs and records: in one line each.
    return [
        "".join(c if c.isprintable() else " " for c in one[:_SENTENCE])
        for one in problems[:_SENTENCES]
        if isinstance(one, str)
    ]
