"""Where everything lies below the state directory."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mvm.domain.ids import InstanceRef, PoolRef, Revision, TenantId

STATE_VERSION = 3
"""Of everything that is kept: the store, the registry, settings. See `mvm.domain.migration`."""
DEFAULT_STATE_DIR = Path("/var/lib/mvm")
_UNIX_PATH_MAX = 107  # sockaddr_un holds 108 bytes with the closing zero
_LONGEST_SOCKET = "run/supervisor.sock.4194304"  # supervisord binds this, with its pid, and renames it
MAX_ROOT_BYTES = _UNIX_PATH_MAX - len(_LONGEST_SOCKET) - 1
"""The longest path of a state directory below which every Unix socket has room."""


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Paths below `root`, which is absolute. Everything is owned by the node's user, mode 0700 or 0600."""

    root: Path

    @property
    def version(self) -> Path:
        """Holds `STATE_VERSION` as text."""
        return self.root / "VERSION"

    @property
    def identity(self) -> Path:
        """Who the directory is and whose, as JSON: see `mvm.domain.identity`."""
        return self.root / "identity.json"

    @property
    def database(self) -> Path:
        """The node's store."""
        return self.root / "node.db"

    @property
    def run(self) -> Path:
        """Sockets and files of the running stack."""
        return self.root / "run"

    @property
    def connection(self) -> Path:
        """What a command needs to reach the running stack, as JSON: written by ``mvm up``."""
        return self.run / "connection.json"

    @property
    def settings(self) -> Path:
        """The settings that the stack was last started with, as JSON."""
        return self.run / "settings.json"

    @property
    def redis_socket(self) -> Path:
        """The private Redis."""
        return self.run / "redis.sock"

    @property
    def redis(self) -> Path:
        """The private Redis's data."""
        return self.root / "redis"

    @property
    def metadata_socket(self) -> Path:
        """Where the metadata service tells that it is there."""
        return self.run / "metadata.sock"

    @property
    def logs(self) -> Path:
        """One log per process of the stack."""
        return self.root / "logs"

    @property
    def beat_alive(self) -> Path:
        """Touched by Beat with every tick."""
        return self.run / "beat.alive"

    @property
    def certs(self) -> Path:
        """CA, node and coordinator certificates and keys."""
        return self.root / "certs"

    @property
    def known_nodes(self) -> Path:
        """Which node has answered at which address, a file for each."""
        return self.root / "known-nodes"

    @property
    def ssh_key(self) -> Path:
        """The operator's ssh key; ``.pub`` beside it."""
        return self.root / "keys" / "ssh_ed25519"

    @property
    def flower_password(self) -> Path:
        """The generated password of Flower's user ``mvm``."""
        return self.root / "keys" / "flower_password"

    @property
    def secrets_key(self) -> Path:
        """What tenants' secrets are encrypted under."""
        return self.root / "keys" / "secrets"

    @property
    def secrets(self) -> Path:
        """One file per tenant that has some, encrypted."""
        return self.root / "secrets"

    def secrets_of(self, tenant: TenantId) -> Path:
        """The encrypted secrets of one tenant."""
        return self.secrets / tenant

    @property
    def images(self) -> Path:
        """One directory per revision."""
        return self.root / "images"

    def revision(self, revision: Revision) -> Path:
        """The directory of one revision."""
        return self.images / revision

    @property
    def templates(self) -> Path:
        """``TENANT/POOL/REVISION`` below it."""
        return self.root / "templates"

    def template(self, pool: PoolRef, revision: Revision) -> Path:
        """What instances of `pool` at `revision` are cloned from; no other pool's are."""
        return self.templates / pool.tenant / pool.pool / revision

    @property
    def package_cache(self) -> Path:
        """Downloaded Debian packages."""
        return self.root / "cache" / "debs"

    @property
    def instances(self) -> Path:
        """``TENANT/POOL/INSTANCE`` below it."""
        return self.root / "instances"

    def instance(self, ref: InstanceRef) -> Path:
        """The directory of one instance."""
        return self.instances / ref.tenant / ref.pool / ref.instance

    def snapshot(self, ref: InstanceRef) -> Path:
        """What a sleeping instance wakes from."""
        return self.instance(ref) / "snapshot"

    @property
    def audit(self) -> Path:
        """Audit trails, a directory for each tenant that ever was."""
        return self.root / "audit"

    @property
    def locks(self) -> Path:
        """Lock files."""
        return self.root / "locks"

    @property
    def metrics(self) -> Path:
        """Samples that the stack's processes share."""
        return self.run / "metrics"

    @property
    def uplink_mark(self) -> Path:
        """Which uplink forwards because of us."""
        return self.root / "uplink-forwards"

    @property
    def made_netns(self) -> Path:
        """Names the network namespace that the directory's stack made."""
        return self.run / "netns"

    @property
    def default_netns(self) -> str:
        """``mvm`` for the default state directory, else ``mvm-`` and 8 hex digits of its path's hash.

        The one that the directory remembers goes before it.
        """
        if self.root == DEFAULT_STATE_DIR:
            return "mvm"
        return "mvm-" + sha256(str(self.root).encode()).hexdigest()[:8]
