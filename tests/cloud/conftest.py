import pytest

from tests.helpers.cloud import Machine


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)
