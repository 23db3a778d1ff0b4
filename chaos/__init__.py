"""Faults on purpose, at random moments, against real processes; what must hold is checked at the end."""
