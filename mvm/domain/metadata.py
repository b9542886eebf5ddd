"""What a guest can read of itself at the metadata address, and the tokens it must show for it."""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from mvm.domain.addressing import TenantNetwork
from mvm.domain.instance import Instance
from mvm.domain.pool import WorkerPool

MAX_TTL_S = 21_600
TOKEN_PATH = "/latest/api/token"
_ROOT = "/latest/"
_DIGITS = 10  # of the time a token ends at

Tree = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Self:
    """A guest as it may know itself: what it can read, by path, and a name that no other guest ever has."""

    name: str
    tree: Tree


def of(network: TenantNetwork, pool: WorkerPool, instance: Instance, ssh_key: str) -> Self:
    """What the guest of `instance` can read."""
    ref = instance.ref
    meta = {
        "instance-id": str(ref.instance),
        "hostname": str(ref.instance),
        "ref": str(ref),
        "tenant": str(ref.tenant),
        "pool": str(ref.pool),
        "local-ipv4": str(network.ip(instance.offset)),
        "gateway-ipv4": str(network.gateway),
        "mac": network.mac(instance.offset),
        "public-keys/0/openssh-key": ssh_key,
    }
    tree = {f"{_ROOT}meta-data/{name}": text for name, text in meta.items() if text}
    if pool.user_data:
        tree[f"{_ROOT}user-data"] = pool.user_data
    return Self(f"{ref} {instance.created_at.isoformat()}", tree)


def read(tree: Tree, path: str) -> str | None:
    """The text at `path`; of a directory the names in it, one a line, directories with a slash behind."""
    if path in tree:
        return tree[path]
    directory = path.rstrip("/") + "/"
    below = (each.removeprefix(directory) for each in tree if each.startswith(directory))
    names = {f"{first}/" if slash else first for first, slash, _ in (rest.partition("/") for rest in below)}
    return "\n".join(sorted(names)) or None


def token(key: bytes, guest: Self, ends_at: int) -> str:
    """Proof, until the Unix time `ends_at`, that who shows it is `guest`."""
    return f"{ends_at:0{_DIGITS}d}{urlsafe_b64encode(_mac(key, guest, ends_at)).decode().rstrip('=')}"


def proves(key: bytes, guest: Self, shown: str, now: float) -> bool:
    """Whether `shown` is a token of `guest` that has not ended."""
    ends_at, mac = shown[:_DIGITS], shown[_DIGITS:]
    if not (ends_at.isascii() and ends_at.isdecimal() and mac.isascii() and int(ends_at) > now):
        return False
    try:
        said = urlsafe_b64decode(mac + "=" * (-len(mac) % 4))
    except ValueError:
        return False
    return hmac.compare_digest(said, _mac(key, guest, int(ends_at)))


def _mac(key: bytes, guest: Self, ends_at: int) -> bytes:
    return hmac.digest(key, f"{ends_at} {guest.name}".encode(), sha256)
