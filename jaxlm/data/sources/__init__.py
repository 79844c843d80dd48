"""Where texts come from: each kind of source gives documents, in units that a stopped preparation goes on at."""

from jaxlm.data.sources.opening import open_source, read_parts

__all__ = ["open_source", "read_parts"]
