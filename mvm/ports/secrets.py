"""Where the node keeps tenants' secrets."""

from __future__ import annotations

from typing import Protocol

from mvm.domain.ids import TenantId
from mvm.domain.secrets import Secrets


class SecretStore(Protocol):
    """Secrets at rest, encrypted under a key of the node's; nothing of them is readable without it.

    Raises `Failed` (``secrets.damaged``) for what was edited, cut, or is another tenant's, and (``secrets.no_key``)
    when the node's key is missing.
    """

    def load(self, tenant: TenantId) -> Secrets | None:
        """The tenant's secrets; None when there are none."""
        ...

    def save(self, tenant: TenantId, secrets: Secrets) -> None:
        """Replace them, under a key that was never used before; durable when the call returns."""
        ...

    def remove(self, tenant: TenantId) -> None:
        """There are none; may be repeated."""
        ...
