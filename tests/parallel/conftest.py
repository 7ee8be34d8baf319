"""What the tests of messages between ranks share."""

import json

import pytest

from tests.distributed.processes import run_ranks

LIMIT = 2.0
"""The workers' train.timeout."""


@pytest.fixture
def outcome_of_ranks(tmp_path, request):
    """Starts RANKS ranks of the test's own WORKER in a mode, and returns what the first found."""

    def run(mode: str) -> dict:
        worker, ranks = request.module.WORKER, request.module.RANKS
        result = tmp_path / "result.json"
        run_ranks([str(worker), mode, str(result)], ranks, tmp_path, limit=90)
        return json.loads(result.read_text())

    return run
