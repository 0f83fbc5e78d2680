"""Every command of the other READMEs; none of them needs data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.newcomer import ELSEWHERE, Newcomer
from tests.places import ROOT
from tests.readme import README, READMES, commands

pytestmark = pytest.mark.long

WITH_COMMANDS = [
    readme
    for readme in READMES
    if readme != README and any(each[0] not in ELSEWHERE for each in commands(readme))
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("readme", WITH_COMMANDS, ids=lambda path: path.parent.name)
def test_every_command_works_in_order(readme: Path, tmp_path: Path) -> None:
    Newcomer(tmp_path, tmp_path).follow(readme)


def test_commands_are_found() -> None:
    found = [str(readme.parent.relative_to(ROOT)) for readme in WITH_COMMANDS]
    assert found == ["tune_configs", "tasks", "pipeline/evaluation"]
