# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, registry, trainings and measurements."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from console import output_of

import kdkernels as kd
from kdkernels.cli.main import main
from kdkernels.demo import data as demo_data
from kdkernels.demo import losses, measure, models, training

ROOT = Path(__file__).parents[1]


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


SAMPLES, HELD_OUT = 41, 23


def demo_packages() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")


def setting_in(folder: Path) -> losses.Setting:
    """A teacher that was never trained, on noise; its features are wider than the student's."""
    shape = (1, 8, 8)
    x, x_test = torch.randn(SAMPLES, *shape), torch.randn(HELD_OUT, *shape)
    y, y_test = torch.arange(SAMPLES) % 10, torch.arange(HELD_OUT) % 10
    data = demo_data.Data("noise", x, y, x_test, y_test)
    teacher = models.ConvNet(shape, (5,), (2,), 3)
    taught, held_out = (training.outputs(teacher, part) for part in (x, x_test))
    return losses.Setting(data, teacher, taught, held_out, 3 * 4 * 4, folder)


def student_outputs(setting: losses.Setting, count: int) -> models.Outputs:
    return models.Outputs(torch.rand(count, setting.student_width), torch.rand(count, 10))


def test_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "needs matplotlib and mnist1d: pip install 'kdkernels[demo]'" in capsys.readouterr().err


def test_demo_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo_packages()
    argv = [
        "demo",
        "--data",
        "digits",
        "--epochs",
        "2",
        "--batch-size",
        "700",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--device", "cpu", "--json", str(tmp_path / "copy.json")]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert record == json.loads((tmp_path / "copy.json").read_text())
    assert record["settings"] == {"data": "digits", "epochs": 2, "batch_size": 700, "seed": 0}
    assert [student["name"] for student in record["students"]] == [
        entry.name for entry in losses.ENTRIES
    ]
    for student in record["students"]:
        assert student["label"] in text
        assert len(student["curve_loss"]) == len(student["curve_accuracy"]) == 2
        assert student["accuracy"] == student["curve_accuracy"][-1]
        if student["name"] == "ce":
            assert student["step_time"] is None
        else:
            assert 0 < student["step_time"]["p20_ms"] <= student["step_time"]["median_ms"]
            assert student["peak_bytes"] >= 0
        hashed = student["name"] in ("lshl2", "lsh-cached")
        assert (student["curve_agreement"] is not None) == hashed
        if hashed:
            assert len(student["curve_agreement"]) == 2
            assert f"{student['curve_agreement'][-1]:.1%} at the end" in text
    by_name = {student["name"]: student for student in record["students"]}
    # autograd keeps at least the two normalised Grams
    assert by_name["sp-reference"]["peak_bytes"] > 2 * 700 * 700 * 4
    (difference,) = record["differences"]
    assert (difference["name"], difference["twin"]) == ("sp-kernels", "sp-reference")
    twins = by_name["sp-kernels"]["curve_loss"], by_name["sp-reference"]["curve_loss"]
    torch.testing.assert_close(*(torch.tensor(curve[:1]) for curve in twins))
    png = (tmp_path / "out" / "demo.png").read_bytes()
    assert png.startswith(PNG_SIGNATURE)
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width > 1000
    assert height > 500
    from matplotlib import image

    assert image.imread(tmp_path / "out" / "demo.png").std() > 0


def test_demo_without_a_teacher_has_no_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    demo_packages()
    argv = (
        "demo",
        "--data",
        "digits",
        "--epochs",
        "1",
        "--losses",
        "ce",
        "--device",
        "cpu",
        "--output",
        str(tmp_path),
    )
    record = output_of(capsys, *argv)
    assert [student["step_time"] for student in record["students"]] == [None]
    assert record["differences"] == []
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG_SIGNATURE)


def test_students_start_alike_and_repeat_themselves() -> None:
    demo_packages()
    data = demo_data.SOURCES["digits"].load()
    curves = []
    for _ in range(2):
        torch.manual_seed(3)
        student = models.RECIPES["digits"].student(data.x.shape[1:])
        teacher = models.Outputs(torch.zeros(len(data.x), 4), torch.zeros(len(data.x), 10))
        curves.append(
            training.train_student(
                student, None, teacher, data, cross_entropy_weight=1.0, epochs=2, batch_size=500,
                seed=3, after_epoch=lambda epoch, found: None,
            )
        )  # fmt: skip
    assert curves[0].loss == curves[1].loss
    assert curves[0].accuracy == curves[1].accuracy
    assert curves[0].agreement == []


class Watching(losses.Criterion):
    """Learns nothing and keeps what it is told of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[models.Outputs, torch.Tensor, torch.Tensor]] = []

    def forward(
        self,
        student: models.Outputs,
        teacher: models.Outputs,
        labels: torch.Tensor,
        index: torch.Tensor,
    ) -> torch.Tensor:
        self.seen.append((teacher, labels, index))
        return 0 * student.logits.sum()


def test_an_index_says_which_sample_is_seen_as_it_is(tmp_path: Path) -> None:
    """Codes that are read by index are those of what the student sees: no augmentation."""
    setting, criterion = setting_in(tmp_path), Watching()
    data, taught = setting.data, setting.taught
    student = models.ConvNet(data.x.shape[1:], (3,), (2,), 3)
    inputs = []
    student.register_forward_pre_hook(
        lambda model, args: inputs.append(args[0]) if model.training else None
    )
    training.train_student(
        student, criterion, taught, data, cross_entropy_weight=1.0, epochs=2, batch_size=13,
        seed=0, after_epoch=lambda epoch, found: None,
    )  # fmt: skip
    assert len(inputs) == len(criterion.seen) == 2 * (SAMPLES // 13)
    for x, (teacher, labels, index) in zip(inputs, criterion.seen, strict=True):
        assert torch.equal(x, data.x[index])
        assert torch.equal(labels, data.y[index])
        assert torch.equal(teacher.features, taught.features[index])
        assert torch.equal(teacher.logits, taught.logits[index])


def test_cached_codes_are_those_of_the_teacher(tmp_path: Path) -> None:
    setting = setting_in(tmp_path)
    criteria = []
    for name in ("lshl2", "lsh-cached"):
        torch.manual_seed(11)
        criteria.append(losses.entry(name).build(setting))
    plain, cached = criteria
    assert torch.equal(plain.loss.hash_weight, cached.loss.hash_weight)
    assert torch.equal(plain.loss.hash_bias, cached.loss.hash_bias)
    index = torch.randperm(SAMPLES)[:19]
    codes = plain.loss.encode(setting.taught.features[index])
    assert torch.equal(cached.cache[index], codes)
    # the loss is that of these codes, and asks for no teacher
    student = student_outputs(setting, len(index))
    loss = cached(student, None, setting.data.y[index], index)
    features = cached.loss.adapter(student.features)
    expected = kd.lsh_bce(features, codes, cached.loss.hash_weight, cached.loss.hash_bias)
    torch.testing.assert_close(loss, losses.HASH_WEIGHT * expected)


def test_hash_bits_are_balanced_and_directions_spread_like_the_head(tmp_path: Path) -> None:
    setting = setting_in(tmp_path)
    torch.manual_seed(2)
    expected = kd.nn.LSHFeatureMimickingLoss(
        setting.teacher_width,
        hash_bits=losses.HASH_BITS,
        std=setting.teacher.head.weight.std().item(),
        student_dim=setting.student_width,
    )
    torch.manual_seed(2)
    loss = losses.entry("lshl2").build(setting).loss
    torch.testing.assert_close(loss.hash_weight, expected.hash_weight)
    bits = setting.taught.features.flatten(1) @ loss.hash_weight.T + loss.hash_bias > 0
    # the median itself may fall on either side
    assert (bits.sum(0) - SAMPLES // 2).abs().max() <= 1


def test_samples_that_the_teacher_gets_wrong_do_not_count(tmp_path: Path) -> None:
    setting = setting_in(tmp_path)
    criterion = losses.entry("lshl2").build(setting)
    index = torch.arange(SAMPLES)
    student = student_outputs(setting, SAMPLES)
    correct = index % 3 == 0
    said = setting.taught.logits.argmax(1)
    labels = torch.where(correct, said, (said + 1) % 10)
    loss = criterion(student, setting.taught, labels, index)
    part = models.Outputs(student.features[correct], student.logits[correct])
    few = criterion(part, setting.taught[correct], labels[correct], index[correct])
    torch.testing.assert_close(loss, few)


def test_agreement_is_the_share_of_equal_bits(tmp_path: Path) -> None:
    setting = setting_in(tmp_path)
    criterion = losses.entry("lshl2").build(setting)
    student = student_outputs(setting, HELD_OUT)
    weight, bias = criterion.loss.hash()
    with torch.no_grad():
        adapted = criterion.loss.adapter(student.features)
    signs = [x.flatten(1) @ weight.T + bias > 0 for x in (adapted, setting.held_out.features)]
    expected = (signs[0] == signs[1]).double().mean().item()
    assert criterion.agreement(student) == pytest.approx(expected)
    assert 0.2 < expected < 0.8
    equally_wide = replace(setting, student_width=setting.teacher_width)
    fitted = losses.entry("lsh-cached").build(equally_wide)
    assert fitted.loss.adapter is None
    assert fitted.agreement(setting.held_out) == 1.0


def test_agreement_rises_in_training(tmp_path: Path) -> None:
    demo_packages()
    data = demo_data.SOURCES["digits"].load()
    recipe = models.RECIPES["digits"]
    torch.manual_seed(0)
    teacher = recipe.teacher(data.x.shape[1:])
    quiet = {"seed": 0, "after_epoch": lambda epoch, found: None}
    training.train_teacher(teacher, data, epochs=3, batch_size=128, **quiet)
    taught, held_out = (training.outputs(teacher, x) for x in (data.x, data.x_test))
    for name in ("lshl2", "lsh-cached"):
        torch.manual_seed(0)
        student = recipe.student(data.x.shape[1:])
        width = student.head.in_features
        setting = losses.Setting(data, teacher, taught, held_out, width, tmp_path)
        criterion = losses.entry(name).build(setting)
        curves = training.train_student(
            student, criterion, taught, data, cross_entropy_weight=1.0, epochs=8, batch_size=200,
            **quiet,
        )  # fmt: skip
        assert len(curves.agreement) == 8
        assert curves.agreement[-1] > curves.agreement[0] + 0.1
        assert curves.agreement[-1] == criterion.agreement(training.outputs(student, data.x_test))


def test_the_plot_shows_agreement_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from kdkernels.demo import plots

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    cost = {"step_time": {"median_ms": 1.0}, "peak_bytes": 2**20, "twin": None, "accuracy": 0.5}
    curve = {"curve_accuracy": [0.25, 0.5]}
    plain = {"name": "kd", "label": "KD", "curve_agreement": None, **cost, **curve}
    hashed = {"name": "lsh", "label": "LSH", "curve_agreement": [0.5, 0.75], **cost, **curve}
    record = {
        "settings": {"data": "digits", "batch_size": 7, "epochs": 2},
        "teacher": {"parameters": 1, "accuracy": 0.9},
        "student_parameters": 1,
        "device": "CPU",
    }
    for students in ([plain, hashed], [plain]):
        plots.draw({**record, "students": students}, tmp_path / "never.png")
    with_panel, without = (figure.axes for figure in drawn)
    panels = [axes for axes in with_panel if axes.get_title().startswith("Hash bits")]
    assert len(with_panel) == len(without) + 1
    (line,) = (x for x in panels[0].lines if x.get_label().startswith("LSH"))
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [50, 75]
    assert len(panels[0].lines) == 2  # and chance


def test_mnist1d_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mnist1d")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = demo_data.SOURCES["mnist1d"]
    first = source.load()
    assert first.x.shape == (4000, 1, 40)
    assert first.x_test.shape == (1000, 1, 40)
    assert len(list((tmp_path / "kdkernels").iterdir())) == 1
    monkeypatch.setattr(demo_data, "_save_generated", lambda path: pytest.fail("generated again"))
    assert torch.equal(source.load().x, first.x)


def test_the_registry_is_sound(tmp_path: Path) -> None:
    names = [entry.name for entry in losses.ENTRIES]
    assert len(set(names)) == len(names)
    setting, index = setting_in(tmp_path), torch.arange(9)
    student = student_outputs(setting, 9)
    values = {
        entry.name: entry.build(setting)(
            student, setting.taught[index], torch.zeros(9, dtype=torch.int64), index
        )
        for entry in losses.ENTRIES
        if entry.build is not None
    }
    assert all(torch.isfinite(value) and value.shape == () for value in values.values())
    for entry in losses.ENTRIES:
        if entry.twin is not None:
            torch.testing.assert_close(values[entry.name], values[entry.twin])


def test_triplet_entries_reach_what_they_are_about(tmp_path: Path) -> None:
    """Triplet distillation the logits, given the teacher's; batch-hard the features."""
    features, logits = torch.rand(30, 4, 3).requires_grad_(), torch.rand(30, 10).requires_grad_()
    student = models.Outputs(features, logits)
    teacher = models.Outputs(torch.rand(30, 7), torch.rand(30, 10))
    labels, index = torch.arange(30) % 10, torch.arange(30)
    setting = setting_in(tmp_path)
    for name, reached in (("triplet-kd", logits), ("triplet", features)):
        criterion = losses.entry(name).build(setting)
        grads = torch.autograd.grad(
            criterion(student, teacher, labels, index), (features, logits), allow_unused=True
        )
        found = [x for x, grad in zip((features, logits), grads, strict=True) if grad is not None]
        assert len(found) == 1
        assert found[0] is reached
    torch.manual_seed(5)
    loss = losses.entry("triplet-kd").build(setting)(student, teacher, labels, index)
    torch.manual_seed(5)
    # the authors' weight and margin
    expected = 2 * kd.triplet_distillation(logits, teacher.logits, labels, margin=5.0)
    torch.testing.assert_close(loss, expected)


def test_relations_are_those_of_the_features_and_add_up_with_logits(tmp_path: Path) -> None:
    """The queue holds the training set, so every batch fits."""
    setting, index = setting_in(tmp_path), torch.arange(SAMPLES)
    student = student_outputs(setting, SAMPLES)
    sources = student.features.requires_grad_(), student.logits.requires_grad_()
    values, gradients = {}, {}
    for name in ("rrd", "rrd-kd", "kd"):
        torch.manual_seed(3)
        criterion = losses.entry(name).build(setting)
        values[name] = criterion(student, setting.taught, setting.data.y, index)
        gradients[name] = torch.autograd.grad(values[name], sources, allow_unused=True)
        trained = [x for x in criterion.parameters() if x.requires_grad]
        assert len(trained) == (0 if name == "kd" else 2)
    assert gradients["rrd"][1] is None
    assert gradients["rrd"][0].ne(0).any()
    torch.testing.assert_close(values["rrd-kd"], values["rrd"] + values["kd"] / 0.9)
    torch.testing.assert_close(gradients["rrd-kd"][0], gradients["rrd"][0])
    torch.testing.assert_close(gradients["rrd-kd"][1], gradients["kd"][1] / 0.9)


def test_a_criterion_is_measured_as_it_was_trained(tmp_path: Path) -> None:
    """In a process of its own too, which finds the file of codes."""
    setting, index = setting_in(tmp_path), torch.arange(SAMPLES)
    criterion = losses.entry("lsh-cached").build(setting)
    student = student_outputs(setting, SAMPLES)
    batch = measure.Batch(student, setting.taught, setting.data.y, index)
    path = tmp_path / "step.pt"
    torch.save((criterion, batch.tensors()), path)
    found, tensors = torch.load(path, weights_only=False)
    again = measure.Batch.of(tensors)
    expected = criterion(student, setting.taught, setting.data.y, index)
    assert torch.equal(found(again.student, again.teacher, again.labels, again.index), expected)
    assert len(measure.Batch.of(tensors, 7).index) == 7
    assert measure.peak_bytes(criterion, batch) >= 0
