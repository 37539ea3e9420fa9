"""`adaclip bench`: every row at its smallest size, and the comparison with earlier results."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaclip_finetune.bench.measure import Aim, Measured, Setup, check, in_turns
from adaclip_finetune.bench.rows import ROWS
from adaclip_finetune.bench.run import slower
from adaclip_finetune.cli import main
from adaclip_finetune.errors import UserError

CPU = Setup(torch.device("cpu"), turns=3)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_works(row: str) -> None:
    cases = list(ROWS[row].function()(replace(CPU, turns=1, quick=True)))
    assert cases
    for case in cases:
        assert case.aims and all(len(seconds) == 1 and seconds[0] > 0 for seconds in case.seconds.values())
        assert all(len(case.ratios(aim)) == 1 for aim in case.aims)


def test_the_command_writes_a_table_and_compares(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results, words = tmp_path / "bench.json", ["bench", "hard_topk", "--quick", "--device", "cpu"]
    assert main([*words, "--json", str(results)]) == 0
    out = capfd.readouterr().out
    assert re.search(r"processor: .*threads", out) and "| ours |" in out
    found = json.loads(results.read_text())
    assert list(found["rows"]) == ["hard_topk"] and set(found["machine"]) >= {"processor", "versions", "device"}
    (case,) = found["rows"]["hard_topk"]
    case["aims"][0]["times_as_fast"] = [1000.0]
    results.write_text(json.dumps(found))
    assert main([*words, "--compare", str(results)]) == 1
    assert "1000.00 times as fast before" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hard_topkk"], "did you mean hard_topk"),
        (["--turns", "0"], "--turns 0"),
        (["--compare", "nowhere.json"], "nowhere.json: no such file"),
        (["--compare", "{}/other.json"], "is not a file that `adaclip bench --json` wrote"),
        (["--compare", "{}/rows.json"], "is not a file that `adaclip bench --json` wrote"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "rows.json").write_text('{"rows": {}}')
    assert main(["bench", "--device", "cpu", *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_only_what_is_beyond_the_spread_counts_as_slower() -> None:
    def results(*ratios: float) -> dict[str, object]:
        aim = {"ours": "ours", "reference": "plain", "times_as_fast": sorted(ratios)}
        return {"machine": {}, "rows": {"row": [{"case": "case", "aims": [aim]}]}}

    old = results(2.0, 2.2, 2.4)
    assert slower(old, results(1.5, 1.6, 1.7))
    assert not slower(old, results(1.5, 1.6, 2.1))  # one turn was as fast as before
    assert not slower(results(2.0, 2.1), results(1.98, 1.99))  # less than a tenth
    assert not slower({"machine": {}, "rows": {}}, old)
    assert not slower(old, copy.deepcopy(old))


def test_alternatives_take_turns_in_both_directions() -> None:
    calls: list[str] = []
    seconds = in_turns(CPU, {name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "baabbaab" and [len(own) for own in seconds.values()] == [3, 3]


def test_ratios_are_taken_within_a_turn() -> None:
    measured = Measured("case", {"ours": [1.0, 2.0], "plain": [2.0, 8.0]}, [])
    assert measured.ratios(Aim("ours", "plain")) == [2.0, 4.0] and measured.median("plain") == 5.0


def test_results_are_checked_before_anything_is_timed() -> None:
    reference = torch.tensor([1.0, -100.0])
    check("sums", reference + 0.01, reference, 1e-3)
    for wrong in (reference + 1, reference * torch.nan, reference[:1]):
        with pytest.raises(UserError, match="sums differ from the reference"):
            check("sums", wrong, reference, 1e-3)
