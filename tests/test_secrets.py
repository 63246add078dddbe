"""What may be shown, and what is hidden."""

import traceback

import pytest

from namr import secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:s3cret@db/mlflow, http://token@h/x", "postgresql://***@db/mlflow, http://***@h/x"),
        ("s3://AKIA:wJal/K7+x@bucket/key", "s3://***@bucket/key"),
        ("Could not connect to http://u:p@[::1]:9000/a", "Could not connect to http://***@[::1]:9000/a"),
        ("http://host:5000/models/birds@champion", "http://host:5000/models/birds@champion"),
        ("s3://bucket/a@b, models:/birds@champion", "s3://bucket/a@b, models:/birds@champion"),
        ("https://b/k?X-Amz-Signature=0af&x=1", "https://b/k?X-Amz-Signature=***&x=1"),
        ("", ""),
    ],
)  # fmt: skip
def test_users_passwords_and_signatures_of_uris_are_hidden(text: str, shown: str) -> None:
    assert secrets.without_secrets(text) == shown


def test_values_of_the_environment_are_hidden_wherever_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJal/K7+MD")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2!")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    text = "signed with wJal/K7+MD (wJal%2FK7%2BMD), hunter2! said; a test of tests; xhunter2!"
    assert secrets.without_secrets(text) == "signed with *** (***), *** said; a test of tests; xhunter2!"


def raised(cause: str | None, text: str) -> ValueError:
    try:
        try:
            raise KeyError(cause)
        except KeyError as error:
            raise ValueError(text) from error if cause else None
    except ValueError as error:
        return error


def test_an_error_that_tells_a_secret_is_no_cause() -> None:
    for error in (raised("http://me:s3cret@db", "innocent"), raised(None, "http://me:s3cret@db")):
        assert "s3cret" in "".join(traceback.format_exception(error))
        assert secrets.cause_of(error) is None
    grouped = ExceptionGroup("innocent", [raised("http://me:s3cret@db", "innocent"), KeyError("x")])
    assert secrets.cause_of(grouped) is None
    innocent = raised("KeyError", "innocent")
    assert secrets.cause_of(innocent) is innocent
