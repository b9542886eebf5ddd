"""The state directory: made, recognised, and held by one ``mvm up`` or ``mvm down`` at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mvm.domain.layout import STATE_VERSION, StateLayout
from mvm.domain.migration import refuse_newer
from mvm.domain.secrets import NODE_KEY_BYTES
from mvm.drivers.files import write_once
from mvm.errors import Failed, Forbidden, NotAllowed

_FOREIGN_OK = frozenset({"lost+found"})  # a file system of its own may be mounted there


def check_version(layout: StateLayout) -> int | None:
    """The directory's version, None when it is not there or empty. `upgrade` brings an older one up to date.

    Raises `NotAllowed`: ``state.version`` when it is a newer program's, ``state.foreign`` when it is not a state
    directory; `Forbidden` (``permission.denied``) when it cannot be read.
    """
    try:
        if not layout.root.exists():
            return None
        if layout.version.exists():
            found = layout.version.read_text().strip()
        else:
            drafts = (f".{layout.version.name}.", f".{layout.certs.name}.")
            names = {p.name for p in layout.root.iterdir() if not p.name.startswith(drafts)}
            strangers = names - _FOREIGN_OK - _own_names(layout)
            if strangers:
                raise NotAllowed(
                    "state.foreign", f"{layout.root} is not a state directory: it holds {min(strangers)!r}",
                    hint="set MVM_STATE_DIR to a directory that is empty or does not exist", state_dir=str(layout.root),
                )  # fmt: skip
            return None
    except PermissionError:
        raise denied(layout.root) from None
    except NotADirectoryError:
        raise NotAllowed("state.foreign", f"{layout.root} is not a directory", state_dir=str(layout.root)) from None
    version = int(found) if found.isascii() and found.isdecimal() else found[:20]
    refuse_newer(layout.root, version)
    return int(version)


def prepare(layout: StateLayout) -> None:
    """The directory, its version, and the keys that are made once exist."""
    check_version(layout)
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.root.chmod(0o700)
        write_once(layout.version, f"{STATE_VERSION}\n".encode())
        for path in (
            layout.run, layout.redis, layout.logs, layout.certs, layout.ssh_key.parent, layout.images,
            layout.package_cache, layout.instances, layout.locks, layout.audit, layout.secrets,
        ):  # fmt: skip
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_once(layout.flower_password, f"{secrets.token_urlsafe(24)}\n".encode())
        write_once(layout.secrets_key, secrets.token_bytes(NODE_KEY_BYTES))
        _ssh_key(layout.ssh_key)
    except PermissionError:
        raise denied(layout.root) from None
    except OSError as error:
        raise Failed("state.failed", f"{error.filename or layout.root}: {error.strerror}",
                     hint="choose a writable directory with MVM_STATE_DIR") from None  # fmt: skip


@contextmanager
def held(layout: StateLayout) -> Iterator[None]:
    """Be the only ``up`` or ``down`` of this directory.

    Raises `NotAllowed` (``stack.busy``) when another is at it, at once.
    """
    path = layout.locks / "stack.lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError:
        raise denied(layout.root) from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotAllowed(
                "stack.busy",
                f"the stack of {layout.root} is being started or stopped by another command",
                hint="see: mvm status",
            ) from None
        yield
    finally:
        os.close(fd)


def denied(path: Path) -> Forbidden:
    """The caller may not use it."""
    return Forbidden("permission.denied", f"{path}: permission denied", hint="run it as root")


def _own_names(layout: StateLayout) -> frozenset[str]:
    paths = (layout.identity, layout.run, layout.redis, layout.logs, layout.certs, layout.ssh_key, layout.images,
             layout.package_cache, layout.instances, layout.locks, layout.secrets, layout.known_nodes)  # fmt: skip
    return frozenset(path.relative_to(layout.root).parts[0] for path in paths)


def _ssh_key(path: Path) -> None:
    if path.exists():
        return
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    # The private half last: where it is, the pair is complete.
    path.with_suffix(".pub").unlink(missing_ok=True)
    write_once(path.with_suffix(".pub"), public + b" mvm\n")
    write_once(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
