"""One file a version, numbered; forward only."""
