"""``python -m mvm`` is the command ``mvm``."""

from mvm.cli.main import main

main()
