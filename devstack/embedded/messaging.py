# SPDX-License-Identifier: Apache-2.0
"""A RabbitMQ broker of the cloud's own."""

import socket

from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

DATA = settings.STATE / "rabbitmq"
CONFIG = settings.ETC / "rabbitmq"
USER = "cloud"

# In the cloud's network namespace, this port of localhost is nobody else's.
EPMD = processes.Service("epmd", ["epmd", "-address", "127.0.0.1"], namespace=network.NAMESPACE)


def url() -> str:
    password = settings.passwords().messaging
    return f"rabbit://{USER}:{password}@{settings.CONTROLLER}:{settings.MESSAGING_PORT}/"


def answers() -> bool:
    """Whether it speaks AMQP."""
    try:
        address = (settings.CONTROLLER, settings.MESSAGING_PORT)
        with socket.create_connection(address, timeout=2) as connection:
            connection.sendall(b"AMQP\0\0\x09\1")
            return bool(connection.recv(1))
    except OSError:
        return False


SERVICE = processes.Service(
    "rabbitmq",
    ["/usr/lib/rabbitmq/bin/rabbitmq-server"],
    ready=answers,
    environment={
        "HOME": str(DATA),
        "RABBITMQ_NODENAME": "cloud@localhost",
        "RABBITMQ_CONF_ENV_FILE": str(CONFIG / "rabbitmq-env.conf"),
        "RABBITMQ_CONFIG_FILE": str(CONFIG / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(CONFIG / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(CONFIG / "enabled_plugins"),
        "RABBITMQ_MNESIA_BASE": str(DATA),
        "RABBITMQ_LOG_BASE": str(settings.LOG),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_PID_FILE": str(DATA / "pid"),
        "RABBITMQ_DIST_PORT": "25672",
        # One scheduler thread, and none that waits awake.
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none "
        "-start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
        # Its script becomes the broker, instead of watching it.
        "RUNNING_UNDER_SYSTEMD": "1",
    },
    namespace=network.NAMESPACE,
)


def configure() -> None:
    DATA.mkdir(mode=0o700, exist_ok=True)
    settings.write(CONFIG / "rabbitmq-env.conf", "")
    settings.write(CONFIG / "enabled_plugins", "[].\n")
    settings.write(
        CONFIG / "rabbitmq.conf",
        f"""\
listeners.tcp.1 = {settings.CONTROLLER}:{settings.MESSAGING_PORT}
default_user = {USER}
default_pass = {settings.passwords().messaging}
loopback_users = none
log.console = true
log.console.level = warning
vm_memory_high_watermark.absolute = 512MB
disk_free_limit.absolute = 100MB
""",
    )
