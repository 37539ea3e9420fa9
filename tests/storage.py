"""Object storage for tests: an S3 server in this process, if moto and s3fs are installed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[object]:
    """Run a server with an empty bucket "bucket", and give the fsspec file system that reaches it.

    The environment names the server, as it does for users of an S3 that is not Amazon's.
    """
    server_module = pytest.importorskip("moto.server", reason="needs moto, which plays an S3 server")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install 'adaclip-finetune[s3]'")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        yield files
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
