"""The data folder and the drawing process."""

import asyncio
import os
from pathlib import Path

import numpy as np
import psutil
import pytest

from service import files
from service.drawing import Drawing
from service.errors import Draining
from service.pictures import Chart, Size, Spectrum

ARGUMENTS = ([Spectrum(0, np.ones(4) / 4)], Chart("title", "W2", (4, 4)), Size(200, 150))


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    files.write(path, b"first")
    with pytest.raises(TypeError):
        files.write(path, "text is no content")  # type: ignore[arg-type]
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_nameless_upload_is_seen_only_once_it_is_kept(tmp_path: Path) -> None:
    path = files.upload_path(tmp_path, "job")
    with files.nameless(tmp_path / "uploads") as file:
        file.write(b"whole")
        files.settle(file)
        assert list((tmp_path / "uploads").iterdir()) == []
        files.keep(file, path)
        files.share(path, files.base_path(tmp_path, "other"))
    files.remove_job(tmp_path, "job")
    assert files.base_path(tmp_path, "other").read_bytes() == b"whole"
    with files.nameless(tmp_path / "uploads") as file:
        file.write(b"never kept")
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == ["other"]


def test_the_pictures_used_last_are_kept(tmp_path: Path) -> None:
    paths = [files.picture_path(tmp_path, "job", str(i), "png") for i in range(4)]
    paths[0].parent.mkdir(parents=True)
    for age, path in enumerate(paths):
        files.write(path, b"x" * 100)
        os.utime(path, (age, age))
    files.prune_pictures(tmp_path, 250)
    assert [path.exists() for path in paths] == [False, False, True, True]


def test_a_drawing_process_that_dies_is_replaced_and_a_picture_is_drawn_once(tmp_path: Path) -> None:
    paths = [files.picture_path(tmp_path, "job", str(number), "png") for number in range(9)]

    async def scenario() -> None:
        drawing = Drawing(tmp_path, cache_limit=1 << 20)
        content = await drawing.draw(paths[0], "spectrum_png", *ARGUMENTS)
        assert content.startswith(b"\x89PNG")
        child = drawing_process()
        waiting = [asyncio.create_task(drawing.draw(path, "spectrum_png", *ARGUMENTS)) for path in paths[1:]]
        await asyncio.sleep(0)  # Let all of them stand in line.
        child.kill()
        assert await asyncio.gather(*waiting) == [content] * 8
        paths[0].write_bytes(b"already there")
        assert await drawing.draw(paths[0], "spectrum_png", *ARGUMENTS) == b"already there"
        late = asyncio.create_task(drawing.draw(tmp_path / "job" / "late", "spectrum_png", *ARGUMENTS))
        await asyncio.sleep(0)
        drawing.close()
        with pytest.raises(Draining):
            await late
        with pytest.raises(Draining):
            await drawing.draw(paths[0], "spectrum_png", *ARGUMENTS)

    asyncio.run(scenario())


def drawing_process() -> psutil.Process:
    """The one child of this process that draws."""
    (child,) = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    return child


def test_every_data_folder_has_a_mark_of_its_own(tmp_path: Path) -> None:
    first, _ = (files.mark(tmp_path / name) for name in ("a", "b"))
    assert files.mark(tmp_path / "a") == first
    assert files.has_mark(tmp_path / "a", first)
    assert not files.has_mark(tmp_path / "b", first)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mark"]
