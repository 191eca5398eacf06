"""`ikl adopt`, from a clone."""

import sys

from ikl_plugins.commands.main import main

main(["adopt", *sys.argv[1:]])
