"""QEMU's command line: a pure function."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from mvm import guest
from mvm.domain.identity import mark_of
from mvm.drivers.qemu import argv
from mvm.ports.vmm import BootSpec, Nic, TemplateSpec
from tests.support.make import instance_ref

ONE = instance_ref(1)
MARK = mark_of("0123456789ab")
FDS = argv.Descriptors(10, 11, {name: 12 + at for at, name in enumerate(guest.PORTS)}, 20)
SPEC = BootSpec(
    ref=ONE, directory=Path("/s/i"), kernel=Path("/s/vmlinux"), initramfs=Path("/s/initramfs"),
    rootfs=Path("/s/rootfs"), overlay=Path("/s/i/overlay"), data_disk=Path("/s/i/data"), vcpus=2, mem_mib=256,
    nic=Nic("tn1i3", "02:6d:00:01:00:03"), uid=0x6001_0003,
)  # fmt: skip


def command(spec: BootSpec = SPEC, accel: argv.AccelName = "tcg") -> list[str]:
    return argv.command(spec, FDS, accel, 2_600_000, MARK)


def values(words: list[str], option: str) -> list[str]:
    return [value for name, value in pairwise(words) if name == option]


def test_shape_and_card() -> None:
    words = command()
    assert values(words, "-smp") == ["2"]
    assert values(words, "-m") == ["256M"]
    assert values(words, "-netdev") == ["tap,id=net,fd=10,vhost=off"]
    assert "virtio-net-device,netdev=net,mac=02:6d:00:01:00:03" in values(words, "-device")


def test_disks_are_told_apart_by_serial_and_the_image_is_read_only() -> None:
    image, root, data, secrets = (json.loads(value) for value in values(command(), "-blockdev"))
    assert (image["driver"], image["read-only"], image["file"]["filename"]) == ("raw", True, "/s/rootfs")
    assert (root["driver"], root["backing"], root["file"]["filename"]) == ("qcow2", image["node-name"], "/s/i/overlay")
    assert [each["file"].get("locking") for each in (image, root)] == ["off", None], "what others have, nobody locks"
    assert (data["driver"], data["file"]["filename"]) == ("raw", "/s/i/data")
    assert (secrets["driver"], secrets["file"]["filename"]) == ("raw", f"/proc/self/fd/{FDS.secrets}")
    disks = [value for value in values(command(), "-device") if value.startswith("virtio-blk")]
    assert disks == [f"virtio-blk-device,drive={name},serial={name}" for name in ("root", "data", "secrets")]


def test_no_data_disk_no_device() -> None:
    assert "data" not in " ".join(command(replace(SPEC, data_disk=None)))


def test_each_guest_port_has_its_descriptor_and_number() -> None:
    words = command()
    for number, name in enumerate(guest.PORTS, start=1):
        assert f"socket,id=port{number},fd={FDS.ports[name]},server=on,wait=off" in values(words, "-chardev")
        assert f"virtserialport,chardev=port{number},name={name},nr={number}" in values(words, "-device")


def test_the_kernel_learns_the_rate_and_nothing_of_the_instance() -> None:
    (line,) = values(command(), "-append")
    assert "tsc_early_khz=2600000" in line.split()
    assert "panic=-1" in line.split()
    assert not any(part in line for part in (ONE.tenant, ONE.pool, ONE.instance, "10.240", "02:6d"))


@pytest.mark.parametrize(("accel", "cpu"), [("tcg", "max"), ("kvm", "host")])
def test_accelerators(accel: argv.AccelName, cpu: str) -> None:
    words = command(accel=accel)
    assert [value.split(",")[0] for value in values(words, "-accel")] == [accel]
    assert values(words, "-cpu") == [cpu]


def test_commas_in_a_path_end_no_option() -> None:
    words = command(replace(SPEC, directory=Path("/s/a,b=c")))
    assert "file,id=console,path=/s/a,,b=c/console.log,append=on" in values(words, "-chardev")


def test_a_command_line_tells_whose_it_is() -> None:
    assert argv.started_for(command(), MARK) == ONE
    assert argv.started_for(["/usr/bin/" + argv.BINARY, *command()[1:]], MARK) == ONE


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["grep", *command()[1:]],
        [argv.BINARY],
        [argv.BINARY, "-name"],
        [argv.BINARY, "-name", "guest=vm"],
        [argv.BINARY, "-name", f"guest={MARK}:acme/web"],
        [argv.BINARY, "-name", f"guest={MARK}:Acme/web/i-00000001"],
        argv.command(SPEC, FDS, "tcg", 1, mark_of("ba9876543210")),
    ],
)
def test_other_command_lines_are_nobodys(words: list[str]) -> None:
    assert argv.started_for(words, MARK) is None


# --- templates and what is restored
TEMPLATE = TemplateSpec(
    ref=ONE, directory=SPEC.directory, kernel=SPEC.kernel, initramfs=SPEC.initramfs, rootfs=SPEC.rootfs,
    overlay=SPEC.overlay, data_disk_mib=16, vcpus=2, mem_mib=256, uid=0x6001_0002,
)  # fmt: skip


def restored(spec: BootSpec = SPEC, template: Path | None = Path("/s/t/disk"), memory: int | None = 30) -> list[str]:
    return argv.restored(spec, template, FDS, memory, "tcg", MARK)


def devices(words: list[str]) -> list[str]:
    return [value for option in ("-device", "-smp", "-m", "-cpu", "-accel") for value in values(words, option)]


def test_a_template_has_the_devices_of_its_clones() -> None:
    template = argv.template(TEMPLATE, FDS, "tcg", 1, MARK)
    mac = "02:6d:00:01:00:03"
    assert [each.replace(argv.TEMPLATE_MAC, mac) for each in devices(template)] == devices(restored())
    assert json.loads(values(template, "-blockdev")[2])["size"] == 16 << 20


def test_a_clone_writes_to_its_own_layer_alone() -> None:
    image, template, root, *own = (json.loads(value) for value in values(restored(), "-blockdev"))
    assert [node.get("read-only", False) for node in (image, template, root, *own)] == [True, True, False, False, False]
    assert (template["backing"], root["backing"]) == (image["node-name"], template["node-name"])
    assert root["file"]["filename"] == "/s/i/overlay"


def test_a_templates_memory_is_mapped_privately() -> None:
    words = restored()
    assert "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/30,share=off" in values(words, "-object")
    assert values(words, "-M") == [f"{argv.MACHINE},memory-backend=ram"]
    assert "balloon" not in " ".join(words)
    assert values(restored(memory=None), "-M") == [argv.MACHINE]


def test_what_is_restored_waits_and_has_no_kernel() -> None:
    words = restored()
    assert "-S" in words
    assert values(words, "-incoming") == ["defer"]
    assert not {"-kernel", "-initrd", "-append"} & set(words)
    assert argv.started_for(words, MARK) == ONE


def test_a_machine_is_what_the_guest_sees_of_it(tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    rootfs.write_bytes(bytes(4096))
    spec = replace(SPEC, rootfs=rootfs)

    def machine(
        spec: BootSpec | TemplateSpec = spec, accel: argv.AccelName = "tcg", data: int = 16 << 20, cpu: str = "x"
    ) -> str:
        return argv.machine(spec, accel, data_bytes=data, host_cpu=cpu)

    elsewhere = replace(
        spec, ref=instance_ref(2), directory=Path("/o"), overlay=Path("/o/o"), data_disk=Path("/o/d"),
        nic=Nic("tn9i9", "02:6d:00:09:00:09"),
    )  # fmt: skip
    assert machine() == machine(elsewhere) == machine(replace(TEMPLATE, rootfs=rootfs))
    others = {
        machine(replace(spec, vcpus=1)), machine(replace(spec, mem_mib=512)), machine(data=0), machine(data=1 << 20),
        machine(accel="kvm"), machine(cpu="y"),
    }  # fmt: skip
    assert len(others | {machine()}) == 7
