"""The benchmark runs at toy size on a CPU, and its report says what the results file does: in the README too."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.pages import BENCHMARKS, ON_CPU, RESULTS, ROOT, report, run_benchmark, shared_file

PAGES = ("README.md", "benchmarks/README.md")
COMPILED = ("torch compile", "torch compile, metrics")  # the compiler's half a minute shows nothing of the benchmark

with_jax = pytest.mark.skipif(not (find_spec("jax") and find_spec("optax")), reason="needs JAX and optax")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = ["--device", "cpu", "--rounds", "2", "--commit", "0123456789", "--skip", *COMPILED, "--out"]
    run = partial(run_benchmark, "loss_step.py", *arguments, TRITON_INTERPRET="0", **ON_CPU)
    return shared_file(tmp_path_factory, "cpu.json", run)


@pytest.fixture(scope="module")
def results(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def toy(results: dict) -> dict[str, dict]:
    return results["shapes"]["toy"]


def _ours(rows: dict[str, dict], frontend: str = "") -> dict[str, dict]:
    return {label: row for label, row in rows.items() if label.startswith(f"twinhead {frontend}")}


def test_the_file_says_what_was_measured(results: dict) -> None:
    assert results["device"] == "cpu"
    assert results["commit"] == "0123456789"
    assert results["versions"]["torch"]
    assert results["shapes"]["toy"]["size"] == [96, 32, 512]


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--device: there is no GPU that torch sees; with cpu it measures toys"):
        run_benchmark("loss_step.py", "--out", tmp_path / "none.json", **ON_CPU)
    assert not (tmp_path / "none.json").exists()


def test_nothing_of_ours_fails_and_all_is_timed(toy: dict[str, dict]) -> None:
    for section, base in (("training", "floor"), ("half ignored", "floor"), ("evaluation", "one projection")):
        rows = toy[section]
        assert rows[base]["ratio"] == 1.0
        for label, row in _ours(rows).items():
            assert "failed" not in row, (section, label)
            assert row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert row["ratio"] == pytest.approx(row["ms"] / rows[base]["ms"])
            assert row["rounds"] == 2
    assert len(_ours(toy["training"], "torch")) == 5
    assert len(_ours(toy["half ignored"], "torch")) == 4
    assert len(_ours(toy["evaluation"], "torch")) == 2


def test_errors_are_within_those_of_torch_over_upcast_logits(toy: dict[str, dict]) -> None:
    for section, kinds in (("training", ("random", "peaked")), ("half ignored", ("half ignored",))):
        for kind in kinds:
            torchs = toy[section]["torch eager"][kind]
            assert 1e-4 < torchs["dx_error"] < 0.01  # bf16's rounding
            for label, row in _ours(toy[section]).items():
                assert row[kind]["loss_error"] < 1e-5, label
                assert row[kind]["dx_error"] <= 1.1 * torchs["dx_error"], label
                assert row[kind]["dw_error"] <= 1.1 * torchs["dw_error"], label


def test_predictions_are_those_of_float32(toy: dict[str, dict]) -> None:
    predicted = [row["random"]["predictions_wrong"] for row in _ours(toy["evaluation"]).values() if "wrong" in str(row)]
    assert predicted and set(predicted) == {0.0}


@with_jax
def test_jax_has_the_bits_of_torch(toy: dict[str, dict]) -> None:
    rows = _ours(toy["training"], "jax")
    assert len(rows) == 4
    assert all(row["bits_of_torch"] for row in rows.values())


def test_small_steps_are_timed_as_calls_too(toy: dict[str, dict]) -> None:
    for row in _ours(toy["training"], "torch").values():
        assert 0 < row["host_us"] <= 1.5 * row["pipelined_us"]
        assert row["waited_us"] > 0


def test_given_logits_are_compared_with_a_copy(results: dict) -> None:
    rows = results["logits"]["rows"]
    row, copy = rows["twinhead torch"], rows["copy"]
    assert row["random"]["dx_error"] <= 1.1 * rows["torch eager"]["random"]["dx_error"]
    assert row["forward_share"] == pytest.approx(copy["ms"] / 2 / row["forward_ms"])
    assert row["backward_share"] == pytest.approx(copy["ms"] / (row["step_ms"] - row["forward_ms"]))
    assert copy["gb_per_s"] == pytest.approx(4 * 64 * 512 / copy["ms"] / 1e6)


def test_scaling_has_its_points(results: dict) -> None:
    assert results["scaling"]["tokens"]["48x32x512"]["rows"]["twinhead torch, speed"]["ratio"] > 0
    assert results["scaling"]["vocab"]["96x32x256"]["rows"]["twinhead torch, lean"]["ratio"] > 0


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's modules can be imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_parts_are_added_to_those_of_the_same_commit(modules: None, tmp_path: Path) -> None:
    from results import Results

    path = tmp_path / "cpu.json"
    Results(path, "cpu", "first").add("shapes", "one", value={"size": 1})
    Results(path, "cpu", "first").add("shapes", "two", value={"size": 2})
    assert json.loads(path.read_text())["shapes"] == {"one": {"size": 1}, "two": {"size": 2}}
    Results(path, "cpu", "second").add("shapes", "two", value={"size": 3})
    written = json.loads(path.read_text())
    assert written["commit"] == "second"
    assert written["shapes"] == {"two": {"size": 3}}


def test_a_contender_that_fails_does_not_stop_the_others(modules: None) -> None:
    from measure import Clock, check, take_turns
    from problems import Result, make_problems, reference

    problem = make_problems((8, 4, 16), "cpu")["random"]
    expected = reference(problem)

    def fails(problem: object) -> None:
        raise MemoryError("out of\nmemory")

    contenders = {
        "fails": fails,
        "wrong": lambda problem: lambda: Result(2 * expected.loss),
        "right": lambda problem: lambda: expected,
    }
    rows, steps = check([("random", problem, expected)], contenders)
    assert rows["fails"]["failed"] == "MemoryError: out of memory"
    assert rows["wrong"]["failed"] == "AssertionError: wrong results"
    assert rows["wrong"]["random"]["loss_error"] == pytest.approx(1.0)
    assert rows["right"]["random"] == {"loss_error": 0, "dx_error": 0, "dw_error": 0, "predictions_wrong": 0}
    assert list(steps) == ["right"]

    calls = iter(range(3))  # the fourth raises
    times, failures = take_turns({"stops": lambda: next(calls), "goes on": tuple}, Clock(0.0))
    assert failures == {"stops": "StopIteration:"}
    assert len(times["goes on"]) == 5
    assert "stops" not in times


def test_peaked_data_points_at_its_labels(modules: None) -> None:
    from problems import make_problems, reference

    expected = reference(problem := make_problems((512, 256, 4096), "cpu")["peaked"])
    assert 1.0 < expected.loss < 2.0
    assert (expected.predicted == problem.labels).float().mean() > 0.9
    assert (problem.labels == 0).float().mean() > 0.05  # the most frequent of 4096


def test_the_report_turns_a_file_into_pages_and_plots(file: Path, toy: dict[str, dict], tmp_path: Path) -> None:
    pages = report(file, PAGES, tmp_path)
    text = pages["README.md"]
    assert "One cpu, bf16, " in text and "commit 0123456." in text
    for label, row in _ours(toy["training"]).items():
        assert f"\n| {label} | {row['ratio']:.2f}" in text
    assert text.startswith((ROOT / "README.md").read_text().partition("<!-- benchmark:begin -->")[0])
    assert "torch eager" in pages["benchmarks/README.md"]
    assert (tmp_path / "docs/benchmark_scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_ahead_is_named_with_what_it_pays(modules: None) -> None:
    from report import ahead, ahead_in_both

    def row(ratio: float, extra_mib: float, error: float) -> dict:
        return {"ratio": ratio, "extra_mib": extra_mib, "random": {"dx_error": error, "dw_error": 0.1}}

    training = {"twinhead torch, speed": row(1.1, 200, 0.1), "twinhead torch, lean": row(1.4, 100, 0.1)}
    training |= {"quick": row(1.0, 300, 0.1), "rough": row(1.1, 50, 0.25), "slow": row(2.0, 150, 0.1)}
    training |= {"failed": {**row(0.5, 10, 0.1), "failed": "OutOfMemoryError"}, "floor": {"ratio": 1.0}}
    shapes = {"shape": {"training": training, "half ignored": {}, "evaluation": {}}}
    assert ahead(shapes) == [
        "training: quick is faster, 1.00 against 1.10 at shape.",
        "training: rough takes fewer MiB, 50 against 100 at shape (at 1.10 in time and 2.5 times the error).",
    ]
    places = (
        f"twinhead torch, {mode} at shape, 1.10 and 50 MiB against {ours} (at 2.5 times the error)"
        for mode, ours in (("speed", "1.10 and 200"), ("lean", "1.40 and 100"))
    )
    assert ahead_in_both(shapes) == [f"training: rough is no slower and takes fewer MiB than {'; '.join(places)}."]


def test_kernels_are_shown_beside_the_vendors_products(modules: None) -> None:
    from report import kernels_table

    vendor = {"logits": 10.0, "dX": 10.0, "dW": 20.0}
    kept = {"project_statistics": 11.0, "input_gradient": 12.0, "weight_gradient": 10.0, "sort": 0.2, "gather": 0.1}
    slabs = kept | {"slab_gradient": 13.0}
    times = {"kept": {"vendor": vendor, "speed": kept}, "slabs": {"vendor": vendor, "speed": slabs}}
    lines = kernels_table({name: {"size": [1, 2, 3], "ms": ms} for name, ms in times.items()}).splitlines()
    assert lines[5:] == [
        "| speed: logits and their statistics | 11.00 (1.100) | 11.00 (1.100) |",
        "| speed: logits again, and their gradient | - | 13.00 (1.300) |",
        "| speed: dX | 12.00 (1.200) | 12.00 (1.200) |",
        "| speed: dW | 10.00 (0.500) | 10.00 (0.500) |",
        "| speed: other kernels | 0.30 | 0.30 |",
    ]


def test_a_kernel_that_overlaps_the_one_before_takes_what_is_left(
    modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four calls, the last two of which count: each of a product for 5 us, and one that begins in its middle."""
    import kernel_times
    from torch.autograd import DeviceType

    def launch(name: str, start: float, end: float) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=DeviceType.CUDA, time_range=time_range)

    calls = [[launch("second", at + 3, at + 9), launch("first", at, at + 5)] for at in (0.0, 20.0, 40.0, 70.0)]
    events = [*itertools.chain(*calls), SimpleNamespace(device_type=DeviceType.CPU)]
    profile = nullcontext(SimpleNamespace(events=lambda: events))
    monkeypatch.setattr(kernel_times.torch.profiler, "profile", lambda activities: profile)
    assert kernel_times.kernel_ms(lambda: None, calls=2) == pytest.approx({"first": 5e-3, "second": 4e-3})


@pytest.mark.parametrize(("name", "pages"), [("h100.json", PAGES), ("h100_loop.json", PAGES[1:])])
def test_pages_say_what_the_committed_results_do(name: str, pages: tuple[str, ...], tmp_path: Path) -> None:
    for page, text in report(RESULTS / name, pages, tmp_path).items():
        assert text == (ROOT / page).read_text(), f"{page}: run benchmarks/report.py benchmarks/results/{name}"


@with_jax
def test_a_small_training_loop_is_timed_in_both_frontends(tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    run_benchmark(
        "loop_step.py", "--device", "cpu", "--rounds", "2", "--skip", "torch compile", "--out", out,
        "--commit", "0123456789", TRITON_INTERPRET="0", **ON_CPU,
    )  # fmt: skip
    rows = json.loads(out.read_text())["loops"]["toy"]["rows"]
    assert {"twinhead torch", "torch eager", "twinhead jax", "twinhead jax, cuda graph", "jax, full logits"} <= {*rows}
    for label, row in rows.items():
        assert "failed" not in row, (label, row)
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert rows["twinhead torch"]["loss_error"] <= 2 * rows["torch eager"]["loss_error"]
    assert rows["twinhead jax"]["loss_error"] <= 2 * rows["jax, full logits"]["loss_error"]  # whose updates round alike


def test_a_loop_whose_gradients_are_wrong_is_not_timed(modules: None) -> None:
    import loop_step
    from problems import make_start

    half = loop_step.torch_loop(lambda *inputs: loop_step.upcast_loss(*inputs) * 0.5 + 3.2)  # at first nearly the same
    right = loop_step.torch_loop(loop_step.upcast_loss)
    rows, loops = loop_step.check(make_start((96, 32, 512), "cpu"), {"half": half, "right": right})
    assert "wrong losses" in rows["half"]["failed"]
    assert [*loops] == ["right"]


@pytest.mark.skipif(not find_spec("transformers"), reason="needs transformers")
def test_a_fine_tuning_step_is_timed_with_and_without_the_fused_loss(tmp_path: Path) -> None:
    out = tmp_path / "finetune.json"
    run_benchmark(
        "finetune_step.py", "--tiny", "--rounds", "2", "--out", out, "--commit", "0123456789", TRITON_INTERPRET="0",
        **ON_CPU,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert (found["device"], found["batch"]) == ("cpu", [2, 64])
    assert {"twinhead", "transformers", "evaluation: twinhead, predictions"} < found["rows"].keys()
    for row in found["rows"].values():
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    # transformers rounds its logits to bf16, where some tie that do not in float32
    assert found["agreement"]["loss_difference"] < 2**-9
    assert found["agreement"]["same_predictions"] > 0.9
