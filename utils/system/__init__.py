"""Lowest floor: errors, registries, process group, seeds, locks, atomic files, the run directory, the console."""
