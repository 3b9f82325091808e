"""The options of the operators as types."""

from typing import Literal

Pooling = Literal["l2", "softmax", "sum", "linear"]
"""How the scores become the weights of the tokens."""
Backend = Literal["auto", "triton", "cpu", "aten", "reference"]
"""What computes an operator; "auto" chooses."""
Layout = Literal["auto", "channels_last", "channels_first"]
"""Order of the axes of x; "auto" decides by their number."""
