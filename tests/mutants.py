"""Bugs planted on purpose: `make mutants` puts each into a copy of the tree and expects the tests to fail.

A bug that no test notices is a missing test. Each row names the law's tests, so that a run takes minutes and not hours.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One bug: a text in a file that is replaced once, and the tests that must notice."""

    bug: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...]


MUTANTS = (
    Mutant(
        bug="core imports a clock",
        file="sage_reconcile/core/placement.py",
        old="from dataclasses import dataclass, replace\n",
        new="from dataclasses import dataclass, replace\nimport time\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="core imports world",
        file="sage_reconcile/core/placement.py",
        old="from dataclasses import dataclass, replace\n",
        new="from dataclasses import dataclass, replace\n\nfrom sage_reconcile.world import lock\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="core opens a file",
        file="sage_reconcile/core/quantities.py",
        old="    found = _SIZE.fullmatch",
        new='    open("/dev/null")\n    found = _SIZE.fullmatch',
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="an engine that hangs up on a question is not looked for again",
        file="sage_reconcile/drive/observer.py",
        old='in ("refused", "broken")',
        new='in ("refused",)',
        caught_by=("tests/drive/test_observer.py", "tests/faults/test_lifecycle.py::killed_while_it_is_asked"),
    ),
    Mutant(
        bug="GPUs of two CPUs are as near each other as those of one",
        file="sage_reconcile/core/puzzle.py",
        old="region=region",
        new="region=0",
        caught_by=("tests/core/test_gpu_plans.py",),
    ),
    Mutant(
        bug="drive imports world",
        file="sage_reconcile/drive/executor.py",
        old="from typing import Protocol\n",
        new="from typing import Protocol\n\nfrom sage_reconcile.world import logs\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="audit calls the planner",
        file="sage_reconcile/core/audit.py",
        old="import json\n",
        new="import json\n\nfrom sage_reconcile.core.planner import make_plan\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="audit imports placement through another module",
        file="sage_reconcile/core/plan.py",
        old="from dataclasses import dataclass, replace\n",
        new="from dataclasses import dataclass, replace\n\nfrom sage_reconcile.core import placement\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="a launcher imports sage",
        file="sage_reconcile/launchers/llama_cpp.py",
        old="import argparse\n",
        new="import argparse\n\nfrom sage_reconcile import errors\n",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="a second spawner",
        file="sage_reconcile/world/logs.py",
        old="    found = []\n",
        new='    found = []\n    os.system("true")\n',
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="a second spawner through subprocess",
        file="sage_reconcile/app/serving.py",
        old="    mine = RouterFile",
        new='    __import__("subprocess").run(["true"])\n    mine = RouterFile',
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="the spawner has a default placement",
        file="sage_reconcile/world/processes.py",
        old="    placement: Placement,\n    argv",
        new="    placement: Placement | None,\n    argv",
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="a placement made elsewhere",
        file="sage_reconcile/core/planner.py",
        old="    place = engine.resolved.placement\n",
        new='    place = Placement(node="x", host="y", port=1) if False else engine.resolved.placement\n',
        caught_by=("tests/test_house.py",),
    ),
    Mutant(
        bug="what was told comes back as need",
        file="sage_reconcile/core/needs.py",
        old="    needs_what_it_takes = not told or (",
        new="    needs_what_it_takes = True or (",
        caught_by=("tests/core/test_measuring.py",),
    ),
    Mutant(
        bug="of two measurements the last counts",
        file="sage_reconcile/core/measuring.py",
        old="        peak_bytes=max(earlier.peak_bytes, later.peak_bytes),",
        new="        peak_bytes=later.peak_bytes,",
        caught_by=("tests/core/test_measuring.py",),
    ),
    Mutant(
        bug="restore_target forgets one engine",
        file="sage_reconcile/core/planner.py",
        old="    return replace(desired, wanted=tuple(wanted), prune_stacks",
        new="    return replace(desired, wanted=tuple(wanted[1:]), prune_stacks",
        caught_by=("tests/drive/test_reconciler.py",),
    ),
    Mutant(
        bug="restore on the look before the last orders",
        file="sage_reconcile/drive/reconciler.py",
        old="restore = sound_plan(target, observed, options)",
        new="restore = sound_plan(target, failed.observed, options)",
        caught_by=("tests/drive/test_reconciler.py", "tests/core/test_worlds.py"),
    ),
    Mutant(
        bug="a start does not wait for the stop on its port",
        file="sage_reconcile/core/ordering.py",
        old="return stop.engine == start.engine or stop.port == start.resolved.placement.port",
        new="return stop.engine == start.engine",
        caught_by=("tests/core/test_worlds.py",),
    ),
    Mutant(
        bug="a predecessor is stopped though its successor has no home",
        file="sage_reconcile/core/planner.py",
        old="changes = [change for change in changes if change.id not in {blocked.engine for blocked in homes.refusals}]",
        new='changes = [replace(change, start=None, action="stop") if change.id in {b.engine for b in homes.refusals} and change.stops else change for change in changes if change.stops or change.id not in {b.engine for b in homes.refusals}]',
        caught_by=("tests/core/test_worlds.py", "tests/scenarios"),
    ),
    Mutant(
        bug="the plan depends on the order of facts",
        file="sage_reconcile/core/observed.py",
        old="    return tuple(sorted(mine, key=lambda engine: (engine.id, engine.leader.start_ticks, engine.leader.pid)))",
        new="    return tuple(mine)",
        caught_by=("tests/core/test_worlds.py",),
    ),
    Mutant(
        bug="a zombie counts as alive",
        file="sage_reconcile/core/facts.py",
        old='return self.status not in ("Z", "X", "x") or',
        new="return True or",
        caught_by=("tests/core/test_observed.py",),
    ),
    Mutant(
        bug="any socket on the port will do",
        file="sage_reconcile/core/assembly.py",
        old="        if fact.port == port and not set(fact.pids) & pids:",
        new="        if False:",
        caught_by=("tests/core/test_observed.py",),
    ),
    Mutant(
        bug="health is enough to be ready",
        file="sage_reconcile/core/health.py",
        old='    if signs.proved:\n        return "ready", ""\n',
        new='    return "ready", ""\n',
        caught_by=("tests/core/test_observed.py",),
    ),
    Mutant(
        bug="a partial label is a label",
        file="sage_reconcile/core/label.py",
        old="    if not all(parts) or leader is None:",
        new="    if leader is None:",
        caught_by=("tests/core/test_observed.py",),
    ),
    Mutant(
        bug="routers are not waited for",
        file="sage_reconcile/core/progress.py",
        old="    return all(\n        act.leader in router.drained_from",
        new="    return True or all(\n        act.leader in router.drained_from",
        caught_by=("tests/drive/test_executor.py",),
    ),
    Mutant(
        bug="the second SIGTERM is forgotten",
        file="sage_reconcile/core/progress.py",
        old="_TERMS_PER_GRACE = 4",
        new="_TERMS_PER_GRACE = 1",
        caught_by=("tests/drive/test_executor.py",),
    ),
    Mutant(
        bug="only the leader is killed",
        file="sage_reconcile/core/progress.py",
        old="return Kill(engine=engine.id, leader=engine.leader, processes=engine.members)",
        new="return Kill(engine=engine.id, leader=engine.leader, processes=(engine.leader,))",
        caught_by=("tests/drive/test_executor.py",),
    ),
    Mutant(
        bug="the pid is signalled without a second look",
        file="sage_reconcile/world/processes.py",
        old="        if found is None or found.start_ticks != target.start_ticks:\n            return False\n",
        new="",
        caught_by=("tests/world/test_processes.py",),
    ),
    Mutant(
        bug="an invalid file is skipped",
        file="sage_reconcile/world/manifests.py",
        old="    problems = list(reading.problems)\n",
        new="    problems: list[Problem] = []\n",
        caught_by=("tests/world/test_manifests.py",),
    ),
    Mutant(
        bug="the label is written after the release",
        file="sage_reconcile/app/host.py",
        old="            earlier = self._write_down(act, gated.identity, whole_label, log)\n",
        new="            gated.release()\n            earlier = self._write_down(act, gated.identity, whole_label, log)\n",
        caught_by=("tests/world/test_processes.py",),
    ),
    Mutant(
        bug="an act begins although its line could not be written",
        file="sage_reconcile/drive/executor.py",
        old="    refused = set(begun) if why else set()\n",
        new="    refused: set[int] = set()\n",
        caught_by=("tests/drive",),
    ),
    Mutant(
        bug="an apply goes on after a line that could not be written",
        file="sage_reconcile/core/progress.py",
        old="return bool(self.unwritten or (self.failures and not self.keep_going))",
        new="return bool(self.failures and not self.keep_going)",
        caught_by=("tests/drive",),
    ),
    Mutant(
        bug="what ran before is put back with nothing written down",
        file="sage_reconcile/drive/reconciler.py",
        old="    if not unwritten:\n",
        new="    if True:\n",
        caught_by=("tests/drive",),
    ),
    Mutant(
        bug="a journal line is not forced to the disk",
        file="sage_reconcile/world/journal_file.py",
        old="                os.fdatasync(descriptor)\n",
        new="",
        caught_by=("tests/faults/test_disk.py::d9",),
    ),
    Mutant(
        bug="a file is put in place before its bytes are on the disk",
        file="sage_reconcile/world/state.py",
        old="        os.fsync(file.fileno())\n",
        new="",
        caught_by=("tests/faults/test_disk.py::d9",),
    ),
    Mutant(
        bug="a file's new name is not forced to the disk",
        file="sage_reconcile/world/state.py",
        old='        failpoint(f"{what}.renamed")\n        sync_directory(path.parent)\n',
        new='        failpoint(f"{what}.renamed")\n',
        caught_by=("tests/faults/test_disk.py::d9",),
    ),
    Mutant(
        bug="only the session of the leader is killed",
        file="sage_reconcile/app/host.py",
        old="        for target in targets:\n            processes.send_signal(target, number, boot=self.boot)\n",
        new="        for target in list(targets)[:1]:\n            os.killpg(target.pid, number)\n",
        caught_by=("tests/faults/test_lifecycle.py", "tests/faults/test_processes.py"),
    ),
    Mutant(
        bug="a stop is not marked as draining",
        file="sage_reconcile/core/progress.py",
        old="        if not _drained(act, observed):\n            return entry, (mark,)\n",
        new="        if not _drained(act, observed):\n            return entry, ()\n",
        caught_by=("tests/drive/test_executor.py",),
    ),
    Mutant(
        bug="the lock does not look whether its file is still there",
        file="sage_reconcile/world/lock.py",
        old="        if _is_at(path, descriptor):\n            break\n",
        new="        break\n",
        caught_by=("tests/world/test_state.py",),
    ),
    Mutant(
        bug="cron does not see the lock of a login",
        file="sage_reconcile/world/lock.py",
        old='        return first, private_directory(Path("/tmp") / own) / "lock"\n',
        new="        return (first,)\n",
        caught_by=("tests/world/test_state.py",),
    ),
    Mutant(
        bug="engines do not append to their log",
        file="sage_reconcile/world/logs.py",
        old="os.O_WRONLY | os.O_APPEND | os.O_CREAT",
        new="os.O_WRONLY | os.O_CREAT",
        caught_by=("tests/faults/test_logs.py",),
    ),
    Mutant(
        bug="a held port is never let go",
        file="sage_reconcile/app/host.py",
        old="            hold = self._holds.pop(leader).hold\n",
        new="            hold = None\n",
        caught_by=("tests/faults/test_races.py::again",),
    ),
    Mutant(
        bug="failpoints work without the switch",
        file="sage_reconcile/world/failpoints.py",
        old='    if asked and environment.get(SWITCH) != "1":',
        new="    if False:",
        caught_by=("tests/world/test_failpoints.py",),
    ),
    Mutant(
        bug="records of another boot count",
        file="sage_reconcile/core/assembly.py",
        old="        if label is None or record.leader.boot_id != facts.boot_id or label",
        new="        if label is None or label",
        caught_by=("tests/core/test_observed.py", "tests/faults/test_processes.py::p15"),
    ),
    Mutant(
        bug="a label of another pid namespace is believed",
        file="sage_reconcile/core/assembly.py",
        old="        if label is not None and label.leader[2] == facts.namespace:",
        new="        if label is not None:",
        caught_by=("tests/core/test_strangers.py",),
    ),
    Mutant(
        bug="processes of other users count",
        file="sage_reconcile/core/assembly.py",
        old="        if fact.uid != facts.uid or not fact.label",
        new="        if not fact.label",
        caught_by=("tests/core/test_strangers.py",),
    ),
    Mutant(
        bug="the port is not looked at again before the release",
        file="sage_reconcile/app/host.py",
        old="            if sockets.is_listened_on(act.resolved.placement.port):",
        new="            if False:",
        caught_by=("tests/faults/test_ports.py::n1",),
    ),
    Mutant(
        bug="the seal is not looked at",
        file="sage_reconcile/core/seal.py",
        old="        if not found or seal !=",
        new="        if not found or not seal !=",
        caught_by=("tests/core/test_seal.py",),
    ),
    Mutant(
        bug="a shortened journal forgets what was applied",
        file="sage_reconcile/core/journal.py",
        old="    if not any(_was_applied(plan) for plan in kept):",
        new="    if False:",
        caught_by=("tests/core/test_seal.py",),
    ),
    Mutant(
        bug="what a newer sage wrote is written over",
        file="sage_reconcile/app/project.py",
        old="    if found:\n        raise newer_state(found[0])\n",
        new="",
        caught_by=("tests/faults/test_disk.py::d6",),
    ),
    Mutant(
        bug="a state directory of others is believed",
        file="sage_reconcile/world/state.py",
        old="    return _checked(root, found)\n",
        new="    return root\n",
        caught_by=("tests/faults/test_disk.py::d8",),
    ),
    Mutant(
        bug="after a signal further acts are begun",
        file="sage_reconcile/drive/executor.py",
        old="    while not (stop_signal := host.stop_signal()):",
        new="    stop_signal = 0\n    while True:",
        caught_by=("tests/drive/test_executor.py",),
    ),
    Mutant(
        bug="what was known of an engine is forgotten",
        file="sage_reconcile/app/host.py",
        old="        members = set(engine.members) | set(earlier.members if earlier else ())\n",
        new="        members = set()\n",
        caught_by=("tests/faults/test_processes.py::gives_up",),
    ),
    Mutant(
        bug="an engine on the CPU sees every GPU",
        file="sage_reconcile/core/runtimes/base.py",
        old="    chosen = placement.devices if numbers",
        new="    if not placement.devices:\n        return {}\n    chosen = placement.devices if numbers",
        caught_by=("tests/faults/test_gpus.py::use_gpu_decides",),
    ),
    Mutant(
        bug="the memory of others on a GPU is free",
        file="sage_reconcile/core/ledger.py",
        old="        foreign_bytes=foreign,\n",
        new="        foreign_bytes=0,\n",
        caught_by=("tests/faults/test_gpus.py::g1_apply",),
    ),
    Mutant(
        bug="an engine on a GPU counts for what it uses alone",
        file="sage_reconcile/core/observed.py",
        old="    return max(declared, dict(engine.measured_bytes).get(uuid, 0))",
        new="    return dict(engine.measured_bytes).get(uuid, 0)",
        caught_by=("tests/faults/test_gpus.py::memory_yet",),
    ),
    Mutant(
        bug="an engine on a GPU counts for what it was given alone",
        file="sage_reconcile/core/observed.py",
        old="    return max(declared, dict(engine.measured_bytes).get(uuid, 0))",
        new="    return declared",
        caught_by=("tests/faults/test_gpus.py::takes_more",),
    ),
    Mutant(
        bug="a GPU that cannot be seen is lost",
        file="sage_reconcile/world/gpus.py",
        old="is_lost = isinstance(error, nvml.NVMLError_GpuIsLost)",
        new="is_lost = True",
        caught_by=("tests/faults/test_gpus.py::g4",),
    ),
    Mutant(
        bug="the GPUs are not looked at again before the release",
        file="sage_reconcile/app/host.py",
        old="            if trouble is not None:\n",
        new="            if False:\n",
        caught_by=("tests/faults/test_gpus.py::gate",),
    ),
    Mutant(
        bug="a full disk is found out after the first stop",
        file="sage_reconcile/world/state.py",
        old='        _probe(directory / ".writable")\n',
        new="",
        caught_by=("tests/faults/test_disk.py::d1",),
    ),
    Mutant(
        bug="starts on one device overlap",
        file="sage_reconcile/core/ordering.py",
        old="        ordered.append(replace(act, behind=behind))\n",
        new="        ordered.append(act)\n",
        caught_by=("tests/core/test_gpu_worlds.py", "tests/scenarios"),
    ),
    Mutant(
        bug="a start does not wait for the stop that frees its memory",
        file="sage_reconcile/core/ordering.py",
        old="        more = _needed_stops([drafts[old].act for old in order], room)\n",
        new="        more = set[tuple[int, int]]()\n",
        caught_by=("tests/core/test_gpu_plans.py", "tests/core/test_gpu_worlds.py"),
    ),
    Mutant(
        bug="what depends on an engine without a place takes memory",
        file="sage_reconcile/core/packing.py",
        old="        places = () if self._is_barred(wish) else self._new_places(wish)\n",
        new="        places = self._new_places(wish)\n",
        caught_by=("tests/core/test_packing.py",),
    ),
    Mutant(
        bug="a chain of dependencies breaks at an engine on the CPU",
        file="sage_reconcile/core/placing.py",
        old="if others & chained} - chained",
        new="if False} - chained",
        caught_by=("tests/core/test_gpu_worlds.py", "tests/scenarios"),
    ),
    Mutant(
        bug="an engine is placed on a closed device",
        file="sage_reconcile/core/puzzle.py",
        old='    if device.closed:\n        return f"closed: {device.closed}"\n',
        new="",
        caught_by=("tests/core/test_gpu_worlds.py",),
    ),
    Mutant(
        bug="the memory of anybody's dead is taken",
        file="sage_reconcile/core/puzzle.py",
        old="own = sum(entry.held_bytes for entry in device.lingering if entry.engine == candidate.wanted.id)",
        new="own = sum(entry.held_bytes for entry in device.lingering)",
        caught_by=("tests/core/test_gpu_worlds.py", "tests/scenarios"),
    ),
    Mutant(
        bug="a second pass moves what the first one starts",
        file="sage_reconcile/core/planner.py",
        old='"never" if options.allow_moves else "told"',
        new='"allowed" if options.allow_moves else "told"',
        caught_by=("tests/core/test_gpu_plans.py",),
    ),
    Mutant(
        bug="the audit forgets the CUDA context",
        file="sage_reconcile/core/audit.py",
        old="place.memory_bytes_per_device + place.context_bytes_per_device",
        new="place.memory_bytes_per_device",
        caught_by=("tests/core/test_gpu_plans.py",),
    ),
    Mutant(
        bug="a vLLM is told another number than was planned",
        file="sage_reconcile/core/runtimes/vllm.py",
        old="str(placement.memory_fraction)",
        new='"0.9"',
        caught_by=("tests/core/test_runtimes.py",),
    ),
    Mutant(
        bug="an SGLang is told a share of what is free before its CUDA context",
        file="sage_reconcile/core/shares.py",
        old="free_bytes(device, started.engines) + place.memory_bytes_per_device",
        new="free_bytes(device, started.engines) + place.counted_bytes_per_device",
        caught_by=("tests/core/test_runtimes.py",),
    ),
    Mutant(
        bug="a start does not wait for rest",
        file="sage_reconcile/core/settling.py",
        old="rest.get(uuid, 0.0) < SETTLED_SECONDS",
        new="False",
        caught_by=("tests/core/test_settling.py",),
    ),
    Mutant(
        bug="a start does not wait for an engine that loads",
        file="sage_reconcile/core/settling.py",
        old="    if loading and waited_seconds",
        new="    if False and waited_seconds",
        caught_by=("tests/faults/test_gpu_loading.py::g9",),
    ),
    Mutant(
        bug="a start waits for the proof of an engine that is healthy",
        file="sage_reconcile/core/settling.py",
        old=' or engine.health == "ok" or',
        new=" or",
        caught_by=("tests/faults/test_gpu_loading.py::g9",),
    ),
    Mutant(
        bug="the devices are not looked at again before the release",
        file="sage_reconcile/app/host.py",
        old="            trouble = self._device_trouble(act)\n",
        new="            trouble = None\n",
        caught_by=("tests/faults/test_gpu_moves.py::g10",),
    ),
    Mutant(
        bug="a stop is done before the memory is back",
        file="sage_reconcile/core/progress.py",
        old="    missing = not_back(act, entry.orphaned, observed)\n",
        new='    missing = ""\n',
        caught_by=("tests/faults/test_gpu_moves.py::g7_memory_that",),
    ),
    Mutant(
        bug="programs that know numbers are told those of NVML",
        file="sage_reconcile/core/ledger.py",
        old="    if not all(buses.values()):\n",
        new="    if True:\n",
        caught_by=("tests/faults/test_gpu_moves.py::g8_engines_of",),
    ),
    Mutant(
        bug="an engine on the CPU may use a GPU",
        file="sage_reconcile/core/ledger.py",
        old="    if not elsewhere:\n",
        new="    if not elsewhere or not placement.devices:\n",
        caught_by=("tests/faults/test_gpu_moves.py::g8_engine_on_the_cpu",),
    ),
    Mutant(
        bug="an engine that loads counts twice where the driver hides pids",
        file="sage_reconcile/core/ledger.py",
        old="    hidden |= bool(loading) and not seen",
        new="    hidden |= False and not seen",
        caught_by=("tests/faults/test_gpus.py::g5_engine_that_loads",),
    ),
    Mutant(
        bug="what others use is taken for an engine's that has not taken its memory",
        file="sage_reconcile/core/ledger.py",
        old="- strangers - _before(fact, loading, view.facts)",
        new="- strangers",
        caught_by=("tests/faults/test_gpus.py::g5_engine_that_loads",),
    ),
    Mutant(
        bug="the first of several measurements counts",
        file="sage_reconcile/core/needs.py",
        old="return max(facts, key=lambda fact: fact.size, default=None)",
        new="return facts[0] if facts else None",
        caught_by=("tests/core/test_measuring.py",),
    ),
    Mutant(
        bug="the plan depends on the order of devices",
        file="sage_reconcile/core/planner.py",
        old="    observed = arranged(observed)\n",
        new="",
        caught_by=("tests/core/test_gpu_worlds.py::order_of",),
    ),
    Mutant(
        bug="a search that its budget ended is told as one that tried all",
        file="sage_reconcile/core/placing.py",
        old="places=places, proved=seating.proved)",
        new="places=places)",
        caught_by=("tests/core/test_plan_says.py",),
    ),
    Mutant(
        bug="a margin is not told",
        file="sage_reconcile/core/figure_notes.py",
        old='            if term.name == "margin"\n',
        new="            if False\n",
        caught_by=("tests/core/test_plan_says.py",),
    ),
    Mutant(
        bug="an engine that uses none of its GPUs is not noted where it has several",
        file="sage_reconcile/core/device_notes.py",
        old='        if engine.state == "ready" and device.uuid in',
        new='        if engine.state == "ready" and len(engine.resolved.placement.devices) == 1 and device.uuid in',
        caught_by=("tests/core/test_plan_says.py",),
    ),
    Mutant(
        bug="the first of several engines is waited for alone",
        file="sage_reconcile/app/waiting.py",
        old="    for the_id in sorted(named):\n",
        new="    for the_id in sorted(named)[:1]:\n",
        caught_by=("tests/faults/test_commands.py::wait",),
    ),
    Mutant(
        bug="up forgets its timeout",
        file="sage_reconcile/cli/serve.py",
        old='            ready_seconds=seconds_option("--timeout", timeout),\n',
        new="",
        caught_by=("tests/faults/test_commands.py::up_gives",),
    ),
    Mutant(
        bug="a router opens a file more at each look",
        file="sage_reconcile/app/serving.py",
        old="                mine.write(_said(observed, traffic))\n",
        new="                mine.write(_said(observed, traffic))\n                os.open(os.devnull, os.O_RDONLY)\n",
        caught_by=("tests/faults/test_serving.py::lives_on",),
    ),
    Mutant(
        bug="a router lists an engine that is not ready",
        file="sage_reconcile/core/routes.py",
        old='        if backend.state == "ready":\n            first.setdefault',
        new="        if True:\n            first.setdefault",
        caught_by=("tests/faults/test_serving.py::loads",),
    ),
)


def main() -> None:
    """Plant every bug, or those whose name holds one of the arguments. Leaves with 1 when one was missed."""
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or any(word in mutant.bug for word in sys.argv[1:])]
    missed = []
    with tempfile.TemporaryDirectory(prefix="sage-mutants-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", ".models", "__pycache__"))
        unharmed = first_failure(tuple(sorted({test for mutant in chosen for test in mutant.caught_by})), tree)
        assert not unharmed, f"{unharmed} fails without any bug"
        for mutant in chosen:
            told = noticed(mutant, tree)
            missed += [] if told else [mutant.bug]
            print(f"{'caught' if told else 'MISSED'}  {mutant.bug}  {told}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(1 if missed else 0)


def noticed(mutant: Mutant, tree: Path) -> str:
    """The first test that fails with the bug in place; empty when none does."""
    path = tree / mutant.file
    whole = path.read_text(encoding="utf-8")
    assert mutant.old in whole, f"{mutant.file} has changed: plant {mutant.bug!r} anew"
    path.write_text(whole.replace(mutant.old, mutant.new, 1), encoding="utf-8")
    try:
        return first_failure(mutant.caught_by, tree)
    finally:
        path.write_text(whole, encoding="utf-8")


def first_failure(tests: tuple[str, ...], tree: Path) -> str:
    """The first test that fails. `FILE::WORD` means the tests of a file whose names hold the word."""
    for test in tests:
        file, _, word = test.partition("::")
        failed = _first_failure([file, *(["-k", word] if word else [])], tree)
        if failed:
            return failed
    return ""


def _first_failure(arguments: list[str], tree: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--timeout", "60", *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "WORLDS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    failures = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0] if failures else ""


if __name__ == "__main__":
    main()
