"""Pictures: whole PNG files in which nothing overlaps, and what is said without matplotlib."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from childtune_kernels import ChildMask
from childtune_kernels.report import canvas, densities, fisher_spectrum, overlaps
from childtune_kernels.report.densities import densities_table
from childtune_kernels.report.heat_maps import plot_densities, plot_overlaps
from childtune_kernels.report.spectrum_plot import plot_fisher_spectrum

pytest.importorskip("matplotlib", reason="pictures need the extra `plots`")


def bert(layers: int, dense: tuple[str, ...] = ("classifier.weight",)) -> ChildMask:
    """A mask with BERT's names, sixteen kinds a layer, and small tensors."""
    kinds = [
        f"{module}.{part}"
        for module in (
            "attention.self.query", "attention.self.key", "attention.self.value",
            "attention.output.dense", "attention.output.LayerNorm",
            "intermediate.dense", "output.dense", "output.LayerNorm",
        )
        for part in ("weight", "bias")
    ]  # fmt: skip
    names = ["embeddings.word_embeddings.weight", "pooler.dense.weight"]
    names += [f"encoder.layer.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(40, generator=generator) < at / len(names) for at, name in enumerate(names)
    }
    return ChildMask.from_dense(masks, dense)


def children(count: int) -> dict[str, ChildMask]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"a-name-of-a-run_seed{at}": ChildMask.from_dense(
            {"w": torch.rand(500, generator=generator) < 0.3}
        )
        for at in range(count)
    }


def spectrum(values: torch.Tensor, bound: float) -> fisher_spectrum.FisherSpectrum:
    mask = ChildMask.from_dense({"w": values > bound})
    return fisher_spectrum.fisher_spectrum({"w": values}, mask)


def with_zeros(share: float) -> torch.Tensor:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)).mul(3).sub(15).exp()
    values[: int(3000 * share)] = 0.0
    return values


Draw = Callable[[Path], None]
PICTURES: dict[str, Draw] = {
    "density of 24 layers": lambda path: plot_densities(densities.densities(bert(24)), path),
    "density of 2 layers": lambda path: plot_densities(densities.densities(bert(2, ())), path),
    "density without layers": lambda path: plot_densities(densities.densities(bert(0)), path),
    "density of layers alone": lambda path: plot_densities(
        densities.densities(
            ChildMask.from_dense(
                {
                    "h.0.w": torch.ones(3, dtype=torch.bool),
                    "h.1.v": torch.zeros(3, dtype=torch.bool),
                }
            )
        ),
        path,
    ),
    "overlap of 2": lambda path: plot_overlaps(overlaps.overlaps(children(2)), path),
    "overlap of 10": lambda path: plot_overlaps(overlaps.overlaps(children(10)), path),
    "spectrum": lambda path: plot_fisher_spectrum(spectrum(with_zeros(0.0), 1e-7), path),
    "spectrum of many zeros": lambda path: plot_fisher_spectrum(
        spectrum(with_zeros(0.9), 1e-7), path
    ),
    "spectrum of zeros": lambda path: plot_fisher_spectrum(spectrum(torch.zeros(9), -1.0), path),
    "spectrum of one value": lambda path: plot_fisher_spectrum(spectrum(torch.ones(9), 0.5), path),
    "spectrum without a child": lambda path: plot_fisher_spectrum(
        spectrum(with_zeros(0.5), 1e9), path
    ),
    "spectrum with elements beyond the axis": lambda path: plot_fisher_spectrum(
        spectrum(torch.cat([torch.tensor([1e-30]), torch.logspace(-9, -7, 10_000)]), 5e-8), path
    ),
    "spectrum to the ends of fp32": lambda path: plot_fisher_spectrum(
        spectrum(torch.tensor([1e-44, 1e-20, 1.0, 3.3e38]), 0.5), path
    ),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[canvas.Canvas]:
    """The canvases that are written, in order."""
    written: list[canvas.Canvas] = []
    write = canvas.Canvas.write

    def noted(self: canvas.Canvas, path: str | os.PathLike[str]) -> None:
        written.append(self)
        write(self, path)

    monkeypatch.setattr(canvas.Canvas, "write", noted)
    return written


def ticks_past_the_ends(figure: Any) -> set[Any]:
    """Labels of ticks that matplotlib keeps beyond an axis's ends and does not draw."""
    beyond = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            beyond |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    return beyond


def texts_of(figure: Any) -> list[tuple[str, Any]]:
    """Every text that shows, and the box it takes."""
    from matplotlib.text import Text

    renderer, beyond = figure.canvas.get_renderer(), ticks_past_the_ends(figure)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text not in beyond]
    return [
        (text.get_text(), text.get_window_extent(renderer))
        for text in texts
        if text.get_text().strip()
    ]


def overlap(first: Any, second: Any) -> bool:
    """Whether two boxes share more than a pixel's edge."""
    across = min(first.x1, second.x1) - max(first.x0, second.x0)
    down = min(first.y1, second.y1) - max(first.y0, second.y0)
    return bool(across > 1 and down > 1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_is_a_png_and_its_texts_are_readable(
    picture: str, tmp_path: Path, drawn: list[canvas.Canvas]
) -> None:
    from matplotlib.image import imread

    path = tmp_path / "picture.png"
    PICTURES[picture](path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert 150 < height < 4000
    assert 700 < width < 4000
    assert pixels[..., :3].std() > 0.01
    (figure,) = (written.figure for written in drawn)
    # Slanted labels stand beside one another, though their upright boxes meet.
    slanted = {tick.get_text() for axes in figure.axes for tick in axes.get_xticklabels()
               if tick.get_rotation() % 90}  # fmt: skip
    texts = texts_of(figure)
    for at, (text, box) in enumerate(texts):
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text!r} runs off the picture"
        for other, other_box in texts[at + 1 :]:
            if not (text in slanted and other in slanted):
                assert not overlap(box, other_box), f"{text!r} lies on {other!r}"


def test_the_cells_show_the_densities(tmp_path: Path, drawn: list[canvas.Canvas]) -> None:
    mask = ChildMask.from_dense(
        {
            "h.0.w": torch.arange(100) < 37,
            "h.1.w": torch.arange(1000) < 3,
            "h.2.w": torch.arange(8) < 8,
        }
    )
    plot_densities(densities.densities(mask), tmp_path / "a.png", "a mask")
    texts = [text for text, _ in texts_of(drawn[0].figure)]
    assert {"37", "0.30", "100", "Density of a mask"} <= set(texts)
    assert any("48 of 1,108" in text for text in texts)


def test_the_matrix_shows_the_shares(tmp_path: Path, drawn: list[canvas.Canvas]) -> None:
    a = ChildMask.from_dense({"w": torch.arange(100) < 40})
    b = ChildMask.from_dense({"w": torch.arange(100) < 10})
    plot_overlaps(overlaps.overlaps({"a": a, "b": b}), tmp_path / "a.png")
    figures = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert figures == ["100", "25", "100", "100", "40", "10"]


def test_the_threshold_is_drawn(tmp_path: Path, drawn: list[canvas.Canvas]) -> None:
    plot_fisher_spectrum(spectrum(torch.logspace(-9, -3, 601), 0.99e-5), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    assert line.get_xdata()[0] == pytest.approx(-5, abs=1e-5)
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "threshold 1.000e-05"


def test_the_axis_ends_where_bars_can_be_seen(tmp_path: Path, drawn: list[canvas.Canvas]) -> None:
    body = torch.logspace(-9, -7, 10_000)
    values = torch.cat([torch.tensor([1e-30, 2e-25]), body, torch.tensor([1.0])])
    for bound, end, beyond in ((5e-8, -7, 3), (0.5, 0, 2)):
        plot_fisher_spectrum(spectrum(values, bound), tmp_path / "a.png")
        (axes,) = drawn[-1].axes
        edges = axes.patches[0].get_data().edges
        assert edges[0] == pytest.approx(-9, abs=0.11)
        assert edges[-1] == pytest.approx(end, abs=0.11)
        texts = [text for text, _ in texts_of(drawn[-1].figure)]
        assert (
            f"{beyond} elements (0.0{3 if beyond == 3 else 2} %) lie beyond the ends of the axis"
            in texts
        )


def test_bins_at_the_ends_of_fp32_are_as_wide_as_others(
    tmp_path: Path, drawn: list[canvas.Canvas]
) -> None:
    PICTURES["spectrum to the ends of fp32"](tmp_path / "a.png")
    edges = drawn[0].axes[0].patches[0].get_data().edges
    assert [edges[0], edges[-1]] == pytest.approx([-38.1, 38.6], abs=0.01)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no directory; make it first"):
        PICTURES["overlap of 2"](tmp_path / "nowhere" / "a.png")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    nothing = densities.densities(ChildMask.from_dense({}, dense=["w"]))
    with pytest.raises(ValueError, match="no elements in scope"):
        plot_densities(nothing, tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("picture", ["density of 2 layers", "overlap of 2", "spectrum"])
def test_without_matplotlib_the_remedy_is_named(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        PICTURES[picture](tmp_path / "a.png")
    assert os.listdir(tmp_path) == []
    assert "attention.self.query.weight" in densities_table(densities.densities(bert(2)))
