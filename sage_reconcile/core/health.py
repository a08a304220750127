"""From facts about one engine to its state. Ready is a proof, not a guess: the port is its own and it has answered."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """What is known of one engine's life."""

    leader_alive: bool
    member_count: int
    host: str
    port: int
    model: str
    # Ports on which its members answer at its host.
    listens_on: tuple[int, ...]
    # "address:port" of every socket that its members listen on.
    listens_at: tuple[str, ...]
    # A sentence about whoever else listens on its port; empty when nobody does.
    intruder: str
    # As facts.HealthFact; "unasked" when no answer is known yet.
    health: str
    health_detail: str
    models: tuple[str, ...] | None
    has_record: bool
    phase: str
    # A sentence about devices that are lost, or that it must not use; empty when all is well.
    device_trouble: str
    proved: bool
    proof_failure: str
    in_flight: int


def state(signs: Signs) -> tuple[str, str]:
    """The engine's state and the reason for it, in the order in which the questions are asked.

    1. Without its first process it has failed, whatever its children do.
    2. A stop that was begun is told before anything else.
    3. It must run where it was placed.
    4. Every socket on its port must be its own.
    5. It must listen where it was told to.
    6. It must say that it is healthy, unless it is busy with requests.
    7. It must have answered one request of its kind; without a record, its model list stands in.
    """
    # (1)
    if not signs.leader_alive:
        return "failed", f"its first process is gone; {signs.member_count} of its processes still run"
    # (2)
    if signs.phase:
        return signs.phase, "SIGKILL did not end it" if signs.phase == "stuck" else "a stop was begun"
    not_yet = "unready" if signs.proved else "starting"
    # (3), (4)
    if signs.device_trouble or signs.intruder:
        return not_yet, signs.device_trouble or signs.intruder
    # (5)
    if signs.port not in signs.listens_on:
        if signs.listens_at:
            return not_yet, f"listens on {', '.join(signs.listens_at)}, not on {signs.host}:{signs.port}"
        return not_yet, f"does not listen on {signs.host}:{signs.port}" + ("" if signs.proved else " yet")
    # (6)
    if signs.health != "ok":
        if signs.proved and signs.in_flight and signs.health in ("silent", "unasked"):
            return "ready", f"busy with {signs.in_flight} requests"
        if signs.health == "unasked":
            return ("ready", "") if signs.proved else ("starting", "has not been asked yet")
        return not_yet, signs.health_detail or f"its health is {signs.health}"
    # (7)
    if signs.proved:
        return "ready", ""
    if not signs.has_record:
        if signs.models is not None and signs.model in signs.models:
            return "ready", "no record of its first answer: its health and its model list stand in"
        return "starting", f'does not list the model "{signs.model}"'
    return "starting", signs.proof_failure or "has not answered a request of its kind yet"
