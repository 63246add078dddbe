"""Serve the current release over HTTP, with the search page; the next release is taken up when it comes.

    python jobs/serve.py --config jobs/configs/serve.toml --releases-uri s3://bucket/releases --port 8000

With --release it serves that one for good: what was prepared (jobs/reindex.py --prepare), beside what is
current. SIGTERM or Ctrl-C ends it after the requests under way. `--help` explains every flag.
"""

from namr import config
from namr.serve import process
from namr.serve.process import ServeConfig


def main() -> None:
    """Load the config and serve, saying where."""
    serve_config = config.load(ServeConfig, description=__doc__ or "")
    process.serve(serve_config, announce=lambda line: print(line, flush=True))


if __name__ == "__main__":
    config.run(main)
