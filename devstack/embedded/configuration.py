# SPDX-License-Identifier: Apache-2.0
"""The services' configuration files."""

from collections.abc import Mapping
import pathlib
import sys

from devstack.embedded import database
from devstack.embedded import messaging
from devstack.embedded import ovn
from devstack.embedded import settings

Options = Mapping[str, Mapping[str, object]]

SHIPPED = pathlib.Path(sys.prefix, "etc")
"""What the services' packages install for /etc."""
PRIVSEP = f"{settings.BIN}/privsep-helper"
NOVA_STATE = "/var/lib/nova"
"""On each compute host; a directory of the host's own."""


def render(options: Options) -> str:
    lines = []
    for section, values in options.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {value}" for name, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def credentials(user: str) -> dict[str, object]:
    """How a service shows keystone who it is."""
    return {
        "auth_type": "password",
        "auth_url": settings.KEYSTONE,
        "username": user,
        "password": settings.passwords().service,
        "project_name": "service",
        "user_domain_name": "Default",
        "project_domain_name": "Default",
        "region_name": settings.REGION,
    }


def authtoken(user: str) -> dict[str, object]:
    """How a service checks the tokens that clients show."""
    return {
        **credentials(user),
        "www_authenticate_uri": settings.KEYSTONE,
        "service_token_roles": "service",
        "service_token_roles_required": "true",
    }


def connection(name: str) -> dict[str, object]:
    return {"connection": database.url(name), "max_pool_size": 10, "max_overflow": 20}


def lock_path(service: str) -> dict[str, object]:
    return {"lock_path": settings.STATE / "locks" / service}


def keystone() -> Options:
    keys = settings.STATE / "keystone"
    return {
        "DEFAULT": {"use_stderr": "true"},
        "database": connection("keystone"),
        "token": {"provider": "fernet", "expiration": 86400},
        "fernet_tokens": {"key_repository": keys / "fernet"},
        "credential": {"key_repository": keys / "credential"},
        "fernet_receipts": {"key_repository": keys / "fernet"},
        # Rounds of bcrypt: each token of a service costs one.
        "identity": {"password_hash_rounds": 4},
    }


def glance() -> Options:
    return {
        "DEFAULT": {
            "use_stderr": "true",
            "enabled_backends": "files:file",
            "enabled_import_methods": "[]",
            "worker_self_reference_url": f"http://{settings.CONTROLLER}:{settings.PORTS['glance']}",
        },
        "files": {"filesystem_store_datadir": settings.STATE / "glance/images"},
        "os_glance_staging_store": {"filesystem_store_datadir": settings.STATE / "glance/staging"},
        "os_glance_tasks_store": {"filesystem_store_datadir": settings.STATE / "glance/tasks"},
        "glance_store": {"default_backend": "files"},
        "database": connection("glance"),
        "keystone_authtoken": authtoken("glance"),
        "paste_deploy": {
            "flavor": "keystone",
            "config_file": SHIPPED / "glance/glance-api-paste.ini",
        },
        "oslo_concurrency": lock_path("glance"),
    }


def placement() -> Options:
    return {
        "DEFAULT": {"use_stderr": "true"},
        "api": {"auth_strategy": "keystone"},
        "placement_database": connection("placement"),
        "keystone_authtoken": authtoken("placement"),
    }


def neutron() -> Options:
    return {
        "DEFAULT": {
            "use_stderr": "true",
            "auth_strategy": "keystone",
            "core_plugin": "ml2",
            "service_plugins": "ovn-router,port_forwarding",
            "transport_url": messaging.url(),
            "api_paste_config": SHIPPED / "neutron/api-paste.ini",
            "state_path": settings.STATE / "neutron",
            "dns_domain": "cloud.test.",
            "notify_nova_on_port_status_changes": "true",
            "notify_nova_on_port_data_changes": "true",
            # Nova waits for what it is told of ports.
            "send_events_interval": 1,
        },
        "ml2": {
            "type_drivers": "flat,vlan",
            # Open vSwitch 3.1 in user space drops segmented TCP in tunnels.
            "tenant_network_types": "vlan",
            "mechanism_drivers": "ovn",
            "extension_drivers": "port_security,dns",
        },
        "ml2_type_vlan": {"network_vlan_ranges": f"{ovn.PHYSICAL_NETWORK}:100:199"},
        "ml2_type_flat": {"flat_networks": ovn.PHYSICAL_NETWORK},
        "ovn": {
            "ovn_nb_connection": ovn.url("nb"),
            "ovn_sb_connection": ovn.url("sb"),
            # Servers have config drives.
            "ovn_metadata_enabled": "false",
        },
        "database": connection("neutron"),
        "keystone_authtoken": authtoken("neutron"),
        "nova": credentials("nova"),
        "placement": credentials("placement"),
        "oslo_concurrency": lock_path("neutron"),
    }


def _nova() -> dict[str, dict[str, object]]:
    """What nova's services have in common."""
    return {
        "DEFAULT": {
            "use_stderr": "true",
            "transport_url": messaging.url(),
            "my_ip": settings.CONTROLLER,
            "concurrency_backend": "threading",
            # Nothing here is far away, and who asks a service that was killed waits this long.
            "rpc_response_timeout": 30,
            # A host whose report was in a broker that was killed waits that long for the answer.
            "service_down_time": 90,
            # Hosts have no way to bring a disk to each other.
            "allow_resize_to_same_host": "true",
        },
        "oslo_concurrency": lock_path("nova"),
        "keystone_authtoken": authtoken("nova"),
        "service_user": {**credentials("nova"), "send_service_user_token": "true"},
        "placement": credentials("placement"),
        "neutron": {
            **credentials("neutron"),
            "service_metadata_proxy": "true",
            "metadata_proxy_shared_secret": settings.passwords().metadata,
        },
        "glance": {"region_name": settings.REGION},
        "barbican": {"auth_endpoint": settings.KEYSTONE},
        "cinder": {"os_region_name": settings.REGION},
        "oslo_messaging_notifications": {"driver": "messagingv2"},
        "notifications": {"notification_format": "versioned"},
        "oslo_messaging_rabbit": {"heartbeat_timeout_threshold": 60},
    }


def nova() -> Options:
    """The control plane's."""
    options = _nova()
    options["DEFAULT"] |= {"state_path": settings.STATE / "nova", "host": "controller"}
    return {
        **options,
        "database": connection("nova"),
        "api_database": connection("nova_api"),
        "api": {"auth_strategy": "keystone"},
        "wsgi": {"api_paste_config": settings.ETC / "nova/api-paste.ini"},
        "conductor": {"workers": 1},
        # New hosts are found by `up`, and if that was interrupted, by the scheduler.
        "scheduler": {"workers": 1, "discover_hosts_in_cells_interval": 60},
        "filter_scheduler": {"track_instance_changes": "false"},
        "vnc": {"enabled": "false"},
    }


def nova_compute(host: str) -> Options:
    """A compute host's: it has no database."""
    raw = host in settings.RAW_HOSTS
    options = _nova()
    options["DEFAULT"] |= {
        "host": host,
        "my_ip": settings.management_address(host),
        "state_path": NOVA_STATE,
        "compute_driver": "snowflock.SnowFlockDriver",
        "resume_guests_state_on_host_boot": "true",
        # Nova 34's libvirt driver has a thread that never ends, and would be waited for.
        "graceful_shutdown_timeout": 10,
        "manager_shutdown_timeout": 5,
        # Three of them share one machine's.
        "reserved_host_memory_mb": 512,
        "reserved_host_disk_mb": 0,
        "ram_allocation_ratio": 1.0,
        "cpu_allocation_ratio": 16.0,
        "disk_allocation_ratio": 1.0,
        "update_resources_interval": 60,
        # Guests that a host could not be told to end; half an hour is long for a test.
        "running_deleted_instance_poll_interval": 10,
        "use_cow_images": "false" if raw else "true",
        "mkisofs_cmd": "genisoimage",
        # The test guest does not listen when it is asked to shut down.
        "shutdown_timeout": 5,
    }
    options["oslo_concurrency"] = {"lock_path": "/run/nova-locks"}
    # As root there is nobody to become.
    for section in (
        "nova_sys_admin",
        "snowflock_privileged",
        "privsep_osbrick",
        "vif_plug_linux_bridge_privileged",
        "vif_plug_ovs_privileged",
    ):
        options[section] = {"helper_command": f"{PRIVSEP} --config-file {nova_compute_file(host)}"}
    return {
        **options,
        "libvirt": {
            "virt_type": "qemu",
            "images_type": "raw" if raw else "qcow2",
            "cpu_mode": "custom",
            "cpu_models": "Nehalem",
            "hw_machine_type": "x86_64=q35",
            "num_pcie_ports": 8,
            "sysinfo_serial": "unique",
            "wait_soft_reboot_seconds": 30,
        },
        # There is no proxy: whoever is on the host may look.
        "vnc": {"server_listen": "127.0.0.1", "server_proxyclient_address": "127.0.0.1"},
        "spice": {"enabled": "false"},
        "snowflock_nova": credentials("nova"),
        "snowflock": {
            "address": settings.underlay_address(host),
            "interface": "eth0",
            "mtu": settings.UNDERLAY_MTU,
            # Nothing here is far away.
            "spawn_timeout": 45,
            "sweep_interval": 5,
        },
    }


def nova_compute_file(host: str) -> pathlib.Path:
    return settings.ETC / f"nova-compute-{host}.conf"


def api_paste() -> str:
    """Nova's api-paste.ini with this project's application for the API."""
    text = (SHIPPED / "nova/api-paste.ini").read_text()
    theirs = "nova.api.openstack.compute:APIRouterV21.factory"
    assert theirs in text
    return text.replace(theirs, "nova_snowflock.api.router:APIRouter.factory")


def write() -> set[str]:
    """Have all files as they should be; names of those that changed."""
    changed = set()
    for name, options, file in (
        ("keystone", keystone(), "keystone/keystone.conf"),
        ("glance", glance(), "glance/glance-api.conf"),
        ("placement", placement(), "placement/placement.conf"),
        ("neutron", neutron(), "neutron/neutron.conf"),
        ("nova", nova(), "nova/nova.conf"),
        *(
            (f"nova-compute-{host}", nova_compute(host), nova_compute_file(host).name)
            for host in settings.HOSTS
        ),
    ):
        if settings.write(settings.ETC / file, render(options)):
            changed.add(name)
    if settings.write(settings.ETC / "nova/api-paste.ini", api_paste()):
        changed.add("nova")
    for directory in ("glance/images", "glance/staging", "glance/tasks", "nova", "neutron"):
        (settings.STATE / directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    for service in ("glance", "neutron", "nova"):
        (settings.STATE / "locks" / service).mkdir(parents=True, exist_ok=True, mode=0o700)
    return changed
