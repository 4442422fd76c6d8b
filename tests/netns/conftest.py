"""What the tests in namespaces share: the clusters of the matrix."""

from collections.abc import Iterator

import pytest

from tests.conftest import MakeLab

# Its assertions show their values, as those in tests do. Before its first import.
pytest.register_assert_rewrite("tests.netns.matrix")
from tests.netns.matrix import Cluster  # noqa: E402


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, make_module_lab: MakeLab) -> Iterator[Cluster]:
    """Three hosts, each with two pods; its parameter is (overlay, underlay), the families of both."""
    made = Cluster(make_module_lab, *request.param)
    yield made
    made.lab.down()
