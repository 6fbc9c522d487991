"""Official weights."""
