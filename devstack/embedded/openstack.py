# SPDX-License-Identifier: Apache-2.0
"""The services of the control plane, and their databases' schemas."""

import functools
import sys
import urllib.error
import urllib.request

from devstack.embedded import database
from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

ENVIRONMENT = {
    "OS_KEYSTONE_CONFIG_DIR": str(settings.ETC / "keystone"),
    "OS_GLANCE_CONFIG_DIR": str(settings.ETC / "glance"),
    "OS_PLACEMENT_CONFIG_DIR": str(settings.ETC / "placement"),
    "OS_NEUTRON_CONFIG_DIR": str(settings.ETC / "neutron"),
    "OS_NEUTRON_CONFIG_FILES": "neutron.conf",
    # Neutron shares OVN's events out among the processes of its API, of which there is one.
    "ASGI_WORKERS": "1",
    "OS_NOVA_CONFIG_DIR": str(settings.ETC / "nova"),
    # Few arenas: less memory for the same.
    "MALLOC_ARENA_MAX": "2",
}


def responds(port: int) -> bool:
    """Whether an API answers, if only that a token is needed."""
    try:
        with urllib.request.urlopen(f"http://{settings.CONTROLLER}:{port}/", timeout=10):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def api(name: str, module: str) -> processes.Service:
    port = settings.PORTS[name]
    return processes.Service(
        f"{name}-api" if name in ("nova", "glance", "neutron") else name,
        [
            sys.executable,
            *("-m", "devstack.embedded.wsgi", module, settings.CONTROLLER, str(port)),
        ],
        ready=functools.partial(responds, port),
        environment=ENVIRONMENT | {"PYTHONPATH": str(settings.REPOSITORY)},
        namespace=network.NAMESPACE,
    )


def nova_worker(name: str) -> processes.Service:
    return processes.Service(
        name,
        [str(settings.BIN / name), "--config-file", str(settings.ETC / "nova/nova.conf")],
        environment=ENVIRONMENT,
        namespace=network.NAMESPACE,
    )


KEYSTONE = api("keystone", "keystone.wsgi.api")
GLANCE = api("glance", "glance.wsgi.api")
PLACEMENT = api("placement", "placement.wsgi.api")
NEUTRON = api("neutron", "neutron.wsgi.api")
NOVA = api("nova", "nova.wsgi.osapi_compute")
CONDUCTOR = nova_worker("nova-conductor")
SCHEDULER = nova_worker("nova-scheduler")


def manage(program: str, *arguments: str) -> None:
    """Run one of the services' own tools for administrators."""
    processes.run(
        [str(settings.BIN / program), *arguments],
        log=program,
        environment=ENVIRONMENT,
        namespace=network.NAMESPACE,
    )


def install_keystone() -> None:
    """Keys, schema, and what a client needs to create the rest."""
    database.create("keystone")
    config = f"--config-file={settings.ETC / 'keystone/keystone.conf'}"
    for kind in ("fernet", "credential"):
        directory = settings.STATE / "keystone" / kind
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        manage(
            "keystone-manage",
            config,
            f"{kind}_setup",
            "--keystone-user",
            "root",
            "--keystone-group",
            "root",
        )
    manage("keystone-manage", config, "db_sync")
    processes.run(
        [
            str(settings.BIN / "keystone-manage"),
            *(config, "bootstrap"),
            *("--bootstrap-region-id", settings.REGION),
            *(
                f"--bootstrap-{kind}-url={settings.KEYSTONE}"
                for kind in ("public", "internal", "admin")
            ),
        ],
        log="keystone-manage",
        # Not an argument, which everyone could read.
        environment=ENVIRONMENT | {"OS_BOOTSTRAP_PASSWORD": settings.passwords().admin},
        namespace=network.NAMESPACE,
    )


def install_glance() -> None:
    database.create("glance")
    config = f"--config-file={settings.ETC / 'glance/glance-api.conf'}"
    manage("glance-manage", config, "db_sync")


def install_placement() -> None:
    database.create("placement")
    config = f"--config-file={settings.ETC / 'placement/placement.conf'}"
    manage("placement-manage", config, "db", "sync")


def install_neutron() -> None:
    database.create("neutron")
    config = f"--config-file={settings.ETC / 'neutron/neutron.conf'}"
    manage("neutron-db-manage", config, "upgrade", "heads")


def install_nova() -> None:
    database.create("nova_api", "nova_cell0", "nova")
    config = f"--config-file={settings.ETC / 'nova/nova.conf'}"
    manage("nova-manage", config, "api_db", "sync")
    manage("nova-manage", config, "cell_v2", "map_cell0")
    manage("nova-manage", config, "db", "sync")
    manage("nova-manage", config, "cell_v2", "create_cell", "--name", "cell1")


def discover_hosts() -> None:
    config = f"--config-file={settings.ETC / 'nova/nova.conf'}"
    manage("nova-manage", config, "cell_v2", "discover_hosts")


SCHEMAS = {
    "neutron": install_neutron,
    "nova": install_nova,
    "glance": install_glance,
    "placement": install_placement,
}
