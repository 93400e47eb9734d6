"""What the tests of faults compare with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import jobs


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything a run of `jobs.FULL` on two ranks leaves that nothing happened to."""
    job = jobs.Job(tmp_path_factory.mktemp("faults") / "whole", 2)
    job.finish()
    return jobs.everything(job.run)
