"""Rollouts from one prepared state: 16 copies of a sandbox try 16 actions, the best one is where the next round begins.

    python examples/rollouts.py

The policy is a stand-in for a model: it proposes code from a seed. What it proposes runs in a copy of the sandbox, with
all that was prepared there in memory, and cannot reach this machine.
"""

import random
import time
from concurrent.futures import ThreadPoolExecutor

from warmcell import Sandbox

WIDTH, ROUNDS = 16, 2

PREPARE = """
import math, random

rng = random.Random(7)
points = [rng.uniform(-2, 2) for _ in range(20_000)]        # takes a while to make, so it is made once
wanted = [1.5 * x * x - 0.5 * x + 2 for x in points]
best = [0.0, 0.0, 0.0]                                      # what the rollouts have found so far

def reward(coefficients):
    a, b, c = coefficients
    return -math.sqrt(sum((a * x * x + b * x + c - y) ** 2 for x, y in zip(points, wanted)) / len(points))
"""


def policy(number: int, step: float) -> str:
    """What one rollout does: change what was found so far a little."""
    chance = random.Random(f"{number} {step}")
    change = [chance.gauss(0, step) for _ in range(3)]
    return f"tried = [one + other for one, other in zip(best, {change})]\nreward(tried)"


def rollout(box: Sandbox, code: str) -> float:
    """Its reward; code that fails has none."""
    done = box.run(code, timeout=30)
    return float(done.text) if done.error is None and done.text is not None else float("-inf")


def main() -> None:
    with ThreadPoolExecutor(WIDTH) as threads, Sandbox(preload=(), timeout=600, tags={"example": "rollouts"}) as root:
        root.run(PREPARE).check()
        state, step = root, 1.0
        for number in range(ROUNDS):
            began = time.perf_counter()
            copies = state.fork(WIDTH)
            forked = time.perf_counter()
            codes = [policy(number * WIDTH + rank, step) for rank in range(WIDTH)]
            rewards = list(threads.map(rollout, copies, codes))
            winner = max(range(WIDTH), key=rewards.__getitem__)
            copies[winner].run("best = tried").check()
            print(
                f"round {number + 1}: {WIDTH} copies in {1000 * (forked - began):.0f} ms, "
                f"best reward {rewards[winner]:.3f}, worst {min(rewards):.3f}"
            )
            for copy in [one for one in copies if one is not copies[winner]] + [state] * (state is not root):
                copy.kill()
                copy.close()
            state, step = copies[winner], step / 2
        print("found", state.run("[round(one, 2) for one in best]").text)
        state.kill()
        state.close()


if __name__ == "__main__":
    main()
