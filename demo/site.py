# SPDX-License-Identifier: Apache-2.0
"""A website that is forked with its server: the parent serves on, and each clone on its own."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import time
from typing import Any

from demo import checks
from demo import screen as demo_screen
from demo import web
from devstack.embedded import settings
from tests.cloud import agents
from tests.cloud import family
from tests.cloud import senders

NETWORK = "public"
PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Page:
    """What somebody outside got from a clone."""

    clone: str
    host: str
    address: str
    mac: str
    name: str
    digest: str
    random: str


class Site:
    """The website of a parent."""

    def __init__(self, parent: str, screen: demo_screen.Screen) -> None:
        self._screen = screen
        self._parent = parent
        self._host = family.host_of(parent)
        [port] = family.ports(parent, NETWORK)
        self._mac, self.address = port.mac_address, family.address(parent, NETWORK)

    def start(self) -> None:
        """Have the parent know who it is, and serve."""
        checks.check(family.answers_ping(self.address, PATIENCE), "the parent has no network")
        agents.start(self._parent)
        agents.Program(self._parent, web.SERVER)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._first = web.ask(self.address)
                return
            except checks.CheckFailed:  # it listens in a moment
                if time.monotonic() > deadline:
                    raise
                time.sleep(web.INTERVAL)

    @property
    def digest(self) -> str:
        return str(self._first["digest"])

    @contextlib.contextmanager
    def visited(self) -> Iterator[None]:
        """Somebody asks the parent all the time, over one connection."""
        with web.customer(self.address) as customer:
            yield
        self._screen.say(
            f"the parent's customer had {customer.answers} answers over one connection, the "
            f"slowest in {customer.slowest * 1e3:.0f} ms",
            "green",
        )

    @contextlib.contextmanager
    def captured(self, pages: list[Page]) -> Iterator[None]:
        """Nothing comes from any other host than the parent's under an address of the parent's.

        :param pages: filled meanwhile: clones that are heard from where they are
        """
        others = [host for host in settings.HOSTS if host != self._host]
        with senders.watched(*others) as seen:
            yield
        for page in pages:
            if page.host in others:
                own = {page.mac, page.address}
                checks.check(own <= seen, f"{page.clone} was not heard at the switch")
        wrong = {self._mac, self.address} & seen
        checks.check(not wrong, f"a clone sent as its parent: {', '.join(wrong)}")
        self._screen.say(
            f"at the switch, nothing came from {' and '.join(others)} under the parent's MAC or "
            "address",
            "green",
        )

    def visit(self, clone: dict[str, Any]) -> Page:
        """Ask a clone under its own address, as soon as there is somebody."""
        server = clone["server_id"]
        [port] = family.ports(server, NETWORK)
        address = family.address(server, NETWORK)
        wanted = str(family.compute().get_server(server).hostname)
        answers = family.answers_ping(address, PATIENCE)
        checks.check(answers, f"nobody answers at {address}, which is {clone['name']}'s")
        first = answer = web.ask(address)
        deadline = time.monotonic() + PATIENCE
        # A guest that is on the network has its name in a moment, if it has not yet.
        while answer["name"] != wanted:
            checks.check(
                time.monotonic() < deadline, f"{wanted} at {address} says it is {answer['name']}"
            )
            time.sleep(web.INTERVAL)
            answer = web.ask(address)
        self._screen.say(f"{address} answers: {answer['name']}")
        return Page(
            clone["name"],
            family.host_of(server),
            address,
            port.mac_address,
            answer["name"],
            answer["digest"],
            first["random"],
        )

    def compare(self, pages: Iterable[Page]) -> None:
        """All serve the same, under names of their own, with random numbers of their own."""
        parent = web.ask(self.address)
        pages = list(pages)
        checks.digests_are(
            dict.fromkeys(("the parent", *(page.clone for page in pages)), self.digest),
            {"the parent": parent["digest"], **{page.clone: page.digest for page in pages}},
        )
        self._screen.say("each serves the parent's data, at its own address", "green")
        names = [parent["name"], *(page.name for page in pages)]
        checks.check(len(set(names)) == len(names), f"two have one name: {names}")
        self._screen.say("each has the host name that Nova gave to it", "green")
        drawn = [self._first["random"], parent["random"], *(page.random for page in pages)]
        checks.check(len(set(drawn)) == len(drawn), f"two drew the same random bytes: {drawn}")
        self._screen.say("each drew random bytes of its own, from the first on", "green")

    def summary(self, pages: Iterable[Page]) -> None:
        self._screen.show_table(
            "The clones, as they are seen from outside",
            ["clone", "host name", "address", "MAC", "first random bytes"],
            [
                [page.clone, page.name, page.address, page.mac, f"{page.random[:16]}..."]
                for page in pages
            ],
        )
