"""Where an engine may live: a placement, or a refusal in words. Blind to runtimes.

The only maker of `Placement`, and through it of anything that can be started.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sage_reconcile.core.desired import DesiredState, Wanted
from sage_reconcile.core.observed import Engine, ObservedState
from sage_reconcile.core.quantities import ports_of
from sage_reconcile.core.resolved import Placement, Resolved
from sage_reconcile.core.spec import needs_gpu

# Engines listen on loopback: the router is the address for apps, and an engine's own server asks nobody for a key.
ENGINE_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an engine has no place here and now."""

    reason: str
    why: str
    would_help: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What is not free, seen from one engine."""

    # Ports that stay in use, with who holds them.
    ports: Mapping[int, str]
    # Ports in use now that acts of this plan set free.
    freed_ports: Collection[int] = ()
    # Ports that other engines ask for by number.
    asked_ports: Collection[int] = ()


def placement(
    wanted: Wanted, desired: DesiredState, observed: ObservedState, predecessor: Engine | None, taken: Taken
) -> Placement | Refusal:
    """The place of one replica.

    `predecessor` is the process that it replaces; its port is kept where that may be.
    """
    if wanted.pin is not None:
        return _pinned(wanted.pin.resolved, taken)
    if needs_gpu(wanted.spec):
        return Refusal(
            reason="no_device",
            why=_why_no_device(observed),
            would_help=("use_gpu: false",),
        )
    port = _port(wanted, desired, observed, predecessor, taken)
    if isinstance(port, Refusal):
        return port
    return Placement(node=observed.node, host=ENGINE_HOST, port=port)


def _why_no_device(observed: ObservedState) -> str:
    if not observed.devices:
        return f"it needs a GPU, and none is observed on {observed.node}"
    return "it needs a GPU, and this version only shows GPUs: it places engines on the CPU"


def _pinned(resolved: Resolved, taken: Taken) -> Placement | Refusal:
    port = resolved.placement.port
    if port in taken.ports:
        return Refusal(reason="port_taken", why=f"it ran on port {port}, which is taken by {taken.ports[port]}")
    return resolved.placement


def _port(
    wanted: Wanted, desired: DesiredState, observed: ObservedState, predecessor: Engine | None, taken: Taken
) -> int | Refusal:
    """The port, in this order of preference.

    1. The one that is written down.
    2. The one that the predecessor has.
    3. The one that the engine had when it last ran.
    4. The first of its kind's pool that nobody uses, then the first that this plan sets free.
    """
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
    return ports + [record.port for record in observed.records if record.engine == wanted.id and record.port]
