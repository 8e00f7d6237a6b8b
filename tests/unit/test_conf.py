# SPDX-License-Identifier: Apache-2.0
"""The options of the group [snowflock]."""

import ipaddress

from oslo_config import cfg
import pytest

from nova_snowflock import conf as snowflock_conf


def configured(**options: object) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    snowflock_conf.register_opts(conf)
    conf([], default_config_files=[], default_config_dirs=[])
    for name, value in options.items():
        conf.set_override(name, value, "snowflock")
    return conf


def test_multicast_groups_are_a_network() -> None:
    assert configured().snowflock.multicast_groups == ipaddress.ip_network("239.255.0.0/16")
    chosen = configured(multicast_groups="ff15::/64").snowflock.multicast_groups
    assert chosen == ipaddress.ip_network("ff15::/64")


@pytest.mark.parametrize("groups", ["", "all", "10.0.0.0/8", "239.255.0.1/16", "224.0.0.0/3"])
def test_multicast_groups_that_are_none(groups: str) -> None:
    with pytest.raises(ValueError, match=r"appear|host bits|multicast"):
        configured(multicast_groups=groups)
