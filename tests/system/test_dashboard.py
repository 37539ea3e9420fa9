"""The real optuna-dashboard on a study: what it shows, and that its delete button deletes."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuned import settings, study_of, use_quick_trials

from adaclip_finetune.tuning.run import tune

Page = Callable[[str, str], tuple[int, Any]]


def open_dashboard(url: str) -> Page:
    """Return a function that sends a request and returns the status and the JSON of the answer."""
    app = pytest.importorskip("optuna_dashboard").wsgi(url)

    def request(method: str, path: str) -> tuple[int, Any]:
        status: list[int] = []
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": "after=0",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": "0",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
        }
        body = b"".join(app(environ, lambda answer, *_: status.append(int(answer.split()[0]))))
        return status[0], json.loads(body or b"{}")

    return request


def test_the_dashboard_shows_the_trials_and_deletes_the_study(
    project: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_quick_trials(monkeypatch.setattr)
    grid = {"opt_params": {"top_k": {"choices": [2, 7]}}, "sampler": {"name": "GridSampler"}}  # of 6 frames
    config = settings(project, tmp_path, grid)
    tune(config)
    assert config.optuna_cfg is not None
    request = open_dashboard(config.optuna_cfg.storage)
    (study,) = request("GET", "/api/studies")[1]["study_summaries"]
    assert study["study_name"] == "tiny-full"
    status, shown = request("GET", f"/api/studies/{study['study_id']}")
    assert status == 200 and "t2v.R@1 on validation" in json.dumps(shown)
    trials = {trial["params"][0]["param_external_value"]: trial for trial in shown["trials"]}
    assert {value: trial["state"] for value, trial in trials.items()} == {"2": "Complete", "7": "Pruned"}
    assert "refused: top_k 7" in json.dumps(trials["7"]["user_attrs"])
    assert request("DELETE", f"/api/studies/{study['study_id']}")[0] == 204
    with pytest.raises(ValueError, match="study"):
        study_of(config)
