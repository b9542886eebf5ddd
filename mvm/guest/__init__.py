"""What goes into an image, and the words host and guest exchange.

The scripts beside this file become parts of an image: `init` is the initramfs's first process, `inittab`, `rc`,
`agent`, `ssh` and `halt` live in the root file system, with the programs ``moment`` and ``mounter`` (see
`mvm.drivers.builtin.standby`). They know nothing of any instance: a guest learns who it is from ``configure``, so an
image and a kernel command line hold no identity and no key.

**Ports.** Four virtio-serial ports, each a Unix socket in the instance's directory on the host: `CONTROL` for
everything but commands, and `EXEC` for commands, so that a long command never delays a ping or a shutdown. A port
serves one client and one request at a time.

**Lines.** Requests and replies are lines of ASCII words separated by single spaces. Each is *preceded* by an empty
line, which ends what a killed client or a vanished host may have left half written; empty lines mean nothing. A
request ends with the word ``.``, without which it is such a half and is ignored. It begins with an id of the
client's choosing, and its reply with the same; a client ignores every line with another id. BASE64 is on one line,
``-`` when empty. The guest speaks only when asked.

==================================  ==========================================================================
request                             reply
==================================  ==========================================================================
``ID hello``                        ``ID 0 VERSION UPTIME KERNEL``
``ID ping``                         ``ID 0 UPTIME``
``ID time``                         ``ID 0 SECONDS``: its clock, to the microsecond
``ID configure KEY=VALUE...``       ``ID 0 STEP...`` with every step done, or ``ID 1 STEP: error text``
``ID status``                       ``ID 0 UPTIME WORKER CPU LOAD RECEIVED SENT``
``ID settle``                       ``ID 0`` or ``ID 1 error text``: it is as small as it gets without its files
``ID secrets 0``                    ``ID 0`` or ``ID 1 error text``: it has let its disk of secrets go
``ID secrets 1``                    ``ID 0`` or ``ID 1 error text``: it has mounted it
``ID sleep``                        ``ID 0`` or ``ID 1 error text``: it may be saved now
``ID wake MOMENT SECRETS``          ``ID 0 STEP...`` or ``ID 1 STEP: error text``
``ID shutdown``                     ``ID 0``, then the guest ends its processes and powers off
``ID exec SECONDS BASE64``          ``ID EXIT_CODE TRUNCATED STDOUT STDERR``: 0 or 1, BASE64, BASE64
anything else                       ``ID 127 unknown request``
==================================  ==========================================================================

``configure`` has the keys moment, hostname, machine_id, mac, address, netmask, gateway, data (1: it has a data disk),
secrets (1: there are some on its disk of secrets), host_key and authorized_key. It may be repeated. The first step
that fails ends it. Moment and keys are ESCAPED for the shell's ``printf``: what is not a letter as a backslash and
octal digits.

MOMENT is what a guest needs that stood still or is one of many clones: a `struct timeval` to add to its clock, which
the host knows by ``time``, and `ENTROPY_BYTES` characters with `ENTROPY_BITS` of entropy, ESCAPED. However long it
takes the guest to come to it, the program ``moment`` sets the clock right, and makes the kernel's random numbers new at
once.

``status``: WORKER is which of ``/run/mvm/worker-idle``, ``-ready`` and ``-busy`` is the newest (of the same second, the
last of these), or ``unknown``; CPU is in hundredths of a second, RECEIVED and SENT in bytes of the card.

``exec`` runs the command with ``sh -c`` in a session of its own, its stdin ``/dev/null``. Of each stream the first
`STREAM_LIMIT` bytes are kept. It replies once both streams are closed; after SECONDS the command's process group is
killed and the exit code is `DEADLINE_EXIT`. A client that goes away takes its command with it.
"""

from __future__ import annotations

from importlib import resources

PROTOCOL_VERSION = 3
CONTROL = "mvm.agent.0"
EXEC = ("mvm.exec.0", "mvm.exec.1", "mvm.exec.2")
PORTS = (CONTROL, *EXEC)
CONFIGURE_STEPS = ("moment", "hostname", "machine_id", "mac", "address", "gateway", "data", "secrets", "keys", "ssh")
WAKE_STEPS = ("moment", "secrets")
ENTROPY_BYTES, ENTROPY_BITS = 43, 256  # 6 bits in each
DISK_NAME_BYTES = 16  # as `mounter` reads it
STREAM_LIMIT = 1 << 20
DEADLINE_EXIT = 124
SCRIPTS = ("init", "inittab", "rc", "agent", "halt", "ssh")


def script(name: str) -> bytes:
    """One of `SCRIPTS`."""
    return resources.files(__name__).joinpath(name).read_bytes()
