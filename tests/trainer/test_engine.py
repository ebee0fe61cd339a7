"""The engine under every ZeRO stage and on several ranks: one problem, one curve."""

import json
from pathlib import Path

import pytest
from rank_processes import run_ranks

SCRIPT = Path(__file__).with_name("engine_ranks.py")
FLOAT32 = [f"{stage}-float32" for stage in range(4)]
BFLOAT16 = [f"{stage}-bfloat16" for stage in (1, 2, 3)]
OFFLOADED = ["1-float32-cpu", "2-float32-cpu", "3-float32-cpu", "3-float32-nvme"]
OFFLOADED_BFLOAT16 = ["2-bfloat16-cpu", "3-bfloat16-nvme"]
COPIED = ["3-float32-copy"]  # last: DeepSpeed makes its groups once a process
ALL = FLOAT32 + BFLOAT16 + OFFLOADED + OFFLOADED_BFLOAT16 + COPIED


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """case@ranks -> what `engine_ranks.run_stage` found."""
    folder = tmp_path_factory.mktemp("engine")
    run_ranks(SCRIPT, 1, str(folder), "0-float32", "3-float32", "3-bfloat16")
    run_ranks(SCRIPT, 2, str(folder), *ALL)
    found = {}
    for ranks in (1, 2):
        for case, result in json.loads((folder / f"ranks-{ranks}.json").read_text()).items():
            found[f"{case}@{ranks}"] = result
    return found


@pytest.mark.parametrize("case", ["3-float32@1", *(f"{case}@2" for case in FLOAT32 + OFFLOADED + COPIED)])
def test_stage_and_ranks_do_not_change_losses_and_gradient_norms(results: dict, case: str) -> None:
    expected = results["0-float32@1"]
    for (loss, norm), (expected_loss, expected_norm) in zip(
        results[case]["curve"], expected["curve"], strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert results[case]["after_skip"] == pytest.approx(expected["after_skip"], rel=1e-5)
    for name, values in expected["state"].items():
        # Adam divides by tiny second moments, so rounding shows in single weights, within a share of lr.
        assert results[case]["state"][name] == pytest.approx(values, abs=2e-4), name


@pytest.mark.parametrize("case", [f"{case}@2" for case in BFLOAT16 + OFFLOADED_BFLOAT16])
def test_bfloat16_follows_float32(results: dict, case: str) -> None:
    losses = [loss for loss, _ in results[case]["curve"]]
    assert losses == pytest.approx([loss for loss, _ in results["0-float32@1"]["curve"]], rel=0.01)


@pytest.mark.parametrize("case", [f"{case}@2" for case in ALL])
def test_nan_on_one_rank_is_seen_and_its_step_leaves_no_trace(results: dict, case: str) -> None:
    assert results[case]["spoiled"] != results[case]["spoiled"]  # NaN
    assert results[case]["kept"]


@pytest.mark.parametrize("case", [f"{case}@2" for case in ALL])
def test_fragments_cover_every_element_once(results: dict, case: str) -> None:
    assert results[case]["covered_once"]


@pytest.mark.parametrize("case", [f"{case}@2" for case in BFLOAT16])
def test_buffers_stay_in_float32(results: dict, case: str) -> None:
    dtype, *values = results[case]["buffer"]
    assert dtype == "torch.float32"
    assert values == pytest.approx([1.00001, 3.14159], rel=1e-7)


@pytest.mark.parametrize("case", [f"{case}@2" for case in ALL])
def test_nvme_is_where_states_and_weights_are_and_leaves_no_file(results: dict, case: str) -> None:
    assert results[case]["on_disk"] == ("nvme" in case)
    assert results[case]["files"] == 0
