"""The data folder and the drawing process."""

import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from service import files
from service.drawing import Drawing
from service.pictures import Chart, Size, Spectrum
from tests.conftest import wait_for

ARGUMENTS = ([Spectrum(0, np.ones(4) / 4)], Chart("title", "W2", (4, 4)), Size(200, 150))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    files.write(path, b"first")
    with pytest.raises(TypeError):
        files.write(path, "text is no content")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_the_pictures_used_last_are_kept(tmp_path: Path) -> None:
    paths = [files.picture_path(tmp_path, "job", str(i), "png") for i in range(4)]
    for age, path in enumerate(paths):
        files.write(path, b"x" * 100)
        os.utime(path, (age, age))
    files.prune_pictures(tmp_path, 250)
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_a_drawing_process_that_dies_is_replaced_and_a_picture_is_drawn_once(tmp_path: Path) -> None:
    drawing = Drawing(tmp_path, cache_limit=1 << 20)
    first, second = (files.picture_path(tmp_path, "job", key, "png") for key in "ab")
    content = drawing.draw(first, "spectrum_png", *ARGUMENTS)
    assert content.startswith(b"\x89PNG")
    children = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(children) == 1
    children[0].kill()
    wait_for(lambda: not psutil.pid_exists(children[0].pid) or children[0].status() == "zombie", "its end")
    assert drawing.draw(second, "spectrum_png", *ARGUMENTS) == content
    first.write_bytes(b"already there")
    assert drawing.draw(first, "spectrum_png", *ARGUMENTS) == b"already there"
    drawing.close()
