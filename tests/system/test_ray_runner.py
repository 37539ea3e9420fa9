"""`adaclip index --runner ray` on a local cluster of two machines, one of which dies."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from indexing import contents, index
from media import write_video
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving import until

from adaclip_finetune.errors import UserError
from adaclip_finetune.search.build import index_videos
from adaclip_finetune.search.collection import collect_folder
from adaclip_finetune.search.ray_runner import RayRunner
from adaclip_finetune.search.search_model import load_retriever

Settings = dict[str, Any]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Start two machines of one CPU each on this one, beside a head that does no work, and connect to them."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'adaclip-finetune[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 2 * 10**8})
        patch.setenv("RAY_ADDRESS", nodes.address)
        for _ in range(2):
            add_machine(nodes)
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def add_machine(cluster: Any) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=2 * 10**8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four videos, of which one is a copy, and a file that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(23):
        write_video(folder / f"{number:02}.mp4", 20 + number)
    shutil.copy(folder / "07.mp4", folder / "copy.mp4")
    (folder / "broken.mp4").write_text("no video")
    return folder


def actors() -> list[psutil.Process]:
    """Return the processes of this cluster that embed, which Ray names by their class."""
    return [process for process in psutil.Process().children(recursive=True) if "Map" in _title(process)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


@pytest.mark.parametrize("killed", ["process", "machine"])
def test_the_bytes_are_those_of_one_process(
    killed: str, cluster: Any, run: Path, clips: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """One of two processes, or machines, is killed as soon as the first batch is finished."""
    flags = ("--moments", "--window", "0.4", "--stride", "0.2")
    parts, finished = tmp_path / "ray" / "parts", list[int]()

    def kill() -> None:
        until(lambda: list(parts.glob("*.safetensors")), 600)
        if killed == "process":
            os.kill(actors()[0].pid, signal.SIGKILL)
        else:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        finished.append(len(list(parts.glob("*.safetensors"))))

    killer = threading.Thread(target=kill)
    killer.start()
    assert index(run, clips, *flags, "--runner", "ray", output=tmp_path / "ray") == 1
    killer.join()
    if killed == "machine":
        add_machine(cluster)
    assert finished and finished[0] < 7, "eight batches of three videos: others were under way"
    assert "broken.mp4" in capsys.readouterr().err
    assert index(run, clips, *flags, output=tmp_path / "one") == 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_a_model_that_fails_is_told_as_in_one_process(
    cluster: Any, run: Path, clips: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """The weights of a run change while it is indexed."""
    changing = Path(shutil.copytree(run, tmp_path / "run"))
    model = load_retriever(changing, num_workers=0)
    weights = {name: 2 * tensor for name, tensor in load_file(changing / "best.safetensors").items()}
    with safe_open(changing / "best.safetensors", "pt") as file:
        save_file(weights, changing / "best.safetensors", file.metadata())
    with pytest.raises(UserError, match="is another model"):
        index_videos(model, collect_folder(clips), tmp_path / "i", runner=RayRunner(str(changing), {}))
    assert not (tmp_path / "i").exists()


def test_without_ray(run: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert index(run, clips, "--runner", "ray", output=tmp_path / "i") == 2
    assert "adaclip-finetune[ray]" in capsys.readouterr().err and not (tmp_path / "i").exists()
