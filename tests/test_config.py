from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from namr import config
from namr.errors import ConfigError, NamrError


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    data_uri: str
    """where the images are"""
    learning_rate: float = 1e-3
    use_gpu: bool = False
    side: Literal["query", "both"] = "both"
    ks: tuple[int, ...] = (1, 2)
    version: int | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; expected more than 0")


@dataclass(frozen=True, kw_only=True)
class Job:
    stage: StageConfig
    seed: int = 0


def written(folder: Path, text: str) -> list[str]:
    path = folder / "job.toml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    arguments = written(
        tmp_path, 'seed = 3\n[stage]\ndata_uri = "s3://a"\nlearning_rate = 1e-4\nuse_gpu = true\nks = [4]\n'
    )
    job = config.load(Job, [*arguments, "--stage.no-use-gpu", "--seed", "5"])
    assert job == Job(seed=5, stage=StageConfig(data_uri="s3://a", learning_rate=1e-4, ks=(4,)))


def test_resolved_job_as_toml_reads_back_equal(tmp_path: Path) -> None:
    job = Job(seed=2, stage=StageConfig(data_uri='a "b" \\ -c', use_gpu=True, ks=(7, 9), version=None))
    assert config.load(Job, written(tmp_path, config.to_toml(job))) == job


def test_flat_names_are_the_dotted_flags() -> None:
    flat = config.to_flat(Job(stage=StageConfig(data_uri="x")))
    assert flat["stage.learning_rate"] == 1e-3
    assert flat["stage.ks"] == "(1, 2)"
    assert "stage.version" not in flat


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--stage.data-uri", "x", "--stage.lerning-rate", "1"], "Perhaps you meant: --stage.learning-rate"),
        (
            ["--stage.data-uri", "x", "--stage.learning-rate", "fast"],
            "could not convert string to float: 'fast'",
        ),
        (["--stage.data-uri", "x", "--stage.side", "left"], "'query', 'both'"),
        (
            ["--stage.data-uri", "x", "--stage.learning-rate", "-1"],
            "learning_rate is -1.0; expected more than 0",
        ),
        ([], "--stage.data-uri"),
        (["--config"], "lacks its file"),
        (["--config", "/nowhere/job.toml"], "there is no such file"),
    ],
)
def test_a_wrong_flag_is_one_clear_error(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Job, flags)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[stage]\nlearning_rate = ", "can't be read as TOML"),
        ('[stage]\ndata_uri = "x"\nlearnin_rate = 1.0\n', "Perhaps you meant: --stage.learning-rate"),
        ('[stage]\ndata_uri = "x"\nlearning_rate = "fast"\n', "could not convert string to float: 'fast'"),
    ],
)
def test_a_wrong_file_is_one_clear_error_that_names_it(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(Job, written(tmp_path, text))
    assert expected in str(caught.value)
    assert "job.toml" in str(caught.value)


def test_help_lists_the_fields_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        config.load(Job, ["--help"], description="Does a thing.")
    assert stop.value.code == 0
    assert "where the images are" in capsys.readouterr().out


def test_run_turns_our_errors_into_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise NamrError("what, where, what to do")

    with pytest.raises(SystemExit) as stop:
        config.run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "NamrError: what, where, what to do\n"


def test_run_lets_our_own_faults_through() -> None:
    def main() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        config.run(main)


@pytest.mark.parametrize("word", ["a\0b", "\udcff", "\ud800"])
def test_an_argument_that_is_no_text_is_one_clear_error(word: str) -> None:
    for argv in (["--config", word], [f"--config={word}"], ["--name", word]):
        with pytest.raises(ConfigError, match=r"the argument '.*\\\w+.*' is no text; expected UTF-8"):
            config.load(Job, argv)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = " + "{b = " * 5000,
        "a" + ".a" * 2000 + " = 1",
        "a = " + "[" * 900 + "]" * 900,
    ],
    ids=["arrays", "tables", "dots", "fewer"],
)
def test_a_file_that_is_nested_absurdly_deep_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"job\.toml: nested too deep"):
        config.load(Job, ["--config", str(tmp_path / "job.toml")])


def test_what_a_job_prints_of_an_error_has_no_secret_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise ConfigError("cannot reach http://me:s3cret@mlflow")

    with pytest.raises(SystemExit):
        config.run(main)
    assert capsys.readouterr().err == "ConfigError: cannot reach http://***@mlflow\n"


def test_what_is_stored_of_a_job_has_no_password_of_a_uri() -> None:
    @dataclass(frozen=True)
    class Tracked:
        tracking_uri: str

    job = Tracked("http://people:canary@mlflow:5000")
    assert config.to_flat(job) == {"tracking_uri": "http://***@mlflow:5000"}
    assert "canary" not in config.to_toml(job)
