"""A state directory that mvm 6e69ba5 wrote: a stack on the fake host, with instances in every status that lasts.

It was made by that commit's own code: ``up --driver fake``, tenants `acme` and (destroyed) `gone`, a pool of five
instances, one of them warm, one asleep, one stopped, a secret, and ``down``. Certificates and logs are left out.
"""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "state-6e69ba5.tar.xz"
_MARK_BYTES = 16
PROCESSES = {
    "acme/web/i-06fa3d94": ("running", 1001),
    "acme/web/i-2509a5bc": ("warm", 1002),
    "acme/web/i-c8ef2380": ("sleeping", None),
    "acme/web/i-f22be7a2": ("stopped", None),
    "acme/web/i-ffdbba80": ("ready", None),
}
"""Each instance with its status and the pid of its VMM."""


def unpack(root: Path) -> None:
    """The state directory is at `root`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # type: ignore[assignment]
        for member in archive:
            member.name = str(Path(*Path(member.name).parts[1:]))
            archive.extract(member, root)
    root.chmod(0o700)
    _without_rules(root / "fake-host")


def _without_rules(host: Path) -> None:
    """The fake host forgets its packet filter, as a kernel has one in its own form; the stack puts its own there."""
    content = host.read_bytes()
    kept = pickle.loads(content[_MARK_BYTES:])
    kept["rules"] = None
    host.write_bytes(content[:_MARK_BYTES] + pickle.dumps(kept))
