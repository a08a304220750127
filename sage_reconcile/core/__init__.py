"""DECIDES. Pure functions over frozen values: no clock, disk, process, network, log or randomness."""
