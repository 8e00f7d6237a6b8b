# SPDX-License-Identifier: Apache-2.0
"""OVN: the databases in which neutron says what networks there are, and what each host has of them.

The control plane's part runs in the cloud's network namespace. On each compute host, Open vSwitch
passes frames in user space, since not every kernel has it, and ovn-controller tells it which.
"""

import pathlib
import socket
import subprocess

from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings
from devstack.embedded import taps

DIRECTORY = settings.STATE / "ovn"
SCHEMAS = pathlib.Path("/usr/share/ovn")
PORTS = {"nb": 6641, "sb": 6642}
PHYSICAL_NETWORK = "physnet1"


def url(name: str) -> str:
    """Where clients find a database."""
    return f"tcp:{settings.CONTROLLER}:{PORTS[name]}"


def file(name: str) -> pathlib.Path:
    return DIRECTORY / f"{name}.db"


def local(name: str) -> pathlib.Path:
    """The socket on which a database's server takes the connections of this machine's root."""
    return settings.RUN / f"ovn-{name}.sock"


def answers() -> bool:
    try:
        for name in PORTS:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(local(name)))
    except OSError:
        return False
    return True


DATABASES = processes.Service(
    "ovn-databases",
    [
        "/usr/sbin/ovsdb-server",
        f"--unixctl={settings.RUN}/ovn-databases.ctl",
        # Others are told by a row of the databases, for the one thing that only that can say: a
        # busy machine's clients are not taken for dead.
        *(f"--remote=punix:{local(name)}" for name in PORTS),
        "--remote=db:OVN_Northbound,NB_Global,connections",
        "--remote=db:OVN_Southbound,SB_Global,connections",
        *(str(file(name)) for name in PORTS),
    ],
    ready=answers,
    namespace=network.NAMESPACE,
)
NORTHD = processes.Service(
    "ovn-northd",
    [
        "/usr/bin/ovn-northd",
        *(f"--ovn{name}-db=unix:{local(name)}" for name in PORTS),
        f"--unixctl={settings.RUN}/ovn-northd.ctl",
    ],
    namespace=network.NAMESPACE,
)


def create() -> None:
    """Make the databases, empty."""
    DIRECTORY.mkdir(mode=0o700, exist_ok=True)
    for name in PORTS:
        if not file(name).exists():
            schema = SCHEMAS / f"ovn-{name}.ovsschema"
            processes.run(
                ["/usr/bin/ovsdb-tool", "create", str(file(name)), str(schema)], log="ovsdb-tool"
            )


def listen() -> None:
    """Have the databases' server take connections of the cloud's other parts."""
    for name, port in PORTS.items():
        processes.run(
            [
                *(f"/usr/bin/ovn-{name}ctl", f"--db=unix:{local(name)}", "--timeout=30", "init"),
                *("--", "set-connection", f"ptcp:{port}:{settings.CONTROLLER}"),
                *("--", "set", "connection", ".", "inactivity_probe=0"),
            ],
            log=f"ovn-{name}ctl",
        )


# What follows runs on a compute host.

LOG = pathlib.Path("/var/log/openvswitch")
RUN = pathlib.Path("/run/openvswitch")
CONFIGURATION = RUN / "conf.db"
DATABASE_SOCKET = RUN / "db.sock"


def start_switch(name: str, address: str) -> bool:
    """Start what does not run of the host's switch; whether any did not.

    :param address: the host's, for its peers; networks are VLANs here, but OVN wants to know
    """
    (RUN.parent / "ovn").mkdir(exist_ok=True)
    RUN.mkdir(exist_ok=True)
    if not CONFIGURATION.exists():
        schema = "/usr/share/openvswitch/vswitch.ovsschema"
        subprocess.run(["ovsdb-tool", "create", str(CONFIGURATION), schema], check=True)
    remotes = (f"--remote=punix:{DATABASE_SOCKET}", "--remote=ptcp:6640:127.0.0.1")
    new = _start("ovsdb-server", *remotes, str(CONFIGURATION))
    _configure(name, address)
    # Not the machine's kernel: it has no module for it, or another's configuration.
    new |= _start("ovs-vswitchd", "--disable-system")
    _keep_from_aborting()
    taps.keep_up()
    return _start("ovn-controller") or new


def _keep_from_aborting() -> None:
    """Have OVN believe that the switch lacks a feature, once for each that is started.

    Open vSwitch 3.1 aborts (conntrack.c, conn_update_state) if a connection comes again that has
    just expired and that OVN has had translated to the same address, as it does where that is
    possible. The switch says whether it is when there is no record of what it can.
    """
    running = (RUN / "ovs-vswitchd.pid").read_text()
    done = RUN / "without-ct-zero-snat"
    if done.exists() and done.read_text() == running:
        return
    subprocess.run(
        ["ovs-appctl", "dpif/set-dp-features", "br-int", "ct_zero_snat", "false"], check=True
    )
    vsctl("clear", "Open_vSwitch", ".", "datapaths")
    done.write_text(running)


def _configure(name: str, address: str) -> None:
    options = {
        # Before ovs-vswitchd starts: guests leave checksums and segmentation to their devices.
        "other_config:userspace-tso-enable": "true",
        "other_config:n-handler-threads": "1",
        "other_config:n-revalidator-threads": "1",
        "external_ids:system-id": name,
        "external_ids:hostname": name,
        "external_ids:ovn-remote": url("sb"),
        "external_ids:ovn-encap-type": "geneve",
        "external_ids:ovn-encap-ip": address,
        "external_ids:ovn-bridge-datapath-type": "netdev",
        "external_ids:ovn-bridge-mappings": f"{PHYSICAL_NETWORK}:br-ex",
        # Routers reach the world from one host: several would watch each other through tunnels.
        "external_ids:ovn-cms-options": (
            "enable-chassis-as-gw" if name == settings.HOSTS[0] else '""'
        ),
        # A busy machine's are not taken for dead.
        "external_ids:ovn-remote-probe-interval": "0",
        "external_ids:ovn-openflow-probe-interval": "0",
    }
    bridges: list[str] = []
    for bridge in ("br-int", "br-ex"):
        bridges += ["--", "--may-exist", "add-br", bridge]
        bridges += ["--", "set", "Bridge", bridge, "datapath_type=netdev"]
    vsctl(
        *("init", "--", "set", "Open_vSwitch", "."),
        *(f"{key}={value}" for key, value in options.items()),
        *bridges,
        *("--", "set", "Bridge", "br-int", "fail_mode=secure"),
        *("--", "--may-exist", "add-port", "br-ex", network.DATA_LINK),
    )


def vsctl(*arguments: str) -> str:
    """What ovs-vsctl says. It does not wait for the switch to have done it."""
    command = ["ovs-vsctl", "--no-wait", "--timeout=30", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _start(program: str, *arguments: str) -> bool:
    pid_file = RUN / f"{program}.pid"
    if _runs(pid_file):
        return False
    subprocess.run(
        [
            *(program, *arguments, "--detach", "--no-chdir", f"--pidfile={pid_file}"),
            *(f"--log-file={LOG / program}.log", "-vconsole:off"),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return True


def _runs(pid_file: pathlib.Path) -> bool:
    try:
        pid = int(pid_file.read_text())
        # Another may have its number by now.
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == pid_file.stem
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return False
