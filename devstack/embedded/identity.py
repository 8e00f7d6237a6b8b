# SPDX-License-Identifier: Apache-2.0
"""Users, projects, the catalog, flavors and networks; and the files that clients need for them."""

import datetime
import functools
import json
from typing import Any

from keystoneauth1 import exceptions as keystoneauth_exceptions
from openstack import connection
from openstack import exceptions
from openstack.config import loader

from devstack.embedded import ovn
from devstack.embedded import settings

CLOUDS = settings.STATE / "clouds.yaml"
OPENRC = settings.STATE / "openrc"

CATALOG = {
    "glance": ("image", "http://{address}:{port}"),
    "placement": ("placement", "http://{address}:{port}"),
    "neutron": ("network", "http://{address}:{port}"),
    "nova": ("compute", "http://{address}:{port}/v2.1"),
}
FLAVORS = {
    # Name: MiB of memory, VCPUs, GB of disk.
    "tiny": (256, 1, 1),
    "small": (512, 1, 1),
    "medium": (1024, 1, 1),
    "large": (2048, 2, 2),
}


def users() -> dict[str, tuple[str, str, list[str]]]:
    """By the cloud's name in clouds.yaml, which is the user's: password, project, roles."""
    passwords = settings.passwords()
    return {
        "demo": (passwords.demo, "demo", ["member"]),
        "demo-admin": (passwords.admin, "demo", ["admin"]),
        "demo-reader": (passwords.reader, "demo", ["reader"]),
        "other": (passwords.other, "other", ["member"]),
    }


def write_client_files() -> None:
    """clouds.yaml, and a file for the shell that selects a cloud of it."""
    accounts = {"admin": (settings.passwords().admin, "admin", [""]), **users()}
    clouds = {
        name: {
            "auth": {
                "auth_url": settings.KEYSTONE,
                "username": name,
                "password": password,
                "project_name": project,
                "user_domain_name": "Default",
                "project_domain_name": "Default",
            },
            "region_name": settings.REGION,
            "identity_api_version": 3,
        }
        for name, (password, project, _) in accounts.items()
    }
    # JSON is YAML.
    settings.write(CLOUDS, json.dumps({"clouds": clouds}, indent=1) + "\n")
    settings.write(
        OPENRC,
        f"""\
# For the shell: source {OPENRC} [{"|".join(clouds)}]
export OS_CLIENT_CONFIG_FILE={CLOUDS}
export OS_CLOUD=${{1:-demo}}
case :$PATH: in *:{settings.BIN}:*) ;; *) export PATH={settings.BIN}:$PATH ;; esac
""",
    )


@functools.cache
def client(name: str = "admin") -> Any:
    """A connection as one of the users, the same for all who ask: see :func:`connect`."""
    return connect(name)


def connect(name: str = "admin") -> Any:
    """A new connection as one of the users: an openstack.connection.Connection.

    It knows the catalog as it was when it was first used.
    """
    files = loader.OpenStackConfig(config_files=[str(CLOUDS)], load_envvars=False)
    return connection.Connection(config=files.get_one(name))


def install() -> None:
    """Make users, projects and the catalog, as far as they are missing."""
    identity = connect().identity
    roles = {role.name: role for role in identity.roles()}
    if "service" not in roles:
        roles["service"] = identity.create_role(name="service")
    projects = {
        name: identity.find_project(name) or identity.create_project(name=name, domain_id="default")
        for name in ("service", "demo", "other")
    }

    def user(name: str, password: str, project: str, names: list[str]) -> None:
        account = identity.find_user(name) or identity.create_user(
            name=name, password=password, domain_id="default"
        )
        for role in names:
            identity.assign_project_role_to_user(projects[project], account, roles[role])

    for name in CATALOG:
        user(name, settings.passwords().service, "service", ["admin", "service"])
    for name, (password, project, names) in users().items():
        user(name, password, project, names)

    services = {service.type: service for service in identity.services()}
    endpoints = {(e.service_id, e.interface) for e in identity.endpoints()}
    for name, (kind, template) in CATALOG.items():
        service = services.get(kind) or identity.create_service(name=name, type=kind)
        url = template.format(address=settings.CONTROLLER, port=settings.PORTS[name])
        for interface in ("public", "internal", "admin"):
            if (service.id, interface) not in endpoints:
                identity.create_endpoint(
                    service_id=service.id, interface=interface, url=url, region_id=settings.REGION
                )


def install_flavors() -> None:
    compute = client().compute
    existing = {flavor.name for flavor in compute.flavors()}
    for name, (memory, processors, disk) in FLAVORS.items():
        if name not in existing:
            compute.create_flavor(name=name, ram=memory, vcpus=processors, disk=disk)


def install_networks() -> None:
    """A network of the world outside, and one of the project demo's behind a router."""
    network = client().network
    demo = client().identity.find_project("demo").id
    public = network.find_network("public") or network.create_network(
        name="public",
        provider_network_type="flat",
        provider_physical_network=ovn.PHYSICAL_NETWORK,
        is_router_external=True,
        is_shared=True,
    )
    if not network.find_subnet("public"):
        network.create_subnet(
            name="public",
            network_id=public.id,
            ip_version=4,
            cidr=str(settings.PROVIDER),
            gateway_ip=str(settings.PROVIDER_GATEWAY),
        )
    private = network.find_network("private") or network.create_network(
        name="private", project_id=demo
    )
    subnets = [
        network.find_subnet(name)
        or network.create_subnet(
            name=name, project_id=demo, network_id=private.id, cidr=str(cidr), **options
        )
        for name, cidr, options in (
            ("private", settings.PRIVATE, {"ip_version": 4}),
            (
                "private6",
                settings.PRIVATE6,
                {"ip_version": 6, "ipv6_ra_mode": "slaac", "ipv6_address_mode": "slaac"},
            ),
        )
    ]
    router = network.find_router("router") or network.create_router(
        name="router", project_id=demo, external_gateway_info={"network_id": public.id}
    )
    inside = network.ports(device_id=router.id, network_id=private.id)
    connected = {ip["subnet_id"] for port in inside for ip in port.fixed_ips}
    for subnet in subnets:
        if subnet.id not in connected:
            network.add_interface_to_router(router, subnet=subnet.id)
    [group] = network.security_groups(project_id=demo, name="default")
    open_to_all = {
        rule.protocol
        for rule in network.security_group_rules(security_group_id=group.id, direction="ingress")
        if not rule.remote_group_id
    }
    for protocol in {"icmp", "tcp"} - open_to_all:
        network.create_security_group_rule(
            project_id=demo, security_group_id=group.id, direction="ingress", protocol=protocol
        )


def unmapped_hosts() -> set[str]:
    """Compute hosts that the API does not know yet.

    :raises SDKException: the API does not answer
    """
    hypervisors = client().compute.hypervisors()
    return set(settings.HOSTS) - {hypervisor.name for hypervisor in hypervisors}


def last_report(host: str) -> float | None:
    """When nova last heard of the host's nova-compute, in seconds since 1970.

    None if never, if nova takes it for gone, or if nova does not answer.
    """
    try:
        services = list(client().compute.services(binary="nova-compute", host=host))
    except (
        exceptions.HttpException,
        keystoneauth_exceptions.HttpError,
        keystoneauth_exceptions.ConnectionError,
    ):
        return None
    for service in services:
        if service.state == "up" and service.updated_at:
            moment = datetime.datetime.fromisoformat(service.updated_at)
            return moment.replace(tzinfo=datetime.UTC).timestamp()
    return None
