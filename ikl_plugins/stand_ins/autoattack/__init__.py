"""AutoAttack as it is installed, or pyautoattack in its place; on the path of what ``ikl robustbench`` runs."""

from ikl_plugins._robustbench_import import give_place

if __name__ == "autoattack":  # and not a part of ikl_plugins
    give_place(__name__)
