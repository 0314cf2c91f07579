import pytest
import torch
from server.harness import running

from nanopd.llm import LLM


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Threads only wait for one another on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm():
    return LLM("tiny", device="cpu")


@pytest.fixture(scope="module", params=["C:cpu", "P:cpu D:cpu"])
def server(request):
    with running(request.param) as one:
        yield one


@pytest.fixture(scope="module")
def one_server():
    with running() as one:
        yield one
