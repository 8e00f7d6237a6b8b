# SPDX-License-Identifier: Apache-2.0
"""Configuration options, group ``[snowflock]``."""

from oslo_config import cfg
from oslo_config import types

GROUP = cfg.OptGroup("snowflock", title="VM fork")

OPTIONS = [
    cfg.StrOpt(
        "hypervisor",
        default="qemu",
        help="The hypervisor back end: the name of an entry point in nova_snowflock.hypervisor.",
    ),
    cfg.StrOpt(
        "run_path",
        default="/run/nova-snowflock",
        help="Directory, on a tmpfs and for root only, of control sockets, mounts and records, "
        "one subdirectory per fork image.",
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
        help="The address of this host from which its memory servers serve fork images.",
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
    cfg.StrOpt(
        "multicast_groups",
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
        "background_rate",
        default=50,
        min=1,
        help="The rate in MB/s of the population policy 'background'.",
    ),
    cfg.IntOpt(
        "read_around",
        default=64,
        min=4,
        max=128,
        help="How many KiB around a page that a clone touches are fetched with it.",
    ),
]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Make ``conf.snowflock`` known."""
    conf.register_group(GROUP)
    conf.register_opts(OPTIONS, group=GROUP)


def list_opts() -> list[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """For the sample generator (entry point namespace oslo.config.opts)."""
    return [(GROUP, OPTIONS)]
