"""Backups: one encrypted file with everything that cannot be made again, and the way back from it."""
