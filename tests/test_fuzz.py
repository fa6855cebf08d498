"""A few inputs for every target of ``tests/fuzz``; ``make fuzz`` runs 10,000."""

from __future__ import annotations

import sys

import pytest
from fuzz import run

COUNT = 40


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("name", run.TARGETS)
def test_no_input_gets_an_answer_that_is_not_promised(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    faults: list[str] = []
    assert run.fuzz(name, range(COUNT), faults.append) == 0, "\n".join(faults)
