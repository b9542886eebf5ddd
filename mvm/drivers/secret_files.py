"""`SecretStore` over files: one per tenant, AES-256-GCM under a key that derives from the node's."""

from __future__ import annotations

import errno
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mvm.domain.ids import JobId, TenantId
from mvm.domain.layout import StateLayout
from mvm.domain.secrets import NODE_KEY_BYTES, Secrets
from mvm.drivers.files import write_private
from mvm.errors import Failed

_FORMAT = 1
_SALT_BYTES, _NONCE_BYTES = 32, 12


class SecretFiles:
    """Each file is a JSON object: what it is, in the clear but authenticated, and the sealed values."""

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout

    def load(self, tenant: TenantId) -> Secrets | None:
        """See the port."""
        try:
            text = self._layout.secrets_of(tenant).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _failed(error) from None
        try:
            document = json.loads(text)
            said, salt, nonce, sealed = document["said"], *(b64decode(document[n]) for n in ("salt", "nonce", "sealed"))
            values = json.loads(AESGCM(self._key(tenant, salt)).decrypt(nonce, sealed, _canonical(said)))
            _refuse_newer(tenant, said["format"])  # sealed with the values: nobody has changed it
            if (said["format"], said["tenant"]) != (_FORMAT, tenant):
                raise ValueError
            job = JobId(said["job"]) if said["job"] else None
            return Secrets(said["epoch"], datetime.fromisoformat(said["set_at"]), values, job)
        except (ValueError, KeyError, TypeError, InvalidTag):
            raise damaged(tenant, "were changed, or belong to another node or tenant") from None

    def save(self, tenant: TenantId, secrets: Secrets) -> None:
        """See the port."""
        salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
        said = {
            "format": _FORMAT, "tenant": str(tenant), "epoch": secrets.epoch, "set_at": secrets.set_at.isoformat(),
            "job": secrets.job,
        }  # fmt: skip
        plain = json.dumps(dict(secrets.values)).encode()
        sealed = AESGCM(self._key(tenant, salt)).encrypt(nonce, plain, _canonical(said))
        parts = {"salt": salt, "nonce": nonce, "sealed": sealed}
        document = {"said": said} | {name: b64encode(part).decode() for name, part in parts.items()}
        path = self._layout.secrets_of(tenant)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_private(path, json.dumps(document).encode())
        except OSError as error:
            raise _failed(error) from None

    def remove(self, tenant: TenantId) -> None:
        """See the port."""
        try:
            self._layout.secrets_of(tenant).unlink(missing_ok=True)
        except OSError as error:
            raise _failed(error) from None

    def _key(self, tenant: TenantId, salt: bytes) -> bytes:
        """A key for one file alone: no two are ever sealed with the same."""
        try:
            key = self._layout.secrets_key.read_bytes()
        except OSError:
            key = b""
        if len(key) != NODE_KEY_BYTES:
            raise Failed("secrets.no_key", f"{self._layout.secrets_key} is missing or damaged",
                         hint="put it back from a backup; without it the secrets have to be set again")  # fmt: skip
        return HKDF(SHA256(), 32, salt, f"mvm secrets of {tenant}".encode()).derive(key)


def _refuse_newer(tenant: TenantId, found: object) -> None:
    if isinstance(found, int) and found > _FORMAT:
        raise Failed(
            "secrets.other_format", f"the stored secrets of tenant {tenant} are of format {found}, not {_FORMAT}",
            hint="a newer mvm has written them: use that one, or set them again", subject=str(tenant),
        )  # fmt: skip


def damaged(tenant: TenantId, what: str) -> Failed:
    """The error for secrets that cannot be trusted."""
    return Failed(
        "secrets.damaged", f"the stored secrets of tenant {tenant} {what}",
        hint=f"set them again: mvm tenant secrets set {tenant} --from-file F", subject=str(tenant),
    )  # fmt: skip


def _canonical(said: Mapping[str, Any]) -> bytes:
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _failed(error: OSError) -> Failed:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Failed("disk.full" if full else "storage.failed", f"{error.filename}: {error.strerror}",
                  hint="free some space" if full else "are the state directory's files the node's own?")  # fmt: skip
