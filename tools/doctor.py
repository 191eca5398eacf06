"""`ikl doctor`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["doctor", *sys.argv[1:]])
