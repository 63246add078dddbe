"""Objects on an S3 server, with the two conditional writes as conditional puts.

Credentials and endpoint come from the environment alone (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_ENDPOINT_URL, AWS_REGION or whatever else botocore knows), so they are never in a config or a log. Errors
are those of s3fs: `storage` explains them.
"""

import errno
import functools
import os
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec.asyn
import s3fs

from namr.errors import ConfigError
from namr.store import ranged_gets
from namr.store.ranged_gets import RangedGets

PREFIX = "s3://"
_PART_BYTES = 64 << 20


class Buckets:
    """The store whose URIs are s3://bucket/key."""

    @functools.lru_cache(maxsize=2)  # noqa: B019  one instance of this class lives as long as the process
    def _filesystem_of(self, pid: int) -> s3fs.S3FileSystem:  # noqa: ARG002  a fork must not share connections
        return s3fs.S3FileSystem(
            skip_instance_cache=True,
            use_listings_cache=False,
            default_block_size=8 << 20,
            config_kwargs={
                "retries": {"mode": "standard", "max_attempts": 5},
                "connect_timeout": 10,
                "read_timeout": 60,
                "max_pool_connections": 64,
            },
        )

    def filesystem(self) -> s3fs.S3FileSystem:
        return self._filesystem_of(os.getpid())

    def read(self, uri: str) -> bytes:
        return cast(bytes, self.filesystem().cat_file(uri))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _ranged_gets_of(self, pid: int) -> RangedGets:
        filesystem = self._filesystem_of(pid)
        return RangedGets(lambda uri: cast(str, filesystem.url(uri, expires=ranged_gets.SIGNED_FOR_S)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        parts = self._ranged_gets_of(os.getpid()).read(ranges)
        left = [place for place, part in enumerate(parts) if part is None]
        if left:
            uris, starts, stops = zip(*(ranges[place] for place in left), strict=True)
            read = self.filesystem().cat_ranges(
                list(uris), list(starts), list(stops), on_error="raise", batch_size=64
            )
            for place, part in zip(left, read, strict=True):
                parts[place] = part
        return cast(list[bytes], parts)

    def open_stream(self, uri: str) -> BinaryIO:
        return cast(BinaryIO, self.filesystem().open(uri, "rb", cache_type="readahead"))

    def write(self, uri: str, data: bytes) -> None:
        self._put(uri, data)

    def write_if_absent(self, uri: str, data: bytes) -> bool:
        return self._put_if(uri, data, IfNoneMatch="*")

    def upload(self, path: Path, uri: str) -> None:
        self.filesystem().put_file(str(path), uri, chunksize=_PART_BYTES)

    def upload_if_absent(self, path: Path, uri: str) -> bool:
        try:
            self.filesystem().put_file(str(path), uri, chunksize=_PART_BYTES, mode="create")
        except OSError as error:
            if _precondition_failed(error) or self._exists(uri):
                return False
            raise
        return True

    def move_if_absent(self, path: Path, uri: str) -> bool:
        return self.upload_if_absent(path, uri)

    def download(self, uri: str, path: Path) -> None:
        self.filesystem().get_file(uri, str(path))

    def read_with_etag(self, uri: str) -> tuple[bytes, str]:
        bucket, key = _split(uri)
        loop = self.filesystem().loop
        return cast(tuple[bytes, str], fsspec.asyn.sync(loop, self._get_with_etag, bucket, key))

    def read_with_state(self, uri: str) -> tuple[bytes, str]:
        return self.read_with_etag(uri)

    def state(self, uri: str) -> str:
        return str(self.filesystem().info(uri)["ETag"])

    async def _get_with_etag(self, bucket: str, key: str) -> tuple[bytes, str]:
        filesystem = self.filesystem()

        async def get() -> tuple[bytes, str]:
            answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
            async with answer["Body"] as body:
                return await body.read(), answer["ETag"]

        # a connection that ends inside the body is tried again, as it is by cat_file
        return cast(tuple[bytes, str], await s3fs.core._error_wrapper(get, retries=filesystem.retries))

    def replace_if_match(self, uri: str, data: bytes, etag: str | None) -> bool:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        return self._put_if(uri, data, **condition)

    def size(self, uri: str) -> int:
        described = self.filesystem().info(uri)
        if described["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "is a folder, not an object", uri)
        return int(described["size"])

    def list_entries(self, uri: str) -> list[tuple[str, int, float]]:
        root = uri.removeprefix(PREFIX).rstrip("/") + "/"
        found = self.filesystem().find(root, refresh=True, detail=True)
        return [
            (name.removeprefix(root), int(of["size"]), of["LastModified"].timestamp())
            for name, of in found.items()
        ]

    def now(self, uri: str) -> float:
        answer = self.check_bucket(uri)
        return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()

    def clear_leftovers(self, uri: str, before: float) -> int:
        bucket, _, prefix = uri.removeprefix(PREFIX).partition("/")
        asked, num = {"Bucket": bucket, "Prefix": f"{prefix}/".lstrip("/")}, 0
        while True:
            page = self.filesystem().call_s3("list_multipart_uploads", **asked)
            for upload in page.get("Uploads", ()):
                if upload["Initiated"].timestamp() < before:
                    named = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self.filesystem().call_s3("abort_multipart_upload", **named)
                    num += 1
            if not page.get("IsTruncated"):
                return num
            asked |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def delete(self, uri: str) -> None:
        bucket, key = _split(uri)
        self.filesystem().call_s3("delete_object", Bucket=bucket, Key=key)

    def check_bucket(self, uri: str) -> dict[str, Any]:
        """Some servers create a bucket at the first put: a typo has to fail all the same."""
        bucket = uri.removeprefix(PREFIX).partition("/")[0]
        return cast(dict[str, Any], self.filesystem().call_s3("head_bucket", Bucket=bucket))

    def _exists(self, uri: str) -> bool:
        return bool(self.filesystem().exists(uri))

    def _put(self, uri: str, data: bytes, **condition: str) -> None:
        bucket, key = _split(uri)
        self.filesystem().call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)

    def _put_if(self, uri: str, data: bytes, **condition: str) -> bool:
        try:
            self._put(uri, data, **condition)
        except OSError as error:
            if _precondition_failed(error):
                return False
            raise
        return True


def error_code(error: OSError) -> str:
    """The S3 error code under an OSError of s3fs, or ""."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _precondition_failed(error: OSError) -> bool:
    """A conditional put that lost is answered 412, 409 (two at once) or 404 (If-Match of nothing)."""
    codes = ("PreconditionFailed", "412", "ConditionalRequestConflict", "NoSuchKey")
    return isinstance(error, FileExistsError) or error_code(error) in codes


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(PREFIX).partition("/")
    if not bucket or not key:
        raise ConfigError(f"{uri!r} names no object; expected s3://bucket/key")
    return bucket, key
