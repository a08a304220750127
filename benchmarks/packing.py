"""What the packing of 8 devices with 16 engines, 80% running, takes. Figures, not a test: machines differ."""

import statistics
import time

from sage_reconcile.core.packing import pack
from tests.core.test_packing import large

_INSTANCES = 300


def main() -> None:
    _report(may_move=False)
    print("the same where all that runs may be moved to make room:")
    _report(may_move=True)


def _report(*, may_move: bool) -> None:
    took, first, nodes, proved = [], [], [], 0
    for seed in range(_INSTANCES):
        slots, items = large(seed, may_move=may_move)
        began = time.perf_counter()
        found = pack(slots, items)
        took.append((time.perf_counter() - began) * 1000)
        # One node for each item and one for the answer: as far as the search gets without ever going back.
        began = time.perf_counter()
        pack(slots, items, budget_nodes=len(items) + 1)
        first.append((time.perf_counter() - began) * 1000)
        assert found is not None
        nodes.append(found.nodes)
        proved += found.proved
    took.sort()
    print(f"median {statistics.median(took):.1f} ms, nine of ten {took[_INSTANCES * 9 // 10]:.1f}, most {took[-1]:.0f}")
    print(f"median {statistics.median(nodes):.0f} nodes; {proved} of {_INSTANCES} proved within the budget")
    print(f"first answer: median {statistics.median(first):.1f} ms, most {max(first):.1f}")


if __name__ == "__main__":
    main()
