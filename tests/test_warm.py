# SPDX-License-Identifier: Apache-2.0
"""What `kdkernels.testing.warm` compiles is what Triton's JIT looks up, launch by launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kdkernels.testing import no_interpreter, warm

# The op with the fewest kernels. In one process: the cache is filled, then every sample is launched
# through the JIT by a driver that launches nothing, and Triton says of each kernel whether the
# cache had it.
_WARM_AND_LAUNCH = """
import json, sys
from triton import knobs
from kdkernels.testing import no_interpreter, warm

op, dtype = "rkd_angle", "bfloat16"
status = warm.main(["--target", "sm_90", "--op", op, "--dtype", dtype, "--processes", "2"])
found = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append([src.name, cache_hit])
failures = []
with warm.on_cpu_tensors(warm.named("sm_90")):
    for calls in warm.plan([op], [dtype]):
        info, samples, gradients = warm.samples(calls)
        failures += [warm.call(info, sample, gradients) for sample in samples]
json.dump({"status": status, "found": found, "failures": failures}, sys.stdout)
"""

# Keys of all kernels, asked for in either order, each in a process that has asked for none.
_KEYS = """
import json, multiprocessing, sys
from triton import JITFunction
from kdkernels.testing import triton_targets

found = {}
for module in triton_targets._modules("kdkernels.triton"):
    functions = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction)}
    found |= {name: f for name, f in functions.items() if "_kernel" in name}

def keys(names):
    return {name: found[name].cache_key for name in names}

names = sorted(found)
fork = multiprocessing.get_context("fork")
with fork.Pool(1) as one, fork.Pool(1) as other:
    orders = [one.apply(keys, [names]), other.apply(keys, [names[::-1]])]
json.dump(orders, sys.stdout)
"""


def test_the_key_of_a_kernel_does_not_depend_on_what_was_launched_before() -> None:
    first, last = json.loads(no_interpreter.printed("-c", _KEYS))
    assert len(first) > 50
    assert first == last


def test_the_jit_finds_every_kernel_in_the_cache(tmp_path: Path) -> None:
    printed = no_interpreter.printed("-c", _WARM_AND_LAUNCH, TRITON_CACHE_DIR=str(tmp_path))
    words, _, last = printed.rstrip().rpartition("\n")
    report = json.loads(last)
    assert report["status"] == 0, words
    assert not any(report["failures"])
    compiled = len([entry for entry in tmp_path.iterdir() if any(entry.glob("*.cubin"))])
    assert f"{compiled} kernels for sm_90" in words
    missed = [name for name, hit in report["found"] if not hit]
    assert len(report["found"]) == compiled > 0
    assert not missed


def test_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        warm.main([])
    assert "TRITON_INTERPRET must not be set" in capsys.readouterr().err
