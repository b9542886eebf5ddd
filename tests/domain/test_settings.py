"""Settings of the network: what they may be, and what becomes of them."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest

from mvm.domain.egress import Protocol
from mvm.domain.firewall import HostPort, Plan
from mvm.errors import InvalidInput
from mvm.settings import Settings, load_settings


@pytest.mark.parametrize(
    "wrong",
    [
        {"uplink": "tn1i3"}, {"uplink": "br-tenant-7"}, {"uplink": "mvmtmpl0"}, {"uplink": "a-name-of-16-chars"},
        {"uplink": 'x" accept'}, {"uplink": "-x"}, {"host_ports": "0"}, {"host_ports": "80/icmp"},
        {"host_ports": "80; accept"}, {"egress_never": "192.0.2.1/24"}, {"egress_never": "::/0"},
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as bad:
        load_settings(**wrong)
    assert bad.value.code == "settings.invalid"
    assert next(iter(wrong)) in bad.value.message


def test_they_make_the_plan_and_survive_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(uplink="up0", host_ports="53/udp 443", egress_never="192.0.2.0/24, 198.51.100.7")
    plan = Plan(
        "up0",
        (HostPort(Protocol.UDP, 53), HostPort(Protocol.TCP, 443)),
        (IPv4Network("192.0.2.0/24"), IPv4Network("198.51.100.7/32")),
    )
    assert settings.plan == plan
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings().plan == plan
    monkeypatch.undo()
    assert Settings().plan == Plan()
