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
            # A port of the other family may have the same number.
            shown = sorted(row for row in sockets.read_rows() if row.port in ports and row.address == host)

        assert told == shown
        assert (host, port, os.getuid(), os.fstat(server.fileno()).st_ino, True) in told
        # More where an earlier test had the same port a moment ago.
        assert len(told) >= 2


def test_only_listening_sockets_are_told_of_where_they_are_asked_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        told = list(sockets.told_rows(socket.AF_INET, 1 << 10))

        assert server.getsockname()[1] in {row.port for row in told}
        assert all(row.listens for row in told)


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["IPv4", "IPv6"]
)
def test_the_kernel_leaves_out_sockets_with_other_ports(family: int, host: str) -> None:
    """2026-11-25: half of a look went into ten thousand connections that had ended, and none had a port of sage's."""
    with socket.create_server((host, 0), family=family) as server, socket.create_connection(server.getsockname()[:2]):
        port = server.getsockname()[1]
        every = {row for row in sockets.told_rows(family, 0xFFF) if abs(row.port - port) < 3}
        for ports in (
            range(port, port + 1),
            range(port - 2, port + 3),
            range(port + 1, port + 3),
            range(port - 2, port),
        ):
            told = {row for row in sockets.told_rows(family, 0xFFF, ports) if row.inode}

            assert told == {row for row in every if row.port in ports and row.inode}
