"""The door to sockets: what the kernel answers about them is what it shows in /proc."""

import os
import socket

import pytest

from sage_reconcile.world import sockets


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
def test_sockets_that_the_kernel_tells_of_are_those_that_it_shows(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port)) as client:
            # It closes first, and its port stays with nobody for a minute (TIME_WAIT).
            accepted, _ = server.accept()
            ports = {port, client.getsockname()[1]}
            accepted.close()
            client.close()

            told = sorted(row for row in sockets.told_rows(family, 0xFFF) if row.port in ports)
            shown = sorted(row for row in sockets.read_rows() if row.port in ports)

        assert told == shown
        assert (host, port, os.getuid(), os.fstat(server.fileno()).st_ino, True) in told
        # More where an earlier test had the same port a moment ago.
        assert len(told) >= 2


def test_only_listening_sockets_are_told_of_where_they_are_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        told = list(sockets.told_rows(socket.AF_INET, 1 << 10))

        assert server.getsockname()[1] in {row.port for row in told}
        assert all(row.listens for row in told)
