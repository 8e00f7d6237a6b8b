# SPDX-License-Identifier: Apache-2.0
"""Configuration options, group ``[snowflock]``."""

import ipaddress
from typing import Any

from oslo_config import cfg
from oslo_config import types

GROUP = cfg.OptGroup("snowflock", title="VM fork")


class _MulticastNetwork(types.ConfigType):
    """A network of multicast addresses, as an object of :mod:`ipaddress`."""

    def __init__(self) -> None:
        super().__init__(type_name="multicast network")

    def __call__(self, value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        network = ipaddress.ip_network(str(value))
        if not network.is_multicast:
            raise ValueError(f"{value} is not a network of multicast addresses")
        return network

    def __repr__(self) -> str:
        return "MulticastNetwork"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MulticastNetwork)

    def _formatter(self, value: Any) -> str:
        return str(value)


class _IPv4Network(types.ConfigType):
    """A network of IPv4 addresses, as an object of :mod:`ipaddress`."""

    def __init__(self) -> None:
        super().__init__(type_name="IPv4 network")

    def __call__(self, value: Any) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(str(value))

    def __repr__(self) -> str:
        return "IPv4Network"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IPv4Network)

    def _formatter(self, value: Any) -> str:
        return str(value)


OPTIONS = [
    cfg.StrOpt(
        "hypervisor",
        default="qemu",
        help="The hypervisor back end: the name of an entry point in nova_snowflock.hypervisor.",
    ),
    cfg.StrOpt(
        "connection_uri",
        default="qemu:///system",
        help="libvirt's connection URI of the hypervisor, as in [libvirt]connection_uri.",
    ),
    cfg.StrOpt(
        "run_path",
        default="/run/nova-snowflock",
        help="Directory of control sockets, mounts and records, one subdirectory per fork image. "
        "It must be on a tmpfs and root's; others may only pass through it.",
    ),
    cfg.StrOpt(
        "store_path",
        default="/var/lib/nova-snowflock",
        help="Directory of memtap's page stores. They hold guest memory: for root only.",
    ),
    cfg.Opt(
        "address",
        type=types.IPAddress(),
        default="127.0.0.1",
        help="The address of this host from which its memory servers serve fork images. Set it: no "
        "other host can reach the default.",
    ),
    cfg.StrOpt(
        "interface",
        help="The network interface that carries multicast. Unset: as the routing table says.",
    ),
    cfg.IntOpt(
        "mtu",
        default=1500,
        min=1280,
        max=65535,
        help="The MTU in bytes of the path between compute hosts. Jumbo frames (9000) let pages "
        "arrive whole and distribution run about three times as fast.",
    ),
    cfg.StrOpt(
        "distribution",
        default="multicast",
        choices=[
            ("multicast", "what one host asks for reaches every host of the image"),
            ("unicast", "for networks that pass no multicast between compute hosts"),
        ],
        help="How memory servers send pages.",
    ),
    cfg.Opt(
        "multicast_groups",
        type=_MulticastNetwork(),
        default="239.255.0.0/16",
        help="The network of multicast groups from which each image takes one.",
    ),
    cfg.PortOpt(
        "multicast_port",
        default=5710,
        min=1,
        help="The UDP port of the multicast groups.",
    ),
    cfg.StrOpt(
        "population",
        default="background",
        choices=[
            ("lazy", "fetch only what clones touch"),
            ("background", "fetch the rest too, at a bounded rate"),
            ("eager", "fetch everything as fast as it comes"),
        ],
        help="How a clone host gets the memory that its clones have not touched.",
    ),
    cfg.IntOpt(
        "keep",
        default=3600,
        min=0,
        help="Seconds that a fork image outlives its last clone's need of it, if its user does not "
        "say. Checkpoints are kept until they are released.",
    ),
    cfg.IntOpt(
        "spawn_timeout",
        default=90,
        min=1,
        help="Seconds that a clone may wait for the pages that it starts with, before it is given "
        "up. A memory server that has ended is back within a minute.",
    ),
    cfg.IntOpt(
        "sweep_interval",
        default=60,
        min=1,
        help="Seconds after which nova-compute looks again for images that nobody needs, layers of "
        "disks to merge, and what was left half done.",
    ),
    cfg.IntOpt(
        "max_clones",
        default=64,
        min=1,
        help="How many clones one request may make. nova-api's.",
    ),
    cfg.Opt(
        "family_networks",
        type=_IPv4Network(),
        default="10.240.0.0/12",
        help="Where networks of families that are isolated take their addresses from: a /24 each. "
        "nova-api's.",
    ),
    cfg.IntOpt(
        "quiesce_timeout",
        default=10,
        min=0,
        max=30,  # nova-api waits for the capture, too ([DEFAULT]rpc_response_timeout)
        help="Seconds that a guest with an agent may prepare for a fork. The fork goes on after "
        "them, and says so.",
    ),
    cfg.BoolOpt(
        "allow_unseeded",
        default=False,
        help="Let clones onto networks whose random numbers may be their parent's: those of "
        "servers that were started before this plugin was here, without a generation ID, and have "
        "no agent that makes new ones.",
    ),
    cfg.IntOpt(
        "guest_result_max",
        default=1 << 20,
        min=0,
        max=64 << 20,
        help="Bytes that a clone may hand to the program in its parent that joins it.",
    ),
    cfg.IntOpt(
        "background_rate",
        default=50,
        min=1,
        help="The rate in MB/s of the population policy 'background'.",
    ),
    cfg.StrOpt(
        "xen_helper",
        default="/usr/lib/nova-snowflock/snowflock-xen",
        help="Where snowflock-xen is, which is built on the host (nova_snowflock/virt/xen/native). "
        "On Xen only.",
    ),
    cfg.IntOpt(
        "xen_stop_pages",
        default=2048,
        min=64,
        max=4000,  # a state carries up to four times as many
        help="Pages of 4 KiB that a fork may copy while the guest is stopped. One that writes to "
        "more while as many are copied is not forked. On Xen only.",
    ),
    cfg.IntOpt(
        "read_around",
        default=64,
        min=4,
        max=128,  # the kernel reads no further ahead (VM_READAHEAD_PAGES)
        help="How many KiB around a page that a clone touches are fetched with it.",
    ),
]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Have ``conf.snowflock``."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, group=GROUP)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Groups and their options, for the sample generator (entry point oslo.config.opts)."""
    return [(GROUP, OPTIONS)]
