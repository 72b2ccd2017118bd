"""The outputs made from measurements: files, tables, targets, pictures, and figures in the READMEs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import readme, table, targets
from bench.attention import PINNED
from bench.contestants import COMPILED, OURS, REFERENCE
from bench.generate import NO_CACHE, PACKED, PLAIN
from bench.plot import SHOWN, draw, results_in, speed_figure, speed_svg
from bench.record import FORMULAS, Report, load
from bench.targets import Target, judge
from gpt.errors import InputError
from kernels.registry import SPECS
from tests.bench.reports import invented, measured, models

REPORT = invented("causal_attention", "decode_attention", "layer_norm")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    REPORT.save(path)
    return path


def test_a_report_is_read_back_unchanged(saved: Path) -> None:
    """A field that is lost, or gets another type, when a report is written and read."""
    assert load(saved) == REPORT
    assert json.loads(saved.read_text("utf-8"))["formulas"] == FORMULAS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format is 99, expected 1"),
        (lambda d: d.pop("machine"), "machine is missing"),
        (lambda d: d.update(extra=1), "extra is unknown"),
        (lambda d: d["rows"][0].update(seconds="fast"), "seconds is 'fast', expected float or NoneType"),
        (lambda d: d["rows"][0].update(samples=True), "samples is True, expected int or NoneType"),
        (lambda d: d["rows"][0].pop("op"), "op is missing"),
        (lambda d: d["rows"][0].update(status="fine"), "status is 'fine'"),
        (lambda d: d["rows"][0].update(direction="sideways"), "direction is 'sideways'"),
        (lambda d: d["rows"][0].update(status="wrong"), "is wrong, with seconds"),
        (lambda d: d.update(rows={}), "rows is {}"),
        (lambda d: d.update(machine=3), "machine: is int"),
    ],
)
def test_a_malformed_report_is_refused(saved: Path, change: Any, message: str) -> None:
    """A file that is not a report, or that has a time for a wrong kernel, is accepted."""
    content = json.loads(saved.read_text("utf-8"))
    change(content)
    saved.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        load(saved)


def test_derived_figures() -> None:
    """A rate in the wrong unit, or over the wrong time."""
    row = measured(
        "op",
        "B1",
        "both",
        contestant=OURS,
        seconds=0.002,
        flops=4 * 10**12,
        bytes=6 * 10**9,
        tokens=100,
        limit=0.001,
    )
    assert (row.tflops, row.gbps, row.tokens_per_second, row.share) == (2000, 3000, 50_000, 0.5)
    assert replace(row, seconds=None).share is None
    assert [table.duration(s) for s in (1.5, 0.0123, 4.2e-5, 3e-9)] == [
        "1.50 s",
        "12.3 ms",
        "42.0 µs",
        "3.00 ns",
    ]
    assert [table.seconds(t) for t in ("8m", "90s", "1.5h", "7", "soon", "-3s")] == [
        480,
        90,
        5400,
        7,
        None,
        None,
    ]


def test_the_table_shows_every_contestant() -> None:
    """A contestant missing from the table, an inverted ratio, or a refusal without its reason."""
    rows = [row for row in REPORT.rows if row.op == "causal_attention"][:21]
    rows.append(
        replace(rows[0], contestant="bad", status="wrong", seconds=None, reason="dq: FAILED max 9.00")
    )
    rows.append(replace(rows[0], contestant="silent", status="failed", seconds=None))
    text = table.race(rows)
    assert "  silent: FAILED" in text
    assert text.index("forward + backward") < text.index("\n forward\n") < text.index("\n backward\n")
    slow = next(line for line in text.splitlines() if "SDPA math" in line)
    assert re.search(r"\b9\.00\b", slow)
    assert "bad: WRONG result, not timed: dq: FAILED max 9.00" in text
    marked = table.race([replace(rows[0], error=3.0)])
    assert "3.00 !" in marked
    assert f"× {OURS}" in text
    absent = [replace(rows[0], contestant=name, status="absent", reason="none") for name in ("x", "y", "x")]
    without = table.race([*absent, *(row for row in rows if row.contestant != OURS)])
    assert f"× {REFERENCE}" in without
    assert "\n  x · y: none\n" in without


def test_targets_name_existing_ops_and_contestants() -> None:
    """A target that can never be measured, because no bench has its op, case, contestant or metric."""
    known = {
        REFERENCE,
        COMPILED,
        PLAIN,
        NO_CACHE,
        OURS,
        *PACKED,
        "nanoGPT",
        "transformers",
        "liger-kernel",
        "whole logits",
        "whole logits, compiled",
        "whole logits, padded, compiled",
        *PINNED,
    }
    for target in targets.load():
        assert target.metric in ("speedup", "share", "memory", "tokens_per_second")
        assert (target.at_least is None) != (target.at_most is None)
        assert {*target.against, target.contestant} <= known
        assert bool(target.against) == (target.metric in ("speedup", "memory"))
        if target.op in SPECS:
            assert any(target.names(target.op, case.id) for case in SPECS[target.op].tagged("bench")), (
                target.name
            )
        else:
            assert target.op in ("train", "generate")


def test_targets_are_judged_by_their_worst_case() -> None:
    """A target counted as met on average, against the slower baseline, or by a CPU's figures."""
    forward = Target(
        "f", "causal_attention", "forward", "speedup", {"D": 64}, ["SDPA flash", "SDPA cudnn"], at_least=1.05
    )
    outcome = judge(forward, REPORT)
    assert outcome.status == "met"
    assert outcome.value == pytest.approx(1.1)
    assert judge(replace(forward, at_least=1.15), REPORT).status == "missed"
    slow = Report(**{**vars(REPORT), "rows": list(REPORT.rows)})
    at = next(
        i
        for i, r in enumerate(slow.rows)
        if r.direction == "forward" and r.contestant == OURS and "Tq4096-Tk4096-D64" in r.case
    )
    slow.rows[at] = replace(slow.rows[at], seconds=2 * (slow.rows[at].seconds or 0))
    worst = judge(forward, slow)
    assert (worst.status, worst.case) == ("missed", slow.rows[at].case)
    assert judge(forward, invented("causal_attention", kind="cpu")).status == "not measured"
    assert judge(replace(forward, sizes={"D": 48}), REPORT).status == "not measured"
    assert judge(replace(forward, against=["nobody"]), REPORT).status == "not measured"
    memory = Target("m", "layer_norm", "both", "memory", {}, ["SDPA math", "reference"], at_most=0.75)
    assert judge(memory, REPORT).status == "missed"
    assert judge(replace(memory, at_most=0.77), REPORT).status == "met"
    assert judge(Target("s", "layer_norm", "both", "share", at_least=0.5), REPORT).status == "met"


def test_the_markdown_is_complete(tmp_path: Path) -> None:
    """A report without its machine, notes, targets or formulas, or that hides that it is incomplete."""
    report = Report(
        **{
            **vars(REPORT),
            "complete": False,
            "notes": ["the machine is too noisy"],
            "ceilings": {"copy": 4e12},
        }
    )
    outcomes = [judge(target, report) for target in targets.load()]
    text = table.markdown(report, outcomes, ["report.png"])
    for part in (
        "incomplete: the run was stopped",
        "Invented GPU",
        "too noisy",
        "copy 4,000 GB/s",
        "missed",
        "not measured",
        "](report.png)",
    ):
        assert part in text
    assert all(formula in text for formula in FORMULAS.values())


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """A picture without bars, or a picture of an empty report."""
    from matplotlib.image import imread

    path = tmp_path / "deep" / "report.png"
    assert draw(REPORT, path)
    image = imread(path)
    assert min(image.shape[:2]) > 500
    green = (abs(image[..., :3] - [0x0B / 255, 0x6E / 255, 0x4F / 255]) < 0.02).all(-1)
    assert green.mean() > 0.005
    assert not draw(Report("empty", REPORT.machine), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_picture_of_the_summary_shows_the_results(tmp_path: Path) -> None:
    """A bar that is not the ratio of two measured times, or a contestant that is left out."""
    for report in (*readme.results().values(), whole("NVIDIA H200", "2030-01-02")):
        shown = readme.headlines({tmp_path: report})
        assert shown is not None
        expected, texts = [], [f"{report.machine.device}, {report.machine.date[:10]}"]
        for rows in shown[1]:
            ours = next(row.seconds for row in rows if row.contestant == OURS)
            times = sorted(row.seconds for row in rows if row.contestant != OURS)
            fastest = [seconds / ours for seconds in times[:SHOWN]]
            expected += fastest
            texts += [f"{rows[0].op} {rows[0].case} {rows[0].dtype}", *(f"{ratio:.2f}" for ratio in fastest)]
        (axes,) = speed_figure(*shown).axes
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert ends == pytest.approx(expected)
        svg = speed_svg(*shown)
        assert sorted(results_in(svg)) == sorted(texts)
        assert speed_svg(*shown) == svg


def test_the_readmes_are_up_to_date() -> None:
    """A figure in a README that differs from bench/results/; `python -m bench.readme` updates it."""
    for path in readme.FILES:
        text = path.read_text("utf-8")
        assert readme.rewritten(text, path.parent, readme.results()) == text, path.name
    assert "<!-- bench:" in readme.FILES[1].read_text("utf-8")
    shown = readme.headlines(readme.results())
    assert shown is not None
    assert results_in(readme.PICTURE.read_text("utf-8")) == results_in(speed_svg(*shown))


def test_blocks_are_rewritten(tmp_path: Path) -> None:
    """An old figure kept in a block, changed text around it, or a wrong path to a picture."""
    at = tmp_path / "bench" / "results" / "gpu"
    at.mkdir(parents=True)
    (at / "attention.png").touch()
    text = "a\n<!-- bench:NAME -->\nold 9.99\n<!-- /bench:NAME -->\nb"
    fresh = {
        name: readme.rewritten(text.replace("NAME", name), tmp_path, {at: REPORT}) for name in readme.BLOCKS
    }
    for name, rewritten in fresh.items():
        assert rewritten.startswith(f"a\n<!-- bench:{name} -->\n")
        assert rewritten.endswith(f"\n<!-- /bench:{name} -->\nb")
        assert "9.99" not in rewritten
        assert readme.rewritten(rewritten, tmp_path, {at: REPORT}) == rewritten
    assert "(bench/results/gpu/attention.png)" in fresh["pictures"]
    assert "| causal_attention | B64-H12-Tq1024-Tk1024-D64 bf16 |" in fresh["speed"]
    assert "| SDPA cudnn 1.10 · torch.compile 1.15 · " in fresh["speed"]
    assert readme.NO_GPU not in fresh["speed"]
    assert readme.NO_GPU in readme.rewritten(text.replace("NAME", "speed"), tmp_path, {})
    with pytest.raises(InputError, match="nearest valid one is 'bench:speed'"):
        readme.rewritten(text.replace("NAME", "sped"), tmp_path, {})
    with pytest.raises(InputError, match="has no end"):
        readme.rewritten("<!-- bench:speed -->\n", tmp_path, {})


def whole(name: str, date: str) -> Report:
    """An invented report as `python -m bench` writes it on a GPU."""
    report = invented(*SPECS)
    machine = replace(report.machine, device=name, date=date)
    return replace(report, title="python -m bench", machine=machine, rows=report.rows + models())


def test_a_gpu_fits_into_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary that makes the README too long, or has no line for an op or no machine."""
    kept = readme.results()
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "bench" / "results")
    for at, report in kept.items():
        report.save(readme.RESULTS / at.name / "report.json")
    for name, date in (("NVIDIA H100 80GB HBM3", "2030-01-01"), ("NVIDIA H200", "2030-01-02")):
        at = readme.RESULTS / name.split()[1].lower()
        whole(name, date).save(at / "report.json")
        (at / "report.png").touch()
    text = readme.FILES[0].read_text("utf-8")
    fresh = readme.rewritten(text, tmp_path, readme.results())
    assert len(fresh.splitlines()) <= 130
    (block,) = (match[0] for match in readme.BLOCK.finditer(fresh))
    assert len(block.splitlines()) <= 20
    rows = [line.removeprefix("| ").split(" | ") for line in block.splitlines() if line.startswith("| ")]
    shown = [op for op, spec in SPECS.items() if spec.family != "decode"]
    assert [row[0] for row in rows] == ["op", *shown, "train", "generate"]
    assert "torch.compile 1.15 · SDPA flash 1.25 · reference 1.30" in block
    assert "| train | 12x768-V50257-B64-T1024 bf16 | 655,360 tokens/s | plain PyTorch 1.20 |" in block
    assert "\nNVIDIA H200 (sm_90" in block
    assert "H100" not in block
    assert readme.NO_GPU not in block
    everything = readme.rewritten(readme.FILES[1].read_text("utf-8"), tmp_path / "bench", readme.results())
    for text in (
        "H100 80GB HBM3",
        "H200",
        "B64-T128-new128",
        "```sh\npython -m bench\n```",
        "decoding at batch 1, tokens/s",
    ):
        assert text in everything
    assert everything.count("| layer_norm |") == 2 * len(SPECS["layer_norm"].tagged("bench"))


def test_the_gpus_time_alone_has_a_column() -> None:
    """Kernels called slow because the host is; a graph's time of one contestant over another's with gaps."""
    row = measured("layer_norm", "N65536-C768", "backward", limit=8e-5)
    ours = replace(row, contestant=OURS, seconds=8e-4, graph_seconds=1e-4)
    other = replace(row, contestant="torch.compile", seconds=6e-4)
    liger = replace(row, contestant="liger-kernel", seconds=7e-4, graph_seconds=3e-4)
    report = replace(invented(), rows=[ours, other, liger])
    assert (
        readme._table([report.rows])
        .splitlines()[2]
        .endswith("| torch.compile 0.75 · liger-kernel 0.88 | liger-kernel 3.00 |")
    )
    sizes: Any = {"op": "layer_norm", "direction": "backward"}
    share = judge(Target("share", metric="share", at_least=0.8, **sizes), report)
    assert (share.status, share.value, share.alone) == ("missed", pytest.approx(0.1), pytest.approx(0.8))
    peers = ["torch.compile", "liger-kernel"]
    outcome = judge(Target("speed", metric="speedup", at_least=1, against=peers, **sizes), report)
    assert (outcome.value, outcome.alone) == (pytest.approx(0.75), pytest.approx(3))
    assert "GPU alone" in table.outcomes([share])
    assert "GPU alone" not in table.outcomes([replace(share, alone=None)])


def test_the_later_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contestants of two runs compared in one line; an older figure instead of a newer one."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    old, new = whole("GPU", "2030-01-01"), whole("GPU", "2030-01-02")
    new.machine = replace(new.machine, commit="b2")
    new.rows = [replace(row, seconds=2 * (row.seconds or 0)) for row in new.rows if row.op == "train"]
    for names in (("a", "b"), ("b", "a")):
        for name, report in zip(names, (old, new), strict=True):
            report.save(tmp_path / "gpu" / f"{name}.json")
        (report,) = readme.results().values()
        assert [row.seconds for row in report.rows if row.op == "train"] == [0.2, 0.24]
        assert len(report.rows) == len(old.rows)
        assert (report.machine.commit, report.machine.date) == (f"{old.machine.commit}, b2", "2030-01-02")


def test_reports_in_one_folder_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in bench/results/ missing from the READMEs, or a CPU's report taken for a GPU's."""
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    for op in ("causal_attention", "layer_norm"):
        report = invented(op, kind="cpu")
        report.title = f"bench {op} --json {op}.json"
        report.save(tmp_path / "cpu" / f"{op}.json")
    (report,) = readme.results().values()
    assert {row.op for row in report.rows} == {"causal_attention", "layer_norm"}
    block = readme.rewritten("<!-- bench:speed -->\n<!-- /bench:speed -->", tmp_path, readme.results())
    assert readme.NO_GPU in block
    assert "```sh\nbench causal_attention\nbench layer_norm\n```\n\nInvented GPU" in block
