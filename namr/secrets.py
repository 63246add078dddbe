"""Text as it may be shown: in errors, logs, results and on pages.

What is hidden: user and password of URIs, signatures of signed requests, and the values that the environment
has for keys, passwords, tokens and the webhook, wherever they occur. Not covered: secrets of other names.
"""

import os
import re
import traceback
import urllib.parse

_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "NAMR_NOTIFY_URL",
)
_SHORTEST = 6
"""characters of a value that is looked for: shorter ones are part of innocent words"""
_HIDDEN = "***"
_USER_AND_PASSWORD = re.compile(r"://(?:[^/@\s]*|[^/@:\s]+:(?!\d+/)[^@\s'\"]*)@")
"""A password may have slashes in it, as those of AWS do; a port has not."""
_SIGNED = re.compile(
    r"(?i)\b(x-amz-(?:signature|credential|security-token)|awsaccesskeyid|signature)=[^&\s'\"]+"
)


def without_secrets(text: str) -> str:
    """The text with *** for each secret in it."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST:
            for form in {value, urllib.parse.quote(value, safe=""), urllib.parse.quote(value)}:
                text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", _HIDDEN, text)
    text = _USER_AND_PASSWORD.sub(f"://{_HIDDEN}@", text)
    return _SIGNED.sub(rf"\1={_HIDDEN}", text)


def cause_of(error: BaseException) -> BaseException | None:
    """The error as the cause of another (`raise ... from`); None if it, or what caused it, tells a secret."""
    told = "".join(line for each in _shown_with(error) for line in traceback.format_exception_only(each))
    return error if without_secrets(told) == told else None


def _shown_with(error: BaseException) -> list[BaseException]:
    """The error, and all that a traceback shows with it: what caused it, and what a group holds.

    The lines of code that it shows too are left out: they tell nothing, and take most of the time to find.
    """
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if any(each is other for other in found):
            continue
        found.append(each)
        before = each.__cause__ if each.__suppress_context__ else each.__context__
        waiting += [before] if before else []
        waiting += each.exceptions if isinstance(each, BaseExceptionGroup) else ()
    return found
