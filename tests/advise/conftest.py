"""This machine's figures, measured once for all tests of this folder."""

from __future__ import annotations

import pytest

from shardwise.probe.machine import probe
from shardwise.spec.machine import Machine


@pytest.fixture(scope="session")
def machine() -> Machine:
    return probe(quick=True)
