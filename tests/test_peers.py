# SPDX-License-Identifier: Apache-2.0
"""Other libraries in the benchmark: right in what they compute, timed where they can be, and named
with their version."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import samples
from test_report import _entry, _report

import kdkernels as kd
from kdkernels.cli import _bench_report
from kdkernels.ops.pairwise import METRICS
from kdkernels.reference import _lsh_bce as reference
from kdkernels.testing import bench, numerics, peers, record
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos, randn

CPU = torch.device("cpu")
TARGETS = Path(__file__).parents[1] / "benchmarks" / "targets.json"
INFOS = {info.name: info for info in opinfos()}
PAIRS = [(info, peer) for info in opinfos() for peer in info.peers]
SEARCHERS = ("faiss-cpu", "scikit-learn")
PARTS = {(name, peer) for name in ("triplet_loss", "pairwise") for peer in SEARCHERS}
PARTS |= {("pairwise", "pykeops")}
# An option that peers lack; of the other ops that is `references`.
LACKED = {"lsh_bce": "reduction", "pairwise": "gamma"}
WHOLE = [(info, peer) for info, peer in PAIRS if (info.name, peer) not in PARTS]


def _each(pairs: list[tuple[OpInfo, str]]) -> pytest.MarkDecorator:
    ids = [f"{info.name}-{peer}" for info, peer in pairs]
    return pytest.mark.parametrize(("info", "peer"), pairs, ids=ids)


def _tiny(info: OpInfo) -> Any:
    sizes = {name: min(size, 24) for name, size in info.bench[0].sizes.items()}
    return dataclasses.replace(info.bench[0], sizes=sizes)


def _usable(info: OpInfo, peer: str) -> tuple[peers.Peer, str, torch.dtype]:
    """The peer, and a mode and a dtype that it takes part in; skips where this machine lacks it."""
    if peers.version(peer) is None:
        pytest.skip(f"{peer} is not installed")
    found = peers.get(info, peer)
    # of a whole loss fp64, in which it is judged: KeOps compiles for each dtype
    mode, dtype = ("fwd_bwd", torch.float64) if found.whole else ("fwd", torch.float32)
    reason = peers.why_not(info, peer, _tiny(info), dtype, mode, CPU)
    if reason is not None:
        pytest.skip(reason)
    return found, mode, dtype


@_each(WHOLE)
def test_a_whole_peer_computes_what_the_op_defines(info: OpInfo, peer: str) -> None:
    found, _, dtype = _usable(info, peer)
    assert found.whole
    sample = info.bench_sample(_tiny(info), CPU, dtype)
    hi, hi_gradients = numerics.value_and_grads(
        lambda *args: info.define(sample, args), sample.args, 1
    )
    prepared = found.prepare(sample)
    out, gradients = numerics.value_and_grads(found.function(prepared), prepared.args, 1)
    for what, computed, wanted in (("loss", out, hi), ("gradient", gradients[0], hi_gradients[0])):
        error = numerics.compare(what, computed, wanted, wanted, dtype)
        assert error.ok, error.detail


@pytest.mark.parametrize("peer", SEARCHERS)
def test_a_search_finds_the_negatives_where_the_nearest_row_is_one(peer: str) -> None:
    info = INFOS["triplet_loss"]
    found, _, dtype = _usable(info, peer)
    assert not found.whole
    # The other row of its label is the opposite one, the farthest that there is, so that the
    # nearest other row is a negative.
    half = randn(40, 24, seed=3, device=CPU, dtype=dtype)
    x, labels = torch.cat((half, -half)), torch.arange(40).repeat(2)
    sample = found.prepare(Sample("opposite", (x, labels)))
    assert torch.equal(sample.args[0], F.normalize(x, dim=1))
    raw = Sample("raw", (x, labels), {"normalize_embeddings": False})
    assert found.prepare(raw).args[0] is x
    mined = kd.mine_triplets(x, labels)
    assert torch.equal(found.function(sample)(*sample.args), mined.negatives)
    assert torch.equal(mined.positives, (torch.arange(80) + 40) % 80)


def test_keops_mines_what_the_op_does_among_equal_rows() -> None:
    info = INFOS["triplet_loss"]
    _, _, dtype = _usable(info, "pykeops")
    from kdkernels.testing.peers import pykeops

    x, labels = info.bench_sample(_tiny(info), CPU, dtype).args
    x, labels = torch.cat((x, x[:5], -x[:1])), torch.cat((labels % 5, labels[:5] % 5, labels[:1]))
    labels[-1] = 100  # alone with its label
    positive, negative, valid = pykeops.mine(F.normalize(x, dim=1), labels)
    mined = kd.mine_triplets(x, labels, backend="reference")
    assert torch.equal(valid.nonzero().squeeze(1), mined.anchors)
    assert torch.equal(positive[valid], mined.positives)
    assert torch.equal(negative[valid], mined.negatives)


@pytest.mark.parametrize("peer", ["scikit-learn", "pykeops"])
def test_parts_of_pairwise_are_those_of_its_matrix(peer: str) -> None:
    info = INFOS["pairwise"]
    found, _, dtype = _usable(info, peer)
    assert not found.whole
    # KeOps compiles for each metric
    for metric in ("euclidean",) if peer == "pykeops" else METRICS:
        x = randn(24, 8, seed=3, device=CPU, dtype=dtype)
        sample = Sample(metric, (x,), {"metric": metric, "gamma": 0.1})
        out = found.function(sample)(x)
        hi, low = (info.define(sample, (x.to(t),)) for t in (torch.float64, dtype))
        if peer == "pykeops":
            hi, low = hi.sum(1), low.sum(1)
        # both take some distances from products
        error = numerics.compare(metric, out, hi, low, dtype, scale=x.square().sum(1).max().item())
        assert error.ok, error.detail


def test_metrics_that_a_peer_lacks_are_skipped_with_the_reason() -> None:
    info = INFOS["pairwise"]
    _usable(info, "pykeops")
    (shape,) = (shape for shape in info.bench if shape.name == "cosines")
    reason = peers.why_not(info, "pykeops", shape, torch.float32, "fwd", CPU)
    assert reason == "pykeops has no metric 'cosine'"


@_each(PAIRS)
def test_the_record_names_its_version_its_work_and_the_ratio(
    info: OpInfo, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    found, mode, dtype = _usable(info, peer)
    assert peer in record.default_variants(info, CPU)
    variants = ("reference", "mm", peer)
    entry = record.run(
        info, _tiny(info), dtype, mode, device=CPU, variants=variants, rounds=5, memory=False
    )
    results = entry["variants"]
    assert results[peer]["version"] == peers.version(peer)
    assert results[peer]["computes"] == found.computes
    assert found.computes.endswith(".")
    assert ("error" in results[peer]) == found.whole
    assert results["reference"]["speedup_over"][peer] > 0
    assert "speedup_over" not in results[peer]
    assert "speedup_over" not in results["mm"]
    named = f"{peer} {peers.version(peer)}"
    shown = _bench_report.table(entry).render()
    assert f"x {peer}" in shown
    assert _bench_report.footnotes(entry) == [f"{named}: {found.computes}"]
    text = _report().render([("r.json", entry)], [])
    assert f"| {named} |" in text
    assert f"`{info.name}`, {named}: {found.computes}" in text


@pytest.mark.parametrize("peer", SEARCHERS)
def test_a_search_takes_part_where_it_can_only(peer: str) -> None:
    info = INFOS["triplet_loss"]
    _usable(info, peer)
    shape = _tiny(info)

    def reason(mode: str, dtype: torch.dtype, device: str) -> str | None:
        return peers.why_not(info, peer, shape, dtype, mode, torch.device(device))

    assert reason("fwd", torch.float32, "cpu") is None
    assert reason("bwd", torch.float32, "cpu") == f"{peer} has no gradient"
    assert reason("fwd_bwd", torch.float32, "cpu") == f"{peer} has no gradient"
    assert reason("fwd", torch.bfloat16, "cpu") == f"{peer} has no bfloat16"
    assert reason("fwd", torch.float32, "cuda") == f"{peer} is not timed on cuda"


def test_keops_is_skipped_without_a_compiler_and_where_it_takes_minutes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = INFOS["triplet_loss"]
    if peers.version("pykeops") is None:
        pytest.skip("pykeops is not installed")
    shapes = {shape.name: shape for shape in info.bench}
    sample = info.bench_sample(_tiny(info), CPU, torch.float32)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    ask = (sample, "pykeops", torch.float32, bench.GIB)
    assert bench.why_skip(info, _tiny(info), *ask) == "pykeops needs a C++ compiler"
    for name in ("pooled", "huge"):
        assert bench.why_skip(info, shapes[name], *ask) == "pykeops would take minutes"
    monkeypatch.undo()
    if peers.get(info, "pykeops").why_not() is None:
        assert bench.why_skip(info, shapes["embeddings"], *ask) is None


def test_an_absent_peer_is_skipped_with_the_reason() -> None:
    info = dataclasses.replace(opinfos()[0], peers=("no-such-distribution",))
    shape = _tiny(info)
    sample = info.bench_sample(shape, CPU, torch.float32)
    ask = (shape, sample, "no-such-distribution", torch.float32, bench.GIB)
    assert bench.why_skip(info, *ask) == "no-such-distribution is not installed"
    other = dataclasses.replace(info, peers=())
    assert bench.why_skip(other, *ask) == f"no-such-distribution has no {info.name}"


@_each([pair for pair in PAIRS if any(s.kwargs for s in samples(pair[0], CPU, torch.float64))])
def test_options_that_a_peer_lacks_are_refused(info: OpInfo, peer: str) -> None:
    found, _, dtype = _usable(info, peer)
    option = LACKED.get(info.name, "references")
    with_option = next((s for s in samples(info, CPU, dtype) if option in s.kwargs), None)
    assert with_option is not None
    with pytest.raises(ValueError, match="sample must have"):
        found.function(with_option)


def test_the_projected_teacher_has_the_codes_of_the_sample() -> None:
    info = INFOS["lsh_bce"]
    found = peers.get(info, "eager-with-teacher")
    for dtype in found.dtypes:
        sample = info.bench_sample(_tiny(info), CPU, dtype)
        student, teacher, weight = found.prepare(sample).args
        assert student is sample.args[0]
        assert teacher.shape == student.shape
        assert not torch.equal(teacher, student)
        assert torch.equal(reference.lsh_encode(teacher, weight), sample.args[1])
        other = dataclasses.replace(sample, args=(student, ~sample.args[1], weight))
        with pytest.raises(ValueError, match="must have the codes of the teacher"):
            found.prepare(other)
    assert peers.version("eager-with-teacher") == peers.version("torch")


def test_targets_over_a_peer() -> None:
    report = _report()
    same = {"op": "gram_mse", "shape": "pooled", "dtype": "float32", "mode": "fwd_bwd"}
    same |= {"device": "cpu", "backend": "cpu", "quantity": "speedup_over"}
    targets = [
        {**same, "peer": "one", "at_least": 15},
        {**same, "peer": "one", "at_least": 25},
        {**same, "peer": "other", "at_least": 1},
    ]
    entry = _entry(speedup_over={"one": 20.0})
    entry["variants"]["one"] = {**entry["variants"]["cpu"], "version": "1.2"}
    lines = report.render([("r.json", entry)], targets).splitlines()
    verdicts = [line.rsplit("|", 2)[1].strip() for line in lines if "speed-up over o" in line]
    assert verdicts == ["met", "missed", "not measured"]
    assert any("| one 1.2 |" in line for line in lines)


def test_targets_name_peers_of_the_op() -> None:
    targets = json.loads(TARGETS.read_text())["targets"]
    over = [(target["op"], target["peer"]) for target in targets if "peer" in target]
    assert over
    assert set(over) <= {(info.name, peer) for info, peer in PAIRS}
