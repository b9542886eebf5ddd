"""A document costs what it is long, whatever it says: little time, little memory, and one refusal that can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mvm.domain.desired import parse
from mvm.domain.document import MAX_VALUES, decode_json
from mvm.drivers.document_files import MAX_YAML_VALUES
from mvm.errors import InvalidInput

CPU_S = 20  # on any machine; what is linear takes a tenth of it
DATA_MIB = 400
HEAD = '{"schema_version": 1, "node_id": "n1", "tenants": ['
TENANT = '{"tenant_id": "t%d", "network": {"tenant_net_id": 1, "ipv4_subnet": "10.240.0.0/24"}, "pools": ['

READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
from pathlib import Path
from mvm.domain.desired import parse
from mvm.drivers.document_files import read_document
from mvm.errors import MvmError
used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
limit = used + (int(sys.argv[3]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    parse(read_document(Path(sys.argv[1])))
except MvmError as error:
    print(error.code)
else:
    print("accepted")
"""


def repeated(item: str, size: int, most: int | None = None) -> str:
    return ",".join([item] * min(size // (len(item) + 1), most or size))


def of_tenants(size: int) -> str:
    each = 9000
    many = max(1, size // (3 * each))
    tenants = [TENANT % number + repeated("{}", 3 * each) + "]}" for number in range(many)]
    return HEAD + ",".join(tenants) + "]}"


EIGHT = 8 << 20
KINDS = {
    "empty pools of many tenants": ("json", of_tenants(EIGHT), "desired.too_large"),
    "fields that nobody knows": (
        "json", HEAD + "{" + ",".join(f'"n{n}": 1' for n in range(EIGHT // 12)) + "}]}", "desired.too_large",
    ),
    "empty objects": ("json", HEAD + repeated("{}", EIGHT) + "]}", "desired.too_large"),
    "YAML, a list": ("yaml", "a: [" + repeated("1", EIGHT) + "]", "desired.too_large"),
    "YAML, blocks": ("yaml", "- a: 1\n" * (EIGHT // 7), "desired.too_large"),
    "as many empty objects as may be": (
        "json", HEAD + repeated("{}", EIGHT, MAX_VALUES // 2 - 9) + "]}", "desired.invalid",
    ),
    "as many pools as may be": ("json", of_tenants(MAX_VALUES * 3 // 2 - 20_000), "desired.invalid"),
    "as much YAML as may be": ("yaml", "a: [" + repeated("1", EIGHT, MAX_YAML_VALUES - 9) + "]", "desired.invalid"),
    "one long text": ("json", HEAD + '"' + "a" * EIGHT + '"]}', "desired.invalid"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_document_costs_little(tmp_path: Path, kind: str) -> None:
    form, text, code = KINDS[kind]
    path = tmp_path / f"fleet.{form}"
    path.write_text(text)
    words = [sys.executable, "-c", READ, str(path), str(CPU_S), str(DATA_MIB)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, code), done.stderr[-400:]


def test_nobody_is_told_more_than_can_be_read() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(decode_json(of_tenants(300_000).encode()))
    assert len(caught.value.fields["errors"]) == 1000  # type: ignore[arg-type]
    assert "1000 errors and perhaps more" in caught.value.message
