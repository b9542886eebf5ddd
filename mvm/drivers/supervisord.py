"""supervisord that outlives a full disk: ``python -m mvm.drivers.supervisord -c FILE``.

Its own answer to a log line that cannot be written is a traceback on stderr. That is a file of the same file system,
so writing it fails too, and that failure would end supervisord and with it the stack.
"""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress

from supervisor import loggers
from supervisor.supervisord import main


def _say_if_possible(_handler: loggers.Handler) -> None:
    with suppress(OSError):
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()


if __name__ == "__main__":
    loggers.Handler.handleError = _say_if_possible
    main()
