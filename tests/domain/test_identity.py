from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mvm.domain.identity import Claim, Identity, Place, id_of_path, mark_of
from mvm.domain.ids import NodeId
from mvm.errors import NotAllowed

KNOWN = Identity("0123456789ab", NodeId("n1"), "mvm", Place(65024, 2))


def test_what_is_written_is_read() -> None:
    assert Identity.from_dict(KNOWN.to_dict()) == KNOWN


def test_at_its_place_it_is_itself() -> None:
    assert KNOWN.at(KNOWN.place, "mvm-other") == KNOWN


@pytest.mark.parametrize("place", [Place(65024, 3), Place(65025, 2)])
def test_elsewhere_it_is_another_and_the_same_whoever_looks(place: Place) -> None:
    copy = KNOWN.at(place, "mvm-copy")
    assert copy == KNOWN.at(place, "mvm-copy")
    assert copy == replace(KNOWN, id=copy.id, netns="mvm-copy", place=place)
    assert copy.mark != KNOWN.mark
    assert copy.at(place, "x") == copy
    assert copy.at(KNOWN.place, "x").mark not in (KNOWN.mark, copy.mark)


def test_a_node_keeps_its_name() -> None:
    KNOWN.check_node(NodeId("n1"))
    with pytest.raises(NotAllowed) as caught:
        KNOWN.check_node(NodeId("renamed"))
    assert caught.value.code == "node.renamed"
    assert "n1" in caught.value.hint


def test_former_versions_marked_by_the_path() -> None:
    """As 6e69ba5 has it: what that started must be found."""
    assert id_of_path(Path("/var/lib/mvm")) == "2772e464b10d"


def test_a_claim_fits_into_an_alias_and_is_read_again() -> None:
    mark = mark_of("0123456789ab")
    for where in ("/var/lib/mvm", "/" + "é" * 300):
        claim = Claim(mark, where)
        assert len(claim.text.encode()) <= 255
        found = Claim.parse(claim.text)
        assert found is not None
        assert found.mark == mark
        assert where.startswith(found.where)
        claim.check(found, None)
    assert Claim.parse("uplink") is None
