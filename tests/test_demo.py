# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, registry, trainings and measurements."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from console import output_of

import kdkernels as kd
from kdkernels.cli.main import main
from kdkernels.demo import data as demo_data
from kdkernels.demo import losses, measure, memory, models, training

ROOT = Path(__file__).parents[1]


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def demo_packages() -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")


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
                student, losses.entry("ce"), teacher, data, epochs=2, batch_size=500, seed=3,
                after_epoch=lambda epoch, found: None,
            )
        )  # fmt: skip
    assert curves[0].loss == curves[1].loss
    assert curves[0].accuracy == curves[1].accuracy


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


def test_the_registry_is_sound() -> None:
    names = [entry.name for entry in losses.ENTRIES]
    assert len(set(names)) == len(names)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        models.Outputs(
            torch.rand(9, width, 2, generator=generator), torch.rand(9, 10, generator=generator)
        )
        for width in (3, 5)
    )
    values = {
        entry.name: entry.build(losses.Widths(6, 10))(
            student, teacher, torch.zeros(9, dtype=torch.int64)
        )
        for entry in losses.ENTRIES
        if entry.build is not None
    }
    for entry in losses.ENTRIES:
        if entry.twin is not None:
            torch.testing.assert_close(values[entry.name], values[entry.twin])


def test_triplet_entries_reach_what_they_are_about() -> None:
    """Triplet distillation the logits, given the teacher's; batch-hard the features."""
    features, logits = torch.rand(30, 4, 3).requires_grad_(), torch.rand(30, 10).requires_grad_()
    student = models.Outputs(features, logits)
    teacher = models.Outputs(torch.rand(30, 7), torch.rand(30, 10))
    labels = torch.arange(30) % 10
    for name, reached in (("triplet-kd", logits), ("triplet", features)):
        criterion = losses.entry(name).build(losses.Widths(12, 7))
        grads = torch.autograd.grad(
            criterion(student, teacher, labels), (features, logits), allow_unused=True
        )
        found = [x for x, grad in zip((features, logits), grads, strict=True) if grad is not None]
        assert len(found) == 1
        assert found[0] is reached
    torch.manual_seed(5)
    loss = losses.entry("triplet-kd").build(losses.Widths(12, 7))(student, teacher, labels)
    torch.manual_seed(5)
    # the authors' weight and margin
    expected = 2 * kd.triplet_distillation(logits, teacher.logits, labels, margin=5.0)
    torch.testing.assert_close(loss, expected)


def test_memory_record_sees_what_is_allocated() -> None:
    program = (
        "from kdkernels.demo import memory\n"
        "ballast = memory.fill_to_the_record()\n"
        "before = memory.highest_resident_bytes()\n"
        "block = b'1' * (32 * 2**20)\n"
        "print(memory.highest_resident_bytes() - before)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert 31 * 2**20 < int(done.stdout) < 34 * 2**20
    assert memory.highest_resident_bytes() > 2**20


def test_measuring_an_entry_without_a_criterion_is_refused() -> None:
    nothing = models.Outputs(torch.ones(2, 3), torch.ones(2, 10))
    with pytest.raises(ValueError, match="entry must have a criterion, got 'ce'"):
        measure.step_of(losses.entry("ce"), measure.Batch(nothing, nothing, torch.zeros(2)))
