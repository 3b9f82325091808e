"""The options of the operators as types."""

from typing import Literal

Pooling = Literal["l2", "softmax", "sum", "linear"]
"""How the token weights are computed from the scores."""
Backend = Literal["auto", "triton", "cpu", "aten", "reference"]
"""The backend of an operator; "auto" chooses one."""
Layout = Literal["auto", "channels_last", "channels_first"]
"""Order of the axes of x; "auto" chooses by their number."""
