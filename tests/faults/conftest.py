"""Every test here has a place of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import Place, place_in
from tests.forks import Forks


@pytest.fixture
def place(tmp_path: Path, commands: Forks) -> Iterator[Place]:
    with place_in(tmp_path, commands.run) as one:
        yield one
