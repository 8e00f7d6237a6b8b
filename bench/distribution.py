# SPDX-License-Identifier: Apache-2.0
"""One memory server and several hosts that all want everything."""

from collections.abc import Iterator

from bench import figure
from bench import network
from bench import plane
from tests import emulation

MIB = 1 << 20
HOSTS = 3
_JUMBO = 9000
_BYTES_SIZE = 256 * MIB
_FILL_SIZE = 512 * MIB
_MODES = {"multicast": plane.GROUP, "unicast": None}


def fill(
    server: emulation.Host,
    clients: list[emulation.Host],
    size: int,
    mtu: int,
    group: str | None,
    loss: float = 0.0,
) -> tuple[float, int]:
    """Fill the clients, who all begin at the same moment, and check what they got.

    :returns: seconds until the last has all, bytes that the server has sent
    """
    with (
        plane.served(server, size, mtu, group) as image,
        plane.held(server, image),
        plane.presented(image, clients, "eager", loss=loss),
    ):
        seconds = plane.fill(server, image, clients)
        plane.verify(image, server, clients)
        return seconds, plane.sent(server, image)


@figure.benchmark(
    *(
        f"engine.distribution.bytes.{mode}.{count}"
        for mode in _MODES
        for count in range(1, HOSTS + 1)
    )
)
def sent_bytes() -> Iterator[figure.Figure]:
    """What the server sends, by how many hosts it fills."""
    with emulation.hosts(HOSTS + 1, mtu=_JUMBO) as (server, *clients):
        for mode, group in _MODES.items():
            one: list[float] = []
            for count in range(1, HOSTS + 1):
                ratios = [
                    fill(server, clients[:count], _BYTES_SIZE, _JUMBO, group)[1] / _BYTES_SIZE
                    for _ in range(figure.RUNS)
                ]
                one = one or ratios
                yield figure.Figure(
                    f"engine.distribution.bytes.{mode}.{count}",
                    "ratio",
                    ratios,
                    f"bytes of datagrams sent / {_BYTES_SIZE // MIB} MiB of content, {count} hosts "
                    f"beside the server's, started at the same moment, eager, MTU {_JUMBO}; "
                    f"baseline: one host by {mode}",
                    one,
                )


@figure.benchmark("engine.distribution.fill.3hosts")
def fill_rate() -> Iterator[figure.Figure]:
    yield from _fill_rate("", _JUMBO)


@figure.benchmark("engine.distribution.fill.3hosts.mtu1500")
def fill_rate_mtu1500() -> Iterator[figure.Figure]:
    yield from _fill_rate(".mtu1500", 1500)


@figure.benchmark("engine.distribution.fill.3hosts.loss1")
def fill_rate_loss1() -> Iterator[figure.Figure]:
    yield from _fill_rate(".loss1", _JUMBO, 0.01)


@figure.benchmark("engine.distribution.fill.3hosts.loss10")
def fill_rate_loss10() -> Iterator[figure.Figure]:
    yield from _fill_rate(".loss10", _JUMBO, 0.1)


def _fill_rate(suffix: str, mtu: int, loss: float = 0.0) -> Iterator[figure.Figure]:
    rates: list[float] = []
    baseline: list[float] = []
    sent: list[int] = []
    with emulation.hosts(HOSTS + 1, mtu=mtu) as (server, *clients):
        for _ in range(figure.RUNS):
            seconds, size = fill(server, clients, _FILL_SIZE, mtu, plane.GROUP, loss)
            rates.append(_FILL_SIZE / 1e6 / seconds)
            sent.append(size)
            baseline.append(_FILL_SIZE / 1e6 / network.bulk(server, clients, _FILL_SIZE))
    lost = f", each host loses {loss:.0%} of the datagrams" if loss else ""
    yield figure.Figure(
        f"engine.distribution.fill.3hosts{suffix}",
        "MB/s",
        rates,
        f"what each of {HOSTS} hosts beside the server's gets of {_FILL_SIZE // MIB} MiB, eager, "
        f"multicast, MTU {mtu}{lost}, from the moment all begin until the last has all; at most "
        f"{max(sent) / _FILL_SIZE:.2f} x the content sent; baseline: a TCP stream to each at the "
        "same time, not encrypted, no page store",
        baseline,
    )
