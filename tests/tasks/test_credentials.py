"""What of an address is secret, and what only looks like it."""

from __future__ import annotations

import pytest

from tasks.credentials import redacted, refusal
from tasks.errors import ReportedError, first_line

SECRET = {
    "postgresql://u:PW@h:5432/db": "postgresql://***@h:5432/db",
    "postgresql+psycopg2://u:P/W@x@h/db": "postgresql+psycopg2://***@h/db",
    "s3://KEY:PW/WP+=@bucket/runs?region=x": "s3://***@bucket/runs?region=x",
    "s3://PW@bucket": "s3://***@bucket",
    "https://PW@h:5000/": "https://***@h:5000/",
    "http://u:1234@h:5000": "http://***@h:5000",
    "redis://:PW@h": "redis://***@h",
    "s3://b/p?access_key=PW&secret_key=PW&region=x": "s3://b/p?access_key=***&secret_key=***&region=x",
    "https://h/x?X-Amz-Signature=PW#top": "https://h/x?X-Amz-Signature=***#top",
    "mysql://u@h/db?ssl_key=/k&sslpassword=PW": "mysql://u@h/db?ssl_key=/k&sslpassword=***",
    "mssql+pyodbc:///?odbc_connect=PWD%3DPW": "mssql+pyodbc:///?odbc_connect=***",
    "cannot reach 'mysql://u:PW@h': no": "cannot reach 'mysql://***@h': no",
    "two: http://u:PW@a/ http://u:PW@b/": "two: http://***@a/ http://***@b/",
}
HARMLESS = (
    "sqlite:////home/me@work/a:b@c.db",
    "http://h:5000/x@y",
    "http://[::1]:5000/a@b",
    "hdfs://me@h/x",
    "abfs://container@account.dfs.core.windows.net/x",
    "s3://bucket/p@q?region=eu&scheme=http&endpoint_override=localhost:9000",
    "postgresql://u@h/db?sslkey=/home/me/key",
    "me@example.org: see s3://bucket",
    "postgresql://***@h/db?password=***",
)


@pytest.mark.parametrize("text", SECRET)
def test_credentials_are_found(text: str) -> None:
    assert redacted(text) == SECRET[text]
    assert redacted(SECRET[text]) == SECRET[text]
    said = refusal("tracking.uri", text)
    assert said is not None
    assert said.startswith("tracking.uri: holds credentials")
    assert not {"PW", "1234"} & set(said.replace(":", " ").split())


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_credentials(text: str) -> None:
    assert redacted(text) == text
    assert refusal("tracking.uri", text) is None


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("https://u:PW@h", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("postgresql+psycopg2://u:PW@h", "MLFLOW_TRACKING_URI may hold the whole address"),
        ("s3://K:PW@b", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("gs://b?token=PW", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("ray://u:PW@h", "environment variables"),
    ],
)
def test_the_refusal_says_where_they_belong(address: str, instead: str) -> None:
    assert instead in str(refusal("x", address))


def test_no_error_says_them() -> None:
    assert str(ReportedError("s3://K:PW@b is away")) == "s3://***@b is away"
    assert first_line(OSError("x" * 280 + " mysql://u:SECRET@h/db")).count("SECRET") == 0
