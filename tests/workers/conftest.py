"""One tiny checkpoint for all tests of whole pipelines."""

import pytest
import torch
from workers.serving import Reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A Reference without EOS."""
    return Reference(tmp_path_factory.mktemp("served"))


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads only wait for one another on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
