"""Figures: that they show what was measured and reported, and that what they compute is what it is called."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image
from torch import nn

from sis_lightning.backbones import backbone_config, create_backbone
from sis_lightning.datasets.synthetic import write_synthetic
from sis_lightning.errors import DataError, UsageError
from sis_lightning.models import Classifier
from sis_lightning.operators import create_operator, list_operators
from sis_lightning.run import record as run_record
from sis_lightning.tables import attribution, draw, figures
from sis_lightning.tables.cells import Cell, Evidence, FilledRow, FilledTable
from sis_lightning.tables.spec import Column, DataSet, Group, Row, RunSpec, Table

RUN = RunSpec("seg", ("tasks/seg_voc.yaml",), DataSet("shapes", "synthetic"))
DEEP = {"depth": 101}
SIZES = tuple(Column(name, RUN, name, 1, 1e-6) for name in ("parameters", "macs"))
SCORE = Column("mIoU", RUN, "test/miou", 3)


def filled(
    rows: dict[str, list[Cell]], columns: tuple[Column, ...] = (*SIZES, SCORE), reported_by: str = ""
) -> FilledTable:
    group = Group(tuple(Row(label, "sis50", "basic" if label == "Basic" else None) for label in rows))
    lines = tuple(
        FilledRow(group, row, tuple(cells), (None,) * len(cells))
        for row, cells in zip(group.rows, rows.values(), strict=True)
    )
    return FilledTable(Table("9", "Shapes", columns, (group,), reported_by), lines)


def counted(*values: float) -> list[Cell]:
    return [Cell(None, {0: value}, (), "counted") for value in values]


def measured(*values: float, state: str = "synthetic", reported: float | None = None, records=()) -> Cell:
    return Cell(reported, dict(enumerate(values)), (), state, tuple(records))


def reported(value: float) -> Cell:
    return Cell(value, {}, (0, 1, 2), "not run")


def record(name: str, seed: int = 0, metrics: dict | None = None, curves: dict | None = None) -> Evidence:
    made = run_record.TestRecord.model_construct(seed=seed, metrics=metrics or {}, curves=curves or {})
    return Evidence(name, made, "recipe", "whole")


def markers(axis, *, hollow: bool) -> list[tuple[float, float]]:
    """Where single markers are, of one kind."""
    return sorted(
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in axis.lines
        if len(line.get_xdata()) == 1
        and line.get_marker() not in ("None", "", None, "_", "|")
        and (to_rgba(line.get_markerfacecolor())[3] == 0) is hollow
    )


def test_accuracy_shows_means_filled_and_reported_values_hollow():
    table = filled(
        {
            "Res2Net": [*counted(25.0, 4e3), measured(0.2, 0.3, 0.7, reported=0.5, state="reproduced")],
            "Basic": [*counted(24.0, 3e3), reported(0.6)],
        },
        reported_by="the paper",
    )
    figure = figures.accuracy(table)
    assert figure is not None
    by_parameters, by_macs = figure.axes[:2]
    assert markers(by_parameters, hollow=False) == [(25, pytest.approx(0.4))]
    assert markers(by_parameters, hollow=True) == [(24, 0.6), (25, 0.5)]
    assert markers(by_macs, hollow=True) == [(3, 0.6), (4, 0.5)]
    (bar,) = by_parameters.containers
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.4 - np.std([0.2, 0.3, 0.7], ddof=1), 0.4 + np.std([0.2, 0.3, 0.7], ddof=1)))
    title = figure.get_suptitle()
    assert "reported by the paper, 1 of 2 reproduced" in title
    assert "3 seeds" in title


def test_synthetic_values_are_never_plotted_as_reported_nor_reported_ones_as_measured():
    synthetic = filled({"Res2Net": [*counted(25.0, 4e3), measured(0.2, 0.4)]})
    figure = figures.accuracy(synthetic)
    assert figure is not None
    assert "synthetic" in figure.get_suptitle()
    assert "reported" not in figure.get_suptitle()
    assert all(markers(axis, hollow=True) == [] for axis in figure.axes)
    assert markers(figure.axes[0], hollow=False) == [(25, pytest.approx(0.3))]
    paper = filled({"Res2Net": [*counted(25.0, 4e3), reported(0.7)]}, reported_by="the paper")
    figure = figures.accuracy(paper)
    assert figure is not None
    assert "reported by the paper, not reproduced" in figure.get_suptitle()
    assert all(markers(axis, hollow=False) == [] for axis in figure.axes)
    # Without a source, reported values are not plotted.
    assert figures.accuracy(filled({"Res2Net": [*counted(25.0, 4e3), reported(0.7)]})) is None


def test_columns_of_one_metric_take_their_own_counts_and_are_joined():
    deep = tuple(dataclasses.replace(column, backbone=DEEP) for column in SIZES)
    columns = (*SIZES, *deep, SCORE, dataclasses.replace(SCORE, label="mIoU 101", backbone=DEEP))
    rows = {
        "Res2Net": [*counted(25.0, 4e3, 45.0, 7e3), reported(0.7), reported(0.8)],
        "Basic": [*counted(24.0, 3e3, 43.0, 6e3), reported(0.75), reported(0.85)],
        "Third": [*counted(23.0, 2e3, 42.0, 5e3), reported(0.71), reported(0.81)],
    }
    figure = figures.accuracy(filled(rows, columns, "the paper"))
    assert figure is not None
    axis = figure.axes[0]
    assert markers(axis, hollow=True) == [(23, 0.71), (24, 0.75), (25, 0.7), (42, 0.81), (43, 0.85), (45, 0.8)]
    joined = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert sorted(joined) == [[23, 42], [24, 43], [25, 45]]
    assert {text.get_text() for text in axis.texts} == {"mIoU", "mIoU 101"}


def test_overlapping_markers_are_magnified_and_rows_are_distinguished_without_colour():
    rows = {str(i): [*counted(25.0, 4e3), measured(0.5 + i * 1e-4)] for i in range(4)}
    table = filled({**rows, "far": [*counted(5.0, 1e3), measured(0.1)]})
    figure = figures.accuracy(table)
    assert figure is not None
    (inset,) = figure.axes[0].child_axes
    assert len(markers(inset, hollow=False)) == 4
    (legend,) = figure.legends
    shapes = [str(handle.get_marker()) for handle in legend.legend_handles][: len(table.lines)]
    assert len({*shapes}) == len(table.lines)


def test_sizes_are_means_over_the_records_and_missing_ones_are_left_out():
    evidence = [
        record("a.json", 0, {"test/APs": 0.1, "test/APm": 0.2, "test/ARs": 0.3, "test/APl": None}),
        record("b.json", 1, {"test/APs": 0.2, "test/APm": 0.4, "test/ARs": 0.5, "test/APl": None}),
        record("others.json", 1, {"test/APs": 0.9, "test/ARl": 0.9}),
    ]
    columns = (Column("AP", RUN, "test/AP", 1, 100.0), Column("AP(M)", RUN, "test/APm", 1, 100.0))
    names = ("a.json", "b.json")
    table = filled(
        {"Basic": [measured(1, 2, records=names), measured(20.0, 40.0, records=names, reported=33.0)]}, columns, "it"
    )
    figure = figures.by_size(table, evidence)
    assert figure is not None
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["AP(S)", "AP(M)", "AR(S)"]
    assert markers(axis, hollow=False) == [(0, pytest.approx(15)), (1, pytest.approx(30)), (2, pytest.approx(40))]
    assert markers(axis, hollow=True) == [(1, 33.0)]
    # A reported value of another metric is not plotted.
    alone = filled({"Basic": [measured(1, 2, reported=30.0, records=names)]}, columns[:1], "it")
    figure = figures.by_size(alone, evidence)
    assert figure is not None
    assert "reported" not in figure.get_suptitle() + str([t.get_text() for t in figure.legends[0].get_texts()])
    without = filled({"Basic": [measured(1, records=["c.json"]), measured(1, records=["c.json"])]}, columns)
    assert figures.by_size(without, [record("c.json", 0, {"test/AP": 0.1})]) is None


def test_curves_are_the_mean_between_the_lowest_and_the_highest_seed():
    generator = np.random.default_rng(0)
    values = generator.uniform(size=(3, 5))
    steps = [100, 200, 300, 400, 500]
    pairs = [[[step, value] for step, value in zip(steps, row, strict=True)] for row in values.tolist()]
    pairs[1].append([600, 9.0])  # one seed only
    evidence = [
        record(f"{seed}.json", seed, curves={"train/loss": [[50, 1.0 + seed]], "val/miou": pairs[seed]})
        for seed in range(3)
    ]
    table = filled({"Basic": [*counted(1, 1), measured(1, 2, 3, records=[piece.name for piece in evidence])]})
    figure = figures.curves(table, evidence)
    assert figure is not None
    validation, loss = figure.axes
    assert validation.get_title(loc="left") == "val/miou"
    np.testing.assert_allclose(validation.lines[0].get_xdata(), steps)
    np.testing.assert_allclose(validation.lines[0].get_ydata(), values.mean(axis=0))
    band = validation.collections[0].get_paths()[0].vertices
    for step, low, high in zip(steps, values.min(axis=0), values.max(axis=0), strict=True):
        found = band[band[:, 0] == step, 1]
        assert (found.min(), found.max()) == pytest.approx((low, high))
    assert loss.lines[0].get_ydata() == pytest.approx([2.0])
    assert "mean of 3 seeds, band: lowest to highest" in figure.get_suptitle()
    assert figures.curves(table, []) is None


def test_a_noisy_curve_is_a_moving_mean_in_a_band():
    values = np.random.default_rng(0).uniform(size=200)
    evidence = [record("0.json", curves={"train/loss": list(enumerate(values.tolist(), 1)), "val/miou": [[200, 0.5]]})]
    table = filled({"Basic": [*counted(1, 1), measured(1, records=["0.json"])]})
    loss = figures.curves(table, evidence).axes[1]
    # Of 200 points, 5 % are five on either side; fewer at the ends.
    windows = [values[max(0, place - 5) : place + 6] for place in range(200)]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [window.mean() for window in windows])
    band = loss.collections[0].get_paths()[0].vertices
    for step, window in enumerate(windows, 1):
        found = band[band[:, 0] == step, 1]
        assert (found.min(), found.max()) == pytest.approx((window.min(), window.max()))


def test_reported_values_stand_at_reported_sizes_and_around_each_other():
    table = filled(
        {
            "Wide": [Cell(36.5, {0: 5.0}, (), "counted"), *counted(1e3), measured(0.3, reported=0.5)],
            "Twin": [*counted(36.5, 2e3), reported(0.5)],
            "Far": [*counted(10.0, 3e3), reported(0.6)],
        },
        reported_by="the paper",
    )
    axis = figures.accuracy(table).axes[0]
    assert markers(axis, hollow=True) == [(10.0, 0.6), (36.5, 0.5), (36.5, 0.5)]
    assert markers(axis, hollow=False) == [(5.0, 0.3)]
    hollow = [line for line in axis.lines if to_rgba(line.get_markerfacecolor())[3] == 0 and len(line.get_xdata()) == 1]
    sizes = {place: sorted(x.get_markersize() for x in hollow if x.get_xdata()[0] == place) for place in (10.0, 36.5)}
    assert len(sizes[10.0]) == 1
    assert sizes[36.5][1] - sizes[36.5][0] >= 3


@pytest.mark.parametrize(("operator", "side"), [("conv", 3), *((name, 7) for name in list_operators()[1:6])])
def test_receptive_fields_of_operators_are_those_of_the_paper(operator, side):
    state = torch.get_rng_state()
    field = attribution.gradient_map(lambda: create_operator(operator, 16, 16), 16, 15, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert attribution.support(field) == (side, side)
    rows, columns = np.nonzero(field)
    assert {rows.min(), columns.min()} == {7 - side // 2}  # around the centre
    assert field.max() == 1
    np.testing.assert_array_equal(field, attribution.gradient_map(lambda: create_operator(operator, 16, 16), 16, 15, 3))


@pytest.mark.parametrize(("operator", "reach"), [("conv", (1, 0, 0)), ("interactive2", (1, 1, 1))])
def test_the_receptive_field_of_a_backbone_is_the_sum_of_its_kernels(operator, reach):
    # Stem 7×7 and pool 3×3 of stride 2: 11 px at stride 4. An operator's kernels reach 1 each; only K1 of stage 2 is
    # at stride 4, what follows it at 8.
    side = 11 + 2 * 4 * sum(reach) + 2 * (4 * reach[0] + 8 * sum(reach[1:]))

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create_backbone("sis_demo", operator=operator)

        def forward(self, x):
            return self.body(x)["c3"]

    assert attribution.support(attribution.gradient_map(Map, 3, 97, 4)) == (side, side)


def test_a_gradient_map_is_the_gradient():
    kernel = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    field = attribution.gradient_map(lambda: lambda x: torch.conv2d(x, kernel, padding=1), 2, 9, 2)
    wanted = kernel.sum(dim=0).abs().sum(dim=0)
    np.testing.assert_allclose(field[3:6, 3:6], wanted / wanted.max())
    assert field.sum() == pytest.approx(float((wanted / wanted.max()).sum()))


def test_the_mean_of_an_activation_map_is_the_logit_without_its_bias():
    torch.manual_seed(0)
    network = Classifier(backbone_config("sis_demo", stem="cifar"), 7).eval()
    images = torch.randn(3, 3, 32, 32)
    maps, probabilities = attribution.class_activation_map(network, images)
    with torch.no_grad():
        logits = network(images)
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))
    best = logits.argmax(dim=1)
    torch.testing.assert_close(maps.mean(dim=(1, 2)), logits[torch.arange(3), best] - network.fc.bias.detach()[best])
    assert maps.std(dim=(1, 2)).min() > 0


@pytest.fixture
def fitted(command, small):
    """Trains for some steps; returns the run's directory."""

    def fit(name: str, task: str = "cls_cifar100", *options: str) -> Path:
        result = command("fit", *small(task, steps=2), "--run_dir", name, *options)
        assert result.code == 0, result.err
        return Path(name)

    return fit


def test_activation_maps_show_runs_over_the_same_images(fitted, command, small):
    first = fitted("first")
    second = fitted("second", "cls_cifar100", "--model.backbone.operator", "conv")
    state = torch.get_rng_state()
    figure = attribution.activation_maps([first, second], images=2)
    assert torch.equal(state, torch.get_rng_state())
    panels = [axis for axis in figure.axes if axis.images]
    assert len(panels) == 2 * 3
    assert [axis.get_xlabel().replace("\n", "") for axis in panels[-2:]] == [
        "res2net14-4w4s-basic-8ch-cifar-pool",
        "res2net14-4w4s-conv-8ch-cifar-pool",
    ]
    assert panels[0].get_ylabel().startswith("true: ")
    # As the command predicts them, on the first and the last image.
    for column, (run, options) in enumerate({first: [], second: ["--model.backbone.operator", "conv"]}.items(), 1):
        result = command("predict", *small("cls_cifar100", steps=2), "--run_dir", run, *options)
        assert result.code == 0, result.err
        rows = json.loads((run / "predictions" / "predictions.json").read_text())
        for line, row in zip((0, 1), (rows[0], rows[-1]), strict=True):
            assert panels[3 * line + column].get_title() == f"{row['class']} {row['probability']:.2f}"
    for axis in panels[1:3] + panels[4:]:
        overlay = np.asarray(axis.images[-1].get_array())
        assert overlay.shape == panels[0].images[0].get_array().shape[:2]
        assert 0 <= overlay.min() <= overlay.max() <= 1


def test_runs_that_cannot_be_shown_together_are_refused(fitted, tmp_path):
    first = fitted("first")
    write_synthetic(tmp_path / "other", images=24, size=64, seed=2, min_object=12, kinds=["cifar"])
    other = fitted("second", "cls_cifar100", "--data.root", str(tmp_path / "other"))
    with pytest.raises(UsageError, match="different data"):
        attribution.activation_maps([first, other])
    segmentation = fitted("third", "seg_voc")
    with pytest.raises(UsageError, match=r"third is a run of SegmentationTask"):
        attribution.activation_maps([first, segmentation])
    with pytest.raises(DataError, match=r"no config\.yaml"):
        attribution.activation_maps([tmp_path])


def paper_and_ours() -> tuple[list[FilledTable], list[Evidence]]:
    curves = {"train/loss": [[1, 2.0], [2, 1.0]], "val/miou": [[2, 0.3]]}
    ours = filled({"Basic": [*counted(24.0, 3e3), measured(0.3, records=["a.json"])]})
    its = filled({"Basic": [*counted(24.0, 3e3), reported(0.7)]}, reported_by="the paper")
    its = dataclasses.replace(its, table=dataclasses.replace(its.table, id="3-X"))
    return [ours, its], [record("a.json", curves=curves)]


def test_figures_are_written_completely_and_reproducibly(tmp_path):
    tables, evidence = paper_and_ours()
    written = draw.draw([], tables, evidence, tmp_path / "figures")
    stems = ["accuracy_table_9", "accuracy_table_3-x", "curves_table_9", "receptive_fields"]
    assert [path.name for path in written] == [f"{stem}{ending}" for stem in stems for ending in (".png", ".svg")]
    assert {*(tmp_path / "figures").iterdir()} == {*written}
    before = {path: path.read_bytes() for path in written}
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
                shades = np.asarray(image.convert("L"))
            assert shades.std() > 5
        else:
            root = ET.fromstring(before[path])
            assert root.tag.endswith("svg")
            assert sum(1 for _ in root.iter("{http://www.w3.org/2000/svg}path")) > 20
    again = draw.draw(["curves", "accuracy"], tables, evidence, tmp_path / "figures")
    assert [path.name for path in again] == [path.name for path in written[:6]]
    assert {path: path.read_bytes() for path in again} == {path: before[path] for path in again}


def test_wrong_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'curves'"):
        draw.draw(["curve"], [], [], tmp_path)
    with pytest.raises(UsageError, match="--runs"):
        draw.draw(["activation-maps"], [], [], tmp_path)
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        figures.draw_pair({"val/miou": ({1: 0.1}, {1: 0.2})}, ("A", "B"), tmp_path / "pair.jpg")
    assert not list(tmp_path.iterdir())


def test_curves_of_two_runs_share_their_panels(tmp_path):
    found = {f"val/{number}": ([{1: 0.1, 2: 0.2}, {1: 0.3, 2: 0.4}], [{1: 0.2, 2: 0.3}]) for number in range(4)}
    for ending in (".png", ".svg", ".pdf"):
        path = tmp_path / f"pair{ending}"
        figures.draw_pair(found, ("A: this", "B: that"), path)
        first = path.read_bytes()
        assert len(first) > 1000
        figures.draw_pair(found, ("A: this", "B: that"), path)
        assert path.read_bytes() == first


def test_no_letter_is_smaller_than_8_pt_and_the_global_style_stays():
    before = dict(matplotlib.rcParams)
    tables, evidence = paper_and_ours()
    drawn = [figures.accuracy(tables[1]), figures.curves(tables[0], evidence)]
    assert dict(matplotlib.rcParams) == before
    for figure in drawn:
        assert figure is not None
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 8
