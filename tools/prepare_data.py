"""`ikl data`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["data", *sys.argv[1:]])
