"""Every command of the main README, on a machine without any data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drawn_data import draw_omniglot, draw_photos
from tests.newcomer import Newcomer, examples
from tests.readme import README, commands

pytestmark = pytest.mark.long


@pytest.mark.timeout(600)
def test_every_command_works_in_order(tmp_path: Path) -> None:
    assert len(commands(README)) >= 12
    data = tmp_path / "archives"
    data.mkdir()
    draw_omniglot(data)
    draw_photos(data / "photos.zip")
    Newcomer(tmp_path, data).follow(README)
    # What commands leave is where neither git nor a job looks for it.
    left = {path.name for path in tmp_path.iterdir()} - set(examples()) - {data.name}
    assert left == {"data", "runs"}
