"""Passwords and keys in addresses: found, refused, and left out of whatever is shown or recorded.

An address is `scheme://...` anywhere in a text. Its credentials are a password before the host
(`user:password@`; with http and s3 a name alone, which may be a token or a key), and the values of
parameters that are called so (`?access_key=...`).
"""

import re

HIDDEN = "***"
"""What stands where credentials were."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
# A password may hold '/' and '@', as keys of AWS do: it ends at the last '@'. A colon before
# digits and the end of the host is that of a port.
_PASSWORD = re.compile(r"^(\w[\w+.-]*://)(?!\[)[^/?#@:]*:(?!\d{1,5}(?:[/?#]|$)).*@")
_NAME_ALONE = re.compile(r"^((?:https?|s3)://)[^/?#@:]+@", re.I)
_PARAMETER = re.compile(
    r"([?&;](?:[\w.-]*(?:password|passwd|pwd|secret|token|credential|signature|"
    r"access_?key|api_?key|account_?key)[\w.-]*|key|pass|sig|auth|odbc_connect)=)[^&;#]+",
    re.I,
)
_BELONGS = {
    "http": "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, are "
    "for MLflow, RAY_AUTH_TOKEN is for a cluster",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials, are for S3",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS names a file of them",
    "": "environment variables and credential files are for them",
}
"""Where credentials belong, by the scheme of an address."""
_DATABASES = ("postgresql", "mysql", "mssql")
_IN_ENVIRONMENT = "MLFLOW_TRACKING_URI may hold the whole address of a database, password included"


def redacted(text: str) -> str:
    """The text with `***` for all credentials in its addresses."""
    return _ADDRESS.sub(lambda found: _without_credentials(found[0]), text)


def refusal(where: str, text: str) -> str | None:
    """The line that refuses the setting `where` because its text holds credentials, which it does
    not repeat; None if there are none."""
    if redacted(text) == text:
        return None
    found = next(each for each in _ADDRESS.findall(text) if redacted(each) != each)
    scheme = found.partition(":")[0].partition("+")[0].lower()
    if scheme in _DATABASES:
        instead = _IN_ENVIRONMENT
    else:
        instead = _BELONGS.get(scheme.replace("https", "http"), _BELONGS[""])
    return f"{where}: holds credentials, which would be shown and recorded: {instead}"


def _without_credentials(address: str) -> str:
    hidden = _PASSWORD.sub(rf"\g<1>{HIDDEN}@", address)
    hidden = _NAME_ALONE.sub(rf"\g<1>{HIDDEN}@", hidden)
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", hidden)
