"""The cost of foreign text, by doubling it twice."""

import time
from collections.abc import Callable


def assert_linear(work: Callable[[str], object], text: Callable[[int], str], size: int = 100_000) -> None:
    """Fail if four times the text costs more than nine times: linear work costs 4, quadratic 16."""

    def seconds(length: int) -> float:
        given, best = text(length), float("inf")
        for _ in range(3):
            began = time.thread_time()
            work(given)
            best = min(best, time.thread_time() - began)
        return best

    once = seconds(size)
    assert seconds(4 * size) < 9 * once + 0.01
