"""The log of a training run on local disks and object stores."""

import json

from grape_jax.runtime import files, log


def test_lines_wait_for_the_checkpoint_where_a_file_cannot_grow(tmp_path, monkeypatch):
    metrics, rewrites = tmp_path / "metrics.jsonl", tmp_path / "rewrites.jsonl"
    step_of = lambda path: [json.loads(line)["step"] for line in path.read_text().splitlines()]
    for local in (True, False):
        monkeypatch.setattr(files, "is_local", lambda _, local=local: local)
        run = log.Log(tmp_path, first=0)  # drops what the run before it wrote
        run.keep_rewrites(0, [{"query": "soup"}, {"query": "rocket"}])
        run.write(1, "grpo", {"loss": 0.5})
        assert local == bool(metrics.exists() and metrics.read_text())
        run.flush()
        run.write(2, "grpo", {"loss": 0.25})
        assert step_of(metrics) == ([1, 2] if local else [1])
        run.close()
        assert step_of(metrics) == [1, 2] and step_of(rewrites) == [1, 1]
