"""Listening sockets: who has them, which ports this user may have, and a port that is held until an engine takes it.

Facts come from the kernel, by sock_diag(7) where it answers and else from /proc (proc(5)); nothing is judged here.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sage_reconcile.core.facts import Gap, ListenerFact
from sage_reconcile.world.failpoints import failpoint

EVERY_PORT = range(1 << 16)

_LISTEN = 10  # TCP_LISTEN, include/net/tcp_states.h
_EVERY_STATE = 0xFFF  # A bit for each state that /proc/net/tcp shows, include/net/tcp_states.h
_CAP_NET_BIND_SERVICE = 10  # include/uapi/linux/capability.h


class _Row(NamedTuple):
    """One TCP socket, as its own end sees it."""

    address: str
    port: int
    uid: int
    inode: int
    listens: bool


def listeners(pids: Iterable[int]) -> tuple[tuple[ListenerFact, ...], tuple[Gap, ...]]:
    """Every listening TCP socket of this network namespace; its holders are looked for among `pids`."""
    holders: dict[int, list[int]] = {}
    try:
        rows = _listening()
        wanted = {row.inode for row in rows}
        for pid in pids:
            for inode in _socket_inodes(pid) & wanted:
                holders.setdefault(inode, []).append(pid)
        if wanted - set(holders):
            # A socket that closed with its process between the two looks is nobody's, and not an unknown's.
            still = {row.inode for row in _listening()}
            rows = [row for row in rows if row.inode in holders or row.inode in still]
    except OSError as error:
        return (), (Gap(what="listeners", why=f"cannot read /proc/net/tcp: {error.strerror}"),)
    return tuple(
        ListenerFact(address=row.address, port=row.port, uid=row.uid, pids=tuple(sorted(holders.get(row.inode, []))))
        for row in rows
    ), ()


def _listening() -> list[_Row]:
    return [row for row in _rows(1 << _LISTEN) if row.listens]


def _rows(states: int, ports: range = EVERY_PORT) -> list[_Row]:
    """Every socket in one of these states with such a port, and further ones where the kernel can only be read.

    To show /proc/net/tcp it walks a table that grows with the machine's memory: 10 ms a read on one with 24 GiB, and
    more the more clients came and went in the last minute. An answer about listening sockets takes 0.1 ms.
    """
    try:
        return [row for family in (socket.AF_INET, socket.AF_INET6) for row in told_rows(family, states, ports)]
    except OSError:
        return list(read_rows())


# What sock_diag(7) is asked with and answers: nlmsghdr (netlink(7)), inet_diag_req_v2 and inet_diag_msg.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_AND_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
# The attribute that says which sockets are meant, and its steps (inet_diag_bc_op), a comparison and its port each.
_BYTECODE = 1
_AT_LEAST, _AT_MOST = 2, 3
_STEPS = struct.Struct("=HHBBHxxHBBHxxH")
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ASKED = struct.Struct("=BBBBI48x")  # family, protocol, extensions, padding, states, and no particular socket
_TOLD = struct.Struct("=xB2x2s2x16s40xII")  # state, port and address (both in network order), uid, inode
# The kernel fills at most this much at a time (netlink_dump in net/netlink/af_netlink.c).
_ANSWER_BYTES = 32 * 1024


def _with_ports(ports: range) -> bytes:
    """The attribute that leaves out sockets whose own port is another (inet_diag_bc_run in net/ipv4/inet_diag.c).

    A comparison that holds goes on 8 bytes, to the next or to the end; one that does not, beyond the end.
    """
    steps = (_AT_LEAST, 8, 20, ports[0], _AT_MOST, 8, 12, ports[-1])
    return _STEPS.pack(_STEPS.size, _BYTECODE, *steps)


def told_rows(family: int, states: int, ports: range = EVERY_PORT) -> Iterator[_Row]:
    """The sockets of a family that sock_diag(7) tells of. Raises OSError where it is not there."""
    asked = _ASKED.pack(family, socket.IPPROTO_TCP, 0, 0, states)
    asked += _with_ports(ports) if ports != EVERY_PORT else b""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as kernel:
        header = _HEADER.pack(_HEADER.size + len(asked), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_AND_DUMP, 1, 0)
        kernel.sendall(header + asked)
        while True:
            answer, start = kernel.recv(_ANSWER_BYTES), 0
            while start < len(answer):
                length, kind, *_ = _HEADER.unpack_from(answer, start)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (error,) = struct.unpack_from("=i", answer, start + _HEADER.size)
                    raise OSError(-error, os.strerror(-error))
                state, port, address, uid, inode = _TOLD.unpack_from(answer, start + _HEADER.size)
                yield _Row(
                    address=socket.inet_ntop(family, address[: 4 if family == socket.AF_INET else 16]),
                    port=int.from_bytes(port, "big"),
                    uid=uid,
                    inode=inode,
                    listens=state == _LISTEN,
                )
                start += length + 3 & ~3


def read_rows() -> Iterator[_Row]:
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        # A machine without IPv6 has no such file.
        for line in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else ():
            fields = line.split()
            address, _, port = fields[1].partition(":")
            yield _Row(
                address=_address(address),
                port=int(port, 16),
                uid=int(fields[7]),
                inode=int(fields[9]),
                listens=int(fields[3], 16) == _LISTEN,
            )


def busy_ports(asked: Collection[int]) -> tuple[int, ...]:
    """Those of the ports on which nobody listens and nobody could: a client's connection has them, or had them before.

    Only where the kernel shows a socket with such a port is it tried, by a bind that listens to nothing.
    """
    try:
        # A machine on which clients come and go has ten thousands of sockets that have ended, and are of no interest.
        rows = _rows(_EVERY_STATE, range(min(asked), max(asked) + 1)) if asked else []
    except OSError:
        return ()
    listened = {row.port for row in rows if row.listens}
    tried = sorted({row.port for row in rows if row.port in asked} - listened)
    return tuple(port for port in tried if not _can_be_bound(port))


def _can_be_bound(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _address(words: str) -> str:
    """An address of /proc/net/tcp: 32-bit words, each in the machine's byte order."""
    raw = b"".join(int(words[start : start + 8], 16).to_bytes(4, "little") for start in range(0, len(words), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def lowest_port() -> int:
    """The lowest TCP port that this user may listen on (ip_unprivileged_port_start in ip(7), CAP_NET_BIND_SERVICE)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    capabilities = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    if int(capabilities, 16) & 1 << _CAP_NET_BIND_SERVICE:
        return 1
    return _kernel_numbers("/proc/sys/net/ipv4/ip_unprivileged_port_start", (1024,))[0]


def client_ports() -> tuple[int, int]:
    """The first and last port that the kernel gives to clients (ip_local_port_range in ip(7)); (0, 0) for none."""
    first, last = _kernel_numbers("/proc/sys/net/ipv4/ip_local_port_range", (0, 0))
    return first, last


def _kernel_numbers(path: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in Path(path).read_text(encoding="ascii").split())
    except OSError:
        return otherwise


def _socket_inodes(pid: int) -> set[int]:
    """Inodes of the sockets that a process holds; empty for one that may not be looked into."""
    inodes = _inodes_in(f"/proc/{pid}/fd")
    if inodes is None:
        # The first thread has ended, and with it this list; that of another thread is the same.
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                inodes = inodes or _inodes_in(f"/proc/{pid}/task/{thread}/fd")
    return inodes or set()


def _inodes_in(directory: str) -> set[int] | None:
    """Inodes of the sockets among the descriptors in a directory; None when there are no descriptors to be seen."""
    inodes, is_empty = set(), True
    with contextlib.suppress(PermissionError, FileNotFoundError, ProcessLookupError):
        for entry in os.scandir(directory):
            is_empty = False
            with contextlib.suppress(FileNotFoundError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
    return None if is_empty else inodes


def held_port(host: str, port: int, *, hold: bool) -> socket.socket | None:
    """Prove the port free by a bind with SO_REUSEADDR alone, then hold it if so asked. Raises OSError.

    The holder is bound and does not listen: it keeps away who sets neither SO_REUSEADDR nor SO_REUSEPORT.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    failpoint("port.begin")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
    failpoint("port.proved")
    if not hold:
        return None
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
        failpoint("port.held")
    except OSError:
        held.close()
        raise
    return held


def is_listened_on(port: int) -> bool:
    """Whether anybody listens on the port, at whatever address."""
    found, _ = listeners(())
    return any(fact.port == port for fact in found)
