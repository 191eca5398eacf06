"""`ikl evaluate`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["evaluate", *sys.argv[1:]])
