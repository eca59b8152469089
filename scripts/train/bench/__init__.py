"""Measurements of the trainer; none of this is shipped."""
