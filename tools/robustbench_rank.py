"""`ikl rank`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["rank", *sys.argv[1:]])
