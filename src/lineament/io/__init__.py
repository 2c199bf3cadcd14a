"""Weights and files: shards opened late, headers first, nothing unsafe loaded, everything saved whole or not at all."""

from lineament.io.files import (
    DiskFullError,
    clear_disk_errors,
    digest,
    free_bytes,
    human_bytes,
    need_space,
    read_json,
    replacing,
    write_bytes,
    write_json,
    write_text,
)
from lineament.io.folder import building_folder, partial_path
from lineament.io.header import Entry, Header, read_header
from lineament.io.parts import Parts, digest_of, kept_parts, stamp
from lineament.io.save import parse_bytes, save_sharded, save_tensors
from lineament.io.weights import Weights, check_finite, open_weights

__all__ = [
    "DiskFullError",
    "Entry",
    "Header",
    "Parts",
    "Weights",
    "building_folder",
    "check_finite",
    "clear_disk_errors",
    "digest",
    "digest_of",
    "free_bytes",
    "human_bytes",
    "kept_parts",
    "need_space",
    "open_weights",
    "parse_bytes",
    "partial_path",
    "read_header",
    "read_json",
    "replacing",
    "save_sharded",
    "save_tensors",
    "stamp",
    "write_bytes",
    "write_json",
    "write_text",
]
