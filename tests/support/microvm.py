"""Real microVMs for tests: one built image for all of them, and a host in a network namespace of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from itertools import count
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from mvm.domain.addressing import TenantNetwork, parse_subnet
from mvm.domain.ids import InstanceRef, Revision
from mvm.domain.layout import StateLayout
from mvm.domain.pool import ImageSource, SeccompPolicy
from mvm.drivers import identity as identity_of
from mvm.drivers import netns
from mvm.drivers.cgroups import LinuxCgroups
from mvm.drivers.guest_channel import UnixGuestChannel
from mvm.drivers.images_builtin import BuiltinImages
from mvm.drivers.qemu.driver import QemuDriver
from mvm.drivers.shell import LocalShell
from mvm.ports.guest import GuestIdentity
from mvm.ports.vmm import BootSpec, Nic, TemplateSpec
from tests.support.make import instance_ref

BOOT_S = 60.0
ANSWER_S = 20.0
REVISION = Revision("5" * 64)
GUEST_IP = "10.240.1.3"
NETWORK = TenantNetwork(1, parse_subnet("10.240.1.0/24"))
_serial = count(1)


def image_cache() -> StateLayout:
    """Keeps packages and images between sessions: ``MVM_TEST_IMAGE_CACHE``, or below the temporary directory."""
    fallback = Path(tempfile.gettempdir()) / f"mvm-test-images-{os.getuid()}"
    return StateLayout(Path(os.environ.get("MVM_TEST_IMAGE_CACHE", fallback)).absolute())


def fresh_layout(root: Path) -> StateLayout:
    """A state directory with nothing but the cached packages."""
    layout = StateLayout(root)
    layout.package_cache.parent.mkdir(parents=True)
    image_cache().package_cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    layout.package_cache.symlink_to(image_cache().package_cache)
    return layout


@cache
def built_image(profile: str) -> Path:
    """The directory of a built-in image, built by the first caller."""
    layout = image_cache()
    return layout.revision(BuiltinImages(layout, LocalShell()).build(ImageSource("builtin:", profile), print))


def minimal_image() -> Path:
    """The directory of the built-in minimal image."""
    return built_image("minimal")


def lay_in(layout: StateLayout, image: Path) -> None:
    """A state directory has an image as if it had built it: its files have a second name there."""
    layout.images.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.copytree(image, layout.images / image.name, copy_function=_second_name)


def _second_name(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@dataclass(frozen=True)
class SshKey:
    """A key pair of the OpenSSH kind, and the same in dropbear's form."""

    private: bytes
    public: str
    dropbear: bytes

    @classmethod
    def make(cls) -> SshKey:
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        raw = key.private_bytes_raw() + key.public_key().public_bytes_raw()
        kind = b"ssh-ed25519"
        dropbear = len(kind).to_bytes(4, "big") + kind + len(raw).to_bytes(4, "big") + raw
        return cls(private, public.decode(), dropbear)


HOST_KEY = SshKey.make()


def identity(hostname: str = "i-00000001", address: str = f"{GUEST_IP}/24", **changes: object) -> GuestIdentity:
    made = GuestIdentity(
        machine_id="0" * 31 + "1", mac="02:6d:00:01:00:03",
        hostname=hostname, address=address, gateway="10.240.1.1", now=datetime.now(UTC),
        ssh_host_key=HOST_KEY.dropbear, authorized_key=SshKey.make().public, entropy=os.urandom(64),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


class QemuHost:
    """A state directory and its QEMU guests. Its thread is in the namespace that `qemu_host` made."""

    def __init__(self, layout: StateLayout) -> None:
        self.layout = layout
        self.shell = LocalShell()
        self.cgroups = LinuxCgroups(identity_of.mark(layout))
        self.vmm = QemuDriver(layout, self.shell, self.cgroups)
        self.guest = UnixGuestChannel()

    def spec(
        self, number: int = 1, *, data_disk: Path | None = None, mem_mib: int = 192, profile: str = "minimal"
    ) -> BootSpec:
        """What is needed to boot guest `number`: its directory, overlay and TAP exist."""
        ref, image = instance_ref(number), built_image(profile)
        directory = self.layout.instance(ref)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        overlay, rootfs = directory / "overlay.qcow2", image / "rootfs.ext4"
        self.shell.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), str(rootfs.stat().st_size)])
        return BootSpec(
            ref=ref, directory=directory, kernel=image / "vmlinux", initramfs=image / "initramfs.cpio", rootfs=rootfs,
            overlay=overlay, data_disk=data_disk, vcpus=1, mem_mib=mem_mib,
            nic=Nic(self._tap(number), f"02:6d:00:01:00:{number + 2:02x}"),
            uid=NETWORK.uid(number + 2), seccomp=SeccompPolicy.STRICT,
        )  # fmt: skip

    def template_spec(self, number: int = 9, *, data_disk_mib: int = 0, mem_mib: int = 192) -> TemplateSpec:
        """What is needed to boot a template: its directory and overlay exist."""
        own = self.spec(number, mem_mib=mem_mib)
        return TemplateSpec(
            own.ref,
            own.directory,
            own.kernel,
            own.initramfs,
            own.rootfs,
            own.overlay,
            data_disk_mib,
            1,
            mem_mib,
            own.uid,
            own.seccomp,
        )

    def template(self, spec: TemplateSpec) -> Path:
        """A template made of a guest that was ready for it."""
        process = self.vmm.boot_template(spec)
        self.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
        self.guest.settle(spec.ref, spec.directory, deadline_s=BOOT_S)
        into = self.layout.root / f"template-{spec.ref.instance}"
        self.vmm.save_template(spec, process, revision=REVISION, into=into)
        return into

    def running(self, spec: BootSpec) -> InstanceRef:
        """The instance, once its guest has answered."""
        self.vmm.boot(spec)
        self.guest.hello(spec.ref, spec.directory, deadline_s=BOOT_S)
        return spec.ref

    def end_all(self) -> None:
        for ref in self.vmm.processes():
            self.vmm.kill(ref, None)
        for ref in self.cgroups.groups():
            self.cgroups.remove(ref)
        self.cgroups.close()

    def _tap(self, number: int) -> str:
        name = f"tn1i{number + 2}"
        if not Path("/proc/self/net/dev").read_text().count(f"{name}:"):
            self.shell.run(["ip", "tuntap", "add", name, "mode", "tap"])
            self.shell.run(["ip", "link", "set", name, "up"])
        return name


@contextmanager
def qemu_host(root: Path, profile: str = "minimal") -> Iterator[QemuHost]:
    """A host whose guests and TAPs are gone at the end; an image of `profile` is there."""
    built_image(profile)  # packages come from outside the namespace
    shell, name = LocalShell(), f"mvm-vmtest-{os.getpid()}-{next(_serial)}"
    netns.create(shell, name)
    try:
        with netns.entered(netns.path_of(name)):
            # Longer than a socket's address may be.
            host = QemuHost(StateLayout(root / ("a-deep-state-directory/" * 6)))
            try:
                yield host
            finally:
                host.end_all()
    finally:
        netns.delete(shell, name)
