# SPDX-License-Identifier: Apache-2.0
"""UDP sockets for mcdist: big buffers, multicast membership, segmentation offload."""

import errno
import ipaddress
import logging
import socket
import struct

from nova_snowflock import endpoint

LOG = logging.getLogger(__name__)

# <linux/udp.h>
_UDP_SEGMENT = 103
_UDP_GRO = 104
# <asm-generic/socket.h>
_SO_RCVBUFFORCE = 33
# <linux/in.h>
_IP_MTU_DISCOVER = 10
_IP_MULTICAST_ALL = 49
_IP_PMTUDISC_OMIT = 5
# <linux/in6.h>
_IPV6_MTU_DISCOVER = 23

_RECEIVE_BUFFER = 16 << 20
_SEND_BUFFER = 1 << 20
_SEGMENT_SIZE = struct.Struct("=H")

RECEIVE_SIZE = 65536
"""Bytes that one call may return: several datagrams that the kernel has put together."""


class UdpSocket:
    """A socket that does not block in receiving and whose calls move many datagrams at once."""

    def __init__(
        self, address: endpoint.Address, interface: str | None = None, multicast_ttl: int = 1
    ) -> None:
        """Bind to ``address``; a multicast group is joined too. Needs CAP_NET_ADMIN.

        :param interface: name of the interface that multicast goes through; the routing table
            chooses one if there is none
        :param multicast_ttl: how many routers multicast passes, plus one
        :raises OSError: the address is not one of this host's, or is taken
        """
        ip = ipaddress.ip_address(address[0])
        self.errors = 0
        """How many datagrams could not be sent."""
        self._errors_seen: set[int] = set()
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            self._set_up(ip, address, interface, multicast_ttl)
        except BaseException:
            self._socket.close()
            raise

    def _set_up(
        self,
        ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
        address: endpoint.Address,
        interface: str | None,
        multicast_ttl: int,
    ) -> None:
        sock = self._socket
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        index = socket.if_nametoindex(interface) if interface else 0
        if ip.is_multicast:
            # The groups of several images share one port on a host.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if sock.family == socket.AF_INET:
            # Nobody's ICMP message makes the path narrower than the operator says it is.
            sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_OMIT)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, multicast_ttl)
            if interface:
                member = struct.pack("=4s4si", bytes(4), bytes(4), index)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, member)
            if ip.is_multicast:
                member = struct.pack("=4s4si", ip.packed, bytes(4), index)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
                sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_OMIT)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, multicast_ttl)
            if interface:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            if ip.is_multicast:
                member = struct.pack("=16si", ip.packed, index)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)

    @property
    def address(self) -> endpoint.Address:
        """The address it is bound to."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, datagram: bytes, address: endpoint.Address) -> None:
        """Send one datagram; one that cannot be sent is lost like any other."""
        try:
            self._socket.sendto(datagram, address)
        except OSError as error:
            self._note(error, address)

    def send_segments(self, datagrams: memoryview, size: int, address: endpoint.Address) -> None:
        """Send several datagrams in one call.

        :param datagrams: at most 64 of them, one behind another
        :param size: bytes in each but the last, which may be shorter
        """
        segment_size = (socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT_SIZE.pack(size))
        try:
            self._socket.sendmsg((datagrams,), (segment_size,), 0, address)
        except OSError as error:
            # The device cannot segment, or the path is narrower than its configured MTU.
            if error.errno not in (errno.EIO, errno.EMSGSIZE, errno.EINVAL):
                self._note(error, address)
                return
            for start in range(0, len(datagrams), size):
                self.send(bytes(datagrams[start : start + size]), address)

    def has_more(self) -> bool:
        """Whether there is something to receive."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def receive_into(self, buffer: memoryview) -> tuple[int, int, endpoint.Address] | None:
        """Receive datagrams of one sender, one behind another; None if there are none.

        :param buffer: :data:`RECEIVE_SIZE` bytes
        :returns: bytes received, bytes (at least 1) in each datagram but the last, sender
        """
        try:
            size, ancillary, _, address = self._socket.recvmsg_into(
                (buffer,), 64, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return None
        except OSError as error:
            LOG.warning("Receiving on %s failed: %s", endpoint.format(self.address), error)
            return None
        segment = size or 1
        for _, kind, data in ancillary:
            if kind == _UDP_GRO:
                segment = int.from_bytes(data[:4], "little")
        return size, segment, address[:2]

    def _note(self, error: OSError, address: endpoint.Address) -> None:
        # The peer chooses the address and the network its answer: neither may end this process.
        self.errors += 1
        if error.errno is not None and error.errno not in self._errors_seen:
            self._errors_seen.add(error.errno)
            LOG.warning(
                "Sending to %s failed, which is told once: %s", endpoint.format(address), error
            )
