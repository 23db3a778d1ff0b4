"""The animation of a training run's spectra: only what changes is drawn again, and only that is stored."""

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image

from service.pictures import Chart, Size, Spectrum
from service.render.frame import Frame
from service.render.spectrum import Scene, cells, coordinates, lay_out
from service.render.style import GRID, INK, MUTED, PAPER, REFERENCE, SHADES, drawing, shades

Bytes = NDArray[np.uint8]

HOLD_CS = 100  # The last frame stays a second longer, so that the eye sees where training ended.
CLEAR = 255  # The palette entry that means "as in the frame before".


def spectrum_gif(frames: Sequence[Spectrum], chart: Chart, size: Size | None = None, fps: int = 10) -> bytes:
    """The memo's Figure 1: a frame for each spectrum, in order of epoch, over the first one; it loops for ever."""
    with drawing():
        scene = lay_out([frames[0], frames[-1]], chart, size, frames)
        return encode(scene, _indexed(scene, frames), len(frames), fps)


def encode(frame: Frame, drawn: Iterator[Bytes], count: int, fps: int) -> bytes:
    """An endless GIF of pictures as palette indices, drawn on the frame's canvas one after another."""
    body = list(_encoded(drawn, _durations(count, fps)))
    blank = Image.new("P", frame.canvas.get_width_height())
    blank.putpalette(_palette()[0].tobytes())
    header, _ = GifImagePlugin.getheader(blank, info={"loop": 0})
    return b"".join([*header, *body, b";"])


def _durations(count: int, fps: int) -> list[int]:
    """Milliseconds of each frame. A GIF counts hundredths: differences of cut-off times keep the mean rate right."""
    times = [100 * place // fps for place in range(count + 1)]
    hundredths = [after - before for before, after in pairwise(times)]
    hundredths[-1] += HOLD_CS
    return [10 * duration for duration in hundredths]


def _indexed(scene: Scene, frames: Sequence[Spectrum]) -> Iterator[Bytes]:
    """Draw everything but the last curve and its row once, then only those two, one frame after another."""
    canvas, curve, row = scene.canvas, scene.curves[-1], scene.rows[-1]
    for artist in (curve, *row.dots, *row.cells):
        artist.set_animated(True)
    canvas.draw()
    still = canvas.copy_from_bbox(scene.figure.bbox)
    pixels = np.asarray(canvas.buffer_rgba()).view(np.uint32)[..., 0]
    still_pixels, still_indices = pixels.copy(), lookup(pixels)
    floor, renderer = scene.floor, canvas.get_renderer()
    span = max(1, frames[-1].epoch - frames[0].epoch)
    for frame in frames:
        shade = shades()[round((SHADES - 1) * (frame.epoch - frames[0].epoch) / span)]
        curve.set_data(*coordinates(frame.values, floor))
        curve.set_color(shade)
        row.dots[0].set_color(shade)
        canvas.restore_region(still)
        curve.draw(renderer)
        row.dots[0].draw(renderer)
        for cell, text in zip(row.cells, cells(frame), strict=True):
            draw_text(renderer, cell, text)
        changed = pixels != still_pixels
        indices = still_indices.copy()
        indices[changed] = lookup(pixels[changed])
        yield indices


def draw_text(renderer: Any, place: Text, text: str) -> None:
    """Draw one line as `place` would: a Text works out its layout anew for every string, at twice the cost."""
    x, y = place.get_transform().transform(place.get_position())
    context = renderer.new_gc()
    context.set_foreground(place.get_color())
    renderer.draw_text(context, x, renderer.height - y, text, place.get_fontproperties(), 0, mtext=place)
    context.restore()


def _encoded(drawn: Iterator[Bytes], durations: Sequence[int]) -> Iterator[bytes]:
    """GIF image blocks, each holding what changed since the frame before.

    `Image.save` would merge equal neighbours, keep every frame in memory and look for the changes itself.
    """
    before: Bytes | None = None
    for indices, duration in zip(drawn, durations, strict=True):
        changed = np.ones_like(indices, bool) if before is None else indices != before
        rows, columns = _extent(np.any(changed, axis=1)), _extent(np.any(changed, axis=0))
        part = np.where(changed, indices, np.uint8(CLEAR))[rows, columns]
        image = Image.fromarray(part)
        offset = (columns.start, rows.start)
        yield from GifImagePlugin.getdata(image, offset, duration=duration, transparency=CLEAR, disposal=1)
        before = indices


def _extent(used: NDArray[np.bool_]) -> slice:
    """From the first to the last place in use, and one place where there is none: no frame is ever left out."""
    places = np.flatnonzero(used)
    return slice(int(places[0]), int(places[-1]) + 1) if places.size else slice(0, 1)


@functools.cache
def _palette() -> tuple[Bytes, Bytes]:
    """The colours of every GIF, (n, 3), and the nearest of them for each 15-bit colour.

    A picture holds our own colours and what smoothing makes of them on paper, so the palette is known beforehand.
    """
    steps = {REFERENCE: 20, MUTED: 24, INK: 48, **dict.fromkeys(shades(), 7)}
    ramps = [np.linspace(to_rgb(PAPER), to_rgb(color), count + 1)[1:-1] for color, count in steps.items()]
    pure = [to_rgb(color) for color in (*steps, GRID, PAPER)]
    colors = np.rint(255 * np.concatenate([*ramps, pure]))
    fifths = np.rint(np.arange(32) * 255 / 31)
    cube = np.stack(np.meshgrid(fifths, fifths, fifths, indexing="ij"), axis=-1).reshape(-1, 3)
    squares = (colors**2).sum(axis=1)
    # In slabs that fit the cache: all at once takes four times as long, most of it for fresh memory.
    slabs = [np.argmin(squares - 2 * slab @ colors.T, axis=1) for slab in np.split(cube, 32)]
    nearest = np.concatenate(slabs).astype(np.uint8)
    palette = colors.astype(np.uint8)
    nearest[_fifteen_bits(palette)] = np.arange(len(palette))  # Pure colours come last, so each stays itself.
    return palette, nearest


def lookup(pixels: NDArray[np.uint32]) -> Bytes:
    """RGBA pixels to palette indices."""
    indices: Bytes = _palette()[1][_fifteen_bits(pixels[..., np.newaxis].view(np.uint8))]
    return indices


def _fifteen_bits(colors: Bytes) -> NDArray[np.intp]:
    coarse = (colors >> 3).astype(np.intp)
    return coarse[..., 0] << 10 | coarse[..., 1] << 5 | coarse[..., 2]
