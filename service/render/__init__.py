"""Pictures: values in, bytes out; each as PNG and as SVG, a training run also as GIF.

Every picture has the same parts: a title and what it is of, a small table that is also the legend, and axes. The same
arguments give the same bytes, in any process. Nothing here imports pyplot, keeps a figure or leaves matplotlib's
settings changed; while a call runs, its settings and warning filter are the process's, so one thread draws at a time.
A user's text is drawn letter by letter, never as mathtext.
"""

from service.render import budget, heatmap, layer, spectrum, sweeps
from service.render.frame import stills
from service.render.gif import spectrum_gif
from service.render.sweep_gif import sweep_gif

__all__ = [
    "budget_png",
    "budget_svg",
    "heatmap_png",
    "heatmap_svg",
    "layer_png",
    "layer_svg",
    "spectrum_gif",
    "spectrum_png",
    "spectrum_svg",
    "sweep_gif",
    "sweep_heat_png",
    "sweep_lines_png",
    "sweep_overlay_png",
]

budget_png, budget_svg = stills(budget.lay_out)
heatmap_png, heatmap_svg = stills(heatmap.lay_out)
layer_png, layer_svg = stills(layer.lay_out)
spectrum_png, spectrum_svg = stills(spectrum.lay_out)
sweep_heat_png = stills(sweeps.lay_out_heat)[0]
sweep_lines_png = stills(sweeps.lay_out_lines)[0]
sweep_overlay_png = stills(sweeps.lay_out_spectra)[0]
