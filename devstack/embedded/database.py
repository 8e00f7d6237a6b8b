# SPDX-License-Identifier: Apache-2.0
"""A MariaDB server of the cloud's own."""

import shutil

import pymysql

from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

DATA = settings.STATE / "mariadb"
SOCKET = settings.RUN / "mariadb.sock"
NAMES = ("keystone", "glance", "placement", "neutron", "nova_api", "nova_cell0", "nova")
USER = "cloud"


def url(name: str) -> str:
    password = settings.passwords().database
    return f"mysql+pymysql://{USER}:{password}@127.0.0.1:{settings.DATABASE_PORT}/{name}?charset=utf8mb4"


def connect() -> "pymysql.connections.Connection[pymysql.cursors.Cursor]":
    return pymysql.connect(unix_socket=str(SOCKET), user="root", connect_timeout=5)


def answers() -> bool:
    try:
        connect().close()
    except pymysql.MySQLError:
        return False
    return True


SERVICE = processes.Service(
    "mariadb",
    [
        "/usr/sbin/mariadbd",
        "--no-defaults",
        "--user=root",
        f"--datadir={DATA}",
        f"--socket={SOCKET}",
        f"--pid-file={DATA}/mariadb.pid",
        "--bind-address=127.0.0.1",
        f"--port={settings.DATABASE_PORT}",
        "--skip-name-resolve",
        "--character-set-server=utf8mb3",
        "--max-connections=400",
        # Little memory; and a machine that loses power may lose its last second.
        "--performance-schema=OFF",
        "--innodb-buffer-pool-size=96M",
        "--innodb-log-file-size=32M",
        "--innodb-flush-log-at-trx-commit=2",
        "--innodb-doublewrite=OFF",
        "--aria-pagecache-buffer-size=8M",
        "--key-buffer-size=1M",
    ],
    ready=answers,
    namespace=network.NAMESPACE,
)


def install() -> None:
    """Make the data directory, unless there is one that is complete."""
    complete = DATA / "complete"
    if complete.exists():
        return
    shutil.rmtree(DATA, ignore_errors=True)
    # As the system's own tables need no password for root over the socket, its directory is
    # root's alone.
    DATA.mkdir(mode=0o700)
    processes.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            "--user=root",
            f"--datadir={DATA}",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
            "--auth-root-socket-user=root",
            "--innodb-log-file-size=32M",
        ],
        log="mariadb-install",
    )
    complete.touch()


def create_user() -> None:
    """Make the user that the services have in common."""
    with connect() as connection, connection.cursor() as cursor:
        cursor.execute(
            f"CREATE USER IF NOT EXISTS {USER}@'127.0.0.1' IDENTIFIED BY %s",
            [settings.passwords().database],
        )
        for name in NAMES:
            cursor.execute(f"GRANT ALL ON {name}.* TO {USER}@'127.0.0.1'")


def create(*names: str) -> None:
    """Make databases anew: one whose schema was made by half cannot be gone on with."""
    with connect() as connection, connection.cursor() as cursor:
        for name in names:
            cursor.execute(f"DROP DATABASE IF EXISTS {name}")
            cursor.execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb3")
