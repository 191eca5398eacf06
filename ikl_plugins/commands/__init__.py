"""The console command ``ikl``: a module for each of its commands, over the rooms of the package.

Each has ``configure(parser)``, which adds its arguments, and ``run(arguments)``, which raises what a user can mend;
:mod:`.main` turns that into one line. Nothing is imported here: ``ikl --help`` needs neither torch nor a host.
"""
