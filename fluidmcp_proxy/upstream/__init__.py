"""The wire to one model's server."""
