"""A model as mteb measures it, on mteb's own small tasks and on the example data."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adaclip_finetune import load_retriever, mteb_model
from adaclip_finetune.errors import UserError
from adaclip_finetune.search import mteb_model as module
from adaclip_finetune.search.mteb_model import MtebModel

EXAMPLE = Path(__file__).parents[2] / "dataset_example"

installed = pytest.mark.skipif(find_spec("mteb") is None, reason="mteb is not installed: pip install .[mteb]")


@pytest.fixture(scope="module")
def model() -> MtebModel:
    return mteb_model(EXAMPLE / "tiny_clip", num_frm=4)


def loader(columns: dict[str, list[Any]], workers: int = 0) -> Any:
    """Return a data loader as mteb gives it to `encode`."""
    from datasets import Dataset, Video

    rows = Dataset.from_dict(columns)
    if "video" in columns:
        rows = rows.cast_column("video", Video())
    return torch.utils.data.DataLoader(rows, batch_size=2, num_workers=workers)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(UserError, match=r"adaclip-finetune\[mteb\]"):
        mteb_model(EXAMPLE / "tiny_clip")


@installed
@pytest.mark.parametrize(
    "name",
    [
        *("MockVideoRetrievalT2V", "MockVideoRetrievalV2T", "MockVideoZeroshotClassificationTask"),
        *("MockVideoClassification", "MockVideoClusteringTask", "MockVideoPairClassificationTask"),
        *("MockAny2AnyRetrievalT2ITask", "MockRetrievalTask"),
    ],
)
def test_tasks_of_all_kinds_run(model: MtebModel, name: str) -> None:
    import mteb
    from mteb.mocks import mock_tasks

    (result,) = mteb.evaluate(model, getattr(mock_tasks, name)(), cache=None, show_progress_bar=False).task_results
    assert 0 <= result.get_score() <= 1


@installed
def test_the_figures_are_those_of_our_own_vectors(model: MtebModel) -> None:
    import mteb
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.mocks.mock_tasks import MockVideoRetrievalT2V

    annotation = json.loads((EXAMPLE / "test.json").read_text())
    captions = {name: row["sentences"][0] for name, row in list(annotation.items())[:16]}
    files = {name: EXAMPLE / "videos" / f"{name}.mp4" for name in captions}

    class Example(MockVideoRetrievalT2V):
        def load_data(self, **_kwargs: Any) -> None:
            queries = Dataset.from_dict({"id": list(captions), "text": list(captions.values())})
            videos = {"id": list(files), "video": [path.read_bytes() for path in files.values()]}
            corpus = Dataset.from_dict(videos).cast_column("video", Video())
            relevant = {name: {name: 1} for name in captions}
            split = RetrievalSplitData(queries=queries, corpus=corpus, relevant_docs=relevant, top_ranked=None)
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    (result,) = mteb.evaluate(model, Example(), cache=None, show_progress_bar=False).task_results
    ours = load_retriever(EXAMPLE / "tiny_clip", num_frm=4)
    videos = torch.stack([ours.encode_video(path)[0] for path in files.values()])
    cosines = ours.encode_text(list(captions.values())) @ videos.T
    for k in (1, 3, 5):
        found = (cosines.topk(k).indices == torch.arange(16)[:, None]).any(dim=1).float().mean()
        assert result.scores["test"][0][f"recall_at_{k}"] == pytest.approx(float(found), abs=1e-5)


@installed
@pytest.mark.parametrize("workers", [0, 2])
def test_vectors_are_those_of_an_index_and_add_up(model: MtebModel, workers: int) -> None:
    files = sorted((EXAMPLE / "videos").glob("*.mp4"))[:3]
    given = {"text": ["a red square", "a blue circle", "a star"], "video": [path.read_bytes() for path in files]}
    texts, videos, both = (
        model.encode(loader({kind: given[kind] for kind in kinds}, workers))
        for kinds in (["text"], ["video"], ["text", "video"])
    )
    torch.testing.assert_close(texts, model.model.encode_text(given["text"]))
    torch.testing.assert_close(videos, torch.stack([model.model.encode_video(path)[0] for path in files]))
    torch.testing.assert_close(both, torch.nn.functional.normalize(texts + videos, dim=-1))
    torch.testing.assert_close(model.similarity(texts, videos).diagonal(), model.similarity_pairwise(texts, videos))


@installed
def test_a_broken_video_is_named(model: MtebModel, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match=r"broken\.mp4"):
        model.encode(loader({"video": [str(tmp_path / "broken.mp4")]}))


@installed
def test_results_are_stored_by_the_model_that_gave_them(model: MtebModel) -> None:
    about, other = model.mteb_model_meta, mteb_model(EXAMPLE / "tiny_clip", num_frm=8).mteb_model_meta
    assert (about.name, about.embed_dim) == ("adaclip-finetune/tiny_clip", 96)
    assert about.revision != other.revision
