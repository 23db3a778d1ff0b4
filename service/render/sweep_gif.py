"""The animation of a sweep: the spectra of all members over the epochs."""

from collections.abc import Iterator

import numpy as np

from service.pictures import Size, SweepSpectra
from service.render.gif import Bytes, draw_text, encode, lookup
from service.render.style import drawing
from service.render.sweeps import SweepScene, lay_out_spectra, segments


def sweep_gif(shown: SweepSpectra, size: Size | None = None, fps: int = 10) -> bytes:
    """A frame for each epoch with the curves of all members."""
    with drawing():
        scene = lay_out_spectra(shown, size)
        return encode(scene, _drawn(scene, shown), len(shown.epochs), fps)


def _drawn(scene: SweepScene, shown: SweepSpectra) -> Iterator[Bytes]:
    """Draw everything but curves and epoch once, then only those, one frame after another."""
    canvas, cell = scene.canvas, scene.row.cells[0]
    for artist in (scene.curves, cell):
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(scene.figure.bbox)
    pixels = np.asarray(canvas.buffer_rgba()).view(np.uint32)[..., 0]
    renderer = canvas.get_renderer()
    for epoch, values in zip(shown.epochs, shown.values, strict=True):
        canvas.restore_region(still)
        scene.curves.set_segments(segments(values, scene.floor))
        scene.curves.draw(renderer)
        draw_text(renderer, cell, str(epoch))
        yield lookup(pixels)
