"""What the tests start and how they wait for it."""
