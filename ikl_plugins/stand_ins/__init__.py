"""A folder for the path of programs that ``ikl robustbench`` runs; its packages are imported by their own names."""
