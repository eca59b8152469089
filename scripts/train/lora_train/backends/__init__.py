"""Stand-ins for the real training loop; each has `run(session) -> None`."""
