"""`ikl train`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["train", *sys.argv[1:]])
