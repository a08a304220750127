"""The tests of one worker share the process that their commands are forked from; the longest tests come first."""

from collections.abc import Iterator

import pytest

from tests.forks import Forks, forks

# Begun last, one of these would be waited for by all other workers.
_LONG = ("test_kill_campaign.py", "test_races.py", "test_worlds.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("commands")) as one:
        yield one
