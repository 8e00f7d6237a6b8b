# SPDX-License-Identifier: Apache-2.0
"""Connections to libvirt."""

import threading

import libvirt


class Connections:
    """One connection for each thread, made when the thread first asks.

    Threads that share one let one of them wait for all answers. It forgets what another gives it to
    send just before it falls asleep (libvirt 9.0, virnetclient.c: g_main_loop_quit() does nothing
    before g_main_loop_run()), which is then sent when the answer comes that it sleeps for. That may
    be the end of a clone's start, or never.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._local = threading.local()

    def get(self) -> libvirt.virConnect:
        """The calling thread's connection; it works, also after libvirt's daemon was restarted.

        :raises libvirtError: the daemon does not answer
        """
        connection: libvirt.virConnect | None = getattr(self._local, "connection", None)
        if connection is None or _is_broken(connection):
            connection = self._local.connection = libvirt.open(self._uri)
        return connection


def _is_broken(connection: libvirt.virConnect) -> bool:
    try:
        connection.getLibVersion()
    except libvirt.libvirtError as error:
        if error.get_error_domain() in (libvirt.VIR_FROM_REMOTE, libvirt.VIR_FROM_RPC):
            return True
        raise
    return False
