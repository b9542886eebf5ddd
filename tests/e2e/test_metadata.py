"""The metadata service, asked by real guests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_secrets import execute
from tests.support.microvm import built_image, lay_in
from tests.support.stack import Stack, running_stack
from tests.support.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.guest, pytest.mark.redis, pytest.mark.timeout(600)]

ADDRESS = "169.254.169.254"
TTL, TOKEN = "X-aws-ec2-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two tenants; acme's guests have user data, and those of acme/quiet no metadata."""
    user_data = tmp_path_factory.mktemp("files") / "user-data"
    user_data.write_text("#cloud-config\nhello: wörld\n")
    with running_stack() as running:
        lay_in(running.layout, built_image("python"))
        for tenant in ("acme", "bolt"):
            running.mvm("tenant", "create", tenant)
        for pool, *more in (
            ("acme/web", "--user-data", str(user_data)),
            ("bolt/web", "--cold"),  # as the others with one instance: a template would be made for each
            ("acme/quiet", "--cold", "--no-metadata"),
            ("acme/python", "--cold", "--profile", "python"),
        ):
            words = ("--flake", "builtin:", "--profile", "minimal", "--mem", "128", *more)
            running.mvm("pool", "create", pool, *words)
            running.mvm("pool", "build", pool)
        yield running


@pytest.fixture(scope="module")
def guests(stack: Stack) -> dict[str, str]:
    """One running instance per pool, and a second one of acme/web."""
    made = {pool: create(stack, pool) for pool in ("acme/web", "bolt/web", "acme/quiet", "acme/python")}
    return made | {"second": create(stack, "acme/web")}


def create(stack: Stack, pool: str) -> str:
    (made,) = stack.json("instance", "create", pool)
    stack.mvm("instance", "start", made["ref"])
    return str(made["ref"])


def ask(stack: Stack, ref: str, method: str, path: str, *headers: str) -> tuple[int, str]:
    """What a guest is told: the status (0: nothing) and the body."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {ADDRESS}", "Connection: close", *headers, "", ""]
    request = "\\r\\n".join(lines)
    text = execute(stack, ref, f"printf '{request}' | nc -w 10 {ADDRESS} 80 || :")
    head, _, body = text.replace("\r\n", "\n").partition("\n\n")
    return (int(head.split()[1]) if head else 0), body


def token(stack: Stack, ref: str) -> str:
    status, given = ask(stack, ref, "PUT", "/latest/api/token", f"{TTL}: 60")
    assert status == 200, given
    return given


def test_a_guest_with_a_token_reads_who_it_is(stack: Stack, guests: dict[str, str]) -> None:
    ref = guests["acme/web"]
    info = stack.json("instance", "info", ref)
    shown = f"{TOKEN}: {token(stack, ref)}"
    wanted = {
        "/latest/meta-data/instance-id": ref.split("/")[2],
        "/latest/meta-data/tenant": "acme",
        "/latest/meta-data/pool": "web",
        "/latest/meta-data/local-ipv4": info["guest_ip"],
        "/latest/meta-data/mac": info["mac"],
        "/latest/user-data": "#cloud-config\nhello: wörld",
    }
    for path, text in wanted.items():
        assert ask(stack, ref, "GET", path, shown) == (200, text), path
    assert ask(stack, ref, "GET", "/latest/meta-data/public-keys/0/openssh-key", shown)[1].startswith("ssh-ed25519 ")
    assert "instance-id" in ask(stack, ref, "GET", "/latest/meta-data/", shown)[1].split()
    assert ask(stack, ref, "GET", "/latest/nothing", shown)[0] == 404


def test_the_guides_example_works_in_each_profile(stack: Stack, guests: dict[str, str]) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text().partition("## Who am I")[2]
    example = guide.split("```sh\n")[1].partition("```")[0]
    for ref in (guests["acme/web"], guests["acme/python"]):
        assert "instance-id" in execute(stack, ref, example).split()


def test_without_a_token_nothing_is_told(stack: Stack, guests: dict[str, str]) -> None:
    ref = guests["acme/web"]
    assert ask(stack, ref, "GET", "/latest/meta-data/instance-id")[0] == 401
    assert ask(stack, ref, "GET", "/latest/meta-data/instance-id", f"{TOKEN}: {'0' * 53}")[0] == 401
    assert ask(stack, ref, "PUT", "/latest/api/token")[0] == 400
    assert ask(stack, ref, "PUT", "/latest/api/token", f"{TTL}: 999999")[0] == 400
    assert ask(stack, ref, "PUT", "/latest/api/token", f"{TTL}: 60", "X-Forwarded-For: 10.0.0.1")[0] == 403


def test_a_guest_sees_itself_and_nobody_else(stack: Stack, guests: dict[str, str]) -> None:
    one, other, second = guests["acme/web"], guests["bolt/web"], guests["second"]
    stolen = token(stack, one)
    for thief in (other, second):
        assert ask(stack, thief, "GET", "/latest/meta-data/instance-id", f"{TOKEN}: {stolen}")[0] == 401
        victim = stack.json("instance", "info", one)["guest_ip"]
        lies = (f"X-Forwarded-For: {victim}", f"Forwarded: for={victim}", f"X-Real-IP: {victim}")
        shown = f"{TOKEN}: {token(stack, thief)}"
        assert ask(stack, thief, "GET", "/latest/meta-data/instance-id", shown, *lies) == (200, thief.split("/")[2])
    assert ask(stack, guests["acme/quiet"], "PUT", "/latest/api/token", f"{TTL}: 60")[0] == 403


def test_a_flood_and_long_headers_are_cut_off_and_others_are_served(stack: Stack, guests: dict[str, str]) -> None:
    bad, good = guests["bolt/web"], guests["acme/web"]
    long = "head -c 1000000 /dev/zero | tr '\\0' a"
    cut = (
        f"(printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\nX-Long: '; {long}) | nc -w 10 {ADDRESS} 80 2>&1 | head -c 200 || :"
    )
    assert "431" in execute(stack, bad, cut)
    flood = f"for i in $(seq 300); do printf 'GET / HTTP/1.1\\r\\n\\r\\n' | nc -w 5 {ADDRESS} 80 & done"
    execute(stack, bad, f"({flood}) >/dev/null 2>&1 &")
    for _ in range(3):
        assert ask(stack, good, "GET", "/latest/meta-data/tenant", f"{TOKEN}: {token(stack, good)}") == (200, "acme")
    (part,) = [row for row in stack.json("status") if row["name"] == "metadata"]
    assert part["answers"]
    until(lambda: ask(stack, bad, "PUT", "/latest/api/token", f"{TTL}: 60")[0] == 200, 60, "the flood is over")


def test_a_tenant_that_comes_later_is_served_too(stack: Stack, guests: dict[str, str], tmp_path: Path) -> None:
    stack.mvm("tenant", "create", "late")
    stack.mvm("pool", "create", "late/web", "--flake", "builtin:", "--profile", "minimal", "--mem", "128", "--cold")
    stack.mvm("pool", "build", "late/web")
    ref = create(stack, "late/web")
    assert ask(stack, ref, "GET", "/latest/meta-data/tenant", f"{TOKEN}: {token(stack, ref)}") == (200, "late")
