"""Fuzzing with coverage (atheris), for longer than a test may take: `python -m fuzz.formats --seconds N`."""
