"""The example of a desired state can be applied where the documents' tour has been."""

from pathlib import Path

from mvm.domain.job import JobVerb
from tests.services.conftest import Node

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "desired-state.json"


def test_the_example_fits_beside_the_tours_tenant(node: Node) -> None:
    node.pool("acme/web")
    content = EXAMPLE.read_bytes()
    plan = node.services.view.desired_plan(content, prune=False)
    assert plan.actions
    node.services.view.desired_apply(content, prune=False, expect=None, actor="ann")
    assert node.services.store.desired() is not None
    assert JobVerb.NODE_RECONCILE in {job.verb for job in node.services.registry.jobs()}
