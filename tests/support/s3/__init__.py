"""A small S3 object store on the loopback address, with faults on demand."""

from tests.support.s3.faults import Body, Cut, Fault, Reset, Stall, Status
from tests.support.s3.server import ACCESS_KEY, BUCKET, SECRET_KEY, STORE, S3Server

__all__ = [
    "ACCESS_KEY",
    "BUCKET",
    "SECRET_KEY",
    "STORE",
    "Body",
    "Cut",
    "Fault",
    "Reset",
    "S3Server",
    "Stall",
    "Status",
]
