# SPDX-License-Identifier: Apache-2.0
"""Every op on its named workloads: `pytest benchmarks -k "pooled and float32 and fwd_bwd"`.

pytest-benchmark times each variant by itself and compares runs; `extra_info` holds the interleaved
measurement, whose ratios are the ones to quote.
"""

from __future__ import annotations

from typing import Any

import pytest

from kdkernels.testing import bench


def test_time(workload: Any, benchmark: Any, measured: Any, gated: Any) -> None:
    info, shape, dtype, mode, variant, device = workload
    sample = info.bench_sample(shape, device, dtype)
    limit = bench.memory_limit(device)
    reason = bench.why_skip(info, shape, sample, variant, dtype, limit, mode)
    if reason is not None:
        pytest.skip(reason)
    wrong = gated(info.name, variant, device, dtype)
    assert not wrong, "nothing is timed that is wrong:\n" + "\n".join(wrong)
    entry = measured(info.name, shape.name, dtype, mode, device)
    function = bench.variant_function(info, sample, variant)
    sets = bench.input_sets(bench.variant_sample(info, sample, variant), device)
    call = bench.synchronised(bench.timed(function, sets, mode, variant), device)
    benchmark.group = f"{info.name} {shape.name} {dtype} {mode}"
    benchmark.extra_info.update(
        entry["variants"][variant],
        environment=entry["environment"],
        sizes=shape.sizes,
        oracle=entry["oracle"],
        commit=entry["commit"],
        dirty=entry["dirty"],
    )
    numbers = iter(range(10**9))
    benchmark.pedantic(lambda: call(next(numbers)), rounds=5, iterations=1, warmup_rounds=1)
