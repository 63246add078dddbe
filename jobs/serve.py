"""Serve the current release over HTTP, with the search page; the next release is taken up when it comes.

    python jobs/serve.py --config jobs/configs/serve.toml --serve.releases-uri s3://bucket/releases \
        --serve.port 8000

SIGTERM or Ctrl-C ends it after the requests under way. `--help` explains every flag.
"""

from dataclasses import dataclass

from namr import config
from namr.serve import process
from namr.serve.process import ServeConfig


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """What this job reads."""

    serve: ServeConfig


def main() -> None:
    """Load the config and serve, saying where."""
    job = config.load(ServeJob, description=__doc__ or "")
    process.serve(job.serve, announce=lambda line: print(line, flush=True))


if __name__ == "__main__":
    config.run(main)
