# SPDX-License-Identifier: Apache-2.0
"""Distil a real teacher into a student at large batch, once with each loss.

Trains a convolutional teacher, then the same small student with cross-entropy only, with logit
distillation, with a triplet loss mined among its own features, with triplet distillation (the
teacher's logits as anchors, the student's as positives and negatives), and with similarity
preservation (SP) twice, as it is usually written and by the kernels of this package, with
relational representation distillation (RRD, against a queue of the teacher's embeddings) alone and
with logit distillation, and with feature mimicking through hash bits (LSH) twice: beside the
distance of the features, and alone, from a file in which the teacher's bits are written once, so
that the teacher need not run again.
All students start from the same weights and see the same batches, so both trainings with SP have to
follow the same curve. For LSH, the share of hash bits that student and teacher have in common on
the test set is followed too. Then the losses are timed and their memory measured on the outputs of
a real step. Results as a table, JSON and a plot.

examples:
  kdkernels demo
  kdkernels demo --data digits --epochs 40
  kdkernels demo --losses ce sp-kernels --batch-size 4000 --output /tmp/results
  kdkernels demo --losses ce lshl2 lsh-cached"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import kdkernels as kd
from kdkernels._progress import Progress
from kdkernels.cli import UsageError
from kdkernels.cli.check import parse_device
from kdkernels.cli.table import Table, report_stream, write_json
from kdkernels.demo import measure, training
from kdkernels.demo.data import SOURCES, Data, missing_package
from kdkernels.demo.losses import ENTRIES, Criterion, Entry, Setting
from kdkernels.demo.models import RECIPES, ConvNet, Outputs, Recipe, parameter_count
from kdkernels.demo.training import Curves

NAME = "demo"
HELP = "distil a teacher into a student with each loss: accuracy, time and memory"

JSON_NAME, PLOT_NAME = "demo.json", "demo.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "; ".join(f"{name} is {source.description}" for name, source in SOURCES.items())
    names = [entry.name for entry in ENTRIES]
    parser.add_argument(
        "--data", choices=tuple(SOURCES), default="mnist1d", help=f"{sources} (default: mnist1d)"
    )
    parser.add_argument(
        "--epochs",
        type=_positive,
        metavar="N",
        help="of each student; the teacher trains no longer",
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="B", help="of the students (default: by data set)"
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=names,
        default=names,
        metavar="LOSS",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-results"),
        metavar="DIR",
        help="default: ./demo-results",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--json", metavar="FILE", help='write the record here too; "-" is standard output'
    )


def run(args: argparse.Namespace) -> int:
    _require_packages(args.data)
    device = parse_device(args.device)
    file = report_stream(args.json)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--output must be a directory that can be made, got {args.output}: {error.strerror}"
        ) from error
    data = SOURCES[args.data].load().to(device)
    recipe = RECIPES[args.data]
    epochs, batch_size = (
        args.epochs or recipe.student_epochs,
        args.batch_size or recipe.student_batch,
    )
    if batch_size > len(data.x):
        raise UsageError(
            f"--batch-size must be at most the {len(data.x)} training samples of {args.data}, "
            f"got {batch_size}"
        )
    entries = [entry for entry in ENTRIES if entry.name in args.losses]
    steps = len(data.x) // batch_size
    plan = f"batches of {batch_size}, {steps} an epoch, {epochs} epochs"
    print(f"{SOURCES[args.data].description}; {plan}", file=file)
    print(
        f"on {device}, seed {args.seed}, losses: {', '.join(entry.name for entry in entries)}\n",
        file=file,
    )

    begin = time.perf_counter()
    record = _distil(data, recipe, entries, epochs, batch_size, args.seed, args.output)
    record["seconds"] = time.perf_counter() - begin
    from kdkernels.demo import plots  # needs matplotlib, which _require_packages has made sure of

    write_json(record, str(args.output / JSON_NAME))
    plots.draw(record, args.output / PLOT_NAME)
    if args.json:
        write_json(record, args.json)
    _results_table(record).print(file)
    for line in _remarks(record):
        print(line, file=file)
    written = f"{args.output / JSON_NAME} and {args.output / PLOT_NAME}"
    print(f"\nwrote {written} in {record['seconds']:.0f} s", file=file)
    print(_next_steps(args.data), file=file)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _require_packages(data: str) -> None:
    missing = [] if importlib.util.find_spec("matplotlib") else ["matplotlib"]
    package = missing_package(SOURCES[data])
    missing += [package] if package else []
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}: pip install 'kdkernels[demo]'")


def _distil(
    data: Data,
    recipe: Recipe,
    entries: list[Entry],
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Train, measure, and return the record that the table, the JSON and the plot show."""
    shape, device = data.x.shape[1:], data.x.device
    teacher_epochs = min(recipe.teacher_epochs, epochs)
    with Progress(teacher_epochs + epochs * len(entries) + len(entries), "teacher") as progress:

        def reporter(label: str, total: int) -> Any:
            def after_epoch(epoch: int, curves: Curves) -> None:
                numbers = f"loss {curves.loss[-1]:.3f}, accuracy {curves.accuracy[-1]:.1%}"
                progress.step(f"{label}: epoch {epoch + 1}/{total}, {numbers}")
                if epoch + 1 == total:
                    progress.note(f"{label}: {numbers}, {curves.seconds:.1f} s")

            return after_epoch

        torch.manual_seed(seed)
        teacher = recipe.teacher(shape).to(device)
        teacher_curves = training.train_teacher(
            teacher,
            data,
            epochs=teacher_epochs,
            batch_size=recipe.teacher_batch,
            seed=seed,
            after_epoch=reporter("teacher", teacher_epochs),
        )
        taught = training.outputs(teacher, data.x)
        held_out = training.outputs(teacher, data.x_test)
        students: list[dict[str, Any]] = []
        criteria: dict[str, Criterion] = {}
        for entry in entries:
            torch.manual_seed(seed)
            student = recipe.student(shape).to(device)
            if entry.build is not None:
                setting = Setting(data, teacher, taught, held_out, student.head.in_features, folder)
                criteria[entry.name] = entry.build(setting).to(device)
            curves = training.train_student(
                student, criteria.get(entry.name), taught, data,
                cross_entropy_weight=entry.cross_entropy_weight, epochs=epochs,
                batch_size=batch_size, seed=seed, after_epoch=reporter(entry.label, epochs),
            )  # fmt: skip
            students.append(_student_record(entry, curves))
        batch = _real_batch(student, taught, data, batch_size)
        _add_costs(students, criteria, batch, progress)
    return {
        "settings": {"data": data.name, "epochs": epochs, "batch_size": batch_size, "seed": seed},
        "device": _device_words(device),
        "versions": {
            "kdkernels": kd.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": ["kdkernels", *sys.argv[1:]],
        "teacher": {
            "parameters": parameter_count(teacher),
            "epochs": teacher_epochs,
            "accuracy": teacher_curves.accuracy[-1],
            "seconds": teacher_curves.seconds,
        },
        "student_parameters": parameter_count(student),
        "features": {"student": student.head.in_features, "teacher": teacher.head.in_features},
        "explain": str(
            kd.explain(
                "gram_mse", batch.student.features.flatten(1), batch.teacher.features.flatten(1)
            )
        ),
        "students": students,
        "differences": _differences(students),
    }


def _device_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _student_record(entry: Entry, curves: Curves) -> dict[str, Any]:
    return {
        "name": entry.name,
        "label": entry.label,
        "twin": entry.twin,
        "accuracy": curves.accuracy[-1],
        "training_seconds": curves.seconds,
        "step_time": None,  # of the criterion alone; cross-entropy has none
        "peak_bytes": None,
        "curve_loss": curves.loss,
        "curve_accuracy": curves.accuracy,
        "curve_agreement": curves.agreement or None,  # of hash bits, where the loss has them
    }


def _real_batch(student: ConvNet, taught: Outputs, data: Data, batch_size: int) -> measure.Batch:
    """The first batch as the last student sees it after training."""
    index = torch.arange(batch_size, device=data.x.device)
    found = training.outputs(student, data.x[index])
    return measure.Batch(found, taught[index], data.y[index], index)


def _add_costs(
    students: list[dict[str, Any]],
    criteria: dict[str, Criterion],
    batch: measure.Batch,
    progress: Progress,
) -> None:
    progress.step("time of each loss", count=len(students) - len(criteria))
    times = measure.step_times(criteria, batch) if criteria else {}
    for student in students:
        if student["name"] in times:
            time_ = times[student["name"]]
            student["step_time"] = {
                "median_ms": time_.median_ms,
                "p20_ms": time_.p20_ms,
                "p80_ms": time_.p80_ms,
            }
            student["peak_bytes"] = measure.peak_bytes(criteria[student["name"]], batch)
            progress.step(f"memory of {student['label']}")


def _differences(students: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far each entry's curves are from its twin's, where both were trained."""
    by_name = {student["name"]: student for student in students}
    found = []
    for student in students:
        twin = by_name.get(student["twin"])
        if twin is None:
            continue
        pairs = zip(student["curve_loss"], twin["curve_loss"], strict=True)
        losses = [abs(value - twin) / abs(twin) for value, twin in pairs]
        accuracies = zip(student["curve_accuracy"], twin["curve_accuracy"], strict=True)
        found.append({
            "name": student["name"],
            "twin": twin["name"],
            "first_loss_relative": losses[0],
            "max_loss_relative": max(losses),
            "max_accuracy": max(abs(value - twin) for value, twin in accuracies),
            "final_accuracy": student["accuracy"] - twin["accuracy"],
        })  # fmt: skip
    return found


def _results_table(record: dict[str, Any]) -> Table:
    numbers = "test accuracy", "loss step", "p20 - p80", "peak memory", "training"
    table = Table("", *numbers, right=numbers)
    teacher = record["teacher"]
    table.add("teacher", f"{teacher['accuracy']:.1%}", "", "", "", f"{teacher['seconds']:.1f} s")
    for student in record["students"]:
        cost = "", "", ""
        if student["step_time"] is not None:
            times = student["step_time"]
            cost = (
                f"{times['median_ms']:.2f} ms",
                f"{times['p20_ms']:.2f} - {times['p80_ms']:.2f} ms",
                f"{student['peak_bytes'] / 2**20:.1f} MiB",
            )
        table.add(
            student["label"],
            f"{student['accuracy']:.1%}",
            *cost,
            f"{student['training_seconds']:.1f} s",
        )
    return table


def _remarks(record: dict[str, Any]) -> list[str]:
    """What a reader would work out from the table, and the agreement of the curves."""
    lines = [
        "Loss step: the distillation loss, forward and backward. Peak memory: above its inputs.",
        "",
    ]
    by_name = {student["name"]: student for student in record["students"]}
    for difference in record["differences"]:
        student, twin = by_name[difference["name"]], by_name[difference["twin"]]
        time_ratio = twin["step_time"]["median_ms"] / student["step_time"]["median_ms"]
        lines += [
            f"{student['label']} against {twin['label']}: {time_ratio:.1f}x the speed, "
            f"{student['peak_bytes'] / 2**20:.1f} instead of {twin['peak_bytes'] / 2**20:.1f} MiB.",
            f"Loss curves: {difference['first_loss_relative']:.1e} apart (relative) in the first "
            f"epoch, at most {difference['max_loss_relative']:.1e} apart in any.",
            f"Test accuracies: at most {100 * difference['max_accuracy']:.1f} points apart in any "
            f"epoch, {100 * difference['final_accuracy']:+.1f} at the end.",
            "Rounding differs, and training amplifies it.",
            "",
        ]
    agreements = [
        f"{student['label']}: {student['curve_agreement'][0]:.1%} of the hash bits on the test set "
        f"are the teacher's after the first epoch, {student['curve_agreement'][-1]:.1%} at the end."
        for student in record["students"]
        if student["curve_agreement"] is not None
    ]
    return [*lines, *agreements, *([""] if agreements else []), record["explain"]]


def _next_steps(data: str) -> str:
    other = next(name for name in SOURCES if name != data)
    return (
        "\nnext:\n"
        f"  kdkernels demo --data {other}\n"
        "  kdkernels check --quick     is every kernel right on this machine?\n"
        "  kdkernels bench             how fast, against batch size\n"
        "  examples/similarity_preserving.py shows the loss in a training step of your own"
    )
