"""Untrusted bytes → a checked list of tensors. Nothing is unpickled, allocated or inflated beyond its header here."""

from service.uploads.model import Format, Limits, Matricize, Place, Tensor, Upload

__all__ = ["Format", "Limits", "Matricize", "Place", "Tensor", "Upload"]
