import pytest

from server import Server


@pytest.fixture(scope="session")
def server():
    """A server as it is without any options."""
    with Server("--default-task", "pairs") as running:
        yield running


@pytest.fixture(scope="session")
def closed():
    """A server that asks for tokens."""
    with Server("--default-task", "pairs", closed=True) as running:
        yield running
