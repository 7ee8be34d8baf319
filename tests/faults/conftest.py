"""The store that the runs which are going to be disturbed read."""

from tests.distributed.conftest import data  # noqa: F401
