"""What a driver asks for to make a GPU well again, mostly after an Xid error, and what that means for engines. Pure.

https://docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt/error-recovery-and-response-flags.html
"""

from sage_reconcile.core.facts import DeviceFact

_RESET_HELPS = "once nothing runs on it: nvidia-smi --gpu-reset -i {index}"

# With these, nothing new is to be started on the GPU; and what would help, where that is more than was asked for.
_CLOSING = {
    "gpu_reset": ("the driver asks for a reset of this GPU", _RESET_HELPS),
    "drain_and_reset": ("the driver asks for this GPU to be drained and reset", _RESET_HELPS),
    "bus_reset": ("the driver asks for a reset of this GPU's PCIe bus", ""),
    "node_reboot": ("the driver asks for a reboot of this machine, because of this GPU", ""),
    "system_reboot": ("the driver asks for a reboot of the whole system, because of this GPU", ""),
}
# With these it is traffic between GPUs that is not well.
_TROUBLES = {
    "drain_p2p": "the driver asks for an end of all traffic between this GPU and others",
    "recover_imex_domain": "the driver asks for its IMEX domain to be recovered",
}


def asked_for(fact: DeviceFact) -> tuple[str, ...]:
    """What the driver asks for, in a sentence; empty when that is nothing."""
    action = fact.recovery_action
    if not action:
        return ()
    if action in _CLOSING:
        return (_CLOSING[action][0],)
    return (_TROUBLES.get(action, f"the driver asks for something that this sage does not know (action {action})"),)


def why_closed(fact: DeviceFact) -> str:
    """Why nothing may be placed on a device, and what would help; empty when the driver has nothing against it."""
    if fact.recovery_action not in _CLOSING:
        return ""
    asked, helps = _CLOSING[fact.recovery_action]
    return f"{asked}; {helps.format(index=fact.index)}" if helps else asked
