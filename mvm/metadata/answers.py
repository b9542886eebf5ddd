"""A request and its answer: no sockets, no HTTP syntax."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mvm.domain.metadata import MAX_TTL_S, TOKEN_PATH, Self, proves, read, token

_TTL = ("x-aws-ec2-metadata-token-ttl-seconds", "x-metadata-token-ttl-seconds")
_TOKEN = ("x-aws-ec2-metadata-token", "x-metadata-token")
_BY_WAY_OF = "x-forwarded-for"
_ADDRESS = "169.254.169.254"
HOSTS = frozenset({_ADDRESS, f"{_ADDRESS}:80"})
"""What the service is called. Another name is one that somebody's DNS server made to lead here (DNS rebinding)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent back."""

    status: int
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


class Answers:
    """Answers guests that are known for who they are. Tokens end with the process that gave them."""

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock

    def to(self, guest: Self | None, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        """The answer for `guest`; `headers` have lower-case names. None is an asker that nobody knows."""
        if guest is None:
            return Answer(403, "there is no metadata for you\n")
        if headers.get("host", _ADDRESS) not in HOSTS:  # there is none in HTTP/1.0
            return Answer(421, f"ask http://{_ADDRESS}/\n")
        path = target.partition("?")[0]
        if method == "PUT" and path == TOKEN_PATH:
            return self._token(guest, headers)
        if method not in ("GET", "HEAD"):
            return Answer(405, "only GET, and PUT of a token\n", {"Allow": "GET, HEAD"})
        if not any(proves(self._key, guest, headers.get(name, ""), self._clock()) for name in _TOKEN):
            return Answer(401, f"get a token first: PUT {TOKEN_PATH} with {_TTL[0]}\n")
        text = read(guest.tree, path)
        return Answer(404, "there is no such thing\n") if text is None else Answer(200, text)

    def _token(self, guest: Self, headers: Mapping[str, str]) -> Answer:
        if _BY_WAY_OF in headers:  # a proxy in the guest, that somebody outside may have asked
            return Answer(403, "a token is given to nobody by way of another\n")
        said = next((headers[name] for name in _TTL if name in headers), "")
        if not (said.isascii() and said.isdecimal() and len(said) < 6 and 1 <= int(said) <= MAX_TTL_S):
            return Answer(400, f"{_TTL[0]} must be 1 to {MAX_TTL_S}\n")
        given = token(self._key, guest, int(self._clock()) + int(said))
        return Answer(200, given, {_TTL[0]: said})
