"""Tests of the checks of uploaded files."""
