"""Which GPUs count as near each other, by what the driver tells of their links, switches and NUMA nodes."""

from dataclasses import replace
from itertools import groupby

from sage_reconcile.core.facts import DeviceFact
from sage_reconcile.core.islands import islands, regions


def gpu(index: int, numa: int | None = 0, *, switched: tuple[int, ...] = (), links: tuple[int, ...] = ()) -> DeviceFact:
    return DeviceFact(
        index=index,
        uuid=f"GPU-{index}",
        name="NVIDIA L40S",
        total_bytes=48 * 1024**3,
        reserved_bytes=0,
        used_bytes=0,
        numa_node=numa,
        switched=tuple(f"GPU-{other}" for other in switched),
        links=tuple(f"GPU-{other}" for other in links),
    )


def together(*facts: DeviceFact) -> list[str]:
    """The islands, each as the UUIDs of its devices without what they all begin with."""
    found = sorted((number, uuid.removeprefix("GPU-")) for uuid, number in islands(facts).items())
    return [" ".join(uuid for _, uuid in group) for _, group in groupby(found, key=lambda entry: entry[0])]


def test_gpus_behind_common_switches_are_near_and_their_numa_node_is_not_asked_for() -> None:
    pairs = (gpu(0, switched=(2,)), gpu(1, switched=(3,)), gpu(2, switched=(0,)), gpu(3, switched=(1,)))
    assert together(*pairs) == ["0 2", "1 3"]
    # As in a virtual machine that shows no NUMA nodes.
    assert together(*(replace(one, numa_node=None) for one in pairs)) == ["0 2", "1 3"]


def test_gpus_that_share_no_switch_are_near_on_one_numa_node() -> None:
    pair = (gpu(0, switched=(1,)), gpu(1, switched=(0,)))
    assert together(*pair, gpu(2), gpu(3, 1), gpu(4, 1)) == ["0 1", "2", "3 4"]
    assert together(gpu(0), gpu(1, 1), gpu(2), gpu(3, 1)) == ["0 2", "1 3"]


def test_nvlink_goes_before_switches() -> None:
    facts = (gpu(0, switched=(1,), links=(2,)), gpu(1, switched=(0,)), gpu(2, links=(0,)))
    assert together(*facts) == ["0 2", "1"]


def test_slices_are_where_their_gpu_is() -> None:
    slices = [replace(gpu(0, switched=(1,)), uuid=f"MIG-{letter}", parent="GPU-0") for letter in "ab"]
    assert together(*slices, gpu(1, switched=(0,)), gpu(2)) == ["1 MIG-a MIG-b", "2"]


def test_islands_of_one_numa_node_are_nearer_each_other_than_those_of_another() -> None:
    """Pairs behind switches, two at each of two CPUs: four GPUs stay at one CPU."""
    pairs = [(island, numa) for island, numa in ((0, 0), (2, 0), (4, 1), (6, 1)) for _ in range(2)]
    assert regions(pairs) == (0, 0, 0, 0, 1, 1, 1, 1)


def test_there_are_no_regions_where_an_island_spans_them_or_nobody_tells_its_numa_node() -> None:
    assert regions([(0, 0), (0, 1), (2, 1)]) == (0, 0, 0)
    assert regions([(0, 0), (1, 1), (2, None)]) == (0, 0, 0)
    assert regions([]) == ()
