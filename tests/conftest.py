"""The tests of one worker share the process that their commands are forked from; the longest tests come first.

Whoever runs the tests in the background or under nohup ignores SIGINT or SIGHUP, and every command would inherit that.
A handler that does nothing is not inherited.
"""

import os
import signal
from collections.abc import Iterator

import pytest

from tests.forks import Forks, forks

CHAOS = os.environ.get("CHAOS") == "1"

# Begun last, one of these would be waited for by all other workers.
_LONG = ("test_kill_campaign.py", "test_races.py", "test_worlds.py")


def pytest_configure(config: pytest.Config) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if CHAOS or item.get_closest_marker("chaos") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = sorted(kept, key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("commands")) as one:
        yield one
