"""CUDA graphs to be timed: replaying one costs the host the same whatever is in it."""

from collections.abc import Callable

import torch

MICROSECONDS_PER_GRAPH = 2000  # at least: a replay costs the host some ten


def graph_of(calls: list[Callable[[], object]], repeats: int) -> Callable[[], object]:
    """Capture all calls, so often, into one graph; return what replays it and waits."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay
