"""CAs as people have them: what `openssl` makes, in any order, above and below others; accepted, or nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvm.domain.layout import StateLayout
from mvm.drivers.quic import certs
from mvm.drivers.quic.authority import Issued
from mvm.drivers.quic.identity import load_certificates, load_key
from mvm.errors import InvalidInput, MvmError
from tests.adapters.test_quic_certs import contents, problems
from tests.support.quic_agent import NODE, make_certs, running_agent

P256 = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
KEYS = {
    "P-256": P256,
    "P-384": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"),
    "P-521": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-521"),
    "RSA 2048": ("-newkey", "rsa:2048"),
}
EXTENSIONS = {
    "key usage": ["keyUsage=critical,keyCertSign,cRLSign"],
    "no room for another CA below": ["basicConstraints=critical,CA:TRUE,pathlen:0"],
    "constraints that are not critical": ["basicConstraints=CA:TRUE"],
    "both extended usages": ["extendedKeyUsage=serverAuth,clientAuth"],
}
REFUSED = {
    "a key that may not sign certificates": (P256, ["keyUsage=critical,digitalSignature"], "not for signing"),
    "no CA": (P256, ["basicConstraints=critical,CA:FALSE"], "is not a CA's certificate"),
    "a weak key": (("-newkey", "rsa:1024"), [], "RSA key is too weak"),
    "an Ed25519 key": (("-newkey", "ed25519"), [], "use P-256"),
    "for servers only": (P256, ["extendedKeyUsage=serverAuth"], "EKU"),
}


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def made(directory: Path, name: str, key: tuple[str, ...] = P256, extensions: list[str] = []) -> tuple[Path, Path]:  # noqa: B006
    """A self-signed CA, and its key."""
    certificate, private = directory / f"{name}.crt", directory / f"{name}.key"
    more = [word for each in extensions for word in ("-addext", each)]
    openssl("req", "-x509", *key, "-nodes", "-keyout", private, "-out", certificate, "-days", "90",
            "-subj", f"/CN={name}", *more)  # fmt: skip
    return certificate, private


def below(directory: Path, name: str, above: tuple[Path, Path], constraints: str) -> tuple[Path, Path]:
    """An intermediate CA under `above`, and its key."""
    certificate, private, request = directory / f"{name}.crt", directory / f"{name}.key", directory / f"{name}.csr"
    openssl("req", *P256, "-nodes", "-new", "-keyout", private, "-out", request, "-subj", f"/CN={name}")
    (directory / "extensions").write_text(f"basicConstraints={constraints}\nkeyUsage=critical,keyCertSign\n")
    openssl("x509", "-req", "-in", request, "-CA", above[0], "-CAkey", above[1], "-CAcreateserial", "-days", "60",
            "-extfile", directory / "extensions", "-out", certificate)  # fmt: skip
    return certificate, private


def joined(path: Path, *parts: Path) -> Path:
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def accepted(root: Path, ca: Path) -> None:
    """The CA replaces a good set, its key stays away, and an agent serves with the new one."""
    directory = make_certs(root)
    before = contents(directory)
    certs.init(StateLayout(root), NODE, ca)
    assert problems(root) == {"ca": "", "node": "", "coordinator": ""}
    assert contents(directory)["ca.pem"] != before["ca.pem"]
    assert not (directory / "ca.key").exists()
    with running_agent(directory) as agent:
        assert agent.agents.call(agent.address, "node.ping", {}, deadline_s=30) == {}


@pytest.mark.parametrize("order", ["certificate first", "key first"])
def test_what_openssl_makes_without_more_words_is_a_ca(tmp_path: Path, order: str) -> None:
    certificate, key = made(tmp_path, "ca")
    parts = (certificate, key) if order == "certificate first" else (key, certificate)
    accepted(tmp_path, joined(tmp_path / "ca.pem", *parts))


@pytest.mark.parametrize("kind", KEYS)
def test_a_cas_key_may_be_of_several_kinds(tmp_path: Path, kind: str) -> None:
    accepted(tmp_path, joined(tmp_path / "ca.pem", *made(tmp_path, "ca", KEYS[kind])))


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_a_ca_may_say_more_of_itself(tmp_path: Path, kind: str) -> None:
    accepted(tmp_path, joined(tmp_path / "ca.pem", *made(tmp_path, "ca", extensions=EXTENSIONS[kind])))


@pytest.mark.parametrize("kind", REFUSED)
def test_a_ca_that_will_not_do_changes_nothing(tmp_path: Path, kind: str) -> None:
    key, extensions, why = REFUSED[kind]
    directory = make_certs(tmp_path)
    before = contents(directory)
    with pytest.raises(InvalidInput) as caught:
        certs.init(StateLayout(tmp_path), NODE, joined(tmp_path / "ca.pem", *made(tmp_path, "ca", key, extensions)))
    assert caught.value.code == "certs.damaged"
    assert why in caught.value.message
    assert contents(directory) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_intermediate_issues_under_its_root(tmp_path: Path) -> None:
    root = made(tmp_path, "root")
    middle = below(tmp_path, "middle", root, "critical,CA:TRUE")
    lowest = below(tmp_path, "lowest", middle, "critical,CA:TRUE,pathlen:0")
    accepted(tmp_path, joined(tmp_path / "ca.pem", root[0], lowest[1], middle[0], lowest[0]))
    directory = StateLayout(tmp_path).certs
    assert [c.subject.rfc4514_string() for c in load_certificates(directory / "ca.pem")] == ["CN=root"]
    assert len(load_certificates(directory / "node.pem")) == 3


def test_an_intermediate_without_its_root_is_trusted_itself(tmp_path: Path) -> None:
    middle = below(tmp_path, "middle", made(tmp_path, "root"), "critical,CA:TRUE")
    accepted(tmp_path, joined(tmp_path / "ca.pem", *middle))


def test_a_path_longer_than_its_root_allows_is_refused(tmp_path: Path) -> None:
    root = made(tmp_path, "root", extensions=["basicConstraints=critical,CA:TRUE,pathlen:0"])
    middle = below(tmp_path, "middle", root, "critical,CA:TRUE")
    directory = make_certs(tmp_path)
    before = contents(directory)
    with pytest.raises(InvalidInput):
        certs.init(StateLayout(tmp_path), NODE, joined(tmp_path / "ca.pem", *middle, root[0]))
    assert contents(directory) == before


def test_nothing_outlives_its_ca(tmp_path: Path) -> None:
    ca = joined(tmp_path / "ca.pem", *made(tmp_path, "ca"))
    certs.init(StateLayout(tmp_path), NODE, ca)
    ends = {row["name"]: row["not_after"] for row in certs.status(StateLayout(tmp_path), NODE)}
    assert ends["node"] == ends["coordinator"] == ends["ca"]


def test_a_set_that_ends_soon_is_good_until_then_without_the_cas_key(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    own = Issued(load_certificates(directory / "ca.pem")[0], load_key(directory / "ca.key"))
    from tests.adapters.test_quic_certs import put
    from tests.support.quic_agent import node

    put(directory, "node", node(own, days=certs.RENEW_DAYS - 1))
    (directory / "ca.key").unlink()
    before = contents(directory)
    assert ["node.pem ends on" in note for note in certs.init(StateLayout(tmp_path), NODE)] == [True]
    assert contents(directory) == before


@contextmanager
def fed(data: bytes) -> Iterator[Path]:
    """A pipe with `data` in it, as a shell's ``<(...)`` gives one: it can be read once."""
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        yield Path(f"/dev/fd/{reading}")
    finally:
        os.close(reading)


def test_a_ca_may_come_by_a_pipe(tmp_path: Path) -> None:
    certificate, key = made(tmp_path, "ca")
    with fed(key.read_bytes() + certificate.read_bytes()) as pipe:
        accepted(tmp_path, pipe)


def test_the_command_takes_one_from_the_shell(tmp_path: Path) -> None:
    certificate, key = made(tmp_path, "ca")
    mvm = Path(sys.executable).with_name("mvm")
    state = tmp_path / "state"
    words = ["bash", "-c", f'"{mvm}" agent certs init --ca <(cat "{certificate}" "{key}") -o json']
    done = subprocess.run(words, env={**os.environ, "MVM_STATE_DIR": str(state)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (state / "certs" / "ca.key").exists()


CRASH = """
import os, sys
from pathlib import Path
from mvm.domain.layout import StateLayout
from mvm.drivers.quic import certs
from mvm.drivers.quic.authority import Issued
from mvm.drivers.quic.identity import load_certificates, load_key
from tests.support.quic_agent import NODE

root, bundle = Path(sys.argv[1]), Path(sys.argv[2])
certs.init(StateLayout(root), NODE)
import mvm.drivers.quic.rehearsal

def files():
    return {p.name: p.read_bytes() for p in (root / "certs").iterdir()}

def attempt(step):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "shutil.rmtree"):
            count += 1
            if count == step:
                os._exit(9)
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(hook)
        certs.init(StateLayout(root), NODE, bundle)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

before, sets, step = files(), [], 0
while True:
    step += 1
    code = attempt(step)
    now = files()
    if now not in sets:
        sets.append(now)
    bad = [row["problem"] for row in certs.status(StateLayout(root), NODE) if not row["ok"]]
    assert not bad, (step, bad)
    if code == 0:
        break
    if now != before:  # the new one is whole: begin again with the old
        import shutil
        for path in root.glob(".certs.*"):
            shutil.rmtree(path)
        for path in (root / "certs").iterdir():
            path.unlink()
        for name, data in before.items():
            path = root / "certs" / name
            path.write_bytes(data)
            path.chmod(0o600)
assert before in sets and len(sets) > 1, len(sets)
assert not list(root.glob(".certs.*")), "what crashes left goes with the next"
print(step)
"""


def test_a_crash_at_any_point_leaves_one_set_whole(tmp_path: Path) -> None:
    ca = joined(tmp_path / "ca.pem", *made(tmp_path, "ca"))
    words = [sys.executable, "-c", CRASH, str(tmp_path / "state"), str(ca)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20, "there were points to crash at"


def test_what_is_not_ours_in_the_directory_is_kept(tmp_path: Path) -> None:
    directory = make_certs(tmp_path)
    (directory / "note").write_text("mine")
    certs.init(StateLayout(tmp_path), NODE, joined(tmp_path / "ca.pem", *made(tmp_path, "ca")))
    assert (directory / "note").read_text() == "mine"


def test_a_linked_directory_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "certs").symlink_to(tmp_path / "elsewhere")
    make_certs(tmp_path / "state")
    assert (tmp_path / "state" / "certs").is_symlink()
    assert problems(tmp_path / "state") == {"ca": "", "node": "", "coordinator": ""}


def test_a_new_set_that_fails_its_rehearsal_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else may be wrong with a set: the handshake that it is for decides."""
    from mvm.drivers.quic import rehearsal
    from mvm.drivers.quic.identity import Refused

    def refuse(*_: object) -> None:
        raise Refused("the handshake failed")

    directory = make_certs(tmp_path)
    before = contents(directory)
    monkeypatch.setattr(rehearsal, "rehearse", refuse)
    with pytest.raises(MvmError) as caught:
        certs.init(StateLayout(tmp_path), NODE, joined(tmp_path / "ca.pem", *made(tmp_path, "ca")))
    assert "the handshake failed" in caught.value.message
    assert contents(directory) == before
