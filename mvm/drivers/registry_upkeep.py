"""The registry of one stack, made ready for it: its files whole, what they lost put back, of this mvm's version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext, suppress

from mvm.domain.layout import STATE_VERSION
from mvm.drivers import netns, redis_files, registry_migrations
from mvm.drivers.redis_link import RedisLink
from mvm.drivers.registry_rebuild import rebuild
from mvm.drivers.upgrade import upgrade
from mvm.errors import NotAllowed, Unreachable
from mvm.ports.shell import Shell
from mvm.settings import Settings

Report = Callable[[str], None]


class RegistryUpkeep:
    """For whoever holds the state directory. The registry is the stack's own (private), or one that nodes share."""

    def __init__(self, settings: Settings, shell: Shell) -> None:
        self._settings = settings
        self._layout = settings.layout
        self._shell = shell
        self._private = not settings.redis_url

    def is_served(self) -> bool:
        """Whether a Redis has the private one's files open. While it loads them it listens, and does not answer."""
        link = RedisLink(f"unix://{self._layout.redis_socket}", code="redis.unreachable")
        return self._private and link.listens()

    def check_unserved(self) -> None:
        """Raises `NotAllowed` (``stack.already_up``) when a Redis of somebody else has the private one's files open."""
        if self.is_served():
            raise NotAllowed(
                "stack.already_up", f"a Redis that this stack has not started listens at {self._layout.redis_socket}",
                hint="stop it first; who is it? fuser " + str(self._layout.redis_socket),
                state_dir=str(self._layout.root),
            )  # fmt: skip

    def make_ready(self, report: Report) -> None:
        """All that is kept is of this version, and the registry can be loaded. Nothing of the stack runs."""
        lost = self._private and redis_files.mend(self._layout.redis, self._shell, report)
        upgrade(self._settings, self._shell, report)
        if lost:
            jobs = rebuild(self._layout, self._settings.node, self._shell)
            redis_files.made_good(self._layout.redis)
            report(f"the registry is put back from the node's store: tenants, pools, net ids and {jobs} jobs")

    def migrate_before_it_is_started(self) -> None:
        """The registry is of this mvm's version before others start the stack; a shared one only if it is there."""
        if self._private:
            with redis_files.served(self._layout.redis, self._shell) as link:
                registry_migrations.migrate(link, unnumbered=STATE_VERSION)
            return
        with suppress(Unreachable):  # the first node that comes up while it answers does it
            self.migrate()

    def migrate(self) -> None:
        """The registry, whose Redis answers, is of this mvm's version; a private one is so by its directory's.

        Raises `NotAllowed` (``state.version``) when it is of a newer one.
        """
        namespace = self._settings.namespace
        inside = netns.entered(netns.path_of(namespace)) if namespace and netns.exists(namespace) else nullcontext()
        with inside, closing(RedisLink(self._settings.redis, code="registry.unreachable")) as link:
            registry_migrations.migrate(link, unnumbered=STATE_VERSION if self._private else None)
