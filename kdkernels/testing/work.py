# SPDX-License-Identifier: Apache-2.0
"""The measuring of one shape: variant by variant, so that what fails in one leaves the others."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from kdkernels.testing import bench, clock, oracle, peak, peers
from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample

PROFILED_CALLS = 5
Progress = Callable[[str, float], None]  # what is being done, and the finished share of it


class Work:
    """A shape, and what is known of each variant so far."""

    def __init__(
        self,
        info: OpInfo,
        shape: BenchShape,
        dtype: torch.dtype,
        mode: str,
        device: torch.device,
        say: Progress,
    ) -> None:
        self.info, self.shape, self.dtype, self.mode = info, shape, dtype, mode
        self.device, self._say = device, say
        self._clock = clock.of(device)
        self.results: dict[str, dict[str, Any]] = {}
        self._functions: dict[str, Callable[..., Any]] = {}  # of the variants that can be timed
        self._samples: dict[str, Sample] = {}
        self.oracle: str | None = None

    def prepare(
        self, asked: Sequence[str], refused: dict[str, str], memory_limit: float | None
    ) -> None:
        info, device = self.info, self.device
        self.results.clear()
        self._sample = info.bench_sample(self.shape, device, self.dtype)
        limit = bench.memory_limit(device) if memory_limit is None else memory_limit
        if "compile" in asked:
            torch._dynamo.reset()
        for name in asked:
            self.results[name] = {}
            if name in refused:
                self.results[name]["failed"] = refused[name]
            else:
                self._attempt(name, "preparation", functools.partial(self._admit, name, limit))
        if "skipped" in self.results.get("mm", {}):
            self.results["mm_part"] = {}
            self._attempt("mm_part", "preparation", functools.partial(self._take, "mm_part"))

    def _admit(self, name: str, limit: float) -> None:
        skipped = bench.why_skip(
            self.info, self.shape, self._sample, name, self.dtype, limit, self.mode,
            self.device,
        )  # fmt: skip
        if skipped is not None:
            self.results[name]["skipped"] = skipped
            return
        if name in self.info.peers:
            computes = peers.get(self.info, name).computes
            self.results[name] |= {"version": peers.version(name), "computes": computes}
        self._take(name)

    def _take(self, name: str) -> None:
        self._samples[name] = bench.variant_sample(self.info, self._sample, name)
        self._functions[name] = bench.variant_function(self.info, self._sample, name)

    def _attempt(
        self, name: str, stage: str, step: Callable[[], None], lacking: str | None = None
    ) -> None:
        """Do something for a variant. If it fails, that is its result, and it is done with; or if
        it only lacks a number then, the reason is the result of the name `lacking`."""
        try:
            step()
        except Exception as error:
            if lacking is None:
                self._fail(name, stage, error)
            else:
                self.results[name][lacking] = bench.reason(error)
        else:
            return
        self._raise_if_lost(name)
        self._clock.forget_failure()  # the exception, and the tensors that its frames hold, is gone

    def _raise_if_lost(self, name: str) -> None:
        reason = clock.lost(self.device)
        if reason is not None:
            raise clock.DeviceLostError(name, reason)

    def _fail(self, name: str, stage: str, error: Exception) -> None:
        self.results[name]["failed"] = f"{stage}: {bench.reason(error)}"
        self._functions.pop(name, None)

    def measure_errors(self) -> None:
        self._say("error", 0.0)
        truth = oracle.oracle(self.info, self.shape, self._sample, self.device)
        self.oracle = truth.name
        judged = [
            name
            for name in self._functions
            if not name.startswith("mm")
            and (name not in self.info.peers or peers.get(self.info, name).whole)
        ]

        def judge(name: str) -> None:
            errors = oracle.relative_errors(
                self._functions[name], self._samples[name], truth, self.info.diff_args[0]
            )
            # JSON has no NaN; a baseline in half precision may overflow
            self.results[name]["error"] = {
                what: e if math.isfinite(e) else str(e) for what, e in errors.items()
            }

        for i, name in enumerate(judged):
            self._attempt(name, "error", functools.partial(judge, name), "error_failed")
            self._say("error", (i + 1) / len(judged))

    def measure_memory(self) -> None:
        names = [name for name in self._functions if not name.startswith("mm")]
        reason = peak.why_not(self.device)

        def measure(name: str) -> None:
            what = self.info.name, self.shape, self.dtype, self.mode, name, self.device
            extra_mib = (
                peak.on_gpu(self._calls(name, [self._samples[name].args]), self.device)
                if self.device.type == "cuda"
                else peak.extra_mib(*what)
            )
            self.results[name]["peak_extra_mib"] = round(extra_mib, 1)

        for i, name in enumerate(names):
            self._say("memory", i / len(names))
            if reason is None:
                step = functools.partial(measure, name)
                self._attempt(name, "memory", step, "peak_extra_mib_skipped")
            else:
                self.results[name]["peak_extra_mib_skipped"] = reason
        self._say("memory", 1.0)

    def _calls(self, name: str, sets: list[tuple[Any, ...]]) -> clock.Call:
        return bench.timed(self._functions[name], sets, self.mode, name)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What is found inside is forgotten afterwards: what fails in one way of timing is tried in
        the next."""
        results, functions = copy.deepcopy(self.results), dict(self._functions)
        yield
        self.results, self._functions = results, functions

    def time(self, timing: str, seconds: float, rounds: int | None) -> None:
        """Add times, launches and ratios in one way of timing."""
        self._say("time", 0.0)
        products = {
            name: self.info.product.flops(*self._samples[name].args)
            for name in self._functions
            if name.startswith("mm")
        }
        if timing == "kernels":
            self._time_kernels()
        else:
            self._time_rounds(timing, seconds, rounds)
        _add_ratios(self.info, self.shape, self.dtype, self.mode, products, self.results)

    def _time_rounds(self, timing: str, seconds: float, rounds: int | None) -> None:
        calls: dict[str, clock.Call] = {}
        calls_of: dict[str, int] = {}
        release: list[Callable[[], None]] = []

        def make(name: str) -> None:
            sets = bench.input_sets(self._samples[name], self.device)
            if timing == "call":
                calls[name] = self._calls(name, sets)
                return
            graph = self._clock.graph(functools.partial(self._calls, name, sets), len(sets))
            release.append(graph.release)
            calls[name], calls_of[name] = graph.call, graph.calls
            if graph.launches is not None:
                self.results[name]["launches"] = round(graph.launches, 2)
            else:
                self.results[name]["launches_unknown"] = graph.launches_unknown

        for name in list(self._functions):
            self._attempt(name, timing, functools.partial(make, name))

        def drop(name: str, error: Exception) -> None:
            self._fail(name, timing, error)
            self._raise_if_lost(name)

        timed = bench.measure(
            calls, seconds=seconds, device=self.device, calls_of=calls_of,
            on_round=lambda share: self._say("time", share),
            on_failure=drop,
            **({} if rounds is None else {"min_rounds": rounds, "max_rounds": rounds}),
        )  # fmt: skip
        for name, times in timed.items():
            self.results[name]["time_us"] = {
                key: round(value, 2) for key, value in asdict(times).items() if key != "rounds"
            }
            self.results[name]["rounds"] = times.rounds
        calls.clear()
        for free in release:
            free()

    def _time_kernels(self) -> None:
        def profile(name: str) -> None:
            sets = bench.input_sets(self._samples[name], self.device)
            kernels = self._clock.kernels(self._calls(name, sets), PROFILED_CALLS)
            self.results[name] |= {
                "device_us": round(sum(kernel.time_us for kernel in kernels), 2),
                "launches": round(sum(kernel.launches for kernel in kernels), 2),
                "kernels": [asdict(kernel) for kernel in kernels],
            }

        names = list(self._functions)
        for i, name in enumerate(names):
            self._attempt(name, "kernels", functools.partial(profile, name))
            self._say("time", (i + 1) / len(names))


def _add_ratios(
    info: OpInfo,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    products: dict[str, float],
    results: dict[str, dict[str, Any]],
) -> None:
    """Speed-up over eager and over each peer, time in units of the product, and the share of the
    limit that is reached. `products` are the operations of each product timed."""
    median = {
        name: result["time_us"]["p50"] if "time_us" in result else result["device_us"]
        for name, result in results.items()
        if "time_us" in result or "device_us" in result
    }
    rate = None  # flops per microsecond
    for name, flops in ((name, flops) for name, flops in products.items() if name in median):
        rate = flops / median[name]
        results[name]["gflops_per_second"] = round(rate * 1e-3, 1)
    for name, time_us in median.items():
        if name.startswith("mm"):
            continue
        if "eager" in median:
            results[name]["speedup_over_eager"] = round(median["eager"] / time_us, 3)
        over = {peer: median[peer] / time_us for peer in info.peers if peer in median}
        if over and name not in info.peers:
            results[name]["speedup_over"] = {peer: round(x, 3) for peer, x in over.items()}
        if "mm" in median:
            results[name]["times_mm"] = round(time_us / median["mm"], 3)
        if rate is not None and mode == "fwd_bwd":
            results[name]["percent_of_limit"] = round(
                100 * info.cost(shape, dtype).flops / rate / time_us, 1
            )
