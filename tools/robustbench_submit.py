"""`ikl submit`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["submit", *sys.argv[1:]])
