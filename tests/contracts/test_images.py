"""ports/images.py."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from mvm.domain.pool import ImageSource
from mvm.drivers.fake import FakeHost
from mvm.drivers.file_storage import FileStorage
from mvm.drivers.images_builtin import BuiltinImages
from mvm.drivers.shell import LocalShell
from mvm.ports.images import ImageBuilder
from mvm.ports.storage import NodeStorage
from tests.support.microvm import image_cache


@dataclass
class Side:
    images: ImageBuilder
    storage: NodeStorage


@pytest.fixture(params=["fake", "builtin"], scope="module")
def side(request: pytest.FixtureRequest) -> Side:
    if request.param == "fake":
        host = FakeHost()
        return Side(host.images, host.storage)
    layout = image_cache()
    return Side(BuiltinImages(layout, LocalShell()), FileStorage(layout, LocalShell()))


def test_a_build_tells_its_steps_and_passes_the_storages_check(side: Side) -> None:
    steps: list[str] = []
    revision = side.images.build(ImageSource("builtin:", "minimal"), steps.append)
    assert steps
    files = side.storage.revision(revision)
    assert len({files.kernel, files.initramfs, files.rootfs}) == 3


def test_the_same_source_gives_the_same_revision(side: Side) -> None:
    first = side.images.build(ImageSource("builtin:", "minimal"), lambda step: None)
    assert side.images.build(ImageSource("builtin:", "minimal"), lambda step: None) == first


def test_another_profile_is_another_revision(side: Side) -> None:
    minimal = side.images.build(ImageSource("builtin:", "minimal"), lambda step: None)
    assert side.images.build(ImageSource("builtin:", "python"), lambda step: None) != minimal
