"""`corral up`: the whole platform on this machine, from Python wheels alone."""
