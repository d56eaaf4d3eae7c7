"""`tttlm.cli.plot` draws what runs wrote: the right numbers in the right place, and one line for what is wrong."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tttlm.cli.plot import main
from tttlm.errors import InputError
from tttlm.evaluation import curves


def write_run(folder: Path, scale: float = 1.0) -> str:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, 101):
        line = {
            "step": step,
            "loss": scale * 5 / step,
            "tokens_seen": 64 * step,
            "flops": 1e6 * step,
            "seconds": step / 4,
        }
        if step % 10 == 0:
            line |= {f"layer_{n:02d}/drift_{q}": scale * step * n * q for n in range(2) for q in (25, 100)}
        lines.append(line)
        if step % 50 == 0:
            lines.append({"step": step, "validation_loss": scale * 6 / step})
    lines.insert(3, {"step": 3, "fault": "loss nan, gradient norm nan", "batch": 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "lo')
    return str(folder)


@pytest.fixture
def runs(tmp_path) -> tuple[str, str]:
    return write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", 2.0)


def test_every_number_of_several_runs_becomes_a_picture(runs, tmp_path, capsys):
    png = tmp_path / "x.png"
    assert (
        main([*runs, "--of", "loss", "validation_loss", "layer_*/drift_100", "--against", "tokens", "--png", str(png)])
        == 0
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(png)
    assert main([runs[0], "--log"]) == 0
    assert (Path(runs[0]) / "plot.png").exists()


def test_a_series_is_what_was_written_where_it_was_written(runs):
    first, second = curves.read_runs(runs)
    assert (first.label, second.label) == ("a/run", "b/run")
    np.testing.assert_allclose(first.series("loss", "step")[[0, 99]], [[1, 5.0], [100, 0.05]])
    np.testing.assert_allclose(second.series("validation_loss", "tokens"), [[3200, 0.24], [6400, 0.12]])
    np.testing.assert_allclose(first.series("layer_01/drift_25", "seconds")[0], [2.5, 250])


def test_patterns_pick_names_in_the_order_of_their_numbers(runs):
    read = curves.read_runs(runs)
    assert curves.pick_names(read, "layer_00/*") == ["layer_00/drift_25", "layer_00/drift_100"]
    assert curves.pick_names(read, "layer_*/drift_25") == ["layer_00/drift_25", "layer_01/drift_25"]


def test_the_names_there_are_can_be_listed(runs, capsys):
    assert main([runs[0], "--names"]) == 0
    assert capsys.readouterr().out.split() == [
        *("flops", "layer_*/drift_25", "layer_*/drift_100", "loss", "seconds", "tokens_seen", "validation_loss")
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--of", "los"], r"no run has 'los'; there are flops, layer_\*/drift_25, layer_\*/drift_100, loss"),
        (["--png", "no/such/x.png"], "there is no folder no/such"),
        (["no/such/run"], "no/such/run is not a run directory"),
        (["--of"], "--of names at least one metric"),
        (["--names", "--log"], "log = True is not used with --names"),
        (["--png", "x.xyz"], r"'png' must be a file name that ends in \.png, \.pdf or \.svg"),
        (["--against", "hours"], "invalid choice 'hours'"),
    ],
)
def test_bad_input_is_one_line(runs, arguments, says):
    with pytest.raises(InputError, match=says) as caught:
        main([runs[0], *arguments])
    assert "\n" not in str(caught.value)


def test_the_name_of_a_run_may_be_no_utf_8(tmp_path):
    runs = [write_run(tmp_path / os.fsdecode(name)) for name in (b"caf\xe9", b"other")]
    assert main([*runs, "--png", str(tmp_path / "x.png")]) == 0


def test_a_metric_without_a_finite_value_is_one_line(tmp_path):
    lines = ['{"step": 1, "loss": NaN, "huge": 1e308, "²": 1}', '{"step": 2, "loss": Infinity, "huge": -1e308}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("loss", "huge"):
        with pytest.raises(InputError, match=f"no run has a finite value of {name}"):
            main([str(tmp_path), "--of", name])
    assert main([str(tmp_path), "--names"]) == 0


def test_no_run_is_one_line():
    with pytest.raises(InputError, match="name the folders of runs"):
        main([])
