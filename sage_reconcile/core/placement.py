"""Where an engine may live: its port, and the placement that it makes with its devices. Blind to runtimes.

The only maker of `Placement`, and through it of anything that can be started.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.puzzle import Seat
from sage_reconcile.core.quantities import ports_of
from sage_reconcile.core.refusal import Refusal
from sage_reconcile.core.resolved import Placement

# Engines listen on loopback: the router is the address for apps, and an engine's own server asks nobody for a key.
ENGINE_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What is not free, seen from one engine."""

    # Ports that stay in use, with who holds them.
    ports: Mapping[int, str]
    # Ports in use now that acts of this plan set free.
    freed_ports: Collection[int] = ()
    # Ports that other engines ask for by number.
    asked_ports: Collection[int] = ()


def placement(wanted: Wanted, port: int, observed: ObservedState, seat: Seat | None) -> Placement:
    """The place of one replica on a port, and on the devices that it needs; None for one that needs none."""
    if wanted.pin is not None:
        return wanted.pin.resolved.placement
    if seat is None:
        return Placement(node=observed.node, host=ENGINE_HOST, port=port)
    return Placement(
        node=observed.node,
        host=ENGINE_HOST,
        port=port,
        devices=tuple(device.uuid for device in seat.devices),
        device_indexes=tuple(device.index for device in seat.devices),
        memory_bytes_per_device=seat.claim.memory_bytes,
        context_bytes_per_device=seat.claim.context_bytes,
        memory_fraction=seat.claim.fraction,
        memory_source=seat.claim.source,
        memory_told=seat.told,
    )


def with_free(place: Placement, free_bytes: int, fraction: float) -> Placement:
    """The same place, and what is free there when the engine starts."""
    return replace(place, free_at_start_bytes=free_bytes, fraction_of_free=fraction)


def port_of(
    wanted: Wanted, desired: DesiredState, observed: ObservedState, predecessor: Engine | None, taken: Taken
) -> int | Refusal:
    """The port of one replica, in this order of preference. `predecessor` is the process that it replaces.

    0. The one that it had, of an engine that is put back.
    1. The one that is written down.
    2. The one that the predecessor has.
    3. The one that the engine had when it last ran.
    4. The first of its kind's pool that nobody uses, then the first that this plan sets free.
    """
    # (0)
    if wanted.pin is not None:
        port = wanted.pin.resolved.placement.port
        if port in taken.ports:
            return Refusal(reason="port_taken", why=f"it ran on port {port}, which is taken by {taken.ports[port]}")
        return port
    # (1)
    if isinstance(wanted.spec.port, int):
        holder = taken.ports.get(wanted.spec.port)
        if wanted.spec.port < observed.lowest_port:
            return Refusal(
                reason="port_forbidden",
                why=f"port {wanted.spec.port} is below {observed.lowest_port}, where this user may not listen",
                would_help=("port: auto", f"a port from {observed.lowest_port} on"),
            )
        if holder is None:
            return wanted.spec.port
        return Refusal(
            reason="port_taken",
            why=f"port {wanted.spec.port} is taken by {holder}",
            would_help=("port: auto", f"end {holder}"),
        )
    written = ports_of(getattr(desired.ports, wanted.spec.kind))
    pool = tuple(port for port in written if port >= observed.lowest_port)
    free = [port for port in pool if port not in taken.ports and port not in taken.asked_ports]
    # (2), (3)
    for port in _earlier_ports(wanted, observed, predecessor):
        if port in free:
            return port
    # (4)
    unused = [port for port in free if port not in taken.freed_ports]
    if unused or free:
        return (unused or free)[0]
    if not pool:
        return Refusal(
            reason="port_forbidden",
            why=f"its kind has only ports below {observed.lowest_port}, where this user may not listen",
            would_help=(f"ports from {observed.lowest_port} on in sage.yaml: ports: {{{wanted.spec.kind}: ...}}",),
        )
    return Refusal(
        reason="pool_exhausted",
        why=f"all {len(pool)} ports for kind {wanted.spec.kind} are taken",
        would_help=(f"more ports in sage.yaml: ports: {{{wanted.spec.kind}: ...}}",),
    )


def _earlier_ports(wanted: Wanted, observed: ObservedState, predecessor: Engine | None) -> list[int]:
    ports = [predecessor.resolved.placement.port] if predecessor is not None else []
    records = [record for record in observed.records if record.engine == wanted.id and record.port]
    return ports + [record.port for record in sorted(records, key=lambda record: (-record.started_at, record.leader))]
