"""What Prometheus is told: in labels that are few and known, whatever users call their things."""

from prometheus_client import CollectorRegistry, generate_latest

from warmcell.extension.server.metrics import OWNERS, KeeperMetrics
from warmcell.sandbox.lifecycle import State
from warmcell.sandbox.usage import Usage


def told(metrics: KeeperMetrics) -> list[str]:
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry).decode().splitlines()


def test_without_a_keeper_all_is_zero() -> None:
    """Each series is there from the beginning, so that a rate has something to begin at."""
    lines = told(KeeperMetrics())
    assert "warmcell_keeper_up 0.0" in lines
    assert 'warmcell_sandboxes{owner="notebook",state="running"} 0.0' in lines
    assert sum(line.startswith("warmcell_sandboxes{") for line in lines) == len(State) * len(OWNERS)


def test_names_that_users_choose_are_no_labels() -> None:
    """A hundred owners make one series, and notebooks, GPUs and users none."""
    metrics = KeeperMetrics()
    metrics._sandboxes = [{"state": "running", "owner": f"agent-{n}", "notebook": "secret.ipynb"} for n in range(100)]
    metrics._sandboxes = [*metrics._sandboxes, {"state": "running", "owner": "notebook", "parked": {"vram_bytes": 7}}]
    metrics._usage = [{"owner": f"agent-{n}", "usage": Usage(gpu_given_back_s=1.0).to_json()} for n in range(100)]
    gpu = {"uuid": "GPU-1", "simulated": True, "lost": False, "leases": [{"mine": False, "user": "bob"}]}
    metrics._gpus = {"gpus": [gpu, {**gpu, "leases": []}, {**gpu, "lost": True}], "queue": [{}, {}]}
    lines = told(metrics)
    assert 'warmcell_sandboxes{owner="other",state="running"} 100.0' in lines
    assert 'warmcell_gpu_given_back_seconds_total{owner="other"} 100.0' in lines
    assert 'warmcell_gpus{simulated="true",state="others"} 1.0' in lines
    assert 'warmcell_gpus{simulated="true",state="free"} 1.0' in lines
    assert 'warmcell_gpus{simulated="true",state="lost"} 1.0' in lines
    assert "warmcell_gpu_queue_length 2.0" in lines
    assert "warmcell_parked_sandboxes 1.0" in lines
    assert "warmcell_parked_bytes 7.0" in lines
    assert not any(word in line for line in lines for word in ("agent", "secret", "GPU-1", "bob"))
