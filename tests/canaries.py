"""Looks for secrets in what a chain of jobs left behind: words, files of a folder, objects of a bucket."""

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from infra import services

MLFLOW_PASSWORD = "canary-" + uuid.uuid4().hex
"""In the address that jobs get; the server asks for none and takes any."""


def traces(
    secrets: Mapping[str, str],
    *,
    texts: Mapping[str, str],
    folders: Iterable[Path],
    store: services.ObjectStore,
) -> list[str]:
    """Where one of the secrets stands: "<its name> in <place>" each. Every bucket of the store is read."""
    wanted = {name: secret.encode() for name, secret in secrets.items()}

    def here(place: str, data: bytes) -> list[str]:
        return [f"{name} in {place}" for name, secret in wanted.items() if secret in data]

    places = [trace for name, text in texts.items() for trace in here(name, text.encode())]
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                places += here(str(path), path.read_bytes())
    client = store.client()
    try:
        for bucket in client.list_buckets()["Buckets"]:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"]):
                for listed in page.get("Contents", []):
                    body = client.get_object(Bucket=bucket["Name"], Key=listed["Key"])["Body"].read()
                    places += here(f"s3://{bucket['Name']}/{listed['Key']}", body)
    finally:
        client.close()
    return places
