"""How long calls take, on whatever device does the work."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Call = Callable[[int], Any]  # takes the number of the call, to pick a buffer by


class Stopwatch:
    """Seconds on a device: by its own events on CUDA, which the host waits for before and after, never in between.

    `clock` is that of the host; `time.process_time` counts the CPU time of this process, on a machine that others use.
    """

    def __init__(self, device: str | torch.device = "cpu", clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self._calls = torch.device(device), clock, 0

    def seconds(self, call: Call, count: int = 1) -> float:
        """Of one call, when `count` are made one after the other; each gets another number."""
        numbers = range(self._calls, self._calls + count)
        self._calls += count
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            for i in numbers:
                call(i)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / count
        began = self.clock()
        for i in numbers:
            call(i)
        return (self.clock() - began) / count

    def in_turns(
        self, calls: Mapping[Any, Call], rounds: int, budget: float = 1e9, least: int = 5, shortest: float = 2e-3
    ) -> dict[Any, np.ndarray]:
        """Seconds of each call, [rounds]: in every round all take their turn, so that all see the same machine, in an
        order drawn anew, so that none is always the one after a call that empties the caches.

        Each is called twice before, to warm up, and in a turn as often as the fastest fills `shortest` seconds: the
        first call of a turn finds the caches cold, and what that costs is spread over as many calls for all. Rounds
        end after `budget` seconds, though not before there are `least`.
        """
        for call in calls.values():
            self.seconds(call)
        fastest = min(self.seconds(call) for call in calls.values())
        count = int(min(50, max(1, shortest / max(fastest, 1e-9))))
        times: dict[Any, list[float]] = {name: [] for name in calls}
        began, order, draw = time.perf_counter(), list(calls), random.Random(0)
        for done in range(rounds):
            if done >= least and time.perf_counter() - began > budget:
                break
            draw.shuffle(order)
            for name in order:
                times[name].append(self.seconds(calls[name], count))
        return {name: np.array(seconds) for name, seconds in times.items()}
