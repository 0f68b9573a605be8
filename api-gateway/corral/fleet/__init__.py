"""What a node is, and which one serves a request: decisions as pure functions."""
