"""Load tests: traces and schedules, a client that measures each token, results and their report."""
