"""python -m tfjacreg from the command line: the report of sweeps."""

import pytest

from tfjacreg import __main__ as command


@pytest.mark.parametrize("options", [["--limit", "9"], ["--boundary"], ["--attacks", "pgd"]])
def test_a_report_judges_nothing(capsys, options):
    with pytest.raises(SystemExit):
        command.main(["report", "a", *options])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_report_goes_into_the_sweeps_folder_or_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Where there is no results folder, whose benchmarks it would read.
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    toml = 'dataset = "digits"\nrepeats = 2\n[methods.spectral]\n[methods.none]\n'
    (sweep / "sweep.toml").write_text(toml)
    assert command.main(["report", str(sweep)]) == 0
    assert capsys.readouterr().out == f"{sweep}/report/report.html\n"
    assert {p.name for p in (sweep / "report").iterdir()} >= {"report.md", "report.html"}
    assert command.main(["report", str(sweep), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "report.html").is_file()
    missing = ["report", str(sweep), "--benchmarks", str(tmp_path / "none")]
    assert command.main(missing) == 2
    assert "--benchmarks must be a folder" in capsys.readouterr().err
    (sweep / "sweep.toml").unlink()
    assert command.main(["report", str(sweep)]) == 2
    assert "must hold sweep.toml" in capsys.readouterr().err
