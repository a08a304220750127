"""The tests of one worker share the process that their commands are forked from."""

from collections.abc import Iterator

import pytest

from tests.forks import Forks, forks


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("commands")) as one:
        yield one
