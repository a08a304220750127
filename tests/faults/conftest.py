"""Every test here has a place of its own; those of one worker share the process that their commands are forked from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import Place, place_in
from tests.forks import Forks, forks


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("commands")) as one:
        yield one


@pytest.fixture
def place(tmp_path: Path, commands: Forks) -> Iterator[Place]:
    with place_in(tmp_path, commands.run) as one:
        yield one
