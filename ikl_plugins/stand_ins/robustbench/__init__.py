"""RobustBench as it is installed, imported with what it lacks; on the path of what ``ikl robustbench`` runs."""

from ikl_plugins._robustbench_import import give_place

if __name__ == "robustbench":  # and not a part of ikl_plugins
    give_place(__name__)
