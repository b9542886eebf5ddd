"""What goes into an image, and the words host and guest exchange.

The scripts beside this file become parts of an image: `init` is the initramfs's first process, `inittab`, `rc`,
`agent`, `ssh` and `halt` live in the root file system, with the programs ``moment`` and ``mounter`` (see
`mvm.drivers.builtin.standby`). They know nothing of any instance: a guest learns who it is from ``configure``, so an
image and a kernel command line hold no identity and no key.

**Ports.** Five virtio-serial ports, each a Unix socket in the instance's directory on the host: `CLOCK` for the moment,
`CONTROL` for everything else but commands, and `EXEC` for commands, so that a long command never delays a ping or a
shutdown. A port serves one client and one request at a time.

**Moment.** A guest that stood still, or is one of many clones, needs the time and entropy, and somebody waits for it:
no shell reads this. The program ``moment`` serves the port `CLOCK`. A request is one `MOMENT`: entropy, seconds and
nanoseconds since 1970, the request's id. The reply is the id, a digit and a newline: 0, or which of the program's calls
failed. Clients ignore everything else that comes. The guest's clock is set while the request is under way, so it is
late by less than the request took.

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
``ID configure KEY=VALUE...``       ``ID 0 STEP...`` with every step done, or ``ID 1 STEP: error text``
``ID status``                       ``ID 0 UPTIME WORKER CPU LOAD RECEIVED SENT``
``ID settle``                       ``ID 0`` or ``ID 1 error text``: it is as small as it gets without its files
``ID secrets 0``                    ``ID 0`` or ``ID 1 error text``: it has let its disk of secrets go
``ID secrets 1``                    ``ID 0`` or ``ID 1 error text``: it has mounted it
``ID sleep``                        ``ID 0`` or ``ID 1 error text``: it may be saved now
``ID shutdown``                     ``ID 0``, then the guest ends its processes and powers off
``ID run LETTERS``                  frames, see below; only on the ports `EXEC`, which know no other request
anything else                       ``ID 127 unknown request``
==================================  ==========================================================================

``configure`` has the keys hostname, machine_id, mac, address, netmask, gateway, data (1: it has a data disk),
secrets (1: there are some on its disk of secrets), host_key and authorized_key. It may be repeated. The first step
that fails ends it. Keys are ESCAPED for the shell's ``printf``: what is not a letter as a backslash and octal digits.

``status``: WORKER is which of ``/run/mvm/worker-idle``, ``-ready`` and ``-busy`` is the newest (of the same second, the
last of these), or ``unknown``; CPU is in hundredths of a second, RECEIVED and SENT in bytes of the card.

``run`` is served by the program ``runner``: LETTERS are the command's bytes, two letters for each, of which ``a`` is 0
and ``p`` is 15. ID has `TOKEN_BYTES` bytes. It runs the command with ``sh -c`` in a session of its own, its stdin
``/dev/null``, and replies in binary: a `FRAME`, which has the request's id, a kind and the size of what follows.
`BEGUN` comes first and is empty; `STDOUT` and `STDERR` are what the command wrote, as it writes it; `ENDED` has its
`STATUS` as ``wait`` tells it, once its first process has ended and all was sent that was written until then. `FAILED`
comes instead of all of them, with the number of the error. A client that goes away, or asks for something else, takes
its command and all that this began with it: that is how a command is ended, and there is no other deadline.

**Older guests.** A guest of protocol 4, from an image or a snapshot made before, answers ``run`` with ``127`` and knows
``ID exec SECONDS BASE64 .`` instead, to which it replies ``ID EXIT_CODE TRUNCATED STDOUT STDERR``: 0 or 1, BASE64,
BASE64. It keeps the first 1 MiB of each stream, waits until both are closed, and after SECONDS kills the command's
process group and tells `DEADLINE_EXIT`.
"""

from __future__ import annotations

import struct
from importlib import resources

PROTOCOL_VERSION = 5
OLDEST_PROTOCOL = 4
"""Of the guests that this host still serves: those that run, and sleep, since an older mvm started them."""
CONTROL = "mvm.agent.0"
CLOCK = "mvm.moment.0"
EXEC = ("mvm.exec.0", "mvm.exec.1", "mvm.exec.2")
PORTS = (CONTROL, CLOCK, *EXEC)
CONFIGURE_STEPS = ("hostname", "machine_id", "mac", "address", "gateway", "data", "secrets", "keys", "ssh")
ENTROPY_BYTES, ENTROPY_BITS = 32, 256
MOMENT_ID_BYTES = 8
MOMENT = struct.Struct(f"<{ENTROPY_BYTES}sqq{MOMENT_ID_BYTES}s")
DISK_NAME_BYTES = 16  # as `mounter` reads it
TOKEN_BYTES = 8  # of the id of a ``run``
FRAME = struct.Struct(f"<{TOKEN_BYTES}scI")
FRAME_LIMIT = 32 * 1024  # bytes of one with its payload: the most that the guest's kernel takes in one write
BEGUN, STDOUT, STDERR, ENDED, FAILED = b"b", b"o", b"e", b"x", b"f"
STATUS = struct.Struct("<i")
DEADLINE_EXIT = 124
SCRIPTS = ("init", "inittab", "rc", "agent", "halt", "ssh")


def script(name: str) -> bytes:
    """One of `SCRIPTS`."""
    return resources.files(__name__).joinpath(name).read_bytes()
